"""Every execution takes the steps that the eager one takes.

Where there is no CUDA device, the graph's capture is a class that calls the step directly, so all
of the graph's own logic runs here: buffers, warm-up without a trace, scalars, fallbacks. Tests
marked `gpu` do the same with real graphs and streams.
"""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn

from fastdml.cohort import Cohort
from fastdml.data import ImageSet, ResidentLoader
from fastdml.engine import Amp, Ema, Schedule, make_optimizer, make_step
from fastdml.engine.amp import LossScale, resolve_amp
from fastdml.engine.eager import EagerStep
from fastdml.engine.execution import EXECUTIONS, StepOptions
from fastdml.engine.graph import CudaCapture, GraphStep
from fastdml.engine.rollback import optimizer_tensors
from fastdml.engine.sequential import SequentialStep
from fastdml.engine.stacked import StackedStep
from fastdml.engine.streams import StreamsStep
from fastdml.errors import InputError
from fastdml.loss import MutualLoss

C, SIDE, STEPS = 4, 6, 50
CPU = torch.device("cpu")


class DirectCapture:
    """Stands in for a CUDA graph: what it records it calls at once, and again at each replay."""

    def __init__(self, device):
        self.calls = 0

    def warm_up(self):
        return contextlib.nullcontext()

    supervised = warm_up

    def capture(self, run):
        self.run, self.packed = run, run()
        return self.packed

    def replay(self):
        self.calls += 1
        self.packed.copy_(self.run())


