"""VeRi-776: 776 vehicles before twenty cameras.

Liu et al., "A Deep Learning-Based Approach to Progressive Vehicle Re-identification for Urban
Surveillance", ECCV 2016. Every query is in the gallery as well. What its jk_index.txt leaves out of
a query's list is its vehicle before its own camera, as everywhere in re-identification, so that
neither that file nor gt_index.txt is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdml.data.registry import register_dataset
from fastdml.data.reid_folders import ImageFolderReID
from fastdml.data.reid_layouts import VERI
from fastdml.data.reid_split import MEAN, STD


@register_dataset(
    "veri",
    task="reid",
    num_classes=VERI.identities,
    mean=MEAN,
    std=STD,
    purpose="vehicles seen by twenty cameras (VeRi-776)",
    files="own",
    place=VERI.place,
)
class VeRi(ImageFolderReID):
    """VeRi-776 below `root`, in a folder VeRi or not. options: those of `ImageFolderReID`."""

    def __init__(self, root: str | Path, **options: Any) -> None:
        super().__init__(root, "veri", **options)
