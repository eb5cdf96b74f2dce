"""The whole training step as one CUDA graph: the host issues one launch instead of thousands.

The first call copies its batch into static buffers, runs the step a few times to warm up (lazy
initialisation, compilation, choice of algorithms), captures it, and restores every trace of this:
weights, BatchNorm statistics, optimizer state, averages, loss scale, random generators. Each call
then copies its batch, or the index that the batch is assembled from, into the buffers and replays.
Peers run as parallel branches, since the step that is captured forks a stream for each.

A graph replays Python numbers as they were at capture, so those that change are tensors: learning
rate and loss scale already, the loss's temperature and weights from here on. A number that is
assigned to one of them later is copied into its tensor. Everything else that a captured step relies
on (optimizer groups and their settings, weights, their memory, which are frozen, layers in
evaluation mode) is compared before each replay, and a step that has changed is captured anew. The
comparison takes the host 95 microseconds for two ResNet-32 (one thread of a shared AMD EPYC), while
the device is at work. A step that changes again and again runs without a graph. A metric loss keeps
the weights that it was made with.

A batch of another shape runs without the graph. A step that cannot be captured (a model that looks
at a value, a kernel that a capture refuses) runs without one for good, and a warning says why. What
a model does in Python happens only while capturing: a model whose Python code does something else
at each step must not be captured, and nothing here can notice that.

Costs: the memory of one step's activations stays with the graph; about five steps at the start.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdml.engine.eager import EagerStep, check_gradients_wanted
from fastdml.engine.execution import ExecutionName, StepOutput, register_execution
from fastdml.engine.rollback import Snapshot
from fastdml.engine.sequential import SequentialStep
from fastdml.engine.streams import StreamsStep
from fastdml.engine.update import Group, alike
from fastdml.engine.weights import Parts, same
from fastdml.errors import InputError
from fastdml.mutual_stats import MutualStats
from fastdml.torch_private import end_allocation_to_pool

WARM_UP = 3  # steps, the last of them `supervised`
# After HASTY captures in a row that were replayed fewer than REPLAYS times each, steps run without
# a graph: a step that changes that often is not worth capturing.
HASTY, REPLAYS = 3, 10
SCALARS = ("temperature", "ce_weight", "kl_weight")
SUPERVISED = "Synchronization debug mode is a prototype"  # torch warns so when it is switched on


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's garbage collector runs before, not within: an older graph or an event that it frees
    during a capture makes calls to CUDA that end the capture."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class CudaCapture:
    """Warm-up, capture and replay on a CUDA device; tests without one put another class here."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Warm-up and capture share a stream: autograd's nodes run on the stream they were made on.
        self.stream = torch.cuda.Stream(device)
        self.graph = torch.cuda.CUDAGraph()

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            main.wait_stream(self.stream)  # before anything is restored

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Within it, an operation that waits for the device raises. In a warm-up step this does no
        harm; in a capture it would leave the stream and the generators in capture mode."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        torch.cuda.synchronize(self.device)
        pool = torch.cuda.graph_pool_handle()
        try:
            return self._record(self.graph, pool, run)
        except RuntimeError:
            self._clear(pool)
            raise

    def _record(self, graph: torch.cuda.CUDAGraph, pool: Any, run: Callable[[], Tensor]) -> Tensor:
        # A failed capture leaves its stream the current one, which the outer context undoes. In
        # mode "thread_local" other threads, such as a loader that pins memory, may go on with calls
        # that a capture forbids.
        with (
            without_collector(),
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            torch.cuda.graph(graph, pool, self.stream, "thread_local"),
        ):
            return run()

    def _clear(self, pool: Any) -> None:
        """A failed capture leaves the allocator and the random generator in capture mode: the
        allocator frees nothing, and the generator refuses to draw. Ends the allocator's mode by
        hand; one tiny successful capture resets the generator."""
        with suppress(RuntimeError):
            end_allocation_to_pool(self.stream.device.index, pool)
        with suppress(RuntimeError):
            self._record(torch.cuda.CUDAGraph(), None, lambda: torch.zeros(1, device=self.device))

    def replay(self) -> None:
        self.graph.replay()


