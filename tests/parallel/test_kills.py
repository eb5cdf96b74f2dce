"""Jobs of ranks that are killed at random moments, also within saves, and ranks that are killed or
stopped: the others end in time, no checkpoint counts that is not whole, and the run goes on to the
same bits."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from killing import PARTS, job, killed_and_resumed
from mesh_trainings import furthest, outcome, without_statistics

SAVING = {"save_every_steps": 1, "drop": 0.2, "optimizer": "adam", "lr": 0.01}
KINDS = ["job", "rank", "stop"]


def unbroken(folder: Path, sizes: tuple[int, int]) -> tuple[dict[str, Any], float]:
    """What a run leaves that nothing breaks, and its seconds."""
    begun = time.monotonic()
    ended = job(sizes[0] * sizes[1], sizes, folder, SAVING | {"accumulate": PARTS // sizes[1]})
    assert ended.fine, ended
    return outcome(folder), time.monotonic() - begun


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """On 2 x 2."""
    return unbroken(tmp_path_factory.mktemp("whole") / "run", (2, 2))


def test_three_of_each(tmp_path):
    """A run of each kind of kill, at the same time: most of it is waiting for ranks that end."""
    expected, seconds = unbroken(tmp_path / "whole", (2, 1))

    def killed(kind: str) -> tuple[list[str], float]:
        root = tmp_path / kind
        root.mkdir()
        said = killed_and_resumed(root, 3 * [kind], [(2, 1)], Random(kind), SAVING, seconds)
        return [*said], furthest(outcome(root / "killed"), expected)

    with ThreadPoolExecutor(len(KINDS)) as runs:
        assert [*runs.map(killed, KINDS)] == len(KINDS) * [([], 0)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_fifty_on_other_numbers_of_ranks_too(whole, tmp_path, seed):
    """Ten kills a run, each on 1, 2 or 4 ranks."""
    expected, seconds = whole
    random = Random(seed)
    kinds = [random.choice(KINDS) for _ in range(10)]
    meshes = [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2)]
    said = killed_and_resumed(tmp_path, kinds, meshes, random, SAVING, seconds)
    assert [*said] == []
    found = outcome(tmp_path / "killed")
    assert furthest(without_statistics(found), without_statistics(expected)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_of_each_on_one_mesh(whole, tmp_path, kind):
    """Bit for bit."""
    expected, seconds = whole
    for seed in range(5):
        random = Random(seed)
        root = tmp_path / str(seed)
        root.mkdir()
        said = killed_and_resumed(root, 10 * [kind], [(2, 2)], random, SAVING, seconds)
        assert [*said] == []
        assert furthest(outcome(root / "killed"), expected) == 0