def peer(seed: int, width: int = 8) -> nn.Module:
    """Convolution, BatchNorm, dropout and a linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, groups=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(width, C),
        )


def batches(steps: int, device=CPU, n: int = 16):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        labels = torch.randint(C, (n,), generator=generator)
        x = torch.randn(n, 2, SIDE, SIDE, generator=generator)
        x[:, 0] += labels[:, None, None]  # something to learn
        x = x.to(memory_format=torch.channels_last)
        yield x.to(device), labels.to(device)


class After:
    """Schedule and a sum of losses, as a training run has them."""

    def __init__(self, schedule, K, device):
        self.schedule = schedule
        self.total = torch.zeros(K, device=device)

    def __call__(self, output, update):
        self.schedule.advance(update.skipped)
        self.total += output.losses

    def tensors(self):
        return [*self.schedule.tensors(), self.total]


KINDS = {
    "eager": EagerStep,
    "sequential": SequentialStep,
    "stacked": StackedStep,
    "graph": lambda *a: GraphStep(EagerStep(*a), DirectCapture),
    "sequential graph": lambda *a: GraphStep(SequentialStep(*a), DirectCapture),
    "stacked graph": lambda *a: GraphStep(StackedStep(*a), DirectCapture),
}


class Run:
    """A cohort and its step, with everything that a run adds to it."""

    def __init__(
        self, kind, *, peers=(0, 1), precision="off", optimizer="sgd", rate=0.05, average=None,
        device=CPU, loss=None, make=None, **options,
    ):  # fmt: skip
        torch.manual_seed(5)  # for dropout
        self.cohort = Cohort([peer(k) for k in peers], C).to(device)
        self.cohort.to(memory_format=torch.channels_last).train()
        self.optimizer = make_optimizer(self.cohort, optimizer, lr=rate, weight_decay=1e-3)
        schedule = Schedule(self.optimizer, torch.linspace(rate, rate / 10, STEPS))
        self.after = After(schedule, len(peers), device)
        self.ema = Ema(self.cohort, average) if average else None
        self.loss = loss or MutualLoss(label_smoothing=0.1)
        self.amp = resolve_amp(precision, device)
        options = StepOptions(ema=self.ema, after=self.after, **options)
        kind = make or KINDS[kind]
        self.step = kind(self.cohort, self.loss, self.optimizer, self.amp, options)

    def train(self, steps=STEPS, **how):
        device = self.amp.device
        self.outputs = [self.step(*batch) for batch in batches(steps, device, **how)]
        return self

    def state(self) -> dict[str, torch.Tensor]:
        names = {f"cohort.{k}": v for k, v in self.cohort.state_dict().items()}
        state = optimizer_tensors(self.optimizer)
        names |= {f"optimizer.{i}": v for i, v in enumerate(state)}
        names |= {f"losses.{i}": o.losses for i, o in enumerate(self.outputs)}
        for field in self.outputs[0].stats._fields:
            names[field] = torch.stack([getattr(o.stats, field) for o in self.outputs])
        names["total"] = self.after.total
        if self.ema:
            names |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        if self.step.update.scaler:
            names |= {"scale": self.step.update.scaler.scale}
        return names


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


CASES = [
    {},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"optimizer": "adam", "rate": 0.005},
    {"optimizer": "adamw", "rate": 0.005, "precision": "fp16", "accumulate": 2},
    {"grad_clip": 0.5, "average": 0.9, "accumulate": 4},
]


class TestGraphLogic:
    @pytest.mark.parametrize("options", CASES, ids=str)
    def test_fifty_steps_are_the_eager_ones_bit_for_bit(self, options):
        eager = Run("eager", **options).train()
        graph = Run("graph", **options).train()
        assert_same(graph.state(), eager.state())
        assert graph.step.captured.calls == STEPS
        assert eager.outputs[-1].losses.mean() < 0.8 * eager.outputs[0].losses.mean()

    def test_sequential_and_stacked_steps_are_captured_too(self):
        for kind in ("sequential", "stacked"):
            plain, graph = Run(kind).train(10), Run(f"{kind} graph").train(10)
            assert_same(graph.state(), plain.state())

    def test_warm_up_and_capture_leave_no_trace(self):
        """Compared before the first replay, with state that exists and state that does not yet."""
        for options in ({}, {"optimizer": "adam", "precision": "fp16", "average": 0.5}):
            run = Run("graph", **options)
            rng = torch.get_rng_state()
            before = {k: v.clone() for k, v in run.cohort.state_dict().items()}
            held = [(t, t.clone()) for t in run.step.tensors()]
            batch = next(batches(1))
            run.step._capture(batch)
            assert run.step.captured.calls == 0
            assert torch.equal(torch.get_rng_state(), rng)
            for name, value in run.cohort.state_dict().items():
                assert torch.equal(value, before[name])
            for t, value in held:
                assert torch.equal(t, value)
            known = {id(t) for t, _ in held}
            new = [t for t in run.step.tensors() if id(t) not in known]
            assert all((t == 0).all() for t in new)
            assert bool(new) == (options != {})
            assert all(w.grad is None for w in run.cohort.parameters())

    def test_outputs_stay_as_they_were(self):
        run = Run("graph").train(3)
        losses = [o.losses.clone() for o in run.outputs]
        run.step(*next(batches(1)))
        assert all(torch.equal(o.losses, x) for o, x in zip(run.outputs, losses, strict=True))

    def test_numbers_of_the_loss_can_be_assigned_between_steps(self):
        results = []
        for kind in ("eager", "graph"):
            run = Run(kind, loss=MutualLoss(kl_weight=torch.tensor(1.0)))
            for i, batch in enumerate(batches(6)):
                run.loss.kl_weight = 0.5 * i if i % 2 else torch.tensor(0.25 * i)
                run.loss.temperature = 1.0 + i
                run.loss.ce_weight = 2.0
                run.step(*batch)
            results.append(run.cohort.state_dict())
            if kind == "graph":
                assert run.step.captured.calls == 6
        for a, b in zip(*(r.values() for r in results), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_a_batch_of_another_shape_runs_without_the_graph(self):
        states = []
        for kind in ("eager", "graph"):
            run = Run(kind).train(2)
            run.step(*next(batches(1, n=6)))
            states.append(run.train(2).state())
        assert_same(*states)
        assert run.step.captured.calls == 4

    def test_loading_the_optimizer_captures_anew(self):
        states = []
        for kind in ("eager", "graph"):
            run = Run(kind, optimizer="adam").train(2)
            saved = copy.deepcopy(run.optimizer.state_dict())
            first = getattr(run.step, "captured", None)
            run.train(2)
            run.optimizer.load_state_dict(saved)
            run.after.schedule.load(torch.tensor(2))
            states.append(run.train(2).state())
        assert run.step.captured is not first
        assert_same(*states)

    def test_a_rate_that_is_replaced_is_not_the_one_in_the_graph(self):
        states = []
        for make in (EagerStep, lambda *a: GraphStep(EagerStep(*a), DirectCapture)):
            cohort = Cohort([peer(0), peer(1)], C)
            optimizer = make_optimizer(cohort, lr=0.1)
            torch.manual_seed(5)
            step = make(cohort, MutualLoss(), optimizer, resolve_amp("off", CPU), StepOptions())
            captures = []
            for i, batch in enumerate(batches(4)):
                if i % 2 == 0:
                    optimizer.param_groups[1]["lr"] = torch.tensor(0.1 * (1 + i // 2))
                step(*batch)
                captures.append(getattr(step, "captured", None))
            states.append(cohort.state_dict())
        assert_same(*states)
        assert captures[0] is captures[1] is not captures[2]

    def test_a_step_that_cannot_be_captured_runs_without_a_graph_and_says_why(self):
        class Refusing(DirectCapture):
            def capture(self, run):
                run()  # gets somewhere, and ends with a second error as a CUDA graph does
                try:
                    raise RuntimeError("operation not permitted when stream is capturing")
                finally:
                    raise RuntimeError("capture was invalidated")

        run = Run("", make=lambda *a: GraphStep(EagerStep(*a), Refusing))
        with pytest.warns(UserWarning, match="runs as 'eager'.*not permitted when stream is"):
            run.train(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is said once
            run.train(1)
        assert run.step.captured is None

    def test_what_torch_always_warns_of_in_a_warm_up_is_not_shown(self):
        class Warned(DirectCapture):
            @contextlib.contextmanager
            def supervised(self):
                warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
                yield

        run = Run("", make=lambda *a: GraphStep(EagerStep(*a), Warned))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run.train(1)
        assert run.step.failure is None

    def test_the_fallback_goes_on_from_an_untouched_state(self):
        class Refusing(DirectCapture):
            def capture(self, run):
                run()
                raise RuntimeError("no")

        eager = Run("eager", optimizer="adam", precision="fp16").train(5)
        graph = Run(
            "", optimizer="adam", precision="fp16",
            make=lambda *a: GraphStep(EagerStep(*a), Refusing),
        )  # fmt: skip
        with pytest.warns(UserWarning, match="slower: RuntimeError: no"):
            graph.train(5)
        assert_same(graph.state(), eager.state())

    def test_mistakes_in_the_batch_are_not_taken_for_a_failed_capture(self):
        run = Run("graph", accumulate=3)
        before = copy.deepcopy(run.cohort.state_dict())
        with pytest.raises(InputError, match="16 images does not split into accumulate=3"):
            run.train(1)
        assert all(torch.equal(v, before[k]) for k, v in run.cohort.state_dict().items())

    def test_a_rate_that_the_graph_would_freeze_is_refused(self):
        cohort = Cohort([peer(0), peer(1)], C)
        optimizer = torch.optim.SGD(cohort.parameters(), 0.1)
        step = EagerStep(cohort, MutualLoss(), optimizer, resolve_amp("off", CPU), StepOptions())
        with pytest.raises(InputError, match="SGD holds its learning rate on the host"):
            GraphStep(step, DirectCapture)

    def test_batches_can_be_assembled_inside(self):
        """Only an index is copied; the batch is made by the captured step."""
        images = torch.stack([x for x, _ in batches(20)])
        labels = torch.stack([y for _, y in batches(20)])

        def assemble(index):
            return images[index].squeeze(0), labels[index].squeeze(0)

        eager = Run("eager").train(20)
        for kind in ("eager", "graph"):
            run = Run(kind, assemble=assemble)
            run.outputs = [run.step(torch.tensor([i])) for i in range(20)]
            assert_same(run.state(), eager.state())
        assert [t.shape for t in run.step.inputs] == [(1,)]


class TestStacked:
    @pytest.mark.parametrize("options", [CASES[0], CASES[3], CASES[5]], ids=str)
    @pytest.mark.parametrize("peers", [(0, 1), (0, 1, 2)])
    def test_fifty_steps_follow_the_eager_ones(self, options, peers):
        """With BatchNorm statistics and dropout, to rounding: 50 steps magnify it."""
        eager = Run("eager", peers=peers, **options).train()
        stacked = Run("stacked", peers=peers, **options).train()
        a, b = eager.state(), stacked.state()
        assert a.keys() == b.keys()
        for name in a:
            loose = {"correct": 1.5, "ensemble_correct": 1.5}.get(name, 2e-3)
            torch.testing.assert_close(b[name], a[name], rtol=2e-3, atol=loose)

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: setattr(p[1], "momentum", 0.5),
            lambda p: setattr(p[8], "p", 0.5),
            lambda p: p[4].eval(),
            lambda p: p[0].requires_grad_(False),
        ],
    )
    def test_captured_steps_follow_what_changes_in_the_peers(self, change):
        runs = []
        for kind in ("eager", "stacked graph"):
            runs.append(run := Run(kind))
            run.outputs = []
            for i, batch in enumerate(batches(8)):
                if i == 4:
                    for p in run.cohort.peers:
                        change(p)
                run.outputs.append(run.step(*batch))
        eager, graph = (run.state() for run in runs)
        assert runs[1].step.captured.calls == 4
        for name, value in eager.items():
            torch.testing.assert_close(graph[name], value, rtol=1e-3, atol=1e-4)

    def test_a_captured_step_notices_hooks(self):
        run = Run("stacked graph").train(2)
        calls = []
        run.cohort.peers[1].register_forward_hook(lambda *_: calls.append(1))
        before = copy.deepcopy(run.cohort.state_dict())
        with pytest.raises(InputError, match="'stacked' does not know a module with hooks"):
            run.train(1)
        assert_same(run.cohort.state_dict(), before)
        assert not calls

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_in_half_precision(self, precision):
        eager = Run("eager", precision=precision).train(5)
        stacked = Run("stacked", precision=precision).train(5)
        for a, b in zip(*(r.cohort.parameters() for r in (eager, stacked)), strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)

    def test_a_peer_that_overflows_skips_its_own_update(self):
        run = Run("stacked", precision="fp16")
        with torch.no_grad():  # logits that fp16 holds, gradients times the scale that it does not
            run.cohort.peers[1][9].weight[0] = 500
        before = [copy.deepcopy(p.state_dict()) for p in run.cohort.peers]
        run.train(1)
        assert run.step.update.overflow.tolist() == [0.0, 1.0]
        for key, w in run.cohort.peers[1].named_parameters():
            assert torch.equal(w, before[1][key])
        for key, w in run.cohort.peers[0].named_parameters():
            assert not torch.equal(w, before[0][key])


class FakeStream:
    """Records what waits for what."""

    log: list = []  # noqa: RUF012
    now = None

    def __init__(self, name="main"):
        self.name = name

    def wait_stream(self, other):
        FakeStream.log.append((self.name, "waits for", other.name))


def test_streams_fork_and_join_around_forward_and_backward(monkeypatch):
    """What runs where and who waits for whom, without a device."""
    FakeStream.log, names, main = [], iter("ab"), FakeStream()
    FakeStream.now = main

    @contextlib.contextmanager
    def stream(chosen):
        was, FakeStream.now = FakeStream.now, chosen
        yield
        FakeStream.now = was

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream.now)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    eager = Run("eager").train(10)
    run = Run("", make=StreamsStep)
    for k, p in enumerate(run.cohort.peers):
        p.register_forward_hook(
            lambda *_, k=k: FakeStream.log.append((FakeStream.now.name, "forward", k))
        )
    run.optimizer.register_step_pre_hook(
        lambda *_: FakeStream.log.append((FakeStream.now.name, "update", None))
    )
    run.train(1)
    assert FakeStream.log == [
        ("a", "waits for", "main"), ("a", "forward", 0),
        ("b", "waits for", "main"), ("b", "forward", 1),
        ("main", "waits for", "a"), ("main", "waits for", "b"),  # before the loss
        ("main", "waits for", "a"), ("main", "waits for", "b"),  # after the backward
        ("main", "update", None),
    ]  # fmt: skip
    names = iter("ab")
    run = Run("", make=StreamsStep).train(10)
    assert_same(run.state(), eager.state())


def test_a_capture_that_breaks_off_is_cleared_away(monkeypatch):
    """The calls, without a device: what torch leaves behind then is a stream and two counts."""
    log, now = [], ["main"]

    @contextlib.contextmanager
    def stream(chosen):
        was, now[0] = now[0], chosen
        try:
            yield
        finally:
            now[0] = was

    class Graph:
        def __init__(self, graph, pool, stream, mode):
            log.append(("capture", pool, mode))
            self.stream = stream

        def __enter__(self):
            now[0] = self.stream

        def __exit__(self, kind, *_):
            if kind:
                raise RuntimeError("capture was invalidated")  # and the stream stays

    def end(name):
        return lambda index, pool: log.append((name, index, pool))

    class Stream:
        device = torch.device("cuda:0")

    for name, value in {
        "Stream": lambda device: Stream(), "CUDAGraph": object, "graph": Graph, "stream": stream,
        "current_stream": lambda device: now[0], "synchronize": lambda device: None,
        "graph_pool_handle": lambda: (0, 7),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end("end"))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", end("release"))
    capture = CudaCapture(torch.device("cpu"))
    assert capture.capture(lambda: 3) == 3
    assert log == [("capture", (0, 7), "thread_local")]

    def looks():
        raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="invalidated"):
        capture.capture(looks)
    assert now == ["main"]
    assert log[2:] == [
        ("end", 0, (0, 7)), ("release", 0, (0, 7)), ("capture", None, "thread_local"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"execution": "graph"},
            "'graph' needs a CUDA device, not cpu: use eager or threads or stacked",
        ),
        ({"execution": "streams"}, "'streams' needs a CUDA device"),
        ({"execution": "stacked", "update": "sequential"}, "'stacked' does not go with update="),
        ({"accumulate": 0}, "accumulate must be 1 or more, not 0"),
        ({"accumulate": 2, "update": "sequential"}, "does not go with update='sequential'"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    cohort = Cohort([peer(0), peer(1)], C)
    with pytest.raises(InputError, match=message):
        make_step(cohort, MutualLoss(), make_optimizer(cohort, lr=0.1), **options)


def test_accumulated_parts_are_the_whole_batch_without_batch_norm():
    """The mean of the parts' gradients is the gradient; counts and means are the batch's."""
    states = []
    for parts in (1, 4):
        torch.manual_seed(0)
        peers = [nn.Sequential(nn.Flatten(), nn.Linear(2 * SIDE * SIDE, C)) for _ in range(2)]
        cohort = Cohort(peers, C)
        optimizer = make_optimizer(cohort, lr=0.1)
        step = make_step(cohort, MutualLoss(), optimizer, amp="off", accumulate=parts)
        outputs = [step(*batch) for batch in batches(5)]
        states.append([*cohort.parameters(), *(o.losses for o in outputs),
                       *(v for o in outputs for v in o.stats)])  # fmt: skip
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- on a CUDA device


def cuda_run(execution, *, update="simultaneous", precision="off", **options):
    device = torch.device("cuda")

    def make(*arguments):
        return EXECUTIONS[execution].builders[update](*arguments)

    return Run("", make=make, device=device, precision=precision, **options)


def close(found, expected, name, **tolerances) -> None:
    torch.testing.assert_close(found, expected, msg=lambda how: f"{name}: {how}", **tolerances)


@pytest.fixture
def _deterministic(monkeypatch):
    """The same algorithms wherever they run, and rounding far below the tolerances."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("execution", ["streams", "graph"])
