"""The example of a loop on a mesh, and the script for Slurm with stand-ins for Slurm's commands."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = {
    "srun": 'echo $$ > step; export SLURM_NODEID=0; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> told; fi',
    "scancel": 'echo "$@" >> told; kill -TERM "$(cat step)"',
}
SLURM = {
    "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "node[0]", "OMP_NUM_THREADS": "1",
}  # fmt: skip
RUN = (
    "digits --peers resnet8 resnet8 --mesh peer=2,data=1 --folder run --device cpu --epochs 30 "
    "--subset 64 --batch-size 32 --no-tensorboard"
)


def example(rows: int, columns: int) -> list[float]:
    spec = importlib.util.spec_from_file_location("mesh_example", ROOT / "examples" / "mesh.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(rows, columns, epochs=1)


@pytest.mark.parametrize(("rows", "columns"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_the_example_learns_and_all_processes_have_all_peers(rows, columns):
    pytest.importorskip("sklearn")
    first, second = run_ranks(2, example, rows, columns)
    assert first == second
    assert min(first) > 0.4  # chance is 0.1


@pytest.mark.slow
def test_a_job_of_slurm_saves_when_its_time_is_over_and_goes_on(tmp_path):
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, **SLURM}
    environment["PATH"] = f"{tmp_path}:{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    metrics, out = tmp_path / "run" / "metrics.jsonl", tmp_path / "out"

    def job() -> subprocess.Popen:
        script = ["bash", ROOT / "examples" / "train.sbatch", *RUN.split()]
        with out.open("a") as log:
            return subprocess.Popen(
                script, cwd=tmp_path, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    first = job()
    try:
        until = time.monotonic() + 120
        while not (metrics.exists() and '"epoch": 2' in metrics.read_text()):
            assert first.poll() is None, out.read_text()
            assert time.monotonic() < until, out.read_text()
            time.sleep(0.1)
        first.send_signal(signal.SIGUSR1)
        assert first.wait(120) != 0
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    told = (tmp_path / "told").read_text().splitlines()
    assert told == ["--signal=TERM 77", "requeue 77"]
    assert "stopped by SIGTERM" in out.read_text()
    assert not (tmp_path / "run" / "summary.json").exists()

    again = job()
    assert again.wait(240) == 0, out.read_text()
    assert (tmp_path / "told").read_text().splitlines() == told  # not queued a third time
    assert (tmp_path / "run" / "summary.json").exists()
