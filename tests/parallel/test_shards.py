"""Peers sharded over a row: what is sharded, what is refused, and updates by their parts."""

from __future__ import annotations

import re

import pytest
import torch
from ranks import run_ranks
from sharded_nets import C, Net, batch, cohort, whole
from torch import nn

from fastdml import Cohort, MutualLoss
from fastdml.absent_tensors import is_sharded, local_part
from fastdml.engine import Ema, make_optimizer
from fastdml.engine.amp import Amp, LossScale
from fastdml.engine.update import Update
from fastdml.errors import InputError
from fastdml.parallel import make_mesh, shard, shards, whole_weights

CPU, ROWS, STEPS = torch.device("cpu"), 16, 3


def optimizer_of(name, cohort):
    if name in ("sgd", "adam", "adamw"):
        return make_optimizer(cohort, name, lr=0.05, weight_decay=1e-3)
    weights = cohort.parameters()
    return {
        "sgd by foreach": lambda: torch.optim.SGD(weights, 0.05, 0.9, foreach=True),
        "adamw, fused": lambda: torch.optim.AdamW(weights, 0.05, fused=True),
        "rmsprop": lambda: torch.optim.RMSprop(weights, 0.05),
    }[name]()


CASES = {
    "sgd": {},
    "sgd, clipped": {"clip": 0.02},
    "sgd, fp16": {"fp16": True},
    "adam": {},
    "adamw, clipped": {"clip": 0.02},
    "adamw, fp16": {"fp16": True},
    "sgd by foreach": {},
    "sgd by foreach, fp16": {"fp16": True},
    "adamw, fused": {},
    "rmsprop": {},
    "rmsprop, fp16": {"fp16": True},
}


def train(name, cohort, column, columns, *, clip=None, fp16=False, mesh=None):
    """STEPS steps on this column's rows, or on those of all `columns` one after the other. In the
    second step a row of the last column overflows, of fp16 only."""
    optimizer = optimizer_of(name.partition(", clip")[0].partition(", fp16")[0], cohort)
    loss = MutualLoss(reduction="sum", ce_weight=1 / ROWS, kl_weight=1 / ROWS)
    scaler = LossScale(CPU, init=8.0) if fp16 else None
    ema = Ema(cohort, 0.9)
    update = Update(cohort, optimizer, Amp(CPU, None, scaler), grad_clip=clip, ema=ema, mesh=mesh)
    flags = []
    for step in range(STEPS):
        images, labels = batch(step, ROWS)
        if fp16 and step == 1:
            images[-1] = float("inf")
        size = ROWS // columns
        update.refresh()
        for c in range(columns) if column is None else [column]:
            rows = slice(c * size, (c + 1) * size)
            logits = cohort(images[rows])
            _, _, grads = loss.value_and_grad([z.detach() for z in logits], labels[rows])
            torch.autograd.backward(logits, [g * (8.0 if fp16 else 1.0) for g in grads])
            if fp16:
                scaler.scale.fill_(8.0)
        update.apply(range(len(cohort)))
        if fp16:
            flags.append(update.overflow.tolist())
        update.finish()
    state = [{k: whole(v) for k, v in optimizer.state[w].items()} for w in cohort.parameters()]
    return {
        "weights": [whole(w) for w in cohort.parameters()],
        "averages": [whole(t) for t in ema.averages],
        "state": [state_of[key] for state_of in state for key in sorted(state_of)],
        "flags": flags,
    }


def refusal(call):
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.gain = Net(5, False), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.gain * self.net(x)


def refusals(mesh) -> dict[str, str]:
    from torch.distributed.fsdp import fully_shard

    over = mesh.device_mesh["data"]
    early = cohort()
    optimizer, ema = make_optimizer(early, lr=0.1), Ema(early, 0.9)
    shard(early, mesh)
    in_part = cohort()
    fully_shard(in_part.peers[1].blocks, mesh=over)
    part_whole = cohort()
    fully_shard(part_whole.peers[0], mesh=over, ignored_params={part_whole.peers[0].scale})
    elsewhere = cohort()
    fully_shard(elsewhere.peers[0], mesh=mesh.device_mesh)
    other = Cohort([Net(5, False), Net(7, False)], C, seed=mesh.rank)
    other.peers[1].head.bias.data.fill_(mesh.rank)
    made = Cohort([Net(5, False), Scalar()], C)
    for peer in made:  # the same in every column
        for w in peer.parameters():
            w.data.fill_(0.5)
    for peer in other:
        for key, w in peer.named_parameters():
            if key != "head.bias":
                w.data.fill_(0.5)
    return {
        "optimizer": refusal(lambda: Update(early, optimizer, Amp(CPU, None, None), mesh=mesh)),
        "no mesh": refusal(lambda: Update(early, optimizer, Amp(CPU, None, None))),
        "ema": refusal(ema.refresh),
        "in part": refusal(lambda: shard(in_part, mesh)),
        "part whole": refusal(lambda: shard(part_whole, mesh)),
        "elsewhere": refusal(lambda: shard(elsewhere, mesh)),
        "other": refusal(lambda: shard(other, mesh)),
        "scalar": refusal(lambda: shard(made, mesh)),
        "apex": refusal(lambda: make_optimizer(early, "apex_sgd", lr=0.1)),
        "save": refusal(lambda: early.save("nowhere")),
    }


