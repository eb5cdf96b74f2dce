"""Re-identification sets as files, in any of `reid_layouts`.

Reading lists and checks the files; pixels are decoded by a loader, or all at once by
`ReidSplit.decode`.

Rules: the identity and the camera come from the file's name alone; identity -1 (junk detections) is
dropped everywhere; identity 0 (distractors) stays in the gallery; files and identities are sorted,
so labels never depend on the order of a directory; training identities are numbered from 0. Hidden
files and what operating systems leave between others are not looked at.
"""

from __future__ import annotations

import logging
import operator
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastdml.data.files.archive import is_leftover
from fastdml.data.files.check_files import check_bad_files, scan
from fastdml.data.reid_layouts import LAYOUTS, Layout, Pattern, checked_pattern, naming
from fastdml.data.reid_split import STORED, ReidSplit
from fastdml.errors import InputError
from fastdml.paths import expanded

logger = logging.getLogger(__name__)

JUNK = -1
LARGEST = 2**63 - 1  # of int64
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")


class ImageFolderReID:
    """`train`, `query` and `gallery` of a set laid out as "market1501", "dukemtmc", "msmt17",
    "veri" or, with names of your own, "reid_folder": the folders train, query and gallery (or
    bounding_box_train, image_train and so on), with folders within them or not.

    pattern: how files are named, in place of what the layout says: a regular expression with the
    groups `id` and `camera`, such as r"(?P<id>\\d+)/cam(?P<camera>\\d+)" (in "reid_folder" it is
    searched for in the file's path below its split, else it begins the file's name), or a function
    from such a path to (identity, camera), both whole numbers, or None for a bad file. size: the
    (height, width) that loaders decode files to before they are resized.

    Every file is decoded once (see `data/files/check_files.py`); bad ones are an error that lists
    them, or with bad_files="skip" are left out and listed on stderr (`bad` has them either way).
    Raises InputError where folders, lists or files are missing, or no image of a split is left.
    """

    train: ReidSplit
    query: ReidSplit
    gallery: ReidSplit
    multi_query: ReidSplit | None = None  # more images of each query's identity and camera

    def __init__(
        self,
        root: str | Path,
        layout: str | Layout = "market1501",
        *,
        pattern: Pattern | None = None,
        size: tuple[int, int] = STORED,
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
        if pattern is not None:
            form = "that its function knows"
            if isinstance(pattern, str):
                form = f"that the pattern {checked_pattern(pattern).pattern!r} finds"
            layouts = tuple(replace(each, pattern=pattern, form=form) for each in layouts)
        check_bad_files(bad_files)
        self.layout, self.root = _find(expanded(root), layouts)
        self.bad: dict[str, str] = {}  # path -> reason
        splits = {
            name: replace(
                read_split(self.root, getattr(self.layout, name), self.layout, self.bad),
                size=size,
            )
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
        official_counts = self.layout.counts
        if official_counts and (*counts, self.num_ids) != (
            *official_counts,
            self.layout.identities,
        ):
            told = (*counts, self.num_ids)
            official = (*official_counts, self.layout.identities)
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


def _find(root: Path, layouts: Sequence[Layout]) -> tuple[Layout, Path]:
    """The layout that the set has and the folder with its splits."""
    name = layouts[0].name
    if not root.is_dir():
        raise InputError(f"{root}: no such folder: name the one that holds {name}")
    tried: list[tuple[float, Path, list[str]]] = []  # share that is missing, folder, what it is
    for layout in layouts:
        for folder in (*(root / name for name in layout.folders), root):
            layout = _with_synonyms(folder, layout)
            needed, missing = _parts(folder, layout)
            if not missing:
                return layout, folder
            if folder.is_dir():
                tried.append((len(missing) / len(needed), folder, missing))
    share, folder, missing = min(tried, key=lambda each: each[0])
    if share == 1:
        raise InputError(f"{root}: holds no {name} (no {', no '.join(missing)})")
    remedy = "unpack the archive again"
    if layouts[0].synonyms:
        remedy = f"it needs {', '.join(' or '.join(names) for names in layouts[0].synonyms)}"
    raise InputError(f"{folder}: {', '.join(missing)} missing from {name}: {remedy}")


def _with_synonyms(folder: Path, layout: Layout) -> Layout:
    """The layout with those names for its splits' folders that are there."""
    if not layout.synonyms:
        return layout
    there = [[n for n in names if (folder / n).is_dir()] or names for names in layout.synonyms]
    train, query, gallery = (((names[0], None),) for names in there)
    return replace(layout, train=train, query=query, gallery=gallery)


def _parts(folder: Path, layout: Layout) -> tuple[list[str], list[str]]:
    """The folders and lists that a set needs, and those of them that are not there."""
    places = [*layout.train, *layout.query, *layout.gallery]
    folders = list(dict.fromkeys(place for place, _ in places))
    lists = [listed for _, listed in places if listed]
    missing = [f for f in folders if not (folder / f).is_dir()]
    missing += [f for f in lists if not (folder / f).is_file()]
    return folders + lists, missing


def images_in(folder: Path, nested: bool = False) -> list[Path]:
    """The images in a folder, or with `nested` also in those below it; nothing that is hidden."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if nested and not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES)


def no_images(folder: Path) -> str:
    others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    held = f", but {len(others):,} other files, such as {others[0]!r}" if others else ""
    return f"{folder}: holds no images ({' '.join(SUFFIXES)}){held}"


def read_split(
    root: Path, places: Sequence[tuple[str, str | None]], layout: Layout, bad: dict[str, str]
) -> ReidSplit:
    """Identities and cameras from the files' names; files whose name does not fit go into `bad`,
    with the reason."""
    import torch

    numbers = naming(layout)
    files: list[tuple[Path, str]] = []  # and what the pattern reads
    for place, listed in places:
        folder = root / place
        found = _listed(root / listed, folder) if listed else images_in(folder, layout.nested)
        if not found:
            empty = f"{root / listed}: names no files: unpack the archive again" if listed else ""
            raise InputError(empty or no_images(folder))
        for file in found:
            name = file.relative_to(folder).as_posix() if layout.nested else file.name
            files.append((file, name))
    paths, ids, cameras = [], [], []
    unread: list[str] = []
    for file, name in sorted(files):
        who = numbers(name)
        if who is None:
            unread.append(name)
            bad[str(file)] = (
                f"its name is not of the form {layout.form}, so its identity and camera are unknown"
            )
            continue
        identity, camera = _checked(file, who)
        if identity == JUNK:
            continue
        paths.append(str(file))
        ids.append(identity)
        cameras.append(camera)
    if layout.nested and len(unread) == len(files):  # the pattern is at fault, not the files
        raise InputError(
            f"{root / places[0][0]}: none of its {len(files):,} images has a name of the form "
            f"{layout.form}: {unread[0]!r} for one"
        )
    return ReidSplit(tuple(paths), torch.tensor(ids).long(), torch.tensor(cameras).long())


def _checked(file: Path, who: object) -> tuple[int, int]:
    """What was found in a file's name, or what a function made of it, where it is an identity and a
    camera."""
    try:
        identity, camera = (operator.index(number) for number in who)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise InputError(
            f"{file}: the pattern's function gives {who!r}: it must give (identity, camera), two "
            "whole numbers, or None"
        ) from None
    if max(abs(identity), abs(camera)) > LARGEST:
        raise InputError(
            f"{file}: the identity or the camera in its name is beyond {LARGEST}, what 64 bits "
            "hold: rename it"
        )
    if identity < JUNK:
        raise InputError(
            f"{file}: the identity in its name is {identity}: the least is {JUNK}, for images that "
            "are left out"
        )
    return identity, camera


def _listed(file: Path, folder: Path) -> list[Path]:
    """The files that the lines "NAME LABEL" of a list name."""
    found = []
    try:
        text = file.read_text(encoding="utf-8-sig")
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


def together(splits: Sequence[ReidSplit]) -> ReidSplit:
    import torch

    return ReidSplit(
        tuple(path for split in splits for path in split.paths),
        torch.cat([split.ids for split in splits]),
        torch.cat([split.cameras for split in splits]),
    )
