"""The usual input pipeline with torchvision: a Dataset of PIL images, transforms one by one, and a
DataLoader of two workers. Needs torchvision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fastdml.data import ImageSet, ReidSplit


class Pictures(Dataset):
    def __init__(self, source: ImageSet | ReidSplit, transform: Callable) -> None:
        self.transform, self.labels = transform, source.labels.tolist()
        self.paths = source.paths if isinstance(source, ReidSplit) else None
        self.images = None if self.paths else source.pixels.numpy()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if self.paths:
            picture = Image.open(self.paths[i]).convert("RGB")
        else:
            picture = Image.fromarray(self.images[i])
        return self.transform(picture), self.labels[i]


def loader(source: ImageSet | ReidSplit, batch_size: int, device: torch.device) -> DataLoader:
    """CIFAR's augmentation for an `ImageSet`, the usual one of re-identification for files."""
    normalise = transforms.Normalize([m / 255 for m in source.mean], [s / 255 for s in source.std])
    if isinstance(source, ImageSet):
        steps = [
            transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            normalise,
        ]
    else:
        steps = [
            transforms.Resize((256, 128)),
            transforms.RandomHorizontalFlip(),
            transforms.Pad(10),
            transforms.RandomCrop((256, 128)),
            transforms.ToTensor(),
            normalise,
            transforms.RandomErasing(0.5, scale=(0.02, 0.4)),
        ]
    return DataLoader(
        Pictures(source, transforms.Compose(steps)),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        pin_memory=device.type == "cuda",
    )
