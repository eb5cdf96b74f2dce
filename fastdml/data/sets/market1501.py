"""Market-1501: 1,501 people before six cameras.

Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.
"""

from __future__ import annotations

from pathlib import Path

from fastdml.data.registry import register_dataset
from fastdml.data.reid_folders import ImageFolderReID, images_in, no_images, read_split, together
from fastdml.data.reid_layouts import MARKET
from fastdml.data.reid_split import MEAN, STD, STORED, ReidSplit
from fastdml.errors import InputError


@register_dataset(
    "market1501",
    task="reid",
    image_shape=(3, *STORED),
    num_classes=MARKET.identities,
    mean=MEAN,
    std=STD,
    purpose="people seen by six cameras; the paper's re-identification",
    files="own",
    place=MARKET.place,
)
class Market1501(ImageFolderReID):
    """Market-1501 below `root`, in a folder Market-1501-v15.09.15 or not.

    `multi_query` (None where there is no gt_bbox) holds gt_bbox's images of each query's identity
    and camera, which multi-query evaluation averages over. `distractors=True` adds the 500,000
    images of the folder `images` to the gallery, as identity 0.
    """

    distractor: ReidSplit  # until they are part of the gallery

    def __init__(
        self,
        root: str | Path,
        *,
        distractors: bool = False,
        bad_files: str = "error",
        progress: bool | None = None,
        cache: Path | None = None,
    ) -> None:
        self.distractors = distractors
        super().__init__(root, bad_files=bad_files, progress=progress, cache=cache)

    def _check(
        self,
        splits: dict[str, ReidSplit],
        bad_files: str,
        progress: bool | None,
        cache: Path | None,
    ) -> None:
        self.multi_query: ReidSplit | None = None
        if (self.root / "gt_bbox").is_dir():
            drawn = read_split(self.root, (("gt_bbox", None),), self.layout, self.bad)
            query = splits["query"]
            wanted = set(zip(query.ids.tolist(), query.cameras.tolist(), strict=True))
            of = zip(drawn.paths, drawn.ids.tolist(), drawn.cameras.tolist(), strict=True)
            others = {path: "" for path, *which in of if tuple(which) not in wanted}
            if len(others) < len(drawn):
                splits["multi_query"] = drawn.without(others)
        if self.distractors:
            folder = self.root / "images"
            if not folder.is_dir():
                raise InputError(f"{folder}: no such folder: the 500k distractors go there")
            paths = tuple(str(path) for path in images_in(folder))
            if not paths:
                raise InputError(no_images(folder))
            import torch

            unknown = torch.zeros(len(paths), dtype=torch.int64)
            splits["distractor"] = ReidSplit(paths, unknown, unknown)  # of no known camera
        super()._check(splits, bad_files, progress, cache)
        if self.distractors:
            self.gallery = together([self.gallery, self.distractor])
            del self.distractor
