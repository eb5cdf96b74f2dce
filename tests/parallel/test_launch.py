"""The launcher: attempts, exit codes, one line of failure; by itself and under torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fastdml.errors import InputError
from fastdml.parallel import launch
from fastdml.parallel.failure import TOLD

JOBS = Path(__file__).with_name("jobs.py")
ROOT = JOBS.parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def job(how: str, restarts: int = 0, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *before, str(JOBS), how, "4", str(restarts)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_a_job_begins_again_after_a_rank_was_killed():
    done = job("kill", restarts=1)
    assert done.stderr == "fastdml: error: rank 1 was killed by SIGKILL\n"
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"attempt 1 rank {r} of 2 done" for r in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "line"),
    [
        ("kill", 1, "rank 1 was killed by SIGKILL"),
        ("hang", 1, "rank 1 did not answer within 4 s"),
        ("stop", 1, "rank 1 is stopped, as by SIGSTOP"),
        ("input", 2, "rank 1: labels must be below 10"),
    ],
)
def test_a_failure_is_one_line(how, code, line):
    done = job(how)
    assert done.stderr == f"fastdml: error: {line}\n"
    assert (done.returncode, done.stdout) == (code, "")


@pytest.mark.slow
def test_a_defect_keeps_its_traceback_once():
    done = job("raise")
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("fastdml: error: rank 1: ValueError: no such image (jobs.py, line")
    assert done.stderr.count("Traceback") == 1
    assert done.returncode == 1


@pytest.mark.slow
def test_torchruns_own_report_ends_with_the_line():
    done = job("kill", before=("-m", "torch.distributed.run", "--nproc-per-node", "2",
                               "--monitor-interval", "2"))  # fmt: skip
    line = "fastdml: error: rank 1 was killed by SIGKILL"
    assert done.stderr.count(f"{line}\n") == 2  # by a rank, and in the report
    assert line in done.stderr.partition("Root Cause")[2]
    assert done.returncode == 1


@pytest.mark.slow
def test_restarts_by_torchrun_ten_times_out_of_ten():
    for _ in range(10):
        done = job("kill", restarts=0, before=(*TORCHRUN, "--max-restarts", "1"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("attempt 1 rank") == 2


@pytest.mark.slow
def test_ranks_end_with_their_launcher():
    done = job("die")
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while left := subprocess.run(["pgrep", "-f", str(JOBS)], capture_output=True).stdout:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.parametrize(("spoke", "lines"), [(0, 1), (1, 0)])
def test_an_attempt_that_says_nothing_is_spoken_for(monkeypatch, capsys, spoke, lines):
    """Whatever the attempt before it has said."""
    failure = ProcessFailure(0, 1, -signal.SIGKILL, "")

    def elastic_launch(config, program):
        host, port = config.rdzv_endpoint.split(":")
        store = dist.TCPStore(host, int(port), is_master=False)
        store.set(f"fastdml/{TOLD}/0/{spoke}", "1")

        def failed(*_):
            raise ChildFailedError("job", {0: failure, 1: failure})

        return failed

    for name in ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    monkeypatch.setattr(launch, "_quieten", lambda: None)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert launch.launch(["true"], 2, max_restarts=1, timeout=45.5) == 1
    assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "46"  # as long as ranks wait
    line = "fastdml: error: rank 0 was killed by SIGKILL, and 1 more\n"
    assert capsys.readouterr().err == line * lines


@pytest.mark.parametrize(
    ("codes", "code"),
    [([1, 1, -9], 1), ([-9, -9], 1), ([1, 2], 2), ([143, 143], 143), ([1, 130], 130), ([3, 1], 1)],
)
def test_exit_codes(codes, code):
    assert launch.exit_code(codes) == code


def test_gpus_that_are_missing(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    launch.check_devices("auto", 2, "peer=2")
    launch.check_devices("cpu", 4, "peer=4")
    with pytest.raises(InputError, match="--mesh peer=4 takes 4 GPUs, and torch finds 2 here"):
        launch.check_devices("auto", 4, "peer=4")
    with pytest.raises(InputError, match="device cuda:1 is one GPU, and --mesh peer=2 takes 2"):
        launch.check_devices("cuda:1", 2, "peer=2")
    assert [launch.ranks_here(device, 3) for device in ("auto", "cuda", "cuda:1")] == [2, 2, 1]


def test_ranks_of_a_mesh_that_is_chosen(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(launch, "cpus", lambda: 4)
    assert [launch.ranks_here("auto", peers) for peers in (1, 3, 9)] == [1, 3, 4]
    with pytest.raises(InputError, match="takes 2 GPUs, and torch finds 0 here"):
        launch.check_devices("cuda", 2, "peer=2")


HANDLES = "import signal; signal.signal(signal.SIGUSR1, lambda *_: print('saved', flush=True))"
WAITS = "print('ready', flush=True); input()"


def test_a_request_to_save_reaches_a_rank_that_handles_it_and_ends_none():
    """Sent to the launcher, as `kill -USR1` with the number of `fastdml train`."""
    ranks = [
        subprocess.Popen([sys.executable, "-S", "-c", f"{first}; {WAITS}"], text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for first in ("pass", HANDLES)
    ]  # fmt: skip
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["ready\n"] * 2
        with launch._saving_on_request():
            mine = {*launch._children()}
            assert {rank.pid for rank in ranks} <= mine
            assert launch.ask_to_save([ranks[0].pid]) is None
            assert launch.ask_to_save([rank.pid for rank in ranks]) == ranks[1].pid
            assert ranks[1].stdout.readline() == "saved\n"
            assert ranks[0].poll() is None
    finally:
        for rank in ranks:
            rank.communicate("\n")


def test_a_request_to_save_does_not_end_the_launcher(monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "_children", lambda: [1, 2])
    monkeypatch.setattr(launch, "ask_to_save", asked.append)
    with launch._saving_on_request():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert asked == [[1, 2]]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
