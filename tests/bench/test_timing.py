"""The clocks of the benchmarks."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from bench import timing


@pytest.mark.gpu
def test_a_call_that_waits_is_refused_and_the_next_one_is_timed():
    x = torch.ones(1 << 20, device="cuda")
    pool = torch.cuda.graph_pool_handle()
    with pytest.raises(RuntimeError, match="synchroniz"):
        timing.replay([lambda: x.sum().item()], pool)
    assert torch.cuda.get_sync_debug_mode() == 0
    timer = timing.replay([lambda: torch.nn.functional.dropout(x)], pool)
    assert timer(10) > 0


def test_the_collector_is_off_while_calls_are_captured(monkeypatch):
    """The calls, without a device: twice before the capture, then `CALLS_A_GRAPH` times within."""
    now = ["outside"]

    @contextlib.contextmanager
    def capturing(graph, pool):
        now[0] = "capture"
        yield
        now[0] = "outside"

    class Stream:
        def wait_stream(self, other):
            pass

    for name, value in {
        "Stream": Stream, "current_stream": Stream, "CUDAGraph": object, "graph": capturing,
        "stream": lambda stream: contextlib.nullcontext(), "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    seen = []
    timing.replay([lambda: seen.append((now[0], gc.isenabled()))], pool=None)
    assert seen == [("outside", True)] * 2 + [("capture", False)] * timing.CALLS_A_GRAPH
    assert gc.isenabled()


def test_rounds_are_counted_also_where_no_contender_ran():
    assert timing.interleave({}, 1.0) == {}
    assert len(timing.interleave({"sleeps": lambda n: 0.01 * n}, 0.1)["sleeps"]) == 6
