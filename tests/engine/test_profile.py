"""The page of a profile from spans written by hand, and from real steps."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer, make_step
from fastdml.engine.profile import Profile, Span, busy, page
from fastdml.loss import MutualLoss

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def span(start, end, name="kernel", branch=7):
    return Span(name, start, end, end - start, branch)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=12))
def test_busy_time_is_the_union(pairs):
    spans = [span(a, a + length) for a, length in pairs]
    marked = {t for s in spans for t in range(int(s.start), int(s.end))}
    assert busy(spans) == len(marked)


def test_two_peers_side_by_side_give_an_overlap_of_two():
    spans = [span(0, 1000, "conv", 7), span(0, 1000, "conv", 13), span(1000, 2000, "norm", 7),
             span(1000, 2000, "a" * 200, 13)]  # fmt: skip
    text = page(spans, 2, CUDA, waits=1)
    values = dict(line.split("  ", 1) for line in text.splitlines() if "  " in line.strip())
    values = {k.strip(): v.strip() for k, v in values.items()}
    assert values["wall time a step"] == "1.000 ms"
    assert values["kernels and copies a step"] == "2.0"
    assert values["their time a step"] == "2.000 ms"
    assert values["busy"] == "100.0 % of the wall time"
    assert values["overlap factor"].startswith("2.00 =")
    assert values["host waits a step"] == "0.5"
    assert values["streams"] == "1.000 ms, 1.000 ms"
    assert max(map(len, text.splitlines())) < 100
    idle = page([span(0, 500), span(1500, 2000)], 1, CUDA)
    assert "50.0 % of the wall time" in idle
    assert "0.50 =" in idle


def test_nothing_recorded():
    assert "before the profiler recorded" in page([], 3, CPU)


@pytest.mark.parametrize(("steps", "expected"), [(40, 10), (12, 10), (5, 3), (1, None)])
def test_records_steps_within_an_epoch(tmp_path, steps, expected):
    with Profile(tmp_path, CPU, True, steps) as profile:
        for _ in range(steps):
            torch.ones(64, 64) @ torch.ones(64, 64)
            profile.step()
    if expected is None:
        assert list(tmp_path.iterdir()) == []
        return
    text = (tmp_path / "profile.txt").read_text()
    assert text.splitlines()[0].split() == ["steps", "recorded", str(expected)]
    assert "aten::mm" in text
    counts = [line for line in text.splitlines() if line.endswith("  aten::mm")]
    assert counts[0].split()[1] == "1.0"
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_on_cuda_the_host_waits_for_nothing_and_a_graph_is_one_launch_a_step(tmp_path, execution):
    cohort = Cohort(["resnet8"] * 2, 10).cuda().train()
    optimizer = make_optimizer(cohort, lr=0.01)
    step = make_step(cohort, MutualLoss(), optimizer, execution=execution)
    x, y = torch.randn(64, 3, 32, 32, device="cuda"), torch.zeros(64, dtype=int, device="cuda")
    with Profile(tmp_path, CUDA, True, 40) as profile:
        for _ in range(40):
            step(x, y)
            profile.step()
    lines = (tmp_path / "profile.txt").read_text().splitlines()
    values = {line[:26].strip(): line[26:].split()[0] for line in lines[:8]}
    assert values["steps recorded"] == "10"
    assert float(values["kernels and copies a step"]) > 50
    assert float(values["host waits a step"]) == 0
    assert float(values["overlap factor"]) > 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    launches = sum(e.get("name") == "cudaGraphLaunch" for e in events)
    assert launches in ((9, 10, 11) if execution == "graph" else (0,))


def test_unasked_it_does_nothing(tmp_path):
    with Profile(tmp_path, CPU, False, 40) as profile:
        profile.step()
    assert list(tmp_path.iterdir()) == []
