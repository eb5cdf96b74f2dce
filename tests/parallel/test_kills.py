"""Jobs of ranks that are killed at random moments, also within saves, and ranks that are killed or
stopped: the others end in time, no checkpoint counts that is not whole, and the run goes on to the
same bits."""

from __future__ import annotations

import time
from random import Random

import pytest
from killing import job, killed_and_resumed
from mesh_trainings import furthest, outcome, without_statistics

SAVING = {"save_every_steps": 1, "drop": 0.2, "optimizer": "adam", "lr": 0.01}
KINDS = ["job", "rank", "stop"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run leaves that nothing breaks, and its seconds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    begun = time.monotonic()
    ended = job(4, (2, 2), folder, SAVING | {"accumulate": 2})
    assert ended.fine, ended
    return outcome(folder), time.monotonic() - begun


def test_three_of_each(whole, tmp_path):
    expected, seconds = whole
    random = Random(1)
    kinds = random.sample(3 * KINDS, 9)
    said = killed_and_resumed(tmp_path, kinds, [(2, 2)], random, SAVING, seconds)
    assert [*said] == []
    assert furthest(outcome(tmp_path / "killed"), expected) == 0


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
