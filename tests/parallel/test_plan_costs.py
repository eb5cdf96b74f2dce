"""The cost model of a mesh: it counts what steps send, and a faster link never costs more."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdml.errors import InputError
from fastdml.plan import costs
from fastdml.plan import links as links_module
from fastdml.plan.costs import Batch, Layout, Line, PeerCost
from fastdml.plan.links import LINKS, Link, find_link

SLOW = Link("slow", 1e6, 1e-3, 1e-3)


def peer(ms: float = 30.0, nbytes: int = 4_000_000, fixed: float = 0.0) -> PeerCost:
    """A step of 64 images takes `ms`, a third of it forward; `fixed` of it whatever the images."""
    whole = 1e-3 * ms

    def line(share: float) -> Line:
        return Line(share * fixed * whole, share * (1 - fixed) * whole / 64)

    return PeerCost(
        name=f"peer of {ms} ms",
        forward=line(1 / 3),
        backward=line(2 / 3),
        update=0.0,
        weights=nbytes + 1000,
        gradients=nbytes,
        optimizer=nbytes,
        activations=Line(0.0, 1e6),
    )


links = st.builds(
    Link,
    st.just("any"),
    st.floats(1e5, 1e12),
    st.floats(0, 1e-2),
    st.floats(0, 1e-2),
)
meshes = st.builds(
    lambda rows, data, nodes, fsdp: Layout(
        tuple(range(rows)) + tuple(range(rows)), data, nodes, fsdp
    ),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
    st.just(1),
    st.booleans(),
)
peers_of = st.lists(
    st.builds(peer, st.floats(0.1, 500), st.integers(1, 10**9), st.floats(0, 1)),
    min_size=8,
    max_size=8,
)
batches = st.builds(
    Batch, st.integers(8, 4096), st.integers(2, 10**5), st.sampled_from([2, 4]), st.integers(1, 4)
)


def nodes_of(layout: Layout, nodes: int) -> Layout:
    return dataclasses.replace(layout, nodes=math.gcd(nodes, layout.devices))


@given(peers_of, meshes, batches, links, links, st.floats(1, 1000), st.integers(1, 4))
def test_a_faster_link_never_makes_a_step_slower(peers, layout, batch, link, network, times, nodes):
    peers, layout = peers[: len(layout.rows)], nodes_of(layout, nodes)
    faster = dataclasses.replace(
        network, bandwidth=times * network.bandwidth, hop=network.hop / times
    )
    before = costs.step(peers, layout, batch, link, network).seconds
    assert costs.step(peers, layout, batch, link, faster).seconds <= before * (1 + 1e-12)
    faster = dataclasses.replace(link, bandwidth=times * link.bandwidth, start=link.start / times)
    assert costs.step(peers, layout, batch, faster, network).seconds <= before * (1 + 1e-12)


@given(st.lists(st.floats(0.1, 500), min_size=1, max_size=5), batches, links)
def test_one_device_sends_nothing_and_takes_what_its_peers_take(times, batch, link):
    peers = [peer(ms) for ms in times]
    found = costs.step(peers, Layout((0,) * len(peers)), dataclasses.replace(batch, parts=1), link)
    assert found.sent == found.exchange == found.reduction == 0
    assert found.seconds == pytest.approx(sum(p.seconds(batch.images) for p in peers))


@given(peers_of, meshes, batches, links)
def test_a_step_takes_no_less_than_what_its_busiest_row_computes(peers, layout, batch, link):
    peers = peers[: len(layout.rows)]
    found = costs.step(peers, layout, batch, link)
    rows = [
        sum(peers[k].seconds(batch.share(layout.data)) for k in layout.of_row(row))
        for row in range(layout.peer)
    ]
    assert found.seconds >= max(rows) * (1 - 1e-9) or layout.fsdp  # of which each updates a share
    assert min(found.exchange, found.reduction) >= 0


def test_bytes_of_the_peer_axis_are_the_logits_of_the_peers_that_live_there():
    peers = [peer() for _ in range(3)]
    for data, images in ((1, 64), (2, 32)):
        layout = Layout((0, 0, 1), data)
        found = costs.step(peers, layout, Batch(64, 100, 2), LINKS["nvlink"])
        assert found.logits_sent == 2 * images * 100 * 2  # row 0, the slower one, has two peers
    in_parts = costs.step(peers, Layout((0, 0, 1)), Batch(64, 100, 2, parts=4), LINKS["nvlink"])
    assert in_parts.logits_sent == 2 * 64 * 100 * 2
    assert costs.step(peers, Layout((0, 0, 0), 2), Batch(64, 100), SLOW).logits_sent == 0


def test_bytes_of_the_data_axis_are_those_of_a_ring():
    """Each rank passes on D - 1 pieces of 1 / D of the gradients, twice."""
    for ranks in (1, 2, 3, 8):
        piece = 4_000_000 / ranks
        passed = 2 * sum(piece for _ in range(ranks - 1))
        assert costs.all_reduce_bytes(4_000_000, ranks) == pytest.approx(passed)
        assert 2 * costs.gather_bytes(4_000_000, ranks) == pytest.approx(passed)
        found = costs.step([peer(), peer()], Layout((0, 0), ranks), Batch(64, 10), SLOW)
        assert found.gradients_sent == pytest.approx(2 * passed)


def test_bytes_of_a_peer_that_is_cut_over_its_row():
    """Two all-gathers of the weights in every part, and a reduce-scatter of the gradients."""
    layout = Layout((0,), 4, fsdp=True)
    found = costs.step([peer(nbytes=4_000_000)], layout, Batch(64, 10, parts=2), SLOW)
    assert found.gradients_sent == pytest.approx(4 * 3 / 4 * 4_001_000 + 3 / 4 * 4_000_000)


def test_the_last_pass_hides_no_exchange_and_the_ones_before_hide_theirs():
    assert costs.exchange_wait([5.0], 10.0, 3.0, 0.0) == 3.0
    assert costs.exchange_wait([5.0], 10.0, 2.0, 1.0) == 3.0
    assert costs.exchange_wait([5.0, 5.0], 10.0, 3.0, 0.0) == 3.0
    assert costs.exchange_wait([5.0, 5.0], 10.0, 7.0, 0.0) == 9.0  # the link is the slower one
    assert costs.exchange_wait([5.0, 5.0], 10.0, 0.0, 7.0) == 7.0  # what is under way overlaps
    assert costs.exchange_wait([5.0, 1.0, 1.0], 10.0, 3.0, 0.0) == 7.0


def test_parts_hide_the_exchange_while_it_is_shorter_than_a_part():
    assert costs.exchange_wait([2.0], 4.0, 1.5, 0.0, parts=2) == 0.0
    assert costs.exchange_wait([2.0], 4.0, 0.0, 1.5, parts=4) == 0.0
    assert costs.exchange_wait([2.0], 4.0, 3.0, 0.0, parts=2) == 1.0  # the second behind the pass
    assert costs.exchange_wait([1.0], 2.0, 3.0, 0.0, parts=2) == 2.0 + 1.0


@pytest.mark.parametrize(
    ("parts", "waits"),
    [(1, (5, 10, 20, 40)), (2, (0, 0, 10, 30)), (4, (0, 5, 25, 65))],
)
def test_a_link_that_only_delays(parts, waits):
    """Forward 20 ms, backward 40: what bench/mesh_pipeline.py has measured, to a few ms."""
    found = [
        costs.exchange_wait([20 / parts], 40 / parts, 0.0, delay, parts)
        for delay in (5, 10, 20, 40)
    ]
    assert found == pytest.approx(waits)


@given(st.integers(0, 10**9))
def test_buckets_hold_all_gradients(nbytes):
    found = costs.buckets(nbytes)
    assert sum(found) == nbytes
    assert all(0 < size <= costs.BUCKET for size in found)


def test_gradients_hide_behind_the_backward_pass_but_for_the_last_bucket():
    nbytes = 3 << 20
    last = costs.all_reduce_seconds(2 << 20, 2, SLOW)
    first = costs.all_reduce_seconds(1 << 20, 2, SLOW)
    assert costs.reduction_wait([nbytes], 1e9, 2, SLOW) == last
    assert costs.reduction_wait([nbytes], 0.0, 2, SLOW) == pytest.approx(first + last)
    assert costs.reduction_wait([nbytes], 0.0, 1, SLOW) == 0.0


def test_who_shares_the_network_between_nodes():
    inside, network = Link("in", 100.0), Link("net", 12.0)

    def along(layout):
        return (
            costs.link_along_peer(layout, inside, network).bandwidth,
            costs.link_along_data(layout, inside, network).bandwidth,
        )

    assert along(Layout((0, 1), 4, nodes=1)) == (100.0, 100.0)
    assert along(Layout((0, 1), 4, nodes=2)) == (3.0, 100.0)  # a row a node: four columns cross
    assert along(Layout((0, 1), 8, nodes=4)) == (3.0, 12.0)  # a row is two nodes
    assert along(Layout((0,), 8, nodes=2)) == (3.0, 12.0)
    assert along(Layout((0, 1), 3, nodes=3)) == (6.0, 6.0)  # a node has the ends of two rows


def test_memory_of_a_device():
    peers = [peer(nbytes=1000), peer(nbytes=2000)]
    one = costs.memory(peers, Layout((0, 0)), Batch(64, 10, 4))
    assert one == costs.Memory(5000, 3000, 3000, 2 * 64e6, 4 * 64 * 10 * 4)
    assert one.total == 5000 + 3000 + 3000 + 128e6 + 10240
    apart = costs.memory(peers, Layout((0, 1)), Batch(64, 10, 4))
    assert apart == costs.Memory(3000, 2000, 2000, 64e6, 3 * 64 * 10 * 4)
    columns = costs.memory(peers, Layout((0, 0), 2), Batch(64, 10, 4))
    assert (columns.activations, columns.gradients) == (64e6, 3000)
    cut = costs.memory(peers, Layout((0, 0), 2, fsdp=True), Batch(64, 10, 4))
    assert (cut.weights, cut.gradients, cut.optimizer) == (2500 + 3000 + 2000, 1500, 1500)
    blocks = [dataclasses.replace(p, units=(p.weights // 2, p.weights // 2)) for p in peers]
    cut = costs.memory(blocks, Layout((0, 0), 2, fsdp=True), Batch(64, 10, 4, parts=2))
    assert (cut.weights, cut.gradients) == (2500 + 3000 + 1500, 1500 + 3000)
    parts = costs.memory(peers, Layout((0, 0)), Batch(64, 10, 4, parts=4))
    assert parts.activations == one.activations / 4


def test_stated_links_name_their_source_and_give_way_to_measured_ones():
    assert set(LINKS) == {"nvlink", "pcie", "ethernet100"}
    assert all("nccl" in link.source for link in LINKS.values())
    measured = find_link("ethernet100", bandwidth=9.5, latency=20)
    assert (measured.bandwidth, measured.hop) == (9.5e9, pytest.approx(20e-6))
    assert measured.source.startswith("given: 9.5 GB/s, 20 us a hop")
    with pytest.raises(InputError, match=r"nvlnk.*nvlink"):
        find_link("nvlnk")
    for wrong in ({"bandwidth": 0}, {"bandwidth": math.nan}, {"latency": -1}):
        with pytest.raises(InputError, match="link's"):
            find_link("pcie", **wrong)


def test_the_formulas_import_neither_torch_nor_what_communicates():
    allowed = {"__future__", "math", "collections", "dataclasses", "typing", "fastdml"}
    for module in (costs, links_module):
        nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
        names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
        assert {name.split(".")[0] for name in names} <= allowed
        ours = {name for name in names if name.startswith("fastdml")}
        assert ours <= {"fastdml.errors", "fastdml.names", "fastdml.plan.links"}


def test_units_are_gathered_while_others_compute():
    whole = costs.gather_seconds(4_001_000, 2, SLOW)
    one = peer(nbytes=4_000_000)
    assert costs.fsdp_wait([one], 1e9, 1e9, 2, SLOW, 1) == pytest.approx(3 * whole)
    unit = costs.gather_seconds(1_000_250, 2, SLOW)
    four = dataclasses.replace(one, units=(1_000_250,) * 4)
    assert costs.fsdp_wait([four], 1e9, 1e9, 2, SLOW, 1) == pytest.approx(3 * unit)
    assert costs.fsdp_wait([four], 0.0, 0.0, 2, SLOW, 1) == pytest.approx(3 * 4 * unit)