def test_on_cuda_fifty_steps_are_the_eager_ones(execution, options):
    eager = cuda_run("eager", **options).train()
    other = cuda_run(execution, **options).train()
    assert getattr(other.step, "failure", None) is None
    a, b = eager.state(), other.state()
    for name in a:
        close(b[name], a[name], name, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
def test_on_cuda_a_sequential_step_is_captured():
    eager = cuda_run("eager", update="sequential").train(20)
    graph = cuda_run("graph", update="sequential").train(20)
    assert graph.step.failure is None
    for (name, a), b in zip(eager.state().items(), graph.state().values(), strict=True):
        close(b, a, name, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("options", [CASES[0], CASES[3], CASES[5]], ids=str)
def test_on_cuda_fifty_stacked_steps_follow_the_eager_ones(options):
    """To rounding, which 50 steps magnify."""
    eager, stacked = (cuda_run(name, **options).train() for name in ("eager", "stacked"))
    assert stacked.step.failure is None
    a, b = eager.state(), stacked.state()
    for name in a:
        loose = {"correct": 1.5, "ensemble_correct": 1.5}.get(name, 5e-3)
        close(b[name], a[name], name, rtol=5e-3, atol=loose)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_on_cuda_warm_up_and_capture_leave_no_trace(precision, optimizer):
    run = cuda_run("graph", precision=precision, optimizer=optimizer, average=0.9)
    held = [(t, t.detach().clone()) for t in run.step.tensors()]
    rng = torch.cuda.get_rng_state()
    run.step._capture(next(batches(1, torch.device("cuda"))))
    assert run.step.failure is None
    assert torch.equal(torch.cuda.get_rng_state(), rng)
    for t, value in held:
        assert torch.equal(t, value)


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["streams", "graph", "stacked"])
@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
def test_on_cuda_nothing_waits_for_the_device(execution, precision):
    run = cuda_run(execution, precision=precision, grad_clip=1.0, average=0.9).train(3)
    data = list(batches(4, torch.device("cuda")))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in data:
            run.step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(w.isfinite().all() for w in run.cohort.parameters())


@pytest.mark.gpu
def test_on_cuda_a_model_that_looks_at_a_value_falls_back():
    class Looks(nn.Module):
        num_classes = C

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            z = self.inner(x)
            return z * (1.0 if z.sum().item() > -1e30 else 0.0)

    cohort = Cohort([Looks(peer(0)), peer(1)], C).cuda()
    optimizer = make_optimizer(cohort, lr=0.01)
    step = make_step(cohort, MutualLoss(), optimizer, execution="graph", amp="off")
    before = copy.deepcopy(cohort.state_dict())
    batch = next(batches(1, torch.device("cuda")))
    with pytest.warns(UserWarning, match="cannot be captured"):
        step._capture(batch)
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())
    assert step(*batch).losses.isfinite().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
