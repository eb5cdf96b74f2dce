"""The scripts for a machine with a CUDA device where something goes wrong there: what hangs, kills
its process or leaves an error on the device costs itself alone, and is named.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu, gpu_summary

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """
[tool.pytest.ini_options]
addopts = "--import-mode=importlib"
python_files = ["test_*.py", "bench_*.py"]
markers = ["gpu: needs a CUDA device"]
"""
# Errors as on a device: each later call fails as well, until the process ends.
FAULTY = """
import os, sys, time
import torch
from pytest import mark

pytestmark = mark.gpu

def refuse():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def broken(*_):
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, refuse

def is_whole():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()

def test_plain_a(): is_whole()
def test_hangs(): time.sleep(600)
def test_plain_b(): is_whole()
def test_access():
    print("block 3, thread 7")
    broken()
    refuse()
def test_plain_c(): is_whole()
def test_access_unseen(): broken()
def test_plain_d(): is_whole()
def test_crashes(): os.kill(os.getpid(), 11)
def test_plain_e(): is_whole()
def test_memory(): raise torch.OutOfMemoryError("Tried to allocate 90 GiB")
def test_plain_f(): is_whole()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A repository whose tests and benchmarks are these; tests may take 3 seconds."""
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    for name in ("tests/test_faulty.py", "bench/bench_faulty.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(FAULTY)
    (tmp_path / "bench" / "conftest.py").write_text("""
def pytest_addoption(parser):
    parser.addoption("--device")
""")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "LONGEST", {"tests": 3, "bench": 3})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tests", "bench"])
def test_what_hangs_crashes_or_breaks_the_device_costs_itself_alone(folder, what):
    stored = folder / "out" / "results.jsonl"
    gpu.begin(stored, None)
    name = "tests/test_faulty.py" if what == "tests" else "bench/bench_faulty.py"
    arguments = argparse.Namespace(dry_run=False, rest=[name])
    gpu.run_all(what, arguments, stored, time.time())
    found = gpu_summary.read(stored)
    log = (folder / "out" / "log.txt").read_text()
    assert found.passed == {f"{name}::test_plain_{letter}" for letter in "abcdef"}, log
    failed = {"hangs", "access", "access_unseen", "crashes", "memory"}
    assert {test.split("::test_")[1] for test in found.ended("failed")} == failed
    assert found.cut_off == found.not_run == []
    assert not found.good
    assert len(found.collected) == 11
    why = {test.split("::test_")[1]: found.texts[test] for test in found.ended("failed")}
    assert "where each thread was" in why["hangs"]
    assert "Timeout (0:00:03)" in log
    assert "in test_hangs" in log
    assert "in test_crashes" in log
    assert "illegal memory access" in why["access"]
    assert "block 3, thread 7" in why["access"]  # what it printed
    assert "the device reports an error after this test" in why["access_unseen"]
    assert "Tried to allocate 90 GiB" in why["memory"]
    assert f"FAILED {name}::test_hangs\nE   " in gpu_summary.text(found)


@pytest.mark.slow
def test_what_passed_is_not_run_again_however_often_a_run_goes_on(folder):
    stored = folder / "out" / "results.jsonl"
    rest = ["bench/bench_faulty.py", "-k"]
    ran = []
    for chosen in ("plain_a or plain_b", "plain_a or plain_b or plain_c", "plain_c or plain_d"):
        gpu.begin(stored, str(stored) if ran else None)
        arguments = argparse.Namespace(dry_run=False, rest=[*rest, chosen])
        gpu.run_all("bench", arguments, stored, time.time())
        found = gpu_summary.read(stored)
        ran.append("".join(test[-1] for test in found.started))
    assert ran == ["ab", "c", "d"]
    assert [test[-1] for test in found.collected] == list("abcd")
    assert found.good


def test_a_file_goes_on_with_what_passed_and_its_figures(tmp_path):
    lines = [
        {"machine": "H100", "commit": "x"}, {"collected": ["t::a", "t::b", "t::c"]},
        {"started": "t::a"}, {"machine_info": {}}, {"benchmark": {"fullname": "t::a"}},
        {"test": "t::a", "outcome": "passed"}, {"benchmark": {"fullname": "t::b"}},
        {"test": "t::b", "outcome": "failed", "text": "E   no"},
    ]  # fmt: skip
    path = tmp_path / "benchmarks.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    gpu.begin(path, str(path))
    found = gpu_summary.read(path)
    assert (found.outcomes, found.collected) == ({"t::a": "passed"}, ["t::a"])
    assert found.benchmarks == [{"fullname": "t::a"}]
    with path.open("a") as file:
        file.write('{"machine": "H200"}\n')
    found = gpu_summary.read(path)  # another device's figures are not in its files
    assert (found.passed, found.benchmarks) == ({"t::a"}, [])


def call(*arguments: str, **options) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", str(ROOT / "bench/gpu-bench.sh"), *arguments],
        env=env, capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("arguments", "line"), [
    (["FILE", "--dry-run"], "OUT: cannot write to"),
    (["NEW", "--dry-run", "--again", "MISSING"], "--again: cannot read"),
    (["NEW", "--dry-run", "--again", "FILE"], "has no results: give a tests.jsonl or"),
    (["NEW", "--summary"], "--summary: there is no"),
])  # fmt: skip
def test_a_wrong_argument_is_one_line(tmp_path, arguments, line):
    (tmp_path / "file").write_text('[]\n{"a": 1}\n{"b')
    named = {"FILE": tmp_path / "file", "NEW": tmp_path / "new", "MISSING": tmp_path / "none"}
    done = call(*(str(named.get(each, each)) for each in arguments))
    assert done.returncode == 2
    assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_stopped_run_left_is_told_without_a_device(tmp_path):
    (tmp_path / "benchmarks.jsonl").write_text(
        json.dumps({"collected": ["bench/bench_x.py::test_a"]}) + '\n{"star'
    )
    done = call(str(tmp_path), "--summary")
    assert done.returncode == 1
    assert "NOT RUN bench/bench_x.py::test_a (1)" in done.stdout


def test_a_script_that_is_stopped_tells_what_it_has(tmp_path):
    """Nothing of it runs on, and what was known is in the summary."""
    out = tmp_path / "with a space"
    process = subprocess.Popen(
        ["bash", str(ROOT / "bench/gpu-bench.sh"), str(out), "--dry-run", "bench/bench_loss.py"],
        env={**os.environ, "PYTHON": sys.executable}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    stored = out / "benchmarks.jsonl"
    while process.poll() is None and not (stored.exists() and '"outcome"' in stored.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # as Ctrl-C does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == gpu.STOPPED
    assert "passed" in output
    assert "NOT RUN bench/bench_loss.py::" in output
    assert list(out.glob("loss-*.json"))
