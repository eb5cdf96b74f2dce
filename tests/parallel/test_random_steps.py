"""Random cohorts, losses, options and changes between steps: on a mesh they train as in one process
and as on a mesh of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_steps import case_of, compare, tried
from ranks import run_ranks

from fastdml.parallel import make_mesh

SEEDS, FEW = range(12), range(3)
Case = dict[str, Any]
Found = dict[str, Any]


def on_ranks(cases: list[Case], peer: int, data: int) -> list[Found]:
    """What this rank found of each case, up to one that may have left the ranks apart."""
    mesh = make_mesh(peer, data, timeout=30)
    found: list[Found] = []
    for case in cases:
        found.append(tried(case, mesh, data))
        error = found[-1].get("error")
        if error is not None and not error.startswith("InputError"):
            break
    return found


def alone(cases: list[Case], data: int, on_mesh: bool) -> list[Found]:
    torch.set_num_threads(1)
    mesh = make_mesh(1, 1) if on_mesh else None
    return [tried(case, mesh, data) for case in cases]


def differences(peer: int, data: int, seeds: range) -> list[str]:
    """What differs, with the seed and the case that it differs in."""
    cases = [case_of(seed, peer, data) for seed in seeds]
    ranks = run_ranks(peer * data, on_ranks, cases, peer, data, timeout=300)
    plain = run_ranks(1, alone, cases, data, False, timeout=300)[0]
    one_rank = run_ranks(1, alone, cases, data, True, timeout=300)[0]
    found = []
    for i, case in enumerate(cases):
        here = [of_rank[i] if i < len(of_rank) else {"error": "not reached"} for of_rank in ranks]
        told = [f"on a mesh of one rank: {d}" for d in compare(case, here, one_rank[i], data)]
        if not case["drops"]:  # dropout draws for each peer on its own on a mesh alone
            told += [f"in one process: {d}" for d in compare(case, here, plain[i], data)]
        if told:
            found.append("\n".join([f"seed {case['seed']}: {case}", *told]))
    return found


def test_two_ranks_train_as_one_process():
    found = differences(2, 1, FEW)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "data"), [(2, 1), (1, 2), (2, 2), (3, 1), (1, 3)])
def test_meshes_train_as_one_process(peer, data):
    found = differences(peer, data, SEEDS)
    assert not found, f"on a mesh {peer} x {data}\n" + "\n".join(found)
