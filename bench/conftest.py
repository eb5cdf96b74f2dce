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
    if is_dry(config):
        timing.SHORTEST = timing.REST = 0.0
        timing.ROUNDS = 1
    config.option.benchmark_quiet = True  # its table has no ratios
    session = getattr(config, "_benchmarksession", None)
    if session:
        session.quiet = True


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.benchmark(timer=timing.CLOCK))


def is_dry(config) -> bool:
    """A dry run: every benchmark in its smallest form on the CPU, whichever device it is for."""
    return config.getoption("--dry-run", False)


def chosen_device(config) -> torch.device:
    """What is to be measured, by which contenders and sizes are chosen."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(config.getoption("--device") or default)


@pytest.fixture(scope="session")
def dry(request) -> bool:
    return is_dry(request.config)


@pytest.fixture(scope="session")
def device(request, dry) -> torch.device:
    """Where it runs."""
    return torch.device("cpu") if dry else chosen_device(request.config)


@pytest.fixture(scope="session")
def copy_bandwidth(request, device, dry) -> float | None:
    """Bytes a second of a device copy; None where a CPU is measured."""
    if chosen_device(request.config).type != "cuda":
        return None
    return timing.copy_bandwidth(device, 1 << 10 if dry else 1 << 30)


@pytest.fixture
def record(benchmark, request):
    """record(samples, group, **facts): the samples of one contender, in seconds."""

    def record(samples: list[float], group: str, **facts) -> None:
        benchmark.group = group
        benchmark.extra_info.update(facts)
        timing.hand_over(benchmark, samples)
        request.config.stash[ROWS].append({**facts, "median": statistics.median(samples)})
        if store := request.config.pluginmanager.get_plugin("gpu_store"):
            store.benchmark(benchmark.stats)

    return record


def where(config) -> str:
    """The line above the tables."""
    if is_dry(config):
        return "dry run, whose figures mean nothing, " + report.machine(torch.device("cpu"))
    return report.machine(chosen_device(config))


def pytest_benchmark_update_machine_info(config, machine_info):
    device = torch.device("cpu") if is_dry(config) else chosen_device(config)
    machine_info.pop("node", None)  # whose machine it is does not matter
    machine_info["fastdml"] = where(config)
    machine_info["versions"] = report.versions(device)


def pytest_benchmark_update_commit_info(commit_info):
    commit_info["id"] = report.commit()


def pytest_terminal_summary(terminalreporter, config):
    if rows := config.stash[ROWS]:
        terminalreporter.write_line("")
        terminalreporter.write_line(report.tables(rows, where(config)))
