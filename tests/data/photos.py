"""Small image files in folders of their own, no two alike."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np


def write(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    """An image of (height, width) random pixels, which its path decides, in the form that the
    ending says."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(zlib.crc32(os.fsencode(path.parent.name + path.name)))
    image = Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).convert(mode)
    form = {"jpg": "JPEG", "tif": "TIFF"}.get(path.suffix[1:].lower(), path.suffix[1:].upper())
    image.save(path, form)
    return path


def write_folders(root: Path, splits=("train", "test"), classes=("cat", "dog"), n: int = 4) -> Path:
    """`n` images of each class of each split; "" is a split of its own."""
    for split in splits:
        for name in classes:
            for i in range(n):
                write(root / split / name / f"{split}{i}.png")
    return root