class GraphStep:
    """`step(images, labels)`, or what `assemble` takes, as one graph of the step `inner`."""

    warm_up = WARM_UP

    def __init__(self, inner: EagerStep, capture: type[CudaCapture] = CudaCapture) -> None:
        device = inner.amp.device
        make_capturable(inner.optimizer, device)
        check_capturable(inner)
        self.inner, self.device, self.new_capture = inner, device, capture
        self.cohort, self.loss, self.update = inner.cohort, inner.loss, inner.update
        self.name: ExecutionName = "stacked" if inner.name == "stacked" else "graph"
        self.failure: str | None = None  # why there is no graph
        self.captured: CudaCapture | None = None
        self.inputs: list[Tensor] = []
        self.scalars = {}
        for name in SCALARS:
            value = getattr(inner.loss, name)
            own = value if isinstance(value, Tensor) else torch.tensor(float(value), device=device)
            self.scalars[name] = own
        self.contents: Contents | None = None  # what the graph was made of
        self.replays = self.hasty = 0
        # Loading replaces the state tensors that the graph writes to.
        inner.optimizer.register_load_state_dict_post_hook(_forget(weakref.ref(self)))

    def __reduce__(self) -> tuple[type[GraphStep], tuple[Any, ...]]:
        """A copy captures a graph of its own at its first call."""
        return type(self), (self.inner, self.new_capture)

    def tensors(self) -> list[Tensor]:
        return self.inner.tensors()

    def release(self) -> None:
        self.inner.release()

    def rehearse(self) -> None:
        self.inner.rehearse()

    def forget(self) -> None:
        """The next call captures anew."""
        self.captured = None

    def __call__(self, *batch: Tensor) -> StepOutput:
        check_gradients_wanted()
        if self.captured is not None and self.contents is not None:
            self._check_contents(self.contents)
        if self.failure is None and self.captured is None:
            self._capture(batch)
        captured = self.captured
        if self.failure is not None or captured is None or not self._fits(batch):
            return self.inner(*batch)
        self._set_scalars()
        for static, given in zip(self.inputs, batch, strict=True):
            static.copy_(given, non_blocking=True)
        captured.replay()
        self.replays += 1
        return self._unpack(self.packed.clone())  # the next replay overwrites the graph's own

    def _check_contents(self, contents: Contents) -> None:
        """Drops the graph if the step has changed since its capture; for good if it keeps
        changing."""
        contents.take_numbers()
        changed = contents.changed()
        if changed is None:
            return
        self.hasty = self.hasty + 1 if self.replays < REPLAYS else 0
        self.forget()
        if self.hasty == HASTY:
            self._fail(f"{changed} changed {HASTY} times within {HASTY * REPLAYS} steps")

    def _fail(self, reason: str) -> None:
        self.failure = reason
        warnings.warn(
            f"the step cannot be captured as a CUDA graph and runs as {self.inner.name!r}, "
            f"which is slower: {reason}",
            stacklevel=4,
        )

    def _fits(self, batch: tuple[Tensor, ...]) -> bool:
        return [(t.shape, t.dtype) for t in batch] == [(t.shape, t.dtype) for t in self.inputs]

    def _capture(self, batch: tuple[Tensor, ...]) -> None:
        make_capturable(self.inner.optimizer, self.device)
        check_capturable(self.inner)
        self.update.refresh()
        self.update.layouts(self.inner.optimizer)
        self.replays = 0
        self.inputs = [torch.empty_like(t, device=self.device).copy_(t) for t in batch]
        self._set_scalars()
        capture = self.new_capture(self.device)
        snapshot = Snapshot(self.inner.tensors, self.device, self.inner.cohort)
        try:
            with warnings.catch_warnings(), capture.warm_up():
                for usual in ("This instance was constructed with capturable", SUPERVISED):
                    warnings.filterwarnings("ignore", usual)
                for _ in range(self.warm_up - 1):
                    self._run()
                with capture.supervised():
                    self._run()
            if snapshot.buffers_replaced():
                raise RuntimeError("a peer puts new tensors in the places of its buffers")
            self.packed = capture.capture(self._run)
            self.captured = capture
        except RuntimeError as error:
            first: BaseException = error
            while first.__context__ is not None:
                first = first.__context__  # ending the failed capture raises a second error
            self._fail(f"{type(first).__name__}: {' '.join(str(first).split())[:300]}")
        finally:
            for w in self.inner.cohort.parameters():
                w.grad = None
            snapshot.restore()
        self.contents = Contents(self.inner)

    def _run(self) -> Tensor:
        output = self.inner(*self.inputs)
        values = {**output._asdict(), "stats": output.stats.packed}
        values = {name: v for name, v in values.items() if v is not None}
        self.shapes = {name: v.shape for name, v in values.items()}
        return torch.cat([v.reshape(-1) for v in values.values()])

    def _unpack(self, packed: Tensor) -> StepOutput:
        parts = packed.split([shape.numel() for shape in self.shapes.values()])
        found = dict(zip(self.shapes, map(Tensor.view, parts, self.shapes.values()), strict=True))
        stats = MutualStats.from_packed(found.pop("stats"), len(self.inner.peers))
        return StepOutput(stats=stats, **found)

    def _set_scalars(self) -> None:
        """Copies numbers assigned to the loss since the last step into the graph's tensors."""
        loss = self.inner.loss
        for name, own in self.scalars.items():
            value = getattr(loss, name)
            if value is not own:
                own.copy_(value) if isinstance(value, Tensor) else own.fill_(value)
                setattr(loss, name, own)


