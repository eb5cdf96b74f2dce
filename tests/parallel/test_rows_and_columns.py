"""Rows and columns at once: a 2 x 2 mesh with three peers trains as one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mesh_runs import SIDE, C, batch, cohort, train
from ranks import run_ranks
from torch import Tensor, nn

from fastdml import Cohort, MutualLoss
from fastdml.engine import Ema
from fastdml.engine.amp import Amp, LossScale
from fastdml.metric_losses import MetricLoss
from fastdml.parallel import Mesh, averaged_statistics, make_mesh, sync_batchnorm, total

K = 3
CPU = torch.device("cpu")


def parameters(peers: Cohort) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in peers.named_parameters()}


def figures(outputs: list[Any], mesh: Mesh | None) -> list[list[Tensor]]:
    whole = outputs if mesh is None else [total(o, mesh) for o in outputs]
    return [[o.losses, *o.stats] for o in whole]


def unlabelled(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = batch(step, dtype, 11)
    return x, torch.where(torch.arange(11) % 5 < 3 if step % 2 else torch.arange(11) > 5, y, -100)


def loud() -> Cohort:
    """Of three peers the second overflows where the others do not."""
    peers = cohort(K, torch.float32)
    with torch.no_grad():
        peers.peers[1][-1].weight.mul_(100)
    return peers


def overflows(mesh: Mesh | None) -> dict[str, Any]:
    peers, scale = loud(), LossScale(CPU, 2.0**17)
    flags: list[Tensor] = []

    class After:
        def __call__(self, output, update):
            flags.append(torch.cat([update.overflow, update.skipped[None], scale.scale[None]]))

        def tensors(self):
            return []

    accumulate = 2 if mesh is None else 1
    train(peers, mesh, steps=5, amp=Amp(CPU, torch.float16, scale), after=After(),
          accumulate=accumulate)  # fmt: skip
    return {"flags": torch.stack(flags), "weights": parameters(peers)}


def whole_batch(mesh: Mesh | None) -> Any:
    peers = cohort(K)
    if mesh is not None:
        mesh.distribute(peers)
        sync_batchnorm(peers, mesh)
    loss = MutualLoss(temperature=2.0, mimic_ignored=True)
    outputs, _ = train(peers, mesh, steps=3, loss=loss, batches=unlabelled)
    state = {n: t.clone() for n, t in peers.state_dict().items()}
    return state, figures(outputs, mesh)


def in_parts(mesh: Mesh | None) -> Any:
    peers = cohort(K)
    if mesh is not None:
        mesh.distribute(peers)
    ema = Ema(peers, 0.9)
    outputs, _ = train(peers, mesh, accumulate=2 if mesh is None else 1, ema=ema)
    averages = {n: t for n, t in ema.state_dict().items() if "running_" not in n}
    found = parameters(peers), averages, [losses for losses, *_ in figures(outputs, mesh)]
    if mesh is not None:
        own = {n: b.clone() for n, b in peers.named_buffers()}
        with averaged_statistics(peers, mesh, ema):
            inside = {n: b.clone() for n, b in peers.named_buffers()}
        return *found, own, inside
    return found


class WithFeatures(nn.Module):
    """A network of re-identification in small: features, BatchNorm over them, a classifier."""

    def __init__(self, seed: int, width: int) -> None:
        super().__init__()
        self.num_features, self.num_classes = width, C
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(2 * SIDE * SIDE, width)
            self.neck = nn.BatchNorm1d(width)
            self.classifier = nn.Linear(width, C, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.logits_and_features(x)[0]

    def logits_and_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.first(x.flatten(1)).tanh()
        return self.classifier(self.neck(features)), features


def on_features(mesh: Mesh | None) -> Any:
    """A batch of eleven, cut into five and six: identities lie in both columns."""
    peers = Cohort([WithFeatures(k, 4 + k) for k in range(K)], C)
    metric = MetricLoss(num_classes=C, dims=(4, 5, 6), triplet=1.0, margin=None, circle=0.1,
                        center=0.5, distance_mutual=0.5).double()  # fmt: skip
    if mesh is not None:
        mesh.distribute(peers)
        sync_batchnorm(peers, mesh)
    outputs, _ = train(
        peers, mesh, steps=4, metric=metric, batches=lambda i, dtype: batch(i, dtype, 11)
    )
    metrics = [o.metric if mesh is None else total(o, mesh).metric for o in outputs]
    centers = {k: m.centers.clone() for k, m in enumerate(metric.centers)}
    return parameters(peers), figures(outputs, mesh), metrics, centers


def on_four_ranks() -> dict[str, Any]:
    mesh = make_mesh(2, 2, timeout=30)
    return {
        "at": (mesh.row, mesh.column),
        "in parts": in_parts(mesh),
        "whole batch": whole_batch(mesh),
        "overflows": overflows(mesh),
        "on features": on_features(mesh),
        "local": mesh.local,
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(4, on_four_ranks, timeout=120)


def test_thirty_steps_are_those_of_two_parts_bit_for_bit(ranks):
    weights, averages, losses = in_parts(None)
    seen = set()
    for rank in ranks:
        now, now_averages, found, *_ = rank["in parts"]
        assert len(found) == 30
        seen |= now.keys()
        assert all(torch.equal(w, weights[n]) for n, w in now.items())
        assert all(torch.equal(w, averages[n]) for n, w in now_averages.items())
        assert torch.equal(torch.stack(found), torch.stack(losses))
    assert seen == weights.keys()


def test_with_group_batch_norm_it_is_one_process_with_the_whole_batch(ranks):
    state, whole = whole_batch(None)
    for rank in ranks:
        now, found = rank["whole batch"]
        for name, t in now.items():
            torch.testing.assert_close(t, state[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-12)


def test_losses_on_features_are_of_the_whole_batch(ranks):
    weights, whole, metrics, centers = on_features(None)
    near = {"rtol": 1e-9, "atol": 1e-12}
    for rank in ranks:
        now, found, found_metrics, found_centers = rank["on features"]
        torch.testing.assert_close(now, {n: weights[n] for n in now}, **near)
        torch.testing.assert_close(found, whole, **near)
        torch.testing.assert_close(found_metrics, metrics, **near)
        for k in rank["local"]:
            assert centers[k].any()
            torch.testing.assert_close(found_centers[k], centers[k], **near)
            beside = ranks[2 * rank["at"][0]]["on features"][3][k]  # in column 0
            assert torch.equal(found_centers[k], beside)


def test_every_rank_has_the_flags_of_all_peers_and_one_scale(ranks):
    expected = overflows(None)
    flags = expected["flags"]
    assert (flags[:, 0] != flags[:, 1]).any()  # one peer overflows alone
    assert len(flags[:, -1].unique()) > 1
    for rank in ranks:
        assert torch.equal(rank["overflows"]["flags"], flags)
        for name, w in rank["overflows"]["weights"].items():
            assert torch.equal(w, expected["weights"][name])


def test_statistics_are_averaged_over_columns_alone(ranks):
    for row in range(2):
        pair = [rank["in parts"] for rank in ranks if rank["at"][0] == row]
        for name, mean in pair[0][-1].items():
            own = [found[-2][name] for found in pair]
            if "running_" in name:
                assert not torch.equal(*own)
                torch.testing.assert_close(mean, (own[0] + own[1]) / 2)
            assert torch.equal(pair[1][-1][name], mean)
