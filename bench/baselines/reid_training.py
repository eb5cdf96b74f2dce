"""The usual re-identification training (torchreid, BoT) made mutual in the usual way: torchvision's
transforms in two workers, batches of a few images of each identity drawn in Python, a kl_div for
each pair, the losses on features of `reid_losses`, and an Adam, a backward pass and an SGD for the
centres a peer. Needs torchvision.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from torchvision import transforms

from bench.baselines import reid_losses
from bench.baselines.vision import Pictures
from fastdml.data import ReidSplit
from fastdml.machine import pairwise

SMOOTHING, CENTER_WEIGHT = 0.1, 5e-4


class RandomIdentitySampler(Sampler[int]):
    """`images_per_id` of each of batch / images_per_id identities, until identities run out."""

    def __init__(self, labels: Sequence[int], batch: int, images_per_id: int) -> None:
        self.of_each, self.ids_per_batch = images_per_id, batch // images_per_id
        self.places = defaultdict(list)
        for place, label in enumerate(labels):
            self.places[label].append(place)

    def __iter__(self) -> Iterator[int]:
        left = {}
        for label, places in self.places.items():
            shuffled = random.sample(places, len(places))
            whole = len(places) // self.of_each * self.of_each
            left[label] = [shuffled[i : i + self.of_each] for i in range(0, whole, self.of_each)]
        while len(left) >= self.ids_per_batch:
            for label in random.sample(list(left), self.ids_per_batch):
                yield from left[label].pop()
                if not left[label]:
                    del left[label]


def loader(split: ReidSplit, size: tuple[int, int], batch: int, images_per_id: int) -> DataLoader:
    steps = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.RandomHorizontalFlip(),
            transforms.Pad(size[1] // 8),
            transforms.RandomCrop(size),
            transforms.ToTensor(),
            transforms.Normalize([m / 255 for m in split.mean], [s / 255 for s in split.std]),
            transforms.RandomErasing(0.5, scale=(0.02, 0.4)),
        ]
    )
    sampler = RandomIdentitySampler(split.labels.tolist(), batch, images_per_id)
    return DataLoader(Pictures(split, steps), batch, sampler=sampler, drop_last=True, num_workers=2)


class Loop:
    """One training step, called with a batch; peers must have a re-identification head."""

    def __init__(self, peers: Sequence[nn.Module], lr: float = 3.5e-4) -> None:
        self.peers = list(peers)
        self.optimizers = [
            torch.optim.Adam(
                [w for w in peer.parameters() if w.requires_grad], lr, weight_decay=5e-4
            )
            for peer in self.peers
        ]
        device = next(self.peers[0].parameters()).device
        self.centers = [
            nn.Parameter(torch.randn(peer.num_classes, peer.num_features, device=device))
            for peer in self.peers
        ]
        self.center_optimizers = [torch.optim.SGD([c], lr=0.5) for c in self.centers]

    def __call__(self, images: Tensor, labels: Tensor) -> list[float]:
        outputs = [peer.logits_and_features(images) for peer in self.peers]
        logits = [z for z, _ in outputs]
        mutual = pairwise.losses(logits, labels)
        values = []
        for k, (z, x) in enumerate(outputs):
            smooth = F.cross_entropy(z, labels, label_smoothing=SMOOTHING)
            loss = mutual[k] - F.cross_entropy(z, labels) + smooth
            loss = loss + reid_losses.triplet(x, labels)
            loss = loss + CENTER_WEIGHT * reid_losses.center(x, labels, self.centers[k])
            self.optimizers[k].zero_grad()
            self.center_optimizers[k].zero_grad()
            loss.backward()
            self.optimizers[k].step()
            self.centers[k].grad.mul_(1 / CENTER_WEIGHT)
            self.center_optimizers[k].step()
            values.append(loss.item())
        return values
