"""A contender that fails leaves words and no memory, and no capture is broken by the collector."""

from __future__ import annotations

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from bench import bench_loss, bench_step, failures, timing

CPU = torch.device("cpu")


@pytest.fixture
def no_collector():
    """So that only what nothing refers to is freed."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def hungry():
    """A function that allocates, keeps its exception and runs out of memory; and what watches."""
    watched = []

    def call(*_) -> None:
        held = torch.zeros(1000)
        watched.append(weakref.ref(held))
        try:
            raise ValueError("inner")
        except ValueError as inner:
            kept = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore")
            call.cycle = [kept]  # an exception that is part of a cycle, which the frame closes
            raise kept from inner

    return call, watched


@pytest.mark.usefixtures("no_collector")
def test_words_are_kept_and_what_the_frames_held_is_freed(hungry):
    call, watched = hungry
    try:
        call()
    except torch.OutOfMemoryError as error:
        assert watched[0]() is not None
        failure = failures.in_words(error)
    assert watched[0]() is None
    assert failure.kind is torch.OutOfMemoryError
    assert failure.line == "CUDA out of memory. Tried to allocate 20.00 GiB."
    assert "raise kept from inner" in failure.text
    assert "ValueError: inner" in failure.text


def row(direction: str, *names: str) -> bench_loss.Row:
    case = bench_loss.Case(2, 3, 4, "float32")
    return bench_loss.Row(case, direction, names, wanted="cpu", dry=False)


@pytest.mark.parametrize(
    "direction", [pytest.param("forward", marks=pytest.mark.slow), "forward_backward"]
)
def test_a_failed_loss_frees_its_memory(monkeypatch, hungry, no_collector, direction):
    call, watched = hungry
    monkeypatch.setattr(bench_loss.pairwise, "losses", call)
    monkeypatch.setattr(bench_loss, "SECONDS", 0.0)
    measured = bench_loss.measure.__wrapped__(row(direction, "ours", "pairwise"), CPU)
    assert list(measured.samples["wall"]) == ["ours"]
    assert [ref() for ref in watched] == [None]
    with pytest.raises(pytest.fail.Exception, match="Tried to allocate"):
        measured.errors["pairwise"].end_test()


@pytest.mark.parametrize("where", [pytest.param("made", marks=pytest.mark.slow), "checked"])
def test_a_failed_step_frees_its_memory(monkeypatch, hungry, no_collector, where):
    call, watched = hungry
    made = []

    def epoch(name, case, device):
        if name == "pairwise":
            return lambda batches: [1.0], None
        if where == "made":
            call()
        held = torch.zeros(1000)
        made.append(weakref.ref(held))
        return lambda batches: [2.0 + 0 * held[0].item()], None

    monkeypatch.setattr(bench_step, "_epoch", epoch)
    monkeypatch.setattr(bench_step, "SECONDS", {"cpu": 0.0})
    case = bench_step.Case(("resnet8",), 2)
    names = ("pairwise", "ours eager fp32 nhwc")
    measured = bench_step.measure.__wrapped__(case, names, CPU)
    assert list(measured.samples) == ["pairwise"]
    assert [ref() for ref in watched + made] == [None]
    failure = measured.errors["ours eager fp32 nhwc"]
    if where == "made":
        with pytest.raises(pytest.skip.Exception, match="Tried to allocate"):
            failure.end_test(torch.OutOfMemoryError)
    else:
        assert "first losses differ" in failure.line


def test_a_row_that_fails_is_measured_once_and_ends_each_of_its_tests():
    calls = []

    @failures.once(KeyError)
    def measure(kind):
        calls.append(kind)
        if kind is not None:
            raise kind("absent")
        return 5

    for _ in range(2):
        with pytest.raises(pytest.skip.Exception, match="absent"):
            measure(KeyError)
    for _ in range(2):
        with pytest.raises(pytest.fail.Exception, match="ValueError: absent"):
            measure(ValueError)
    assert measure(None) == measure(None) == 5
    assert calls == [KeyError, ValueError, None]


def test_the_collector_is_off_wherever_a_contender_may_record_a_graph(monkeypatch):
    """torch.compile's own graphs are recorded in the first calls of a contender."""
    on = []

    def seen(losses, **_):
        def call(*arguments):
            on.append(gc.isenabled())
            return losses(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", seen)
    monkeypatch.setattr(bench_loss, "SECONDS", 0.0)
    bench_loss.measure.__wrapped__(row("forward_backward", "ours", "closed-c"), CPU)
    assert len(on) > 5
    assert not any(on)
    assert gc.isenabled()


def test_the_collector_is_off_when_a_row_is_captured(monkeypatch):
    on = []

    @contextlib.contextmanager
    def graph(*_, **__):
        on.append(gc.isenabled())
        yield

    nothing = SimpleNamespace(wait_stream=lambda _: None)
    stands_in = {
        "Stream": lambda: nothing, "current_stream": lambda: nothing, "CUDAGraph": object,
        "stream": lambda _: contextlib.nullcontext(), "graph": graph,
        "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda _: None,
    }  # fmt: skip
    for name, what in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, what)
    timing.replay([lambda: None], None)
    assert on == [False]
    assert gc.isenabled()
