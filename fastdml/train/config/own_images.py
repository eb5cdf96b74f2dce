"""The settings of a run on images of one's own: `TrainConfig`'s, and how files become images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastdml.errors import InputError
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.fields import Limit, documented

LARGEST = 1024  # pixels a side


@documented
@dataclass(frozen=True, kw_only=True)
class FolderConfig(TrainConfig):
    """The settings of a run on images of your own: those of `TrainConfig`, which see, and these."""

    # --- data ---
    data: str = "folder"
    """Data set: folder."""
    root: str = "data"
    """Folder with train/ and val/ or test/ of class folders, or of class folders; or a CSV file."""
    download: bool = False
    """Not for images of your own."""

    # --- own images ---
    size: int = 0
    """Side of the square that images are cut to. 0: left as they are where all are alike and at
    most 64 a side; else 64, for which the built-in networks are made, or with a timm: peer 224."""
    normalise: Literal["auto", "set", "imagenet"] = "auto"
    """Mean and std of pixels: measured on at most 2,000 training images (set), or ImageNet's. auto:
    what pretrained peers were trained with, else set."""
    bad_files: Literal["error", "skip"] = "error"
    """Images that cannot be decoded: end the run with their names, or go on without them."""

    limits: ClassVar[dict[str, Limit]] = {
        **TrainConfig.limits,
        "size": (lambda x: 0 <= x <= LARGEST, f"within 0..{LARGEST}"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.download:
            raise InputError("images of your own cannot be downloaded: name their folder with root")