def evaluated(mesh) -> dict:
    """A cohort that is evaluated before it trains, and one that its owner has sharded."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for kind in ("ours", "own"):
        made = cohort(normed=True).to(memory_format=torch.channels_last)
        if kind == "own":
            made = made.to(memory_format=torch.contiguous_format)
            for peer in made:
                fully_shard(peer, mesh=mesh.device_mesh["data"])
        before = {name: t.clone() for name, t in cohort(normed=True).state_dict().items()}
        shard(made, mesh)
        images = batch(9)[0]
        with torch.inference_mode():
            logits = made.eval()(images)
        parts = [local_part(w).numel() for w in made.parameters()]
        kept = whole_weights(made.peers[1])
        found[kind] = {
            "logits": logits,
            "units": [len(list(shards.units(peer))) for peer in made],
            "sharded": all(map(is_sharded, made.parameters())),
            "share": sum(parts) / sum(w.numel() for w in made.parameters()),
            "kept": kept and all(torch.equal(t, before[f"peers.1.{n}"]) for n, t in kept.items()),
            "trained": train("sgd", made.train(), mesh.column, 2, mesh=mesh)["weights"],
        }
    return found


def on_two_columns() -> dict:
    torch.set_num_threads(1)
    mesh = make_mesh(data=2)
    mesh.place(2)
    trained = {}
    for name, options in CASES.items():
        made = cohort()
        shard(made, mesh)
        trained[name] = train(name, made, mesh.column, 2, mesh=mesh, **options)
    return {"trained": trained, "evaluated": evaluated(mesh), "refused": refusals(mesh)}


@pytest.fixture(scope="module")
def found():
    return run_ranks(2, on_two_columns)


@pytest.mark.parametrize("name", CASES)
def test_updates_of_shards_are_those_of_whole_weights(found, name):
    torch.set_num_threads(1)
    expected = train(name, cohort(), None, 2, **CASES[name])
    for rank in found:
        got = rank["trained"][name]
        assert got["flags"] == expected["flags"]
        for what in ("weights", "averages", "state"):
            for ours, theirs in zip(got[what], expected[what], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    if CASES[name].get("fp16"):
        assert expected["flags"] == [[0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("kind", ["ours", "own"])
def test_evaluation_before_training_and_the_whole_weights(found, kind):
    made = cohort(normed=True)
    expected = train("sgd", made, None, 2)["weights"]
    with torch.no_grad():
        logits = cohort(normed=True).eval()(batch(9)[0])
    for column, rank in enumerate(found):
        got = rank["evaluated"][kind]
        assert got["sharded"]
        assert got["units"] == ([3, 3] if kind == "ours" else [1, 1])
        assert 0.3 < got["share"] < 0.7
        assert got["kept"] is (True if column == 0 else None)
        for ours, theirs in zip(got["logits"], logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        for ours, theirs in zip(got["trained"], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


REFUSED = {
    "optimizer": "the optimizer holds 18 weights that the peers no longer have: make it after",
    "no mesh": r"scale of peer Net-1 is sharded \(a DTensor.*make_step\(mesh=",
    "ema": "average of peers.0.* was begun before the weight was sharded: make the averages after",
    "in part": "peer Net-2 is sharded in part: call fully_shard on the peer itself too",
    "part whole": "scale of peer Net-1 is whole where others are sharded",
    "elsewhere": "of peer Net-1 is sharded along DeviceMesh.*: call fully_shard",
    "other": "peer Net-2 has other weights on rank 1 than on rank 0: build the cohort",
    "scalar": r"gain of peer Scalar has no dimension to shard along: give it the shape \(1,\)",
    "apex": "is sharded",
    "save": r"is sharded \(a DTensor",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_are_one_line_on_every_rank(found, what):
    for rank in found:
        text = rank["refused"][what]
        assert re.search(REFUSED[what], text), text
        assert "\n" not in text


def kinds(model):
    found = shards.blocks(model)
    modules = [id(m) for block in found for m in block.modules()]
    assert len(modules) == len({*modules})  # none within another
    return [type(block).__name__ for block in found]


def test_blocks_of_models_that_others_wrote():
    import timm
    import torchvision.models as vision

    with torch.device("meta"):
        assert kinds(vision.resnet18()) == ["BasicBlock"] * 8
        assert kinds(vision.vit_b_16()) == ["EncoderBlock"] * 12
        assert kinds(timm.create_model("vit_tiny_patch16_224")) == ["Block"] * 12
        assert kinds(timm.create_model("convnext_atto")) == ["ConvNeXtBlock"] * 12
    tied = Net(5, False)
    tied.blocks[1].conv.weight = tied.blocks[0].conv.weight
    assert kinds(tied) == []
    assert kinds(Net(5, False)) == ["Block", "Block"]


@pytest.mark.slow  # imports transformers
def test_blocks_of_hugging_faces_models():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_hidden_layers=3, hidden_size=12, num_attention_heads=2)
    with torch.device("meta"):
        assert kinds(ViTForImageClassification(config)) == ["ViTLayer"] * 3
