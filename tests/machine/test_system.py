"""What is asked of the system: the compiler, NVIDIA's driver, and work in a child process."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from fastdml.machine import child
from fastdml.machine.compiler import compiler
from fastdml.machine.gpu import Gpus, gpus


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_compiler_that_works(monkeypatch):
    monkeypatch.setenv("CC", "gcc -O1")  # CC may have options
    found = compiler()
    assert found.works
    assert "gcc" in found.name.lower()


def test_compilers_that_do_not(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(program(tmp_path, "cc", "echo 'x: error: no crt1.o' >&2; exit 1")))
    found = compiler()
    assert not found.works
    assert found.failure == "x: error: no crt1.o"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not compiler().works
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert compiler() is None


def test_what_nvidia_smi_says(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus(driver) is None
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\n")
    assert gpus(driver) == Gpus([], "550.54.15", "")
    program(tmp_path, "nvidia-smi", "echo 'NVIDIA H100, 80GB, 580.1'; echo 'NVIDIA A100, 580.1'")
    assert gpus(driver) == Gpus(["NVIDIA H100, 80GB", "NVIDIA A100"], "580.1", "")
    program(tmp_path, "nvidia-smi", "echo 'Failed to initialize NVML'; exit 18")
    assert gpus(driver) == Gpus([], "550.54.15", "Failed to initialize NVML")


WORK = """
import os, sys, time
def rows(arguments):
    print("not a row")
    for k, argument in enumerate(arguments):
        yield {"k": k, "path": __file__}
        if argument == "die":
            os.kill(os.getpid(), 9)
        elif argument == "wait":
            time.sleep(600)
        elif argument == "raise":
            raise ValueError("as told")
"""


@pytest.mark.parametrize(
    ("last", "failure"),
    [("go", None), ("die", "killed by SIGKILL"), ("raise", "ValueError: as told")],
)
def test_rows_come_over_until_the_child_ends(monkeypatch, tmp_path, last, failure):
    (tmp_path / "some_work.py").write_text(WORK)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # the child's too
    found = child.run("some_work", ["go", last, *(["go"] if failure else [])], 60)
    assert [row["k"] for row in found.rows] == [0, 1]
    assert found.failure == failure


def test_a_child_that_does_not_end(monkeypatch, tmp_path):
    (tmp_path / "slow_work.py").write_text(WORK)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = child.run("slow_work", ["wait"], 2)
    assert found.failure == "no answer in 2 s"


def test_a_python_that_cannot_be_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", "no/such/python")
    assert child.run("some_work", [], 1).failure.startswith("cannot start no/such/python")
