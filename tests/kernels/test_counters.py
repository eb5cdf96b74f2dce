"""Counters of finished programs: who has which, of which memory, made when."""

from __future__ import annotations

import time
from threading import Barrier, Thread, current_thread
from types import SimpleNamespace

import pytest
import torch
from fastdml_kernels import (
    Call,
    Options,
    counters,
    launch,
    linear_mutual_loss,
    losses_and_grads,
    mutual_loss,
)
from fastdml_kernels.counters import Counters, counters_of
from fastdml_kernels.graph_end import GraphEnd
from fastdml_kernels.launch_plan import Plans
from oracle import DEVICE
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdml.engine.graph import without_collector

CUDA = torch.device("cuda", 0)


class Operations(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Device:
    """A CUDA device as far as counters ask for it; its memory is the CPU's."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing, self.exists = 7, False, True
        self.makers: list[Thread] = []  # of each tensor of zeros
        self.ends: list[End] = []  # of the graph of each captured launch
        zeros = torch.zeros

        def zeros_on_cpu(size, *, device, dtype):
            assert device == CUDA
            self.makers.append(current_thread())
            return zeros(size, dtype=dtype)

        event = SimpleNamespace(synchronize=lambda: None)
        patch.setattr(torch, "zeros", zeros_on_cpu)
        patch.setattr(torch.cuda, "is_available", lambda: self.exists)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(
            torch.cuda, "current_stream",
            lambda device: SimpleNamespace(cuda_stream=self.stream, record_event=lambda: event),
        )  # fmt: skip
        patch.setattr(GraphEnd, "of_capture", self._end)
        patch.setattr(counters, "_made", {})

    def _end(self, stream: int) -> End:
        assert stream == self.stream
        self.ends.append(End())
        return self.ends[-1]


class End:
    over = False

    def reached(self) -> bool:
        return self.over


@pytest.fixture
def device(monkeypatch) -> Device:
    return Device(monkeypatch)


def apart(taken: list[torch.Tensor]) -> bool:
    """Whether these are zeroed counters, aligned alike, no two of them in the same place."""
    whole = all(t.shape == (1,) and t.dtype == torch.int32 and t.item() == 0 for t in taken)
    aligned = all(t.data_ptr() % 16 == 0 for t in taken)
    return whole and aligned and len({t.data_ptr() for t in taken}) == len(taken)


def call(labels: torch.Tensor) -> Call:
    return Call(labels, Options(), 1.0, 1.0, 1.0, None, None, None, True)


def test_the_first_launch_of_a_shape_takes_one_too(monkeypatch):
    """None for the compilation before it: in a capture it would be the graph's until its end."""
    takes, take = [], Counters.take
    monkeypatch.setattr(Counters, "take", lambda *own: takes.append(1) or take(*own))
    monkeypatch.setattr(launch, "_PLANS", Plans())
    logits = [torch.zeros(3, 5, device=DEVICE) for _ in range(2)]
    for launches in (1, 2):
        launch.launch(logits, torch.arange(3, device=DEVICE), Options())
        assert len(takes) == launches


def block_of(taken: torch.Tensor) -> int:
    return taken.untyped_storage().data_ptr()


@pytest.mark.parametrize("capturing", [False, True])
def test_take_allocates_nothing(device, capturing):
    """Whatever a stream's first launch allocated and kept would be an error in a private pool."""
    own = counters_of(CUDA)
    device.capturing = capturing
    with Operations() as seen:
        taken = []
        for device.stream in range(50):
            taken += [own.take(), own.take(device.stream)]
    assert set(seen.names) <= {"aten::slice"}
    assert len(device.makers) == 1
    assert len({block_of(t) for t in taken}) == 1


def test_a_stream_has_a_counter_of_its_own(device):
    own, taken = counters_of(CUDA), []
    for device.stream in range(5):
        taken.append(own.take())
        assert own.take().data_ptr() == taken[-1].data_ptr() == own.take(device.stream).data_ptr()
    assert apart(taken)


def test_captured_launches_have_counters_as_aligned_as_any(device):
    """One each. Triton compiles another kernel for another alignment, which inside a capture is an
    error."""
    own = counters_of(CUDA)
    taken = [own.take()]
    device.capturing = True
    taken += [own.take() for _ in range(5)]
    device.capturing, device.stream = False, 8
    taken.append(own.take())
    assert apart(taken)


def test_a_counter_is_given_back_when_its_graph_is_over(device, monkeypatch):
    monkeypatch.setattr(Counters, "SLOTS", 4)
    own = counters_of(CUDA)
    device.capturing = True
    taken = [own.take() for _ in range(4)]
    device.ends[1].over = device.ends[3].over = True
    again = [own.take(), own.take()]
    assert {t.data_ptr() for t in again} == {taken[1].data_ptr(), taken[3].data_ptr()}
    assert apart([taken[0], taken[2], *again])
    assert len(device.makers) == 1


def test_without_word_of_its_end_a_graph_keeps_its_counter(device, monkeypatch):
    monkeypatch.setattr(Counters, "SLOTS", 4)
    monkeypatch.setattr(GraphEnd, "of_capture", lambda stream: None)
    own = counters_of(CUDA)
    device.capturing = True
    assert apart([own.take() for _ in range(6)])


def test_when_all_are_taken_a_graph_zeroes_a_counter_of_its_own(device, monkeypatch):
    """In each replay, in memory that only this graph writes."""
    monkeypatch.setattr(Counters, "SLOTS", 4)
    own = counters_of(CUDA)
    device.capturing = True
    taken = [own.take() for _ in range(6)]
    assert apart(taken)
    assert len({block_of(t) for t in taken}) == 3  # the block, and two of their own
    # made by the thread that captures, which makes them a part of the capture
    assert device.makers[1:] == [current_thread()] * 2
    device.ends[0].over = True
    assert own.take().data_ptr() == taken[0].data_ptr()


def test_more_streams_than_slots_get_another_block(device, monkeypatch):
    monkeypatch.setattr(Counters, "SLOTS", 4)
    own, taken = counters_of(CUDA), []
    for device.stream in range(10):
        taken.append(own.take())
    assert apart(taken)
    assert len({block_of(t) for t in taken}) == len(device.makers) == 3
    assert all(maker is not current_thread() for maker in device.makers)


def test_threads_take_counters_at_the_same_time(device, monkeypatch):
    monkeypatch.setattr(Counters, "SLOTS", 64)
    threads, each = 8, 40
    start, taken = Barrier(threads), [[] for _ in range(threads)]

    def work(i: int) -> None:
        start.wait()
        own = counters_of(CUDA)
        taken[i] = [own.take(stream) for stream in range(i * each, (i + 1) * each)]
        taken[i].append(own.take(10**6))

    running = [Thread(target=work, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert apart([t for own in taken for t in own[:-1]])
    assert len({own[-1].data_ptr() for own in taken}) == 1
    assert len(device.makers) == 6  # threads * each + 1 slots, 64 to a block


def test_threads_of_the_interpreter_do_not_share():
    own = Counters(torch.device("cpu"))
    taken = [own.take(), own.take()]
    both, other = Barrier(2), []

    def work() -> None:
        other.append(own.take())
        both.wait()

    thread = Thread(target=work)
    thread.start()
    both.wait()
    thread.join()
    assert taken[0].data_ptr() == taken[1].data_ptr()
    assert apart([taken[0], *other])


def test_the_first_call_in_a_capture_is_refused(device):
    """Zeroed by the capture, the counters would be zero only after that graph has run."""
    device.capturing = True
    with pytest.raises(RuntimeError, match=r"cuda:0 is inside the capture.*once.*before the capt"):
        counters_of(CUDA)
    assert not device.makers
    device.capturing = False
    counters_of(CUDA)
    device.capturing = True
    assert apart([counters_of(CUDA).take()])


def test_a_block_belongs_to_no_pool_and_no_mode():
    """A private pool, as CUDA-graph trees have one, serves the thread that switched it on; so does
    a mode that makes fake tensors."""
    with FakeTensorMode(), torch.inference_mode(), Operations() as seen:
        assert isinstance(torch.empty(1), FakeTensor)
        seen.names.clear()
        block = counters._zeros(8, torch.device("cpu"))
    assert not seen.names
    assert type(block) is torch.Tensor
    assert not block.is_inference()
    assert block.tolist() == [0] * 8


def trace_loss() -> None:
    with FakeTensorMode():
        z = [torch.empty(8, 5, device=CUDA) for _ in range(2)]
        losses, _, grads = losses_and_grads(
            z, call(torch.empty(8, device=CUDA).long()), range(len(z))
        )
        assert losses.device == grads[0].device == CUDA


def trace_linear_loss() -> None:
    with FakeTensorMode():
        hidden = [torch.empty(8, 3, device=CUDA) for _ in range(2)]
        weight = [torch.empty(5, 3, device=CUDA) for _ in range(2)]
        labels = torch.empty(8, device=CUDA).long()
        losses, *_ = linear_mutual_loss(hidden, weight, [None, None], call(labels))
        assert losses.device == CUDA


@pytest.fixture
def traceable(device, monkeypatch) -> Device:
    """FakeTensorMode leaves the device alone."""
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
    return device


@pytest.mark.parametrize("trace", [trace_loss, trace_linear_loss])
def test_tracing_makes_the_counters(traceable, trace):
    """What is traced may first run inside a capture."""
    trace()
    assert type(counters._made[CUDA].blocks[0]) is torch.Tensor
    assert [maker is current_thread() for maker in traceable.makers] == [False]
    traceable.capturing = True
    trace()
    assert apart([counters_of(CUDA).take()])


@pytest.mark.parametrize("why", ["capturing", "absent", "no index", "CPU"])
def test_tracing_makes_no_counters_where_it_must_not(device, why):
    device.capturing, device.exists = why == "capturing", why != "absent"
    where = {"no index": "cuda", "CPU": "cpu", "absent": "cuda:0", "capturing": "cuda:0"}
    counters.prepare(torch.device(where[why]))
    counters.prepare(torch.device("cuda", 1))  # there is one device
    assert not counters._made
    assert not device.makers


# ---- on a device


def problem(seed: int = 0, N: int = 64) -> tuple[list[torch.Tensor], Call]:
    made = torch.Generator(CUDA).manual_seed(seed)
    z = [torch.randn(N, 100, device=CUDA, generator=made).requires_grad_() for _ in range(2)]
    return z, call(torch.randint(100, (N,), device=CUDA, generator=made))


def differentiated(z: list[torch.Tensor], arguments: Call) -> tuple[torch.Tensor, ...]:
    losses = mutual_loss(z, arguments)[0]
    return losses.detach(), *torch.autograd.grad(losses.sum(), z)


@pytest.fixture
def few_counters(monkeypatch) -> None:
    """No counters yet, and then 4 of them; the kernel is compiled."""
    differentiated(*problem())
    torch.cuda.synchronize()
    monkeypatch.setattr(counters, "_made", {})
    monkeypatch.setattr(Counters, "SLOTS", 4)


def captured(launches: int) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of several launches, and their losses."""
    z, arguments = problem()
    graph = torch.cuda.CUDAGraph()
    with without_collector(), torch.no_grad(), torch.cuda.graph(graph):
        losses = [mutual_loss(z, arguments)[0] for _ in range(launches)]
    return graph, losses


def check(graph: torch.cuda.CUDAGraph, losses: list[torch.Tensor]) -> None:
    z, arguments = problem()
    with torch.no_grad():
        expected = mutual_loss(z, arguments)[0]
    for _ in range(3):
        for loss in losses:
            loss.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(loss, expected) for loss in losses)


@pytest.mark.gpu
@pytest.mark.usefixtures("few_counters")
def test_a_refused_capture_names_the_remedy_and_the_remedy_helps():
    with pytest.raises(RuntimeError) as refused:
        captured(1)
    first: BaseException = refused.value
    while first.__context__ is not None:  # torch's own error, as the capture ends with another
        first = first.__context__
    assert "call the loss once" in str(first)
    torch.cuda.synchronize()
    counters.prepare(CUDA)
    check(*captured(1))


@pytest.mark.gpu
@pytest.mark.usefixtures("few_counters")
def test_more_captured_launches_than_counters_give_the_same_losses():
    counters_of(CUDA)
    check(*captured(10))


@pytest.mark.gpu
@pytest.mark.usefixtures("few_counters")
@pytest.mark.skipif(torch.version.hip is not None, reason="ROCm does not tell of a graph's end")
def test_a_graph_that_dies_gives_its_counters_back():
    own = counters_of(CUDA)
    graph, losses = captured(3)
    check(graph, losses)  # the fourth is this stream's
    own._reclaim()
    assert not own.free
    del graph, losses
    torch.cuda.synchronize()
    deadline = time.monotonic() + 30  # the driver tells when it finds the time
    while not own.free and time.monotonic() < deadline:
        time.sleep(0.01)
        own._reclaim()
    assert own.free
    check(*captured(len(own.free)))
    assert len(own.blocks) == 1


@pytest.mark.gpu
def test_graphs_side_by_side_do_not_share_their_sums():
    differentiated(*problem(N=4096))
    z, arguments = problem(N=4096)
    graphs, losses = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with without_collector(), torch.no_grad(), torch.cuda.graph(graph):
            losses.append([mutual_loss(z, arguments)[0] for _ in range(20)])
    with torch.no_grad():
        expected = mutual_loss(z, arguments)[0]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(loss, expected) for own in losses for loss in own)


@pytest.mark.gpu
def test_the_first_call_may_be_one_of_cuda_graph_trees(monkeypatch):
    """They run a function once in their private pool of memory, then capture it."""
    monkeypatch.setattr(counters, "_made", {})
    torch._dynamo.reset()

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def compiled(z: list[torch.Tensor], arguments: Call) -> torch.Tensor:
        return mutual_loss(z, arguments)[0].sum()

    for seed in range(6):
        z, arguments = problem(seed)
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(z, arguments)
        got = [loss.detach().clone(), *(g.clone() for g in torch.autograd.grad(loss, z))]
        losses, *grads = differentiated(z, arguments)
        torch.testing.assert_close(got, [losses.sum(), *grads], rtol=1e-5, atol=1e-7)
