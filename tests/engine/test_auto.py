"""execution="auto"."""

from __future__ import annotations

import copy
import random
import re
import threading
import time
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import Ema, cpus, make_optimizer, make_step, rehearsal
from fastdml.engine.auto import CudaAutoStep
from fastdml.engine.eager import EagerStep
from fastdml.errors import InputError
from fastdml.loss import MutualLoss

CPU = torch.device("cpu")


class SlowStep:
    """A step that takes some milliseconds more and can do without a device."""

    def __init__(self, name, step, seconds, failure=None):
        self.name, self.step, self.seconds, self.failure = name, step, seconds, failure
        self.tensors, self.loss, self.cohort = step.tensors, step.loss, step.cohort

    def __call__(self, *batch):
        self.loss.kl_weight = torch.tensor(1.0)
        time.sleep(self.seconds)
        return self.step(*batch)

    def release(self):
        """Nothing was done to the peers."""


def setting():
    torch.manual_seed(0)
    peers = [nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)) for _ in range(2)]
    cohort = Cohort(peers, 3)
    optimizer = make_optimizer(cohort, "adam", lr=0.1)
    step = make_step(cohort, MutualLoss(), optimizer, amp="off", execution="eager")
    return cohort, step, (torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1]))


def test_the_fastest_is_kept_and_measuring_leaves_no_trace(capsys, monkeypatch):
    cohort, inner, batch = setting()
    made = []

    def make(name):
        made.append(name)
        if name == "stacked":
            raise InputError("different layers")
        failure = "cannot be captured" if name == "graph" else None
        return SlowStep(name, inner, {"eager": 0.02, "streams": 0.005, "graph": 0.0}[name], failure)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    step = CudaAutoStep(["eager", "streams", "graph", "stacked"], make, CPU)
    with pytest.raises(AttributeError, match="chosen at the first step"):
        _ = step.name
    before, rng = copy.deepcopy(cohort.state_dict()), torch.get_rng_state()
    step._measure(batch)
    assert inner.loss.kl_weight == 1
    assert type(inner.loss.kl_weight) is float
    made.clear()
    capsys.readouterr()
    step(*batch)
    after = copy.deepcopy(cohort.state_dict())
    assert made == ["eager", "streams", "stacked", "graph"]  # stacking moves the weights
    assert step.name == "streams"
    line = capsys.readouterr().err
    assert line.startswith("execution: streams (ms a step: eager ")
    assert line.count("\n") == 1
    assert "stacked" not in line
    assert "graph" not in line  # it fell back
    cohort.load_state_dict(before)
    torch.set_rng_state(rng)
    other, again, _ = setting()
    torch.set_rng_state(rng)
    again(*batch)
    for key, value in other.state_dict().items():
        assert torch.equal(value, after[key])
    step(*batch)
    assert made[4:] == []


def test_a_candidate_is_gone_before_the_next_is_measured(monkeypatch):
    """A graph keeps the memory of a step: only the best so far may hold it."""
    _, inner, batch = setting()
    alive = weakref.WeakSet()

    def make(name):
        seconds = {"eager": 0.004, "streams": 0.02, "stacked": 0.0, "graph": 0.01}[name]
        assert {step.name for step in alive} <= {"eager", "stacked"}
        step = SlowStep(name, inner, seconds)
        alive.add(step)
        return step

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    step = CudaAutoStep(["eager", "streams", "graph", "stacked"], make, CPU)
    step(*batch)
    assert {step.name for step in alive} == {"stacked"} == {step.name}


