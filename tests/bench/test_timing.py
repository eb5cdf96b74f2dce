"""The clocks of the benchmarks."""

from __future__ import annotations

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


def test_rounds_are_counted_also_where_no_contender_ran():
    assert timing.interleave({}, 1.0) == {}
    assert len(timing.interleave({"sleeps": lambda n: 0.01 * n}, 0.1)["sleeps"]) == 6
