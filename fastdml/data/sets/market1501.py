"""Person re-identification sets as files: Market-1501, and others of the same kind.

Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015. Reading lists and checks
the files; pixels are decoded by a loader, or all at once by `ReidSplit.decode`.

Rules: the identity and the camera come from the file's name alone; identity -1 (junk detections) is
dropped everywhere; identity 0 (distractors) stays in the gallery; files and identities are sorted,
so labels never depend on the order of a directory; training identities are numbered from 0. Hidden
files and what operating systems leave between others are not looked at.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastdml.data.files.archive import is_leftover
from fastdml.data.files.check_files import check_bad_files, scan
from fastdml.data.registry import register_dataset
from fastdml.data.reid_split import MEAN, STD, STORED, ReidSplit
from fastdml.errors import InputError
from fastdml.paths import expanded

logger = logging.getLogger(__name__)

JUNK = -1
LARGEST = 2**63 - 1  # of int64
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")


@dataclass(frozen=True)
class Layout:
    """Where a set keeps its files. A split is a folder, or a list file with its folder."""

    name: str
    folders: tuple[str, ...]  # of the set, below the root; the root itself is tried last
    train: tuple[tuple[str, str | None], ...]  # (folder, list file or None), read together
    query: tuple[tuple[str, str | None], ...]
    gallery: tuple[tuple[str, str | None], ...]
    pattern: str  # groups: identity, camera; from the start of the file's name
    counts: tuple[int, int, int]  # official images of each split, junk left out
    identities: int  # official, in training
    form: str = "that its layout has"  # the pattern, for people

    @property
    def place(self) -> str:
        """Where the files are, for people."""
        splits = (*self.train, *self.query, *self.gallery)
        return f"{self.folders[0]}/: {', '.join(dict.fromkeys(folder for folder, _ in splits))}"


MARKET = Layout(
    "Market-1501",
    ("Market-1501-v15.09.15", "Market-1501", "market1501"),
    (("bounding_box_train", None),),
    (("query", None),),
    (("bounding_box_test", None),),
    r"(-?\d+)_c(\d+)",
    (12_936, 3_368, 15_913),
    751,
    "0002_c1..., which is identity 2 and camera 1",
)
DUKE = Layout(
    "DukeMTMC-reID",
    ("DukeMTMC-reID", "dukemtmc-reid", "dukemtmcreid"),
    MARKET.train,
    MARKET.query,
    MARKET.gallery,
    r"(-?\d+)_c(\d+)",
    (16_522, 2_228, 17_661),
    702,
    MARKET.form,
)
MSMT = Layout(
    "MSMT17",
    ("MSMT17_V1", "MSMT17_V2", "MSMT17"),
    (("train", "list_train.txt"), ("train", "list_val.txt")),
    (("test", "list_query.txt"),),
    (("test", "list_gallery.txt"),),
    r"(\d+)_\d+_(\d+)_",
    (32_621, 11_659, 82_161),
    1_041,
    "0002_015_01_..., which is identity 2 and camera 1",
)
MSMT_V2 = replace(  # the same images with the faces blurred
    MSMT,
    train=tuple(("mask_train_v2", listed) for _, listed in MSMT.train),
    query=(("mask_test_v2", "list_query.txt"),),
    gallery=(("mask_test_v2", "list_gallery.txt"),),
)
LAYOUTS = {"market1501": (MARKET,), "dukemtmc": (DUKE,), "msmt17": (MSMT, MSMT_V2)}


class ImageFolderReID:
    """`train`, `query` and `gallery` of a set laid out as "market1501", "dukemtmc" or "msmt17".

    Every file is decoded once (see `data/files/check_files.py`); bad ones are an error that lists
    them, or with bad_files="skip" are left out and listed on stderr (`bad` has them either way).
    Raises InputError where folders, lists or files are missing, or no image of a split is left.
    """

    train: ReidSplit
    query: ReidSplit
    gallery: ReidSplit

    def __init__(
        self,
        root: str | Path,
        layout: str | Layout = "market1501",
        *,
        bad_files: str = "error",
        progress: bool | None = None,
        cache: Path | None = None,
    ) -> None:
        if isinstance(layout, str):
            if layout not in LAYOUTS:
                raise InputError(f"unknown layout {layout!r}: give one of {', '.join(LAYOUTS)}")
            layouts = LAYOUTS[layout]
        else:
            layouts = (layout,)
        check_bad_files(bad_files)
        self.layout, self.root = _find(expanded(root), layouts)
        self.bad: dict[str, str] = {}  # path -> reason
        splits = {
            name: _read(self.root, getattr(self.layout, name), self.layout, self.bad)
            for name in ("train", "query", "gallery")
        }
        self._check(splits, bad_files, progress, cache)

    def _check(
        self,
        splits: dict[str, ReidSplit],
        bad_files: str,
        progress: bool | None,
        cache: Path | None,
    ) -> None:
        """Names, decodability, counts, identities; then the splits become attributes."""
        every = [path for split in splits.values() for path in split.paths]
        found = scan(every, progress=progress, cache=cache)
        found = replace(found, bad={**self.bad, **found.bad}, files=found.files + len(self.bad))
        if found.bad and bad_files == "error":
            raise InputError(
                f"{self.layout.name}: {found.describe()}: restore them, or set bad_files to skip"
            )
        if found.bad:
            logger.warning("%s: left out: %s", self.layout.name, found.describe())
        self.bad = found.bad
        for name, split in splits.items():
            split = split.without(found.bad)
            if not len(split):
                raise InputError(f"{self.root}: no image of the {name} split is left")
            setattr(self, name, split)
        counts = tuple(len(getattr(self, name)) for name in ("train", "query", "gallery"))
        if counts != self.layout.counts or self.num_ids != self.layout.identities:
            told = (*counts, self.num_ids)
            official = (*self.layout.counts, self.layout.identities)
            warnings.warn(
                f"{self.root}: {'/'.join(f'{n:,}' for n in told)} training, query, gallery images "
                f"and training identities; {self.layout.name} has "
                f"{'/'.join(f'{n:,}' for n in official)}: figures from a subset do not compare",
                stacklevel=3,
            )
        stray = set(self.query.ids.tolist()) - set(self.gallery.ids.tolist())
        if stray:
            warnings.warn(
                f"{self.root}: {len(stray)} query identities have no image in the gallery, "
                f"identity {min(stray)} for one: they cannot be found",
                stacklevel=3,
            )

    @property
    def num_ids(self) -> int:
        """Identities to train on."""
        return self.train.num_classes


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
            drawn = _read(self.root, (("gt_bbox", None),), self.layout, self.bad)
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
            paths = tuple(str(path) for path in _images(folder))
            if not paths:
                raise InputError(_no_images(folder))
            import torch

            unknown = torch.zeros(len(paths), dtype=torch.int64)
            splits["distractor"] = ReidSplit(paths, unknown, unknown)  # of no known camera
        super()._check(splits, bad_files, progress, cache)
        if self.distractors:
            self.gallery = _together([self.gallery, self.distractor])
            del self.distractor


def _find(root: Path, layouts: Sequence[Layout]) -> tuple[Layout, Path]:
    """The layout that the set has and the folder with its splits."""
    name = layouts[0].name
    if not root.is_dir():
        raise InputError(f"{root}: no such folder: name the one that holds {name}")
    tried: list[tuple[float, Path, list[str]]] = []  # share that is missing, folder, what it is
    for layout in layouts:
        for folder in (*(root / name for name in layout.folders), root):
            needed, missing = _parts(folder, layout)
            if not missing:
                return layout, folder
            if folder.is_dir():
                tried.append((len(missing) / len(needed), folder, missing))
    share, folder, missing = min(tried, key=lambda each: each[0])
    if share == 1:
        raise InputError(f"{root}: holds no {name} (no {', no '.join(missing)})")
    raise InputError(
        f"{folder}: {', '.join(missing)} missing from {name}: unpack the archive again"
    )


def _parts(folder: Path, layout: Layout) -> tuple[list[str], list[str]]:
    """The folders and lists that a set needs, and those of them that are not there."""
    places = [*layout.train, *layout.query, *layout.gallery]
    folders = list(dict.fromkeys(place for place, _ in places))
    lists = [listed for _, listed in places if listed]
    missing = [f for f in folders if not (folder / f).is_dir()]
    missing += [f for f in lists if not (folder / f).is_file()]
    return folders + lists, missing


def _images(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )


def _no_images(folder: Path) -> str:
    others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    held = f", but {len(others):,} other files, such as {others[0]!r}" if others else ""
    return f"{folder}: holds no images ({' '.join(SUFFIXES)}){held}"


def _read(
    root: Path, places: Sequence[tuple[str, str | None]], layout: Layout, bad: dict[str, str]
) -> ReidSplit:
    """Identities and cameras from the files' names; files whose name does not fit go into `bad`,
    with the reason."""
    import torch

    pattern = re.compile(layout.pattern)
    files: list[Path] = []
    for place, listed in places:
        folder = root / place
        found = _listed(root / listed, folder) if listed else _images(folder)
        if not found:
            raise InputError(_no_images(folder))
        files += found
    paths, ids, cameras = [], [], []
    for file in sorted(files):
        match = pattern.match(file.name)
        if match is None:
            bad[str(file)] = (
                f"its name is not of the form {layout.form}, so its identity and camera are unknown"
            )
            continue
        identity, camera = int(match[1]), int(match[2])
        if max(abs(identity), abs(camera)) > LARGEST:
            raise InputError(
                f"{file}: the identity or the camera in its name is beyond {LARGEST}, what 64 bits "
                "hold: rename it"
            )
        if identity == JUNK:
            continue
        paths.append(str(file))
        ids.append(identity)
        cameras.append(camera)
    return ReidSplit(tuple(paths), torch.tensor(ids).long(), torch.tensor(cameras).long())


def _listed(file: Path, folder: Path) -> list[Path]:
    """The files that the lines "NAME LABEL" of a list name."""
    found = []
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{file}: not a text file: unpack the archive again") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name = line.split()[0]
        path = folder / name
        if is_leftover(path.name):
            continue
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{file}: line {number} names {name!r}, which is outside of {folder}")
        if not os.path.isfile(path):  # False for names that no file system takes, too
            raise InputError(f"{path}: the file is not there, but line {number} of {file} names it")
        found.append(path)
    return found


def _together(splits: Sequence[ReidSplit]) -> ReidSplit:
    import torch

    return ReidSplit(
        tuple(path for split in splits for path in split.paths),
        torch.cat([split.ids for split in splits]),
        torch.cat([split.cameras for split in splits]),
    )
