"""Trainings that experiments have in common, and their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdml.files import safe_name
from fastdml.reproduce.experiment import PeerOf, Training
from fastdml.reproduce.scales import Scale

LABELS = {
    "resnet32": "ResNet-32",
    "mobilenet": "MobileNet",
    "wrn_28_10": "WRN-28-10",
    "googlenet": "InceptionV1",
    "resnet8": "ResNet-8",
    "resnet14": "ResNet-14",
    "resnet20": "ResNet-20",
    "wrn_10_2": "WRN-10-2",
}
# On digits, smaller ones take the places of the paper's networks.
STAND_INS = {"resnet32": "resnet8", "mobilenet": "resnet14", "wrn_28_10": "wrn_10_2"}


def peers_text(peers: Sequence[str]) -> str:
    """resnet32-x2, or wrn_28_10-resnet32: a cohort in the name of a folder."""
    if len(peers) > 1 and len(set(peers)) == 1:
        return f"{peers[0]}-x{len(peers)}"
    return "-".join(peers)


def training(
    scale: Scale,
    peers: Sequence[str],
    *,
    data: str = "cifar100",
    kind: str = "",
    teachers: tuple[PeerOf, ...] = (),
    over: dict[str, Any] | None = None,
    **settings: Any,
) -> Training:
    """Peers on CIFAR, or on what the scale has in its place. kind: what tells the training from the
    usual one of these peers. settings: what differs from the data set's defaults, which are the
    paper's; the scale's own go over these, and `over` over both."""
    data = scale.data or data
    name = safe_name("-".join(filter(None, [data, peers_text(peers), kind])))
    settings = {"data": data, "peers": tuple(peers), **settings, **scale.settings, **(over or {})}
    return Training(name, settings, teachers)


def cohort(scale: Scale, K: int) -> Training:
    """K of the scale's networks. The largest cohort also trains independently, for all smaller
    ones: peer k begins with weights that depend on the seed and k alone, and batches depend on the
    seed alone."""
    alone = max(scale.cohort_sizes) == K or (K == 2 and scale.pair_independent)
    return training(scale, [scale.network] * K, independent=alone)


def largest(scale: Scale) -> Training:
    return cohort(scale, max(scale.cohort_sizes))


def independent_pair(scale: Scale) -> Training:
    """The training whose first two peers, trained independently, are the baseline of a pair."""
    return cohort(scale, 2) if scale.pair_independent else largest(scale)


def network(scale: Scale) -> str:
    return LABELS[scale.network]


def changes(scale: Scale, theirs: str = "") -> Sequence[str]:
    """Of an experiment whose rows name no networks. theirs: the paper's network, if it is one."""
    if not scale.scaled_down or scale.network == theirs:
        return scale.changes
    return (*scale.changes, f"{network(scale)} in place of the paper's networks")
