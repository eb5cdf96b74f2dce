"""The pytest plugin of the GPU scripts: an order, a time limit, and results stored as they come.

Every line of --stored FILE is a JSON object: first what ran where (`machine`), then the tests that
were collected (`collected`), and as each starts and ends `started` and `test`. A benchmark's
samples follow in `benchmark`, as pytest-benchmark writes them; `finished` ends it.
`bench.gpu_summary` reads it, whole or cut off.

A test that takes longer than --longest, and one after which the device reports an error, ends its
process: a CUDA context with an error fails every later test. pytest-xdist replaces the process;
`bench.gpu` starts pytest again where there is none.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_order, gpu_summary, report

OUT_OF_TIME = "not run: the time is over"
NO_BODY = "dry run: set up, and not run"
KEPT = 6000  # characters of a failure
STDERR = pytest.StashKey[int]()  # a file descriptor that pytest does not capture


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU scripts")
    group.addoption("--stored", metavar="FILE", help="append results to this file as they come")
    group.addoption("--until", type=float, help="start no test after this time (Unix seconds)")
    group.addoption("--longest", type=float, help="seconds after which a test ends its process")
    group.addoption(
        "--done", type=int, default=0, metavar="N",
        help="without the tests that ended in the first N lines of --stored",
    )  # fmt: skip
    group.addoption(
        "--dry-run", action="store_true",
        help="no device: tests are set up and not run, benchmarks run in their smallest form",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)
    path = config.getoption("--stored")
    if path and not hasattr(config, "workerinput"):  # a process of xdist's reports to its parent
        config.pluginmanager.register(Store(Path(path), config), "gpu_store")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_id = {item.nodeid: item for item in items}
    benchmarks = [test for test in by_id if test.startswith("bench/")]
    tests = [test for test in by_id if not test.startswith("bench/")]
    marked = {test for test in tests if by_id[test].get_closest_marker("gpu")}
    chosen = gpu_order.chosen_tests(tests, marked) + gpu_order.chosen_benchmarks(benchmarks)
    if done := config.getoption("--done"):
        ended = gpu_summary.read(config.getoption("--stored"), done).outcomes
        chosen = [test for test in chosen if test not in ended]
    config.hook.pytest_deselected(items=[by_id[test] for test in by_id.keys() - set(chosen)])
    items[:] = [by_id[test] for test in chosen]


def device_error() -> str | None:
    """What the device has to say against the work it was given."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error)
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    if longest := item.config.getoption("--longest"):
        faulthandler.dump_traceback_later(longest, exit=True, file=item.config.stash[STDERR])
    try:
        result = yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    if item.config.getoption("--longest") and (error := device_error()):
        text = f"E   the device reports an error after this test: {error}"
        item.ihook.pytest_runtest_logreport(
            report=pytest.TestReport(
                item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", text,
                "teardown",
            )
        )  # fmt: skip
        os.write(item.config.stash[STDERR], f"\n{item.nodeid}: {text}\n".encode())
        os._exit(1)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("--until")
    if until and time.time() > until:
        pytest.skip(OUT_OF_TIME)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    """In a dry run a fixture that calls CUDA ends the setup of its test."""
    try:
        return (yield)
    except (AssertionError, RuntimeError) as error:  # a torch without CUDA asserts
        if request.config.getoption("--dry-run") and re.search("CUDA|NVIDIA", str(error)):
            pytest.skip(f"dry run: its fixture {request.fixturename} needs a CUDA device")
        raise


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    if pyfuncitem.config.getoption("--dry-run") and not pyfuncitem.nodeid.startswith("bench/"):
        pytest.skip(NO_BODY)


def output(report: pytest.TestReport) -> str:
    """The end of what a failed test printed."""
    if not report.failed:
        return ""
    return "".join(f"\n-- {name}\n{text[-KEPT // 3 :]}" for name, text in report.sections)


class Store:
    def __init__(self, path: Path, config: pytest.Config) -> None:
        self.path = path
        self.config = config
        self.has_info = self.has_collected = False
        self.started: dict[str, float] = {}

    def write(self, **what: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(what, default=str) + "\n")

    def pytest_sessionstart(self) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.write(machine=report.machine(device), commit=report.commit())

    def pytest_sessionfinish(self) -> None:
        self.write(finished=True)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self.write(collected=[item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        if not self.has_collected:  # each process finds the same
            self.has_collected = True
            self.write(collected=list(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", text=str(report.longrepr)[-3000:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.started[nodeid] = time.time()
        self.write(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "???":  # pytest-xdist's, of a process that is gone
            seconds = time.time() - self.started.get(report.nodeid, time.time())
            longest = self.config.getoption("--longest")
            self.write(**gpu_summary.died(report.nodeid, seconds, longest))
        elif report.when == "call" or not report.passed:
            text = "" if report.passed else str(report.longrepr)
            if report.skipped and isinstance(report.longrepr, tuple):
                text = report.longrepr[2].removeprefix("Skipped: ")
            outcome = "not run" if text == OUT_OF_TIME else report.outcome
            self.write(
                test=report.nodeid, outcome=outcome, seconds=round(report.duration, 3),
                text=text[-KEPT:] + output(report),
            )  # fmt: skip

    def benchmark(self, stats: Any) -> None:
        """What a benchmark recorded, and before the first one what stands above them in a file of
        pytest-benchmark's."""
        if not self.has_info:
            self.has_info = True
            session, hook = self.config._benchmarksession, self.config.hook
            commit_info = hook.pytest_benchmark_generate_commit_info(config=self.config)
            hook.pytest_benchmark_update_commit_info(config=self.config, commit_info=commit_info)
            whole = hook.pytest_benchmark_generate_json(
                config=self.config, benchmarks=[], include_data=True,
                machine_info=session.get_machine_info(), commit_info=commit_info,
            )  # fmt: skip
            self.write(**whole)
        self.write(benchmark=stats.as_dict(include_data=True))
