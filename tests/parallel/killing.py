"""Jobs of ranks that are killed or stopped at any moment, and started again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch.distributed as dist
from mesh_trainings import made, train
from ranks import PRELOADED, become

from fastdml.errors import InputError
from fastdml.parallel.failure import line_of
from fastdml.train import checkpoint_folder

ENDS = 20.0  # seconds in which ranks end that have lost one, above the mesh's timeout
PARTS = 4  # of a batch, on all meshes
LIMIT = 90.0  # seconds that no training here needs


@dataclass
class Ended:
    codes: list[int]  # of the ranks, below 0 the signal
    lines: list[str]  # what each said last
    seconds: float  # from the kill, or else from the start

    @property
    def fine(self) -> bool:
        return not any(self.codes)


def job(
    world: int,
    sizes: tuple[int, int],
    folder: Path,
    settings: dict[str, Any],
    timeout: float = 30.0,
    kill: tuple[str, int, float] | None = None,
) -> Ended:
    """A training by ranks of its own. kill: "job" (all ranks at once), "rank" or "stop" (one,
    by SIGKILL or SIGSTOP), the rank, and after how many seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = [folder.with_name(f"{folder.name}.{rank}.said") for rank in range(world)]
    ranks = []
    for rank in range(world):
        said[rank].unlink(missing_ok=True)
        arguments = (rank, world, store.port, said[rank], sizes, folder, settings, timeout)
        ranks.append(context.Process(target=_rank, args=arguments))
        ranks[-1].start()
    begun, limit = time.monotonic(), LIMIT
    try:
        if kill is not None:
            kind, victim, seconds = kill
            _wait(ranks, seconds)
            number = signal.SIGSTOP if kind == "stop" else signal.SIGKILL
            for rank in ranks if kind == "job" else [ranks[victim]]:
                if rank.is_alive():
                    os.kill(rank.pid, number)
            begun, limit = time.monotonic(), timeout + ENDS
        others = [r for i, r in enumerate(ranks) if kill is None or i != kill[1]]
        _wait(others, limit)
        hung = [i for i, r in enumerate(ranks) if r in others and r.is_alive()]
        seconds = time.monotonic() - begun
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert not hung, f"ranks {hung} did not end within {limit} s"
    lines = [path.read_text() if path.exists() else "" for path in said]
    return Ended([rank.exitcode for rank in ranks], lines, seconds)


def _wait(ranks: list[Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))


def _rank(
    rank: int,
    world: int,
    port: int,
    said: Path,
    sizes: tuple[int, int],
    folder: Path,
    settings: dict[str, Any],
    timeout: float,
) -> None:
    become(rank, world, port)
    try:
        mesh = made(*sizes, timeout=timeout)
        train(folder, mesh, **settings)
        dist.destroy_process_group()
    except BaseException as error:
        said.write_text(line_of(error))
        os._exit(1)
    os._exit(0)


def check_checkpoints(folder: Path) -> None:
    """Whatever a kill leaves: every folder with a manifest has all its files, as it was written."""
    for path in checkpoint_folder.whole_folders(folder):
        checkpoint_folder.check_files(path, checkpoint_folder.read_manifest(path).files)


def killed_and_resumed(
    root: Path,
    kinds: list[str],
    meshes: list[tuple[int, int]],
    random: Random,
    settings: dict[str, Any],
    seconds: float,
) -> Iterator[str]:
    """One run that is killed so many times, each time on one of these meshes and of these kinds,
    and goes on to its end. Yields what was wrong on the way."""
    folder = root / "killed"
    for number, kind in enumerate(kinds):
        sizes = random.choice(meshes)
        world = sizes[0] * sizes[1]
        timeout = 1.0 if kind == "stop" else 30.0
        parts = {"accumulate": PARTS // sizes[1]}
        kill = (kind, random.randrange(world), random.uniform(0.05, seconds))
        ended = job(world, sizes, folder, settings | parts, timeout, kill)
        told = f"kill {number} ({kind} of {sizes} after {kill[2]:.3f} s)"
        try:
            check_checkpoints(folder)
        except InputError as error:
            yield f"{told}: {error}"
        for rank, (code, line) in enumerate(zip(ended.codes, ended.lines, strict=True)):
            if rank == kill[1] or kind == "job" or code == 0:
                continue
            if code > 0 and (not line or "\n" in line):
                yield f"{told}: rank {rank} ended with {code} and said {line!r}"
    sizes = meshes[-1]
    parts = {"accumulate": PARTS // sizes[1]}
    ended = job(sizes[0] * sizes[1], sizes, folder, settings | parts)
    if not ended.fine:
        yield f"the end: {ended}"
