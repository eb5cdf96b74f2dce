"""The usual input pipeline: a Dataset whose items are transformed one by one (pad, random crop,
flip, to float, normalise, as torchvision's transforms do), and a DataLoader of two workers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdml.data import ImageSet

PAD = 4


class Transformed(Dataset):
    def __init__(self, images: ImageSet) -> None:
        self.images = images.images.contiguous().numpy()  # (N, ch, H, W) uint8
        self.labels = images.labels.tolist()
        self.mean = torch.tensor(images.mean)[:, None, None]
        self.std = torch.tensor(images.std)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        _, height, width = image.shape
        image = np.pad(image, ((0, 0), (PAD, PAD), (PAD, PAD)), mode="reflect")
        top, left = torch.randint(0, 2 * PAD + 1, (2,)).tolist()
        image = image[:, top : top + height, left : left + width]
        if torch.rand(()) < 0.5:
            image = image[:, :, ::-1]
        image = torch.from_numpy(image.astype(np.float32))
        return (image - self.mean) / self.std, self.labels[index]


def loader(images: ImageSet, batch_size: int, device: torch.device) -> DataLoader:
    return DataLoader(
        Transformed(images),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        pin_memory=device.type == "cuda",
    )