def test_on_cuda_a_capture_that_breaks_off_leaves_streams_and_generators_usable():
    class Waits(nn.Module):
        num_classes = C

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            torch.cuda.synchronize()  # which nothing reports before the capture
            return self.inner(x)  # with dropout

    runs = []
    for execution in ("eager", "graph"):
        torch.manual_seed(5)
        cohort = Cohort([Waits(peer(0)), peer(1)], C).cuda()
        optimizer = make_optimizer(cohort, lr=0.01)
        step = make_step(cohort, MutualLoss(), optimizer, execution=execution, amp="off")
        main = torch.cuda.current_stream()
        context = contextlib.nullcontext()
        if execution == "graph":
            context = pytest.warns(UserWarning, match="cannot be captured")
        with context:
            losses = [step(*batch).losses for batch in batches(3, torch.device("cuda"))]
        assert torch.cuda.current_stream() == main
        torch.cuda.empty_cache()
        runs.append(torch.stack(losses))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
def test_on_cuda_any_optimizer_that_can_be_captured_skips_overflows_in_the_graph():
    """Its state is copied and put back by the graph itself."""
    device, states = torch.device("cuda"), []
    for execution in ("eager", "graph"):
        torch.manual_seed(5)
        cohort = Cohort([peer(0), peer(1)], C).to(device).train()
        groups = [{"params": list(p.parameters())} for p in cohort.peers]
        rate = torch.tensor(0.01, device=device)
        optimizer = torch.optim.Adam(groups, rate, foreach=True, capturable=True)
        precision = Amp(device, torch.float16, LossScale(device, init=2.0**30))
        step = make_step(cohort, MutualLoss(), optimizer, execution=execution, amp=precision)
        for batch in batches(30, device):
            step(*batch)
        assert getattr(step, "failure", None) is None
        assert precision.scaler.scale < 2.0**30
        states.append([*cohort.state_dict().values(), precision.scaler.scale])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("execution", ["streams", "graph", "stacked"])
