"""The parts of sharded peers on disk: read by the ranks that wrote them, by others, and by one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from sharded_nets import batch, cohort, whole

from fastdml.engine import Ema, make_optimizer
from fastdml.errors import InputError
from fastdml.parallel import make_mesh, shard
from fastdml.parallel.shard_files import divided, joined, write


def state_of(peer, optimizer, ema) -> dict:
    names = dict(peer.named_parameters())
    return {
        "weights": peer.state_dict(),
        "optimizer": {"state": {n: dict(optimizer.state[w]) for n, w in names.items()}},
        "ema": {n.removeprefix("peers.0."): t for n, t in ema.state_dict().items()},
        "numbers": [1, 2.0, None],
    }


def trained(made, images, labels):
    """A peer's state after two steps of Adam, its own and not that of the start."""
    optimizer, ema = make_optimizer(made, "adamw", lr=0.1), Ema(made, 0.9)
    for _ in range(2):
        for logits in made(images):
            torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    return optimizer, ema


def all_whole(tree):
    if isinstance(tree, dict):
        return {key: all_whole(value) for key, value in tree.items()}
    return whole(tree) if isinstance(tree, torch.Tensor) else tree


def kinds(tree):
    if isinstance(tree, dict):
        return {kind for value in tree.values() for kind in kinds(value)}
    return {type(tree).__name__} if isinstance(tree, torch.Tensor) else set()


def on_four(folder: Path) -> dict:
    torch.set_num_threads(1)
    mesh, wide = make_mesh(2, 2), make_mesh(1, 4)
    mesh.place(2)
    wide.place(2)
    made = cohort(normed=True)
    mesh.distribute(made)
    shard(made, mesh)
    k = mesh.row
    optimizer, ema = trained_local(made, k)
    state = state_of(made.peers[k], optimizer, ema)
    rest, parts = divided(state)
    group = torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])
    write(folder / f"peer-{k}", copy.deepcopy(parts), group[k])
    saved = all_whole(state)
    torch.distributed.barrier()
    back = all_whole(joined(rest, folder / f"peer-{k}", made.peers[k]))
    others = cohort(normed=True)
    shard(others, wide)
    torch.distributed.all_gather_object(sent := [None] * 4, rest)
    rests = [sent[0], sent[2]]
    seen = [joined(rests[j], folder / f"peer-{j}", others.peers[j]) for j in range(2)]
    scattered = joined(saved, None, made.peers[k])
    fails = None
    try:
        joined(rests[0], folder / "peer-0", others.peers[1])
    except InputError as error:
        fails = str(error)
    return {
        "k": k,
        "rest": rest,
        "saved": saved,
        "back": back,
        "kinds": kinds(scattered["optimizer"]) | kinds(scattered["ema"]),
        "scattered": all_whole(scattered),
        "wide": [all_whole(tree) for tree in seen],
        "fails": fails,
    }


def trained_local(made, k):
    images, labels = batch(3)
    peer = made.peers[k]
    own = type(made)([peer], made.num_classes)
    return trained(own, images, labels)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return folder, run_ranks(4, on_four, folder)


def same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def test_shards_come_back_on_the_same_ranks_and_on_others(found):
    _, ranks = found
    saved = {rank["k"]: rank["saved"] for rank in ranks}
    for rank in ranks:
        same(rank["back"], saved[rank["k"]])
        for k, tree in enumerate(rank["wide"]):
            same(tree, saved[k])


def test_one_process_reads_them_whole(found):
    folder, ranks = found
    for rank in (ranks[0], ranks[2]):
        peer = cohort(normed=True).peers[rank["k"]]
        tree = joined(rank["rest"], folder / f"peer-{rank['k']}", peer)
        same(tree, rank["saved"])


def test_whole_tensors_become_shards(found):
    for rank in found[1]:
        assert rank["kinds"] == {"DTensor", "Tensor"}  # moments, and counts of steps
        same(rank["scattered"], rank["saved"])


def test_what_is_whole_is_in_no_shard(found):
    rest = found[1][0]["rest"]
    assert rest["weights"]["head.weight"] == {"shard": "weights/head.weight"}
    assert isinstance(rest["weights"]["blocks.0.norm.running_mean"], torch.Tensor)
    assert rest["numbers"] == [1, 2.0, None]


def test_shards_of_another_peer_are_refused(found):
    assert all("has the shape" in rank["fails"] for rank in found[1])
