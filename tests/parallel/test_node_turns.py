"""Data is prepared by the first rank of a node, and the others wait for as long as it works."""

from __future__ import annotations

import os
import signal
import time

from ranks import run_ranks

from fastdml.errors import InputError
from fastdml.parallel import RankLost, make_mesh
from fastdml.parallel.failure import explained
from fastdml.train import TrainConfig
from fastdml.train.ranks import ranks_of

TIMEOUT = 1.0


def in_turn(node: int) -> list[float]:
    """Two nodes of `node` ranks; the first ranks work for longer than the timeout."""
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % node)
    mesh = make_mesh(data=4, timeout=TIMEOUT)
    ranks = ranks_of(TrainConfig(), 2, mesh)
    with ranks.in_turn():
        begun = time.time()
        if mesh.local_rank == 0:
            time.sleep(1.5 * TIMEOUT)
        ended = time.time()
    return [begun, ended, time.time()]


def test_the_first_rank_of_a_node_is_alone_however_long_it_takes():
    found = run_ranks(4, in_turn, 2)
    for first, second in (found[:2], found[2:]):
        assert second[0] >= first[1]  # begins when the first has ended
    assert min(after for _, _, after in found) >= max(ended for _, ended, _ in found)


def failing(how: str) -> str:
    mesh = make_mesh(data=2, timeout=TIMEOUT)
    ranks = ranks_of(TrainConfig(), 2, mesh)
    try:
        with explained(mesh), ranks.in_turn():
            if how == "refuses":
                raise InputError("the archive is damaged")
            os.kill(os.getpid(), signal.SIGSTOP)
    except (InputError, RankLost) as error:
        return str(error)
    return "nothing"


def test_a_refusal_of_the_first_rank_ends_the_wait():
    first, second = run_ranks(2, failing, "refuses")
    assert first == "the archive is damaged"
    assert second == "rank 0: the archive is damaged"


def test_a_first_rank_that_is_stopped_is_named():
    _, second = run_ranks(2, failing, "stops", lost=[0])
    assert second.startswith("rank 0 has not been heard of for 1 s while it prepared data")


def after_a_refusal() -> list[float]:
    """All ranks refuse the first settings, and the script goes on with others."""
    mesh = make_mesh(data=2, timeout=TIMEOUT)
    ranks = ranks_of(TrainConfig(), 2, mesh)
    try:
        with explained(mesh), ranks.in_turn():
            pass
        with explained(mesh):
            raise InputError("batch_size must be above 0")
    except InputError:
        pass
    with explained(mesh), ranks.in_turn():
        begun = time.time()
        if mesh.local_rank == 0:
            time.sleep(0.2)
        return [begun, time.time()]


def test_a_refusal_that_a_script_went_on_from_is_forgotten():
    first, second = run_ranks(2, after_a_refusal)
    assert second[0] >= first[1]  # in turn again
