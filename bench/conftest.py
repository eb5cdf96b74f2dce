"""Options, storage and the closing table of the benchmarks.

`pytest bench` measures a quick set in about three minutes, `pytest bench --full` everything. Stored
with pytest-benchmark's own --benchmark-json=FILE; `python -m bench.report FILE` prints the same
tables from there. Times are reported, never judged: a benchmark fails where a result is wrong.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

from bench import report, timing

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("fastdml")
    group.addoption("--full", action="store_true", help="every shape and model, not the quick set")
    group.addoption("--device", help="cpu or cuda (default: cuda where there is one)")
    group.addoption("--data", default="data", help="folder of CIFAR-100 (default: data)")


def pytest_configure(config):
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True  # its table has no ratios
    session = getattr(config, "_benchmarksession", None)
    if session:
        session.quiet = True


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.benchmark(timer=timing.CLOCK))


def chosen_device(config) -> torch.device:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(config.getoption("--device") or default)


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return chosen_device(request.config)


@pytest.fixture
def record(benchmark, request):
    """record(samples, group, **facts): the samples of one contender, in seconds."""

    def record(samples: list[float], group: str, **facts) -> None:
        benchmark.group = group
        benchmark.extra_info.update(facts)
        timing.hand_over(benchmark, samples)
        request.config.stash[ROWS].append({**facts, "median": statistics.median(samples)})

    return record


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # whose machine it is does not matter
    machine_info["fastdml"] = report.machine(chosen_device(config))


def pytest_terminal_summary(terminalreporter, config):
    if rows := config.stash[ROWS]:
        terminalreporter.write_line("")
        terminalreporter.write_line(report.tables(rows, report.machine(chosen_device(config))))
