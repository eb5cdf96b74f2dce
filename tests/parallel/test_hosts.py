"""Two nodes, simulated by network namespaces: they find each other, train, and one is lost."""

from __future__ import annotations

import os
import time

import hosts
import pytest
import torch
from mesh_runs import batch, cohort, train
from ranks import run_ranks

from fastdml.parallel import RankLost, failure, make_mesh
from fastdml.parallel.failure import explained

STEPS, AFTER, TIMEOUT = 12, 5, 1.0


def on_two_hosts(pair: tuple[hosts.Host, hosts.Host], cutter: int) -> dict:
    """Two peers, one a host; the link is cut after some steps by the rank `cutter`."""
    rank = int(os.environ["RANK"])
    hosts.move_to(pair[rank], master=pair[0])
    failure.GRACE = failure.ANSWER = 0.5
    mesh = make_mesh(2, 1, timeout=TIMEOUT)
    start = time.monotonic()

    def batches(step: int, dtype: torch.dtype) -> tuple:
        nonlocal start
        if step == AFTER:
            start = time.monotonic()
            if rank == cutter:
                hosts.cut(pair[rank])
        return batch(step, dtype)

    peers = cohort(2)
    first, _ = train(peers, mesh, steps=AFTER, batches=batches)
    found = {"losses": [float(output.losses[rank]) for output in first]}
    try:
        with explained(mesh):
            train(peers, mesh, steps=STEPS, batches=batches)
    except RankLost as lost:
        return {**found, "line": str(lost), "seconds": time.monotonic() - start}
    raise AssertionError("the link is cut, and nothing failed")


@pytest.fixture(scope="module")
def _namespaces():
    if not hosts.possible():
        pytest.skip("network namespaces need the rights of root, and `ip`")


@pytest.mark.usefixtures("_namespaces")
@pytest.mark.parametrize("number", range(3))
def test_a_link_that_is_cut_ends_both_hosts(number):
    with hosts.two_hosts(number) as pair:
        first, second = run_ranks(2, on_two_hosts, pair, number % 2)
    alone, _ = train(cohort(2), steps=AFTER)
    for rank, found in enumerate((first, second)):
        assert found["losses"] == [float(output.losses[rank]) for output in alone]
        assert found["seconds"] < TIMEOUT + 6  # that it ends: a busy machine takes its time
    host = os.uname().nodename
    assert first["line"] == f"rank 1 on {host} (peer Sequential-2) did not answer within 1 s"
    assert second["line"] == (
        f"no contact with the job's store nor with rank 0 on {host} (peer Sequential-1): did not "
        "answer within 1 s"
    )
