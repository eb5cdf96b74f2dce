"""Steps of sharded peers on a mesh are those of replicas, and of one process with the parts of the
batch one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mesh_runs import train
from ranks import run_ranks
from sharded_nets import C, batch, cohort, whole
from torch import nn

from fastdml import Cohort, MutualLoss
from fastdml.engine import Ema
from fastdml.engine.amp import Amp, LossScale
from fastdml.metric_losses import MetricLoss
from fastdml.parallel import (
    averaged_statistics,
    make_mesh,
    shard,
    sync_batchnorm,
    total,
)

STEPS, ROWS, CPU = 3, 16, torch.device("cpu")


def unlabelled(step: int, dtype: torch.dtype) -> tuple:
    """Most rows of the second column have no label."""
    images, labels = batch(step, ROWS, dtype)
    labels[ROWS // 2 + step :] = -100
    return images, labels


class WithFeatures(nn.Module):
    """A peer with a head that others call by `logits_and_features`."""

    num_features = 6

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(108, 6 + seed), nn.ReLU())
        self.features, self.head = nn.Linear(6 + seed, 6), nn.Linear(6, C)

    def logits_and_features(self, x):
        found = self.features(self.net(x))
        return self.head(found), found

    def forward(self, x):
        return self.logits_and_features(x)[0]


def plain(**options: Any) -> Any:
    return lambda: (cohort(), options)


def normed(dtype=torch.float64, **options: Any) -> Any:
    return lambda: (cohort(normed=True, dtype=dtype), options)


def frozen() -> tuple:
    made = cohort()
    made.peers[1].requires_grad_(False)
    return made, {}


def partly_frozen() -> tuple:
    made = cohort()
    made.peers[0].blocks.requires_grad_(False)
    made.peers[1].stem.requires_grad_(False)
    return made, {}


def with_metric() -> tuple:
    return Cohort([WithFeatures(k) for k in range(2)], C).double(), {
        "metric": MetricLoss(num_classes=C, dims=(6, 6), triplet=1.0)
    }


def taught() -> tuple:
    made = cohort()
    torch.manual_seed(9)
    made.teachers = [nn.Sequential(nn.Flatten(), nn.Linear(108, C)).double()]
    return made, {}


def half() -> tuple:
    return cohort(dtype=torch.float32), {"amp": Amp(CPU, None, LossScale(CPU, init=2.0**20))}


# What makes a cohort and the options of its training, and how far weights may be apart.
CASES: dict[str, Any] = {
    "sgd": (plain(), 1e-12),
    "adamw, clipped": (plain(optimizer="adamw", grad_clip=0.05), 1e-11),
    "accumulate": (plain(accumulate=2), 1e-12),
    "batchnorm": (normed(), 1e-12),
    "batchnorm, accumulate": (normed(accumulate=2), 1e-12),
    "synchronised": (normed(), 1e-12),
    "unlabelled": (plain(batches=unlabelled, loss=MutualLoss(mimic_ignored=True)), 1e-12),
    "bf16": (normed(torch.float32, amp="bf16"), 2e-6),
    "fp16's scale": (half, 1e-6),
    "a frozen peer": (frozen, 1e-12),
    "frozen blocks": (partly_frozen, 1e-12),
    "metric": (with_metric, 1e-12),
    "teacher": (taught, 1e-12),
}


def run(name: str, mesh=None, *, sharded: bool = False, columns: int = 1) -> dict:
    """Weights, averages and figures after STEPS steps. Without a mesh in one process, which
    computes the `columns` one after the other."""
    made, given = CASES[name][0]()
    options = {"batches": lambda step, dtype: batch(step, ROWS, dtype), **given}
    synchronised = name == "synchronised"
    if mesh is not None:
        mesh.distribute(made)
        if synchronised:
            sync_batchnorm(made, mesh)
        if sharded:
            shard(made, mesh)
    elif not synchronised and "metric" not in options:
        options["accumulate"] = options.get("accumulate", 1) * columns
    ema = Ema(made, 0.8)
    outputs, step = train(made, mesh, steps=STEPS, ema=ema, **options)
    local = range(2) if mesh is None else mesh.local
    if mesh is not None:
        outputs = [total(output, mesh) for output in outputs]
    found = {
        "peers": [*local],
        "losses": torch.stack([output.losses for output in outputs])[:, list(local)],
        "kl": torch.stack([output.stats.kl for output in outputs])[:, list(local)],
        "scale": step.update.scaler and float(step.update.scaler.scale),
    }
    averaged = mesh is not None and mesh.data > 1 and not synchronised
    with averaged_statistics(made, mesh, ema) if averaged else torch.no_grad():
        averages = ema.state_dict()
        for k in local:
            own = f"peers.{k}."
            found[k] = {
                "weights": {n: whole(w) for n, w in made.peers[k].named_parameters()},
                "averages": {
                    n.removeprefix(own): whole(t) for n, t in averages.items()
                    if n.startswith(own) and "running" not in n
                },
            }  # fmt: skip
    return found


def on(peer: int, data: int, names: list[str]) -> dict:
    mesh = make_mesh(peer, data)
    mesh.place(2)
    return {
        name: {kind: run(name, mesh, sharded=kind == "sharded") for kind in KINDS[name in ALSO]}
        for name in names
    }


ALSO = {"batchnorm, accumulate", "bf16"}  # as replicas too
KINDS = {False: ["sharded"], True: ["sharded", "replicas"]}


MORE = ["accumulate", "batchnorm"]  # which "batchnorm, accumulate" has together
QUICK = [name for name in CASES if name not in MORE]


@pytest.fixture(scope="module")
def on_two():
    return run_ranks(2, on, 1, 2, QUICK)


@pytest.fixture(scope="module")
def more_on_two():
    return run_ranks(2, on, 1, 2, MORE)


WIDE = ["sgd", "metric", "bf16", "fp16's scale", "adamw, clipped"]


@pytest.fixture(scope="module")
def on_four():
    return run_ranks(4, on, 2, 2, WIDE)


def check(name: str, ranks: list[dict]) -> None:
    torch.set_num_threads(1)
    near = CASES[name][1]
    expected = run(name, columns=2)
    for rank in ranks:
        sharded, local = rank[name]["sharded"], rank[name]["sharded"]["peers"]
        others = [expected] + [rank[name][kind] for kind in KINDS[name in ALSO][1:]]
        for other in others:
            assert sharded["scale"] == other["scale"]
            theirs = other["losses"][:, local if other is expected else slice(None)]
            torch.testing.assert_close(sharded["losses"], theirs, rtol=10 * near, atol=10 * near)
            for k in local:
                for what in ("weights", "averages"):
                    assert sharded[k][what].keys() == other[k][what].keys()
                    for key, t in sharded[k][what].items():
                        torch.testing.assert_close(t, other[k][what][key], rtol=near, atol=near)


@pytest.mark.parametrize("name", QUICK)
def test_two_columns_are_one_process(on_two, name):
    check(name, on_two)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_of_two_columns(more_on_two, name):
    check(name, more_on_two)


def test_two_rows_of_two_columns_are_one_process():
    check("batchnorm, accumulate", run_ranks(4, on, 2, 2, ["batchnorm, accumulate"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_more_of_two_rows_of_two_columns(on_four, name):
    check(name, on_four)


def by_policy() -> list[tuple]:
    """Losses of peers that compute in bfloat16 by their owner's policy, and by autocast."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = make_mesh(1, 2)
    mesh.place(2)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = []
    for amp in ("off", "bf16"):
        made = cohort(dtype=torch.float32)
        for peer in made if amp == "off" else ():
            fully_shard(peer, mesh=mesh.device_mesh["data"], mp_policy=policy)
        shard(made, mesh)
        outputs, _ = train(
            made, mesh, steps=STEPS, amp=amp, batches=lambda step, dtype: batch(step, ROWS, dtype)
        )
        found.append(torch.stack([total(output, mesh).losses for output in outputs]))
    return found


@pytest.mark.slow
def test_an_owners_policy_of_precision_trains_as_autocast_does():
    for policy, autocast in run_ranks(2, by_policy):
        torch.testing.assert_close(policy, autocast, rtol=0.01, atol=0.01)  # bfloat16's rounding
        assert not torch.equal(policy, autocast)