@pytest.mark.parametrize("fastest", ["eager", "stacked", "graph"])
def test_peers_stay_stacked_where_that_is_chosen_alone(monkeypatch, capsys, fastest):
    """Else they have their weights to themselves again; and so they have when a hook comes."""
    cohort, eager, batch = setting()
    memory = [w.untyped_storage().nbytes() for w in cohort.parameters()]

    def make(name):
        if name == "stacked":
            options = {"execution": name, "amp": "off"}
            step = make_step(cohort, MutualLoss(), eager.optimizer, **options)
        else:
            step = SlowStep(name, eager, 0.0)
        taken.append(name)
        return step

    seconds = {"eager": 3, "streams": 3, "stacked": 2, "graph": 3, fastest: 1}
    taken = []
    monkeypatch.setattr(
        CudaAutoStep, "_seconds", lambda self, step, batch: step(*batch) and seconds[step.name]
    )
    step = CudaAutoStep(["eager", "streams", "graph", "stacked"], make, CPU)
    step(*batch)
    assert step.name == fastest
    assert len(taken) == 4
    stacked = [w.untyped_storage().nbytes() for w in cohort.parameters()]
    assert (stacked == memory) == (fastest != "stacked")
    capsys.readouterr()
    calls = []
    cohort.peers[0][0].register_forward_hook(lambda *_: calls.append(1))
    step(*batch)
    assert calls
    assert [w.untyped_storage().nbytes() for w in cohort.parameters()] == memory
    line = capsys.readouterr().err
    assert (
        line == ""
        if fastest != "stacked"
        else "; not stacked: does not know a module with hooks (0)" in line
    )
    assert line.count("\n") <= 1


def test_an_optimizer_that_counts_on_the_host_is_not_measured(capsys):
    """What steps leave in Python numbers could not be restored."""
    cohort, _, batch = setting()
    kind = type("FusedSGD", (torch.optim.SGD,), {"__module__": "apex.optimizers.fused_sgd"})
    optimizer = kind(cohort.parameters(), 0.5)
    step = make_step(cohort, MutualLoss(), optimizer, amp="off")
    assert type(step) is EagerStep
    assert capsys.readouterr().err == "execution: eager (FusedSGD counts on the host)\n"
    step(*batch)


def test_a_mistake_that_stops_every_candidate_is_told(capsys):
    def make(name):
        raise InputError(f"{name} is wrong")

    step = CudaAutoStep(["eager", "graph"], make, CPU)
    with pytest.raises(InputError, match="eager is wrong"):
        step(torch.zeros(1))
    assert capsys.readouterr().err == ""