def test_on_cuda_batches_are_made_inside_the_step(execution):
    """Three epochs of augmented images: nothing of the first is frozen in the graph."""
    device, states = torch.device("cuda"), []
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (64, 2, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(C, (64,), generator=generator)
    images = ImageSet(pixels, labels, C, tuple("abcd"), mean=(128.0,) * 2, std=(64.0,) * 2)
    loader = ResidentLoader(images, 16, train=True, pad=1, erase=0.5, device=device)

    for name in ("eager", execution):
        inside = name != "eager"
        run = cuda_run(name, **({"assemble": loader.assemble} if inside else {}))
        given = loader.index if inside else loader.batch
        places = [(epoch, step) for epoch in range(3) for step in range(len(loader))]
        run.outputs = [run.step(*given(*place)) for place in places]
        assert getattr(run.step, "failure", None) is None
        states.append(run.state())
    tolerance = 2e-2 if execution == "stacked" else 1e-4
    for name, value in states[0].items():
        if "correct" not in name:
            close(states[1][name], value, name, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_on_cuda_compiled_peers_are_captured():
    device, states = torch.device("cuda"), []
    for execution in ("eager", "graph"):
        torch.manual_seed(0)
        sizes = (2 * SIDE * SIDE, 16)
        peers = [
            nn.Sequential(
                nn.Flatten(), nn.Linear(*sizes), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, C)
            )
            for _ in range(2)
        ]
        cohort = Cohort(peers, C).to(device).train()
        optimizer = make_optimizer(cohort, lr=0.01)
        how = {"execution": execution, "compile": execution == "graph"}
        step = make_step(cohort, MutualLoss(), optimizer, amp="off", **how)
        losses = [step(*batch).losses for batch in batches(5, device)]
        assert getattr(step, "failure", None) is None
        states.append([*cohort.state_dict().values(), torch.stack(losses)])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
def test_on_cuda_auto_says_what_it_chose(capfd, fused):
    cohort = Cohort([peer(0), peer(1)], C).cuda()
    before = copy.deepcopy(cohort.state_dict())
    optimizer = make_optimizer(cohort, "adam", lr=0.01)
    if not fused:  # counts its steps on the host until it is captured
        rate = torch.tensor(0.01, device="cuda")
        optimizer = torch.optim.Adam(cohort.parameters(), rate)
    loss = MutualLoss()
    step = make_step(cohort, loss, optimizer, amp="off")
    step._measure(next(batches(1, torch.device("cuda"))))
    assert loss.kl_weight == 1
    assert all((state["step"] == 0).all() for state in optimizer.state.values())
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())
    line = capfd.readouterr().err
    assert line.startswith("execution: ")
    assert all(f"{name} " in line for name in ("eager", "streams", "graph", "stacked"))


@pytest.mark.gpu
def test_on_cuda_the_capture_supervises_its_last_warm_up_step():
    capture = CudaCapture(torch.device("cuda"))
    with pytest.raises(RuntimeError), capture.supervised():
        torch.ones((), device="cuda").item()
    assert torch.cuda.get_sync_debug_mode() == 0


def test_the_fp16_scale_is_shared_and_flags_are_not():
    run = Run("eager", precision="fp16", peers=(0, 1, 2))
    assert isinstance(run.amp, Amp)
    assert isinstance(run.amp.scaler, LossScale)
    assert run.step.update.overflow.shape == (3,)
