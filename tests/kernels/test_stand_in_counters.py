"""The counters that launches get, as the driver sees them.

Triton's real compiler and launcher run on a stand-in for the driver (`bench/stand_in`).
"""

from __future__ import annotations

import pytest
import torch
from fastdml_kernels import counters
from fastdml_kernels.counters import Counters
from on_stand_in import scenarios_of

from fastdml import mutual_loss


@pytest.fixture(scope="module")
def seen():
    return scenarios_of("test_stand_in_counters")


def counters_of_launches(gpu, launches: int) -> list[int]:
    gpu.clear()
    logits, labels = [torch.randn(8, 10) for _ in range(2)], torch.randint(10, (8,))
    for _ in range(launches):
        mutual_loss(logits, labels)
    return [launch.arguments["counter"] for launch in gpu.launches()]


def streams_and_captures(gpu):
    own = [counters_of_launches(gpu, 2)]
    with gpu.on_stream(5):
        own.append(counters_of_launches(gpu, 2))
        with gpu.capture():
            own += [[counter] for counter in counters_of_launches(gpu, 3)]
        own[1] += counters_of_launches(gpu, 1)
    return {"counters": own, "kernels": gpu.kernels}


def graphs_that_end(gpu):
    counters._made.clear()
    Counters.SLOTS, was = 4, Counters.SLOTS
    try:
        stream = counters_of_launches(gpu, 1)
        with gpu.capture() as first:
            of_first = counters_of_launches(gpu, 2)
        with gpu.capture():
            of_second = counters_of_launches(gpu, 3)
        gpu.end_graph(first)
        with gpu.capture():
            of_third = counters_of_launches(gpu, 2)
        return stream, of_first, of_second, of_third
    finally:
        Counters.SLOTS = was
        counters._made.clear()


def first_call_in_a_capture(gpu):
    counters._made.clear()
    with gpu.capture():
        try:
            counters_of_launches(gpu, 1)
        except RuntimeError as error:
            return str(error)


def test_one_for_each_stream_and_each_captured_launch(seen):
    was = seen(streams_and_captures)
    assert all(len(set(own)) == 1 for own in was["counters"])
    each = [own[0] for own in was["counters"]]
    assert len(set(each)) == 5
    assert all(counter % 16 == 0 for counter in each)
    assert was["kernels"].count("register_rows") == 1  # no other one in a capture


def test_those_of_a_graph_come_back_when_it_is_over(seen):
    stream, of_first, of_second, of_third = seen(graphs_that_end)
    assert len({*stream, *of_first, *of_second}) == 6
    assert set(of_third) == set(of_first)


def test_none_are_made_in_a_capture(seen):
    assert "call the loss once" in seen(first_call_in_a_capture)


SCENARIOS = [streams_and_captures, graphs_that_end, first_call_in_a_capture]