class TestOnACpu:
    @pytest.fixture(autouse=True)
    def _two_cores(self, monkeypatch):
        monkeypatch.setattr(cpus.host, "cpus", lambda: 2)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with cpus.threads(2):
            yield

    @pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
    @pytest.mark.parametrize(
        ("name", "threads"),
        [("eager", 1), ("eager", 2), ("threads", 2), ("stacked", 1), ("stacked", 2)],
    )
    def test_measuring_leaves_no_trace(self, take, capsys, name, threads, amp):
        """The chosen step trains as if it had been named, and nobody's state dict has grown."""
        take(name, threads)
        auto, named = make_run(amp), make_run(amp, execution=name, threads=threads)
        for x, y in batches(3):
            assert torch.equal(auto.step(x, y).losses, named.step(x, y).losses)
        assert (auto.step.name, auto.step.choice.threads) == (name, threads)
        assert auto.same_as(named)
        if name != "stacked":
            sizes = [t.untyped_storage().nbytes() - t.nbytes for t in auto.cohort.parameters()]
            assert sizes == [0] * len(sizes)
        line = capsys.readouterr().err
        assert line.startswith(f"execution: {name}, {threads} thread{'s' * (threads - 1)} (ms a ")
        assert line.count("\n") == 1
        for candidate in ("eager on 1", "eager on 2", "threads on 2", "stacked on 1"):
            assert candidate in line

    def test_what_peers_draw_goes_on_where_it_was(self, take):
        """By torch, numpy and Python; hidden state of a peer stays as well."""

        class Draws(Cnn):
            calls = 0

            def forward(self, x):
                self.calls += 1
                noise = torch.rand(()) + random.random() + np.random.rand()
                return super().forward(F.dropout(x, 0.1) * noise)

        take("eager", 1)
        runs = []
        for options in ({}, {"execution": "eager"}):
            torch.manual_seed(1), random.seed(1), np.random.seed(1)
            run = make_run(peers=[Draws(), Draws()], **options)
            losses = [run.step(x, y).losses for x, y in batches(3)]
            drawn = torch.rand(2).tolist(), random.random(), np.random.rand()
            runs.append((run, torch.stack(losses), drawn))
        (auto, found, after), (named, expected, then) = runs
        assert auto.step.name == "eager"
        assert auto.step.choice.threads == 1
        with cpus.threads(1):
            assert torch.allclose(found, expected, atol=1e-5)
        assert after == then
        assert [p.calls for p in auto.cohort.peers] == [3, 3] == [p.calls for p in named.peers]

    def test_threads_are_measured_side_by_side(self, take, capsys):
        """Their proof, one after the other, would say nothing of their speed."""

        class Meets(Cnn):
            def forward(self, x):
                if threading.current_thread() is not threading.main_thread():
                    barrier.wait()
                return super().forward(x)

        barrier = threading.Barrier(2, timeout=20)
        take("threads", 2)  # and nobody is given up, while the other waits
        run = make_run(peers=[Meets(), Meets()])
        run.step.choose(*next(batches(1)))
        assert re.search(r"threads on 2 \d", capsys.readouterr().err)

    @pytest.mark.parametrize("threads", [1, 2])
    def test_threads_are_the_callers_before_and_after(self, take, threads):
        seen = []

        class Sees(Cnn):
            def forward(self, x):
                seen.append(torch.get_num_threads())
                return super().forward(x)

        take("eager", threads)
        run = make_run(peers=[Sees(), Sees()])
        x, y = next(batches(1))
        run.step.choose(x, y)
        assert torch.get_num_threads() == 2
        seen.clear()
        run.step(x, y)
        assert seen == [threads] * 2
        assert torch.get_num_threads() == 2

    def test_the_number_that_the_user_asks_for(self, monkeypatch, capsys):
        for options, environment in (({"threads": 1}, "2"), ({}, "1"), ({"threads": 0}, "1")):
            monkeypatch.setenv("OMP_NUM_THREADS", environment)
            with cpus.threads(int(environment)):
                run = make_run(**options)
                run.step(*next(batches(1)))
            assert run.step.choice.threads == 1 == run.step.choice.elsewhere
            line = capsys.readouterr().err
            assert "eager on 1" in line
            assert "stacked on 1" in line
            assert "on 2" not in line

    def test_a_named_execution_chooses_threads_where_asked(self, take, capsys):
        take("stacked", 2)
        run = make_run(execution="stacked", threads=0)
        run.step(*next(batches(1)))
        assert run.step.choice == ("stacked", 2, 2)
        line = capsys.readouterr().err
        assert line.startswith("execution: stacked, 2 threads (ms a step: stacked on 1 ")
        assert "eager" not in line
        run = make_run(execution="threads", threads=0)  # nothing to choose
        run.step(*next(batches(1)))
        assert run.step.choice == ("threads", 2, 1)
        assert capsys.readouterr().err == ""
        assert type(make_run(execution="eager").step) is EagerStep  # on torch's threads

    def test_elsewhere_what_is_fastest_for_eager(self, monkeypatch):
        """Threads of peers do not wait for each other; those of evaluations do."""
        times = {("eager", 1): 10.0, ("eager", 2): 30.0, ("threads", 2): 5.0}

        def run(self, found):
            self.times = {c: times[c] for c in found if c in times}

        monkeypatch.setattr(rehearsal.Rehearsal, "run", run)
        step = make_run().step
        assert step.choose(*next(batches(1))) == ("threads", 2, 1)
        times["eager", 2] = 6.0
        step = make_run().step
        assert step.choose(*next(batches(1))) == ("threads", 2, 2)

    @pytest.mark.parametrize(
        ("peers", "side", "chosen"),
        [
            (2, 8, ("threads", 2, 1)),
            (3, 8, ("eager", 1, 1)),  # more peers than cores, and a batch of few pixels
            (3, 32, ("eager", 2, 2)),
            (1, 8, ("eager", 1, 1)),
        ],
    )
    def test_by_rule_where_runs_must_repeat(self, monkeypatch, capsys, peers, side, chosen):
        monkeypatch.setattr(rehearsal.Rehearsal, "run", None)  # not called
        torch.use_deterministic_algorithms(True)
        try:
            run = make_run(peers=[Cnn(w) for w in range(4, 4 + peers)])
            run.step(*next(batches(1, side)))
        finally:
            torch.use_deterministic_algorithms(False)
        assert run.step.choice == chosen
        assert capsys.readouterr().err.endswith(" (by rule: deterministic)\n")

    @pytest.mark.parametrize(
        "kind", ["hook", "all", "gradient", "compiled", "options", "locked", "own"]
    )
    def test_by_rule_where_a_rehearsal_would_not_stay_one(self, capsys, kind):
        peers, options, calls = [Cnn(), Cnn(5)], {}, []
        if kind == "hook":
            peers[1].conv.register_forward_hook(lambda *_: calls.append(1))
        elif kind == "all":
            hook = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
        elif kind == "gradient":
            w = peers[0].head.bias
            w.register_post_accumulate_grad_hook(lambda w: calls.append(1))
        elif kind == "compiled":
            peers[0] = torch.compile(peers[0], backend=lambda graph, _: graph)
        elif kind == "options":
            options["compile"] = True
        elif kind == "own":
            peers[0] = Copies()
        else:
            peers[0].state = torch.ones(2, requires_grad=True) * 2  # torch copies leaves alone
        run = make_run(peers=peers, **options)
        if kind == "options":
            run.step.chosen = make_run(peers=peers, execution="eager").step  # compiling takes long
        run.step(*next(batches(1)))
        if kind == "all":
            hook.remove()
        assert run.step.choice == ("eager", 1, 1)
        assert len(calls) == {"hook": 1, "gradient": 1, "all": 2 * 4}.get(kind, 0)  # of one step
        reason = {
            "compiled": "compiled peers would be compiled anew for each candidate",
            "options": "compiled peers would be compiled anew for each candidate",
            "own": "a copy of the optimizer holds other weights than a copy of the peers",
            "locked": "peers or optimizer cannot be copied: Only Tensors created explicitly by",
        }.get(kind, "hooks would be called by what is measured")
        line = capsys.readouterr().err
        assert line.startswith(f"execution: eager, 1 thread (by rule: {reason}")
        assert line.count("\n") == 1

    def test_executions_that_do_not_fit_are_named(self, capsys):
        peers = [Cnn(), Cnn()]
        peers[1].register_buffer("also", peers[0].norm.running_mean)
        run = make_run(peers=peers)
        run.step(*next(batches(1)))
        assert run.step.name == "eager"
        line = capsys.readouterr().err
        assert "; not threads: peers 0 and 1 share memory; not stacked: " in line
        assert line.count("\n") == 1

    def test_an_execution_that_stops_fitting_is_left_for_eager(self, take, capsys):
        """In one line, with the bits of eager; what eager refuses as well is the caller's."""
        take("threads", 2)
        run, eager = (make_run(peers=[Late(), Late(5)], **o) for o in ({}, {"execution": "eager"}))
        data = list(batches(4))
        for i, (x, y) in enumerate(data):
            if i == 2:
                for peer in (*run.peers, *eager.peers):
                    peer.rate = 0.2
            torch.manual_seed(i)
            found = run.step(x, y)
            torch.manual_seed(i)
            with cpus.threads(1):
                expected = eager.step(x, y)
            if i < 2:  # of threads, each peer on one
                assert torch.equal(found.losses, expected.losses)
            assert run.step.name == ("threads" if i < 2 else "eager")
            torch.testing.assert_close(found.losses, expected.losses)
            a, b = run.cohort.state_dict(), eager.cohort.state_dict()
            torch.testing.assert_close(a, b)  # running statistics took in each batch once
        first, second = capsys.readouterr().err.splitlines()
        assert first.startswith("execution: threads, 2 threads (ms")
        assert second.startswith("execution: eager, 2 threads; not threads: does not go with ")
        assert run.step.choice.execution == "eager"
        with pytest.raises(RuntimeError):
            run.step(torch.randn(8, 7, 8, 8), data[0][1])

    @pytest.mark.parametrize("change", ["hook", "layer", "kind"])
    def test_a_stack_that_stops_fitting_leaves_the_peers_to_themselves(self, take, capsys, change):
        """In one line; nobody's weights lie in the memory of all any more, and hooks are called."""
        take("stacked", 1)
        run, eager = make_run(), make_run(execution="eager", threads=1)
        called = []
        for i, (x, y) in enumerate(batches(4)):
            if i == 2:
                for peer in (run.peers[1], eager.peers[1]):
                    if change == "hook":
                        peer.conv.register_forward_hook(lambda *_: called.append(1))
                    elif change == "layer":
                        peer.conv.padding_mode = "circular"
                    else:
                        peer.head = nn.Sequential(peer.head, nn.Identity())
            found, expected = run.step(x, y), eager.step(x, y)
            torch.testing.assert_close(found.losses, expected.losses)
            assert run.step.name == ("stacked" if i < 2 else "eager")
        sizes = [t.untyped_storage().nbytes() - t.nbytes for t in run.cohort.state_dict().values()]
        assert sizes == [0] * len(sizes)
        assert len(called) == (4 if change == "hook" else 0)  # two steps of both
        line = capsys.readouterr().err.splitlines()[1]
        assert line.startswith("execution: eager, 1 thread; not stacked: ")
        assert "use another" not in line

    def test_a_conversion_refused_at_last_leaves_eager(self, take, monkeypatch, capsys):
        take("stacked", 1)
        run = make_run()
        make = run.step.make

        def refuses(name):
            if name == "stacked":
                raise InputError("not any more")
            return make(name)

        run.step.make = refuses
        run.step(*next(batches(1)))
        assert run.step.name == "eager" == run.step.choice.execution
        assert capsys.readouterr().err.endswith(
            "execution: eager, 1 thread; not stacked: not any more\n"
        )

    def test_the_learning_rate_of_the_copies_is_no_ones(self, take):
        """Nor are averages, metric losses and what is called after a step."""
        take("eager", 1)
        called = []

        class After:
            def __call__(self, output, update):
                called.append(1)

            def tensors(self):
                return []

        run = make_run(after=After(), average=True)
        rates = [group["lr"] for group in run.optimizer.param_groups]
        run.step.choose(*next(batches(1)))
        assert called == []
        assert all(r is g["lr"] for r, g in zip(rates, run.optimizer.param_groups, strict=True))
        assert all(r == 0.1 for r in rates)
        averages = run.step.options.ema.state_dict()
        assert all(torch.equal(v, run.cohort.state_dict()[k]) for k, v in averages.items())
        run.step(*next(batches(1)))
        assert called == [1]


