"""What all ranks decide at the same step, whoever asked for it, and when."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from ranks import run_ranks

from fastdml.parallel import make_mesh
from fastdml.parallel.agreement import Agreement

SAVE, STOP = 1, 2
STEPS = 14


def asked_by_several() -> list[int]:
    """Rank 1 wants to save at step 3, and rank 2 at step 4 too; rank 0, slow, to stop at step 9."""
    mesh = make_mesh(data=3, timeout=20)
    agree = Agreement(mesh)
    found = []
    for step in range(STEPS):
        if mesh.lead:
            time.sleep(0.005)
        flags = SAVE * ((mesh.rank, step) in {(1, 3), (2, 4)}) | STOP * (mesh.lead and step == 9)
        answer = agree.ask(flags)
        if answer & SAVE:
            agree.done(SAVE)
        found.append(answer)
    late = agree.settle(STOP * (mesh.rank == 1)), agree.settle(0)
    return [*found, *late]


def test_all_ranks_read_the_same_answers_two_steps_later():
    found = run_ranks(3, asked_by_several)
    wanted = [0] * STEPS
    wanted[3 + Agreement.LAG] = SAVE  # once, though it was asked for twice before it was done
    wanted[9 + Agreement.LAG] = STOP
    assert found == [[*wanted, STOP, 0]] * 3


def test_flags_that_do_not_fit_are_refused():
    agree = Agreement(SimpleNamespace(control=None))
    with pytest.raises(ValueError, match="flags must be within"):
        agree.ask(256)
