"""Trained peers ready for use: what `fastdml.load` gives."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdml.cohort import Cohort
from fastdml.devices import choose_device
from fastdml.errors import InputError
from fastdml.paths import expanded
from fastdml.peer_groups import check_one_ensemble
from fastdml.peer_outputs import (
    Embedding,
    Ensemble,
    FeatureEnsemble,
    full_precision,
    has_head,
    peer_numbers,
)
from fastdml.preprocessing import Picture, Preprocessing, stacked
from fastdml.train.run_weights import Weights, best_peer, load_cohort

BATCH = 64  # images


class Predictor(nn.Module):
    """One peer of a cohort, or the ensemble of all, with what prepares images for it.

    Called on a batch (N, channels, H, W), on any device, gives probabilities (N, C) float32, of the
    ensemble the mean of the peers'; where the peers have re-identification heads, features (N, D)
    as their `embed` gives them, of the ensemble concatenated to unit length. No gradients.

    peer: a name or number of a peer of the cohort, or "ensemble", which peers in several groups do
        not have in common: InputError.

    Attributes: `names`, of the peers within, in order; `classes`, a name for each probability, None
    where unknown; `num_classes`; `features`, whether a call gives features; `peers`, the modules.
    """

    def __init__(self, cohort: Cohort, peer: str | int = "ensemble") -> None:
        super().__init__()
        chosen = peer_numbers(cohort.names, peer)
        if peer == "ensemble":
            check_one_ensemble(cohort)
        peers = [full_precision(cohort.peers[k]) for k in chosen]
        self.names = [cohort.names[k] for k in chosen]
        self.num_classes = cohort.num_classes
        record = cohort.record()
        self.classes: list[str] | None = record["classes"]
        self.features = all(map(has_head, peers))
        self._record = record
        self._preprocessing: Preprocessing | None = None
        self.peers = nn.ModuleList(peers)
        self.eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self._device())
        if len(self.peers) > 1:
            return (FeatureEnsemble if self.features else Ensemble)(self.peers)(images)
        (peer,) = self.peers
        return Embedding(peer)(images) if self.features else peer(images).float().softmax(1)

    @torch.inference_mode()
    def of_each(self, images: Tensor) -> Tensor:
        """The probabilities of every peer by itself, (K, N, C) float32. Raises InputError where
        peers have features in place of them."""
        self._check_classifies()
        images = images.to(self._device())
        return torch.stack([peer(images).float().softmax(1) for peer in self.peers])

    @property
    def preprocessing(self) -> Preprocessing:
        """What makes an image the peers' input. Raises InputError where the shape, mean or std of
        the images that they were trained on is not recorded."""
        if self._preprocessing is None:
            self._preprocessing = Preprocessing(self._record)
        return self._preprocessing

    def preprocess(self, image: Picture) -> Tensor:
        """An image, a path, a PIL image or an array (H, W, channels) of uint8, as the peers' input
        (channels, H, W) float32 on the CPU: see `Preprocessing`."""
        return self.preprocessing(image)

    def predict(self, images: Sequence[Picture], *, top: int = 1) -> list[list[tuple[str, float]]]:
        """For each image its `top` most probable classes, most probable first, with their
        probabilities. A class without a name is its number. Raises InputError for an image that
        cannot be read, and where peers give features: call the predictor on a batch."""
        self._check_classifies()
        if isinstance(images, (str, os.PathLike)) or not hasattr(images, "__iter__"):
            raise InputError("predict takes a list of images: predict([image])")
        images, found = list(images), []
        for start in range(0, len(images), BATCH):
            batch = stacked([self.preprocess(image) for image in images[start : start + BATCH]])
            found += self.most_probable(self(batch), top)
        return found

    def most_probable(self, probabilities: Tensor, top: int) -> list[list[tuple[str, float]]]:
        """Of each row of (N, C) the `top` classes and probabilities, as `predict` gives them. Of
        equal ones the first class leads."""
        if top < 1:
            raise InputError(f"top must be a whole number of at least 1, not {top}")
        values, places = probabilities.cpu().sort(dim=1, descending=True, stable=True)
        values, places = values[:, :top], places[:, :top]
        return [
            [(self.class_name(c), p) for c, p in zip(row, likely, strict=True)]
            for row, likely in zip(places.tolist(), values.tolist(), strict=True)
        ]

    def class_name(self, index: int) -> str:
        return str(index) if self.classes is None else self.classes[index]

    def _device(self) -> torch.device:
        return next((w.device for w in self.parameters()), torch.device("cpu"))

    def _check_classifies(self) -> None:
        if any(map(has_head, self.peers)):
            raise InputError(
                "these peers were trained for re-identification and have features in place of "
                "classes: call the predictor on a batch for them"
            )


def load(
    path: str | os.PathLike,
    *,
    peer: str | int = "ensemble",
    weights: Weights | None = None,
    device: str | torch.device = "cpu",
    peers: Sequence[str | nn.Module] | None = None,
) -> Predictor:
    """A peer or the ensemble of a training run, in evaluation mode, with what prepares its images.

    path: the folder of a run (of one that has not ended, its checkpoint is read, which is logged),
        a folder that `Cohort.save` wrote, or a .safetensors file that `fastdml export` wrote.
    peer: "ensemble", "best" (the peer with the highest recorded score), a peer's name or its
        number from 0 on.
    weights: of a run, "last" or "best"; by default the best where validation images chose them,
        else the last.
    device: such as "cpu" or "cuda"; "auto" takes a GPU where there is one.
    peers: what to load into, a name or a module for each peer: needed where a peer is code of your
        own, since a file must not decide which code is imported.

    Raises InputError, one line with the remedy, for files that are absent, damaged or of another
    version, and for peers, weights or a device that there are not.
    """
    place, device = expanded(path), choose_device(str(device))
    cohort, weights = load_cohort(place, weights, device, peers)
    if peer == "best":
        peer = best_peer(place, weights, cohort.names)
    return Predictor(cohort, peer)
