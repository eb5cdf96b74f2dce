"""A re-identification set of one's own, by a pattern of its files' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdml.data.registry import register_dataset
from fastdml.data.reid_folders import ImageFolderReID
from fastdml.data.reid_layouts import OWN
from fastdml.data.reid_split import MEAN, STD


@register_dataset(
    "reid_folder",
    task="reid",
    num_classes=0,
    mean=MEAN,
    std=STD,
    purpose="your own: folders train, query and gallery, --pattern for identity and camera",
    files="own",
    place=OWN.place,
)
class OwnReid(ImageFolderReID):
    """The set in the folder `root`. options: those of `ImageFolderReID`."""

    def __init__(self, root: str | Path, **options: Any) -> None:
        super().__init__(root, "reid_folder", **options)
