"""A tiny set in Market-1501's layout, which a small network learns to tell apart in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

SIZE = (32, 16)
TRAIN_IDS, TEST_IDS, CAMERAS = 6, 5, 3


def picture(random: np.random.Generator, identity: int) -> np.ndarray:
    """An identity is its two colours, one above the other, in another light each time."""
    colours = np.random.default_rng(identity).integers(60, 196, (2, 1, 1, 3))
    halves = (colours + np.zeros((2, SIZE[0] // 2, SIZE[1], 3))).reshape(*SIZE, 3)
    noisy = halves + random.normal(0, 30, 3) + random.normal(0, 40, (*SIZE, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def write_market(root: Path) -> Path:
    """Into `root`: 48 training images of 6 identities; of 5 others 15 queries, 30 gallery images
    and 15 in gt_bbox; 4 distractors and 3 junk images."""
    image = pytest.importorskip("PIL.Image", reason="writing pictures needs Pillow")
    random = np.random.default_rng(0)

    def write(folder: str, identity: int, camera: int, number: int) -> None:
        (root / folder).mkdir(exist_ok=True)
        name = f"{identity:04d}" if identity >= 0 else "-1"
        path = root / folder / f"{name}_c{camera}s1_{number:06d}_00.png"
        image.fromarray(picture(random, identity + 1)).save(path)

    for identity in range(1, TRAIN_IDS + 1):
        for number in range(8):
            write("bounding_box_train", identity, number % CAMERAS + 1, number)
    for identity in range(101, 101 + TEST_IDS):
        for camera in range(1, CAMERAS + 1):
            write("query", identity, camera, 0)
            write("gt_bbox", identity, camera, 1)
            for number in (2, 3):
                write("bounding_box_test", identity, camera, number)
    for number in range(4):
        write("bounding_box_test", 0, number % CAMERAS + 1, number)
    for number in range(3):
        write("bounding_box_test", -1, number % CAMERAS + 1, number)
    return root
