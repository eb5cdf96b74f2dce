"""Handwritten digits that come with scikit-learn: 1,797 real 8x8 images, nothing to download.

The UCI "Optical Recognition of Handwritten Digits" test set (Alpaydin and Kaynak, 1998),
bytes 0 to 16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdml.data.registry import register_dataset
from fastdml.errors import require

if TYPE_CHECKING:
    from fastdml.data.image_set import ImageSet

MEAN, STD = (4.8822,), (6.0185,)  # of the training images, in units of 0 to 16
WHITE = 16
CLASSES = tuple(str(c) for c in range(10))


@register_dataset(
    "digits",
    task="classification",
    image_shape=(1, 8, 8),
    classes=CLASSES,
    mean=MEAN,
    std=STD,
    purpose="a first run in seconds, nothing to download",
    files="none",
)
def load_digits() -> tuple[ImageSet, ImageSet]:
    """(train, test): 1,442 and 355 images (N, 1, 8, 8).

    Every fifth image of each class, in the order of the file, is for testing: a split that is
    fixed, stratified and spread over the whole file.
    """
    import numpy as np
    import torch

    from fastdml.data.image_set import ImageSet

    source = require("sklearn.datasets", "train").load_digits()
    pixels = torch.from_numpy(source.images.astype(np.uint8)).unsqueeze(3)  # (N, 8, 8, 1)
    labels = torch.from_numpy(source.target.astype(np.int64))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(10):
        test[(labels == c).nonzero()[4::5, 0]] = True
    train_set, test_set = (
        ImageSet.from_pixels(pixels[part], labels[part], CLASSES, MEAN, STD, WHITE)
        for part in (~test, test)
    )
    return train_set, test_set
