"""The scripts for a machine with a CUDA device, without one: what they run and in which order, that
everything is found and set up where a package is absent, and what is left of a run that is cut off.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu, gpu_order, gpu_summary, report

ROOT = Path(__file__).resolve().parents[2]
ABSENT = Path(__file__).with_name("without_extras")
KEY = "2x64x100-forward_backward or cifar-64 or (2_resnet32 and (pairwise or eager or graph))"


def script(name: str, out: Path, *options: str) -> tuple[subprocess.CompletedProcess, Path]:
    """A dry run where packages are absent, and the file with its results."""
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / f"gpu-{name}.sh"), str(out), "--dry-run", *options],
        capture_output=True, text=True, timeout=600, cwd=out.parent,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ABSENT), "COMMIT": "abc"},
    )  # fmt: skip
    return done, out / ("tests.jsonl" if name == "tests" else "benchmarks.jsonl")


@pytest.fixture
def stored(tmp_path):
    """write(*lines): a file with these lines, whose last may be cut off."""

    def write(*lines: dict | str) -> Path:
        path = tmp_path / "stored.jsonl"
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
        return path

    return write


# ---- dry runs


def test_every_test_for_a_device_is_found_and_set_up(tmp_path):
    done, results = script("tests", tmp_path / "out")
    assert done.returncode == 0, done.stdout
    found = gpu_summary.read(results)
    assert set(found.outcomes.values()) == {"skipped"}  # none has a body without a device
    places = [gpu_order.place(test, gpu_order.TESTS) for test in found.collected]
    assert places == sorted(places)
    assert set(places) >= set(range(len(gpu_order.TESTS)))  # every entry is of some use
    assert {test.split("::")[0] for test in found.collected} == set(gpu_order.files(ROOT))
    assert "test_forward_and_backward_in_a_cuda_graph" in "".join(found.collected)
    assert len(found.ended("skipped")) == len(found.collected)
    allowed = re.compile(r"^dry run: |needs a CUDA device|is not installed|needs Pillow")
    assert not [text for text in found.texts.values() if not allowed.search(text)]


def ends_well(results: Path, out: Path, output: str) -> gpu_summary.Stored:
    """A dry run of benchmarks has results, their files, tables, and reasons for what is not there;
    gives back what it stored."""
    found = gpu_summary.read(results)
    assert len(found.passed) == len(found.benchmarks) > 20
    reasons = {found.texts[test] for test in found.ended("skipped")}
    known = ("needs a CUDA device", "not installed", "a graph of its own", "No module named",
             "pip install", "needs pytorch-dml", "has no such")  # fmt: skip
    assert not [text for text in reasons if not any(each in text for each in known)]
    rows = report.by_machine(map(str, out.glob("*-dry-run.json")))
    assert sum(map(len, rows.values())) == len(found.benchmarks)
    assert list(rows) == [found.info["machine_info"]["fastdml"]]
    assert next(iter(rows)).startswith("dry run")
    for title in ("mutual loss, forward + backward, kernel time", "training step, 2 resnet32"):
        assert title in output
    assert len(list(out.iterdir())) <= 8
    return found


@pytest.mark.slow
def test_the_benchmarks_that_matter_most_run_stored_in_their_order(tmp_path):
    out = tmp_path / "out"
    done, results = script("bench", out, "-k", KEY)
    assert done.returncode == 0, done.stdout
    found = ends_well(results, out, done.stdout)
    assert list(found.outcomes) == found.collected == gpu_order.chosen_benchmarks(found.collected)
    assert re.search(r"loss.*2x64x100-forward_backward-wall-ours\]", found.collected[0])
    assert found.collected[-1].endswith("-closed-cg]")
    eager = [test for test in found.collected if not re.search(gpu_order.COMPILED, test)]
    assert found.collected[: len(eager)] == eager
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    known = [next(k for k in ("benchmark", "test", "started", "machine_info", "machine",
                              "collected", "finished") if k in line) for line in lines]  # fmt: skip
    first = known.index("started")
    assert known[first : first + 7] == [
        "started", "machine_info", "benchmark", "test", "started", "benchmark", "test",
    ]  # fmt: skip
    goes_on(results, out)
    stored = json.loads(next(out.glob("loss-*.json")).read_text())
    assert stored["machine_info"]["versions"]["torch"]
    assert re.fullmatch(r"abc|unknown|[0-9a-f]{40}(-dirty)?", stored["commit_info"]["id"])
    one = stored["benchmarks"][0]
    assert len(one["stats"]["data"]) == one["stats"]["rounds"] == 1
    assert one["extra_info"]["bench"] == "loss"


def goes_on(results: Path, out: Path) -> None:
    """Where a run was cut off after two results, the rest joins them."""
    before = gpu_summary.read(results)
    ends = [i for i, line in enumerate(results.read_text().splitlines()) if '"outcome"' in line]
    cut = results.read_text().splitlines()[: ends[-3] + 1]
    results.write_text("\n".join([*cut, '{"test": "cut o']))
    left = gpu_summary.read(results)
    assert len(left.not_run) == 2
    done, again = script("bench", out, "-k", KEY, "--again", str(results))
    assert done.returncode == 0, done.stdout
    found = gpu_summary.read(again)
    assert found.started == [t for t in before.collected if t not in left.passed]
    assert (found.passed, set(found.collected)) == (before.passed, set(before.collected))
    rows = report.by_machine(map(str, out.glob("*-dry-run.json")))
    assert sum(map(len, rows.values())) == len(before.benchmarks)


@pytest.mark.slow
def test_every_benchmark_runs_in_its_smallest_form(tmp_path):
    out = tmp_path / "out"
    done, results = script("bench", out)
    assert done.returncode == 0, done.stdout
    found = ends_well(results, out, done.stdout)
    assert list(found.outcomes) == found.collected
    places = {gpu_order.place(test, gpu_order.BENCHMARKS) for test in found.collected}
    assert places == set(range(len(gpu_order.BENCHMARKS)))
    assert not [test for test in found.collected if re.search(gpu_order.LEFT_OUT, test)]


@pytest.mark.slow
def test_where_the_time_is_over_nothing_starts_and_the_rest_is_named(tmp_path):
    call = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu_plugin", "--dry-run"]
    call += ["--stored", str(tmp_path / "stored.jsonl"), "--until", "1", "--device", "cuda"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    subprocess.run([*call, "bench/bench_step.py"], cwd=ROOT, env=env, capture_output=True)
    found = gpu_summary.read(tmp_path / "stored.jsonl")
    assert found.not_run == found.collected != []
    assert not found.good
    assert f"NOT RUN bench/bench_step.py::test_step ({len(found.collected)})" in gpu_summary.text(
        found
    )


# ---- what is chosen, and in which order


def test_tests_that_run_the_kernels_on_a_device_are_among_them():
    """`DEVICE` is where the kernels run; these helpers launch one there, in the same process. What
    is skipped on a device is not one of them."""
    launches = re.compile(
        r"\bDEVICE\b|^from oracle import (\([^)]*|.*)\b(launched|register|wide)\b", re.M
    )
    texts = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    found = [
        str(path.relative_to(ROOT))
        for path, text in texts.items()
        if path != Path(__file__)
        and launches.search(text)
        and not re.search(r"^pytestmark = .*skipif\(DEVICE == .cuda.", text, re.M)
    ]
    assert sorted(found) == sorted(gpu_order.ON_DEVICE)


def test_the_order_of_tests():
    ids = [
        "tests/train/test_reid.py::test_a", "tests/engine/test_step.py::test_b",
        "tests/kernels/test_every_path.py::test_c", "tests/kernels/test_loss_op.py::test_d",
        "tests/test_loss.py::test_e", "tests/cli/test_help.py::test_f",
    ]  # fmt: skip
    chosen = gpu_order.chosen_tests(ids, {ids[0], ids[1]})
    assert [test[-1] for test in chosen] == ["d", "e", "b", "a", "c"]


# ---- what is left of a run that is cut off


def test_a_run_that_is_cut_off_keeps_what_ended(stored):
    path = stored(
        {"machine": "NVIDIA H100, torch 2.11.0", "commit": "abc"},
        {"collected": ["t::a", "t::b[1]", "t::b[2]", "t::c", "t::d", "t::e"]},
        {"started": "t::a"}, {"test": "t::a", "outcome": "passed", "seconds": 3.0, "text": ""},
        {"started": "t::d"}, {"started": "t::c"},
        {"test": "t::c", "outcome": "failed", "seconds": 1.0, "text": "x\nE   assert 1 == 2\nx"},
        {"test": "t::c", "outcome": "passed", "seconds": 0.0, "text": ""},  # its teardown
        {"started": "t::e"}, '{"test": "t::e", "outco',
    )  # fmt: skip
    found = gpu_summary.read(path)
    assert (found.passed, found.ended("failed")) == ({"t::a"}, ["t::c"])
    assert (found.cut_off, found.not_run) == (["t::d", "t::e"], ["t::b[1]", "t::b[2]"])
    lines = gpu_summary.text(found).splitlines()
    assert lines[:2] == ["FAILED t::c", "E   assert 1 == 2"]
    assert {"CUT OFF t::d", "CUT OFF t::e", "NOT RUN t::b (2)"} <= set(lines)
    assert lines[-1] == "1 failed, 1 passed, 2 not run"
    assert not found.good


@pytest.mark.parametrize("outcome", ["passed", "skipped", "failed", "not run", None])
def test_a_run_is_good_where_nothing_failed_and_nothing_is_left(stored, outcome):
    ended = [] if outcome is None else [{"test": "t::a", "outcome": outcome, "text": ""}]
    assert gpu_summary.read(stored({"collected": ["t::a"]}, *ended)).good == (
        outcome in ("passed", "skipped")
    )


def test_nothing_collected_is_not_good(stored):
    found = gpu_summary.read(stored({"machine": "a CPU"}))
    assert not found.good
    assert "nothing was collected" in gpu_summary.text(found)


def test_results_are_named_after_the_device_and_read_as_those_of_any_run(stored, tmp_path):
    where = "NVIDIA H100 80GB HBM3, CPU threads 16, torch 2.11.0+cu130"
    rows = [("bench/bench_step.py::test_step[a]", "step"), ("bench/bench_data.py::test_data", "x")]
    path = stored(
        {"machine_info": {"fastdml": where}, "commit_info": {"id": "abc"}, "version": "5"},
        *({"benchmark": {"fullname": name, "extra_info": {"bench": kind},
                         "stats": {"median": 2.0}}} for name, kind in rows),
    )  # fmt: skip
    files = gpu_summary.write_results(gpu_summary.read(path), tmp_path)
    assert [file.name for file in files] == [
        "step-nvidia-h100-80gb-hbm3.json", "data-nvidia-h100-80gb-hbm3.json",
    ]  # fmt: skip
    assert report.load(str(files[0])) == ([{"bench": "step", "median": 2.0}], where)


@pytest.mark.parametrize("stubborn", [False, True])
def test_what_outlasts_its_time_is_interrupted_then_killed(tmp_path, stubborn):
    """It has ended when `run` returns, and so has what it started."""
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, {"signal.SIG_IGN" if stubborn else "signal.default_int_handler"})
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    now = time.time()
    log = tmp_path / "log.txt"
    gpu.run([sys.executable, "-c", code], dict(os.environ), log, now + 3, now + 4)
    child, *rest = log.read_text().split()
    assert rest == ([] if stubborn else ["interrupted"])
    for _ in range(100):  # until whoever inherits it has taken notice
        if not Path("/proc", child).exists() or "Z" in Path("/proc", child, "stat").read_text():
            return
        time.sleep(0.05)
    os.kill(int(child), signal.SIGKILL)
    pytest.fail("it left a process behind")


@pytest.mark.parametrize(("machine", "name"), [
    ("NVIDIA H100 80GB HBM3, CPU threads 16", "nvidia-h100-80gb-hbm3"),
    ("dry run, whose figures mean nothing, AMD EPYC", "dry-run"),
])  # fmt: skip
def test_a_device_in_a_files_name(machine, name):
    assert gpu_summary.device_name(machine) == name


def test_without_a_device_the_scripts_say_what_does(tmp_path):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu-tests.sh"), str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no CUDA device; --dry-run does without one" in done.stderr
