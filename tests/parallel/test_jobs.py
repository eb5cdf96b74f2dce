"""Whole runs of `fastdml train --mesh` by processes of their own, which are killed, stopped and
asked to end; on one host and on two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hosts
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [
    "-m", "fastdml", "train", "digits", "--peers", "resnet8", "resnet8", "--batch-size", "64",
    "--amp", "off", "--timeout", "5",
]  # fmt: skip
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    "OMP_NUM_THREADS": "1",
}
pytestmark = pytest.mark.slow


def ranks_of(job: int) -> dict[int, int]:
    """The processes of a job's ranks, by their numbers."""
    found = {}
    for line in subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(job)], capture_output=True, text=True
    ).stdout.splitlines():
        variables = Path(f"/proc/{int(line)}/environ").read_bytes().split(b"\0")
        numbers = [v.partition(b"=")[2] for v in variables if v.startswith(b"RANK=")]
        found |= {int(number): int(line) for number in numbers}
    return found


def begin(folder: Path, *options: str, before: Sequence[str] = ()) -> subprocess.Popen:
    """A run that has written its first checkpoint."""
    job = subprocess.Popen(
        [sys.executable, *before, *TRAIN, "--folder", str(folder), *options],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_checkpoint(folder, job)
    return job


def wait_for_checkpoint(folder: Path, *jobs: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not [*folder.glob("checkpoints/*/manifest.json")]:
        ended = [job.communicate() for job in jobs if job.poll() is not None]
        assert not ended, ended
        assert time.monotonic() < end
        time.sleep(0.05)


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "peers").iterdir())]


@pytest.mark.parametrize("before", [(), ("-m", "torch.distributed.run", "--nproc-per-node", "2",
                                         "--max-restarts", "1")])  # fmt: skip
def test_a_run_whose_rank_is_killed_goes_on_by_itself(tmp_path, before):
    mesh = ["--mesh", "peer=2", "--epochs", "3"]
    options = [*mesh, "--max-restarts", "1"]
    undisturbed = begin(tmp_path / "whole", *mesh)
    undisturbed.communicate(timeout=120)
    job = begin(tmp_path / "killed", *options, before=before)
    os.kill(ranks_of(job.pid)[1], signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    line = "fastdml: error: rank 1 (peer resnet8-2) was killed by SIGKILL"
    assert before or errors.count(line) == 1  # torchrun ends the others after 0.1 s
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "whom", "code", "line"),
    [
        (signal.SIGTERM, "job", 143, "fastdml: stopped by SIGTERM"),
        (signal.SIGINT, "job", 130, "fastdml: stopped by SIGINT"),
        (signal.SIGTERM, 1, 143, "fastdml: stopped by SIGTERM"),
        (signal.SIGSTOP, 1, 1, "fastdml: error: rank 1 (peer resnet8-2) is stopped, as by SIGSTOP"),
    ],
)
def test_a_signal_ends_the_job_in_one_line(tmp_path, number, whom, code, line):
    job = begin(tmp_path / "run", "--mesh", "peer=2", "--epochs", "30")
    start = time.monotonic()
    os.kill(job.pid if whom == "job" else ranks_of(job.pid)[whom], number)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == code, errors
    assert sum(text.startswith("fastdml: ") for text in errors.splitlines()) == 1, errors
    assert line in errors
    assert time.monotonic() - start < 5 + 30


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path):
    job = begin(tmp_path / "run", "--mesh", "peer=2", "--epochs", "30")
    ranks = [*ranks_of(job.pid).values()]
    job.kill()
    job.communicate(timeout=60)  # until all have closed the pipe
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not hosts.possible(), reason="network namespaces need the rights of root")
def test_a_node_that_is_lost_leaves_a_smaller_mesh(tmp_path):
    folder = tmp_path / "run"
    options = [
        "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "2",
        "--max-restarts", "3", "--monitor-interval", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-id", "job",
    ]  # fmt: skip
    waits = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    with hosts.two_hosts() as pair:
        jobs = [
            subprocess.Popen(
                ["ip", "netns", "exec", host.name, sys.executable, *options,
                 "--local-addr", host.address, "--rdzv-conf", f"is_host={1 - number},{waits}",
                 *TRAIN, "--folder", str(folder), "--mesh", "peer=2,data=2", "--epochs", "8"],
                env={**ENVIRONMENT, **hosts.variables(host)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for number, host in enumerate(pair)
        ]  # fmt: skip
        wait_for_checkpoint(folder, *jobs)
        for pid in (*ranks_of(jobs[1].pid).values(), jobs[1].pid):
            os.kill(pid, signal.SIGKILL)
        _, errors = jobs[0].communicate(timeout=180)
        jobs[1].communicate()
    assert jobs[0].returncode == 0, errors
    assert "2 ranks go on where 4 were: mesh peer=2,data=1" in errors
    assert "rank 2" in errors
    assert "(peer resnet8-2)" in errors
    assert len(weights(folder)) == 2
    assert load_file(sorted((folder / "peers").iterdir())[0])
