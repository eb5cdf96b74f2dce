"""MSMT17: 4,101 people before fifteen cameras, V1 or V2 (with faces blurred), by its list files.

Wei et al., "Person Transfer GAN to Bridge Domain Gap for Person Re-Identification", CVPR 2018.
Training is on list_train.txt and list_val.txt together, 32,621 images, as in the paper. Some code
trains on list_train.txt alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdml.data.registry import register_dataset
from fastdml.data.reid_folders import ImageFolderReID
from fastdml.data.reid_layouts import MSMT
from fastdml.data.reid_split import MEAN, STD


@register_dataset(
    "msmt17",
    task="reid",
    num_classes=MSMT.identities,
    mean=MEAN,
    std=STD,
    purpose="people seen by fifteen cameras, indoors and outdoors",
    files="own",
    place=MSMT.place,
)
class MSMT17(ImageFolderReID):
    """MSMT17 below `root`, in a folder MSMT17_V1, MSMT17_V2 or not. options: those of
    `ImageFolderReID`."""

    def __init__(self, root: str | Path, **options: Any) -> None:
        super().__init__(root, "msmt17", **options)