class Contents:
    """Everything that a captured step relies on and that Python code may change."""

    def __init__(self, inner: EagerStep) -> None:
        self.loss, self.optimizer, self.update = inner.loss, inner.optimizer, inner.update
        self.stale, self.cohort, self.teachers = inner.stale, inner.cohort, inner.teachers
        self.holdings = self.update.holdings
        self.parts = Parts(nn.ModuleList([inner.cohort, *inner.teachers]))
        self.modules = self.parts.modules
        self.tensors = [t for t in self.parts.values if isinstance(t, Tensor)]
        groups = self.optimizer.param_groups
        self.rates = [group["lr"] for group in groups]
        self.settings = self._settings()
        self.state = (self.optimizer.state, len(self.optimizer.state))
        self.own_loss = self._loss()
        self.frozen, self.training, self.memory = self._frozen(), self._training(), self._memory()

    def take_numbers(self) -> None:
        """Copies learning rates assigned as numbers into the graph's tensors."""
        for group, own in zip(self.optimizer.param_groups, self.rates, strict=False):
            shared = sum(own is other for other in self.rates) > 1
            if isinstance(group["lr"], Real) and not shared:
                own.fill_(group["lr"])
                group["lr"] = own

    def changed(self) -> str | None:
        """What has changed since the capture, in words; None where nothing has."""
        groups = self.optimizer.param_groups
        if self.update.holdings is not self.holdings or not self.holdings.same_groups():
            return "what the optimizer's groups hold"
        if not self.parts.unchanged():
            return "what the peers or teachers consist of"
        if self.cohort.teachers is not self.teachers:
            return "the teachers"  # which the step refuses
        if not same([group["lr"] for group in groups], self.rates):
            return "the tensor that holds a learning rate"
        if not all(map(alike, self._settings(), self.settings)):
            return "a setting of the optimizer"
        if self.optimizer.state is not self.state[0] or len(self.state[0]) != self.state[1]:
            return "the optimizer's state"
        if not same(self._loss(), self.own_loss):
            return "a setting of the loss"
        if self._frozen() != self.frozen:
            return "what is frozen"
        if self._training() != self.training:
            return "what is in evaluation mode"
        if self._memory() != self.memory:
            return "the memory of weights or buffers"
        return "what the peers consist of" if self.stale() else None

    def _settings(self) -> list[Group]:
        names = self.optimizer.defaults.keys() - {"lr"}
        return [{n: group[n] for n in names} for group in self.optimizer.param_groups]

    def _loss(self) -> list[object]:
        names = ("options", "peer_weights", "class_weight")
        return [getattr(self.loss, name, None) for name in names]

    def _frozen(self) -> list[bool]:
        return [t.requires_grad for t in self.tensors]

    def _training(self) -> list[bool]:
        return [m.training for m in self.modules]

    def _memory(self) -> list[int]:
        return [t.data_ptr() for t in self.tensors]


def _forget(step: weakref.ref[GraphStep]) -> Callable[[object], None]:
    """A hook that drops the graph. It refers to the step weakly, so as not to keep the graph's
    memory alive."""

    def hook(_: object) -> None:
        if (found := step()) is not None:
            found.forget()

    return hook


def make_capturable(optimizer: Optimizer, device: torch.device) -> None:
    """Makes torch's optimizers count their steps on the device, those already made included, and
    fused ones read their learning rate there."""
    for group in optimizer.param_groups:
        if group.get("fused") and isinstance(group["lr"], Real):
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=device)
        if "capturable" in group:
            group["capturable"] = True
            for state in (optimizer.state[w] for w in group["params"] if w in optimizer.state):
                if "step" in state:
                    state["step"] = state["step"].to(device)


def check_capturable(inner: EagerStep) -> None:
    """Refuses a learning rate on the host: a graph would repeat its first value for ever."""
    optimizer = inner.optimizer
    for group in optimizer.param_groups:
        lr = group["lr"]
        if not isinstance(lr, Tensor) or lr.device.type != inner.amp.device.type:
            raise InputError(
                f"{type(optimizer).__name__} holds its learning rate on the host, which a CUDA "
                "graph would freeze: give a 0-d tensor on the device (make_optimizer does where "
                "the optimizer can take one), or use execution eager or streams"
            )


@register_execution("graph", turn=3, devices=("cuda",), keeps_addresses=True)
def graph_of_streams(*arguments: Any) -> GraphStep:
    return GraphStep(StreamsStep(*arguments))


@register_execution("graph", update="sequential")
def sequential_graph(*arguments: Any) -> GraphStep:
    return GraphStep(SequentialStep(*arguments))