class Cnn(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, width, 3), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Copies(Cnn):
    def __deepcopy__(self, memo):
        other = Copies()
        other.load_state_dict(self.state_dict())
        return other


class Late(Cnn):
    """Begins to draw at some later step."""

    rate = 0.0

    def forward(self, x):
        return super().forward(F.dropout(x, self.rate) if self.rate else x)


class Run:
    def __init__(self, cohort, optimizer, step):
        self.cohort, self.optimizer, self.step, self.peers = cohort, optimizer, step, cohort.peers

    def same_as(self, other):
        a, b = self.cohort.state_dict(), other.cohort.state_dict()
        mine, theirs = (
            [t for s in run.optimizer.state.values() for t in s.values()] for run in (self, other)
        )
        return all(torch.equal(a[k], b[k]) for k in a) and all(map(torch.equal, mine, theirs))


def make_run(amp="off", peers=None, **options):
    torch.manual_seed(0)
    cohort = Cohort(peers or [Cnn(), Cnn()], 3).train()
    optimizer = make_optimizer(cohort, "sgd", lr=0.1, momentum=0.9)
    if options.pop("average", False):
        options["ema"] = Ema(cohort, 0.9)
    step = make_step(cohort, MutualLoss(), optimizer, amp=amp, **options)
    return Run(cohort, optimizer, step)


def batches(steps, side=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        y = torch.randint(3, (8,), generator=generator)
        yield torch.randn(8, 2, side, side, generator=generator) + y[:, None, None, None], y
