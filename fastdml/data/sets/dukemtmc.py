"""DukeMTMC-reID: 1,404 people before eight cameras, in Market-1501's layout. Its authors have
withdrawn it; who has it can read it.

Ristani et al., "Performance Measures and a Data Set for Multi-Target, Multi-Camera Tracking",
ECCVW 2016; split of Zheng et al., ICCV 2017.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdml.data.registry import register_dataset
from fastdml.data.reid_folders import ImageFolderReID
from fastdml.data.reid_layouts import DUKE
from fastdml.data.reid_split import MEAN, STD


@register_dataset(
    "dukemtmc",
    task="reid",
    num_classes=DUKE.identities,
    mean=MEAN,
    std=STD,
    purpose="people seen by eight cameras; withdrawn by its authors",
    files="own",
    place=DUKE.place,
)
class DukeMTMC(ImageFolderReID):
    """DukeMTMC-reID below `root`, in a folder DukeMTMC-reID or not. options: those of
    `ImageFolderReID`."""

    def __init__(self, root: str | Path, **options: Any) -> None:
        super().__init__(root, "dukemtmc", **options)
