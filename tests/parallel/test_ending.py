"""What is left of a mesh when a process ends: nothing that needs the interpreter."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from whole_runs import trained

from fastdml import Cohort, MutualLoss
from fastdml.cli import main, ranks
from fastdml.engine import make_optimizer, make_step
from fastdml.errors import InputError
from fastdml.parallel import ending, make_mesh, total
from fastdml.parallel.failure import explained
from fastdml.train import checkpoint_folder
from fastdml.train.callbacks import Callback

ROOT = Path(__file__).resolve().parents[2]
KEPT: list[Any] = []  # as a script's globals are, to its end


def gloo_threads() -> int:
    """The threads of this process that run gloo's collectives and free their tensors."""
    tasks = Path("/proc/self/task").glob("*/comm")
    return sum("gloo_runloop" in path.read_text() for path in tasks)


def a_script(keep: bool, destroy: bool) -> tuple[int, int, int]:
    """The number of gloo's threads before the end of a script, in a process forked from it, and
    after what the interpreter does first when it ends."""
    mesh = make_mesh(1, 2, timeout=30.0)
    peers = [torch.nn.Linear(4, 3) for _ in range(2)]
    cohort = Cohort(peers, num_classes=3)
    mesh.distribute(cohort)
    step = make_step(cohort, MutualLoss(), make_optimizer(cohort, "sgd", lr=0.1), mesh=mesh)
    output = total(step(torch.randn(6, 4), torch.randint(3, (6,))), mesh)
    if keep:
        KEPT.extend([mesh, cohort, step])
    if destroy:
        dist.destroy_process_group()
    del mesh, cohort, step, output
    before = gloo_threads()
    ending._end(os.getppid())
    elsewhere = gloo_threads()
    atexit._run_exitfuncs()
    return before, elsewhere, gloo_threads()


@pytest.mark.parametrize(("keep", "destroy"), [(True, False), (False, True)])
def test_the_threads_of_a_mesh_have_ended_before_the_interpreter_does(keep, destroy):
    for before, elsewhere, after in run_ranks(2, a_script, keep, destroy):
        assert before == elsewhere > 0
        assert after == 0


def a_run(folder: Path) -> int:
    trained("data=2", folder)
    atexit._run_exitfuncs()
    return gloo_threads()


def test_so_have_those_of_a_run(tmp_path):
    assert run_ranks(2, a_run, tmp_path / "run") == [0, 0]


def a_failure() -> float:
    """Seconds that a rank which fails while it waits for another one takes to end."""
    mesh = make_mesh(1, 2, timeout=30.0)
    store = mesh.store
    if mesh.rank == 1:
        store.wait(["over"])
        return 0.0
    KEPT.append(dist.all_reduce(torch.ones(1), group=mesh.data_group, async_op=True))
    with pytest.raises(ValueError, match="no such image"), explained(mesh):
        raise ValueError("no such image")
    begun = time.monotonic()
    atexit._run_exitfuncs()
    store.set("over", "")
    return time.monotonic() - begun


def test_a_rank_that_fails_does_not_wait_for_others_at_its_end():
    assert max(run_ranks(2, a_failure, timeout=25)) < 20  # less than the mesh's timeout


class Raising(Callback):
    def on_epoch(self, event: Any) -> None:
        raise InputError("enough")


def a_late_save(folder: Path) -> tuple[list[bool], list[str]]:
    """Whether the checkpoints are whole when an error has left a run whose saves take long, and the
    threads that are left."""
    written = checkpoint_folder.write_manifest

    def late(*arguments: Any) -> None:
        time.sleep(0.5)
        written(*arguments)

    checkpoint_folder.write_manifest = late
    try:
        with pytest.raises(InputError, match="enough"):
            trained("data=2", folder, callbacks=[Raising()])
    finally:
        checkpoint_folder.write_manifest = written
    names = [thread.name for thread in threading.enumerate()]
    found = sorted((folder / "checkpoints").iterdir())
    return [(path / "manifest.json").is_file() for path in found], names


def test_an_error_waits_for_the_save_under_way(tmp_path):
    for whole, names in run_ranks(2, a_late_save, tmp_path / "run"):
        assert whole == [True, True]  # before the first step, and of the epoch
        assert "checkpoint" not in names


def test_a_rank_of_the_command_ends_at_once(monkeypatch, capsys):
    class Ended(BaseException):
        pass

    def ended(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", ended)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "_end_with_launcher", lambda: None)
    with pytest.raises(Ended) as stop:
        main(["data"])
    assert stop.value.args == (0,)
    assert "digits" in capsys.readouterr().out


# The threads of gloo run where nobody else wants the one core: the script is at its end first.
STARVED = """
import os, pathlib, sys
from fastdml.parallel import make_mesh
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
mesh = make_mesh(2, 1, timeout=30.0)
for task in pathlib.Path("/proc/self/task").iterdir():
    if int(task.name) != os.getpid():
        os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
for _ in range(3):
    mesh.share("x" * 100)
"""


@pytest.mark.slow
def test_no_rank_is_aborted_whose_threads_are_late(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    (tmp_path / "script.py").write_text(STARVED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "script.py"]
    for _ in range(3):
        job = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert job.returncode == 0, job.stderr
