"""A step as one CUDA graph takes the steps that the eager one takes.

Where there is no CUDA device, the capture is a class that calls the step directly, so all of the
graph's own logic runs here: buffers, warm-up without a trace, scalars, fallbacks.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings

import pytest
import torch

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer
from fastdml.engine.amp import resolve_amp
from fastdml.engine.eager import EagerStep
from fastdml.engine.execution import StepOptions
from fastdml.engine.graph import CudaCapture, GraphStep
from fastdml.errors import InputError
from fastdml.loss import MutualLoss

from .small_runs import CASES, CPU, STEPS, C, DirectCapture, Run, assert_same, batches, peer


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
    collects = []

    def step():
        collects.append(gc.isenabled())
        return 3

    assert capture.capture(step) == 3
    assert log == [("capture", (0, 7), "thread_local")]

    def looks():
        collects.append(gc.isenabled())
        raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="invalidated"):
        capture.capture(looks)
    assert collects == [False, False]
    assert gc.isenabled()
    assert now == ["main"]
    assert log[2:] == [
        ("end", 0, (0, 7)), ("release", 0, (0, 7)), ("capture", None, "thread_local"),
    ]  # fmt: skip
