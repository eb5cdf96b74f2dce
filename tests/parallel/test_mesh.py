"""The mesh: coordinates, groups and their timeouts, and where peers are."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed, run_ranks

from fastdml import Cohort
from fastdml.errors import InputError
from fastdml.parallel import RankLost, RemotePeer, auto_sizes, make_mesh, processes
from fastdml.parallel.placement import place, refitted

WORLD, PEER, DATA, K, TIMEOUT = 4, 2, 2, 3, 7.5


def seconds(group: dist.ProcessGroup) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def on_a_mesh() -> dict:
    mesh = make_mesh(PEER, DATA, timeout=TIMEOUT)
    mesh.place(K)
    ranks = dist.get_process_group_ranks
    own = [g for k in range(K) if (g := mesh.data_group_of(k)) is not None]
    groups = [
        dist.group.WORLD, mesh.control, mesh.peers_group, mesh.data_group, *own,
        *(mesh.peer_group_of(k) for k in range(K)),
        *(mesh.device_mesh.get_group(name) for name in ("peer", "data")),
    ]  # fmt: skip
    cohort = Cohort(["resnet8", "resnet8", "mobilenet"], 10, seed=3)
    whole = [sum(p.numel() for p in peer.parameters()) for peer in cohort]
    first = {k: next(peer.parameters()).detach().clone() for k, peer in enumerate(cohort)}
    taken = mesh.distribute(cohort)
    mesh.store.add("ranks", 1)
    found = {
        "started": (mesh.attempt, mesh.local_rank, mesh.local_world, mesh.job_store is not None),
        "at": (mesh.rank, mesh.row, mesh.column, mesh.device_mesh.get_coordinate()),
        "timeouts": [seconds(group) for group in groups],
        "groups": len(dist.distributed_c10d._world.pg_map),
        "all timeouts": {seconds(group) for group in dist.distributed_c10d._world.pg_map},
        "peer groups": [ranks(mesh.peer_group_of(k)) for k in range(K)],
        "data groups": [g and ranks(g) for g in map(mesh.data_group_of, range(K))],
        "rows": mesh.rows,
        "local": mesh.local,
        "owners": [mesh.owner(k) for k in range(K)],
        "names": cohort.names,
        "remote": {k: repr(p) for k, p in enumerate(cohort) if isinstance(p, RemotePeer)},
        "sizes": [
            p.num_parameters
            if isinstance(p, RemotePeer)
            else sum(w.numel() for w in p.parameters())
            for p in cohort
        ],
        "whole": whole,
        "state": {name.split(".")[1] for name in cohort.state_dict()},
        "shared": mesh.share({"from": mesh.rank}),
        "gathered": mesh.gather({"rank": "x" * mesh.rank}),
    }
    with torch.no_grad():
        for k in mesh.local:
            for parameter in cohort[k].parameters():
                parameter.add_(k + 1 + 100 * mesh.column)  # that of column 0 counts
    mesh.collect(cohort, taken)
    found["counted"] = mesh.store.add("ranks", 0)
    found["trained"] = [
        torch.equal(next(peer.parameters()), first[k] + (k + 1)) for k, peer in enumerate(cohort)
    ]
    return found


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return run_ranks(WORLD, on_a_mesh)


def test_rank_is_row_times_columns_plus_column(found):
    assert [f["at"] for f in found] == [
        (r, *divmod(r, DATA), divmod(r, DATA)) for r in range(WORLD)
    ]


def test_every_group_has_the_timeout(found):
    for rank in found:
        assert set(rank["timeouts"]) == rank["all timeouts"] == {TIMEOUT}
        assert rank["groups"] == 1 + 3 + K + len(rank["local"])  # and none besides


def test_groups_of_peers(found):
    for r, rank in enumerate(found):
        column = [r % DATA, r % DATA + DATA]
        row = [r // DATA * DATA, r // DATA * DATA + 1]
        assert rank["rows"] == (0, 0, 1)
        assert rank["peer groups"] == [column] * K
        assert rank["data groups"] == [row if k in rank["local"] else None for k in range(K)]
        assert rank["owners"] == [column[0], column[0], column[1]]


def test_peers_of_other_rows_have_no_weights_here(found):
    for r, rank in enumerate(found):
        assert rank["local"] == ((0, 1) if r < DATA else (2,))
        assert rank["state"] == {str(k) for k in rank["local"]}
        assert set(rank["remote"]) == set(range(K)) - set(rank["local"])
        assert rank["sizes"] == rank["whole"]
        assert rank["names"] == ["resnet8-1", "resnet8-2", "mobilenet"]


def test_where_a_rank_is_and_what_it_shares(found):
    for r, rank in enumerate(found):
        assert rank["started"] == (0, r, WORLD, True)
        assert rank["counted"] == WORLD


def test_small_objects(found):
    for rank in found:
        assert rank["shared"] == {"from": 0}
        assert rank["gathered"] == [{"rank": "x" * r} for r in range(WORLD)]


def test_collected_peers_have_the_weights_that_were_trained(found):
    assert [rank["trained"] for rank in found] == [[True] * K] * WORLD


def test_a_remote_peer_cannot_be_called():
    peer = RemotePeer("mobilenet", "mobilenet", 10, row=1)
    with pytest.raises(InputError, match="peer mobilenet is trained by row 1 of the mesh"):
        peer(torch.zeros(1))
    assert not [*peer.parameters()]


def test_blocks_of_neighbours():
    assert place(4, 2) == (0, 0, 1, 1)
    assert place(5, 2) == (0, 0, 0, 1, 1)
    assert place(3, 2, [2.0, 2.0, 2.0]) == (0, 0, 1)
    assert place(3, 3) == (0, 1, 2)


def test_work_is_balanced():
    assert place(4, 2, [1.0, 1.0, 1.0, 3.0]) == (1, 1, 1, 0)
    costs = [5.0, 1.0, 4.0, 2.0, 3.0]
    rows = place(5, 2, costs)
    assert sum(cost for cost, row in zip(costs, rows, strict=True) if row == 0) in (7.0, 8.0)


@pytest.mark.parametrize(
    ("world", "costs", "sizes"),
    [
        (4, [1.0] * 4, (4, 1)),  # as fast as 2 x 2 and 1 x 4, and the fewest bytes
        (4, [1.0] * 3, (1, 4)),  # 3 peers on 4 ranks: 3 / 4, where two rows take 2 / 2
        (4, [1.0, 1.0, 2.0], (2, 2)),
        (2, [1.0] * 5, (1, 2)),  # two rows take 3, two columns 2.5
        (2, [3.0, 1.0, 1.0, 1.0], (2, 1)),
        (3, [1.0, 1.0], (1, 3)),
        (1, [1.0, 2.0], (1, 1)),
    ],
)
def test_sizes_that_take_the_least_time(world, costs, sizes):
    assert auto_sizes(world, costs) == sizes


@pytest.mark.parametrize(
    ("sizes", "world", "K", "parts", "found"),
    [
        ((2, 2), 2, 4, 2, (2, 1)),
        ((2, 2), 1, 4, 2, (1, 1)),
        ((2, 2), 8, 4, 4, (2, 4)),
        ((2, 2), 8, 4, 2, (4, 2)),  # each column at least one of two parts
        ((2, 2), 3, 4, 2, (3, 1)),
        ((2, 2), 3, 2, 0, (1, 3)),
        ((4, 1), 2, 4, 1, (2, 1)),
        ((1, 4), 2, 3, 4, (1, 2)),
    ],
)
def test_sizes_for_the_ranks_that_are_left(sizes, world, K, parts, found):
    assert refitted(*sizes, world, K, parts) == found


def test_ranks_that_no_mesh_has():
    with pytest.raises(InputError, match="3 ranks are left of a mesh peer=2,data=2, and no other"):
        refitted(2, 2, 3, 2, 2)


@pytest.mark.parametrize("costs", [[1.0, 2.0], [1.0, 2.0, 0.0], [1.0, float("nan"), 2.0]])
def test_costs_that_are_none(costs):
    with pytest.raises(InputError, match="costs must be 3 positive numbers"):
        place(3, 2, costs)


def test_more_rows_than_peers():
    with pytest.raises(InputError, match="peer=3 needs at least 3 peers, and the cohort has 2"):
        place(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peer": 2, "data": 2}, "peer=2,data=2 takes 4 ranks, and this job has 1 rank: torchrun"),
        ({"peer": 0}, "peer must be a whole number of at least 1, not 0"),
        ({"data": 1.5}, "data must be a whole number of at least 1, not 1.5"),
        ({"timeout": 0.0}, "timeout must be a positive number of seconds"),
        ({"timeout": float("inf")}, "timeout must be a positive number of seconds"),
    ],
)
def test_wrong_sizes(arguments, message):
    with pytest.raises(InputError, match=message):
        make_mesh(**arguments)


def raises(rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        raise ValueError("on purpose")
    time.sleep(60)


def test_a_rank_that_raises_is_named():
    with pytest.raises(RankFailed, match=r"(?s)rank 1 raised.*ValueError: on purpose") as caught:
        run_ranks(2, raises, 1)
    assert caught.value.rank == 1


def test_attempts_know_each_other_from_those_before():
    """One rank of three lacked in an attempt, and all questions of that attempt are still there."""
    store = dist.HashStore()

    def attempt(ranks: list[int]) -> list:
        def ask(rank: int) -> int | str:
            try:
                return processes._number(store, rank, 3, 0.3)
            except RankLost as late:
                return str(late)

        with ThreadPoolExecutor(3) as pool:
            return [*pool.map(ask, ranks)]

    assert attempt([0, 1, 2]) == [1, 1, 1]
    assert attempt([0, 1]) == ["rank 2 did not start in time", 2]
    assert attempt([2, 1, 0]) == [3, 3, 3]
