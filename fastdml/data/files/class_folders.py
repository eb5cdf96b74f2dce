"""Folders of images by class, by the convention of torchvision's ImageFolder: each folder is a
class, and every image in it or deeper is of that class.

As in ImageFolder classes come in the order of their names, images in the order of their folders and
names, and links are followed. Hidden files and what operating systems leave between others are not
looked at. A hundred thousand files take about a second.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastdml.data.files.archive import is_leftover
from fastdml.errors import InputError

SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
UNSHOWN = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are no text, line breaks
SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


@dataclass
class Listing:
    """The files of a split and the class of each, before any is opened."""

    place: Path  # the folder, or the list
    paths: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # of each path
    bad: dict[str, str] = field(default_factory=dict)  # path -> why it can be no image
    notes: list[str] = field(default_factory=list)  # what the user should know


def read_class_folders(folder: Path) -> Listing:
    """The images below the class folders of `folder`. Raises InputError for a folder that holds
    none, and for one that cannot be read."""
    found = Listing(folder)
    folders, files = _entries(folder)
    beside = [name for name in files if is_image(name)]
    if not folders:
        raise InputError(_no_classes(folder, beside))
    if beside:
        found.notes.append(
            f"{folder}: left out: {counted(len(beside), 'image')} beside the class folders, "
            f"without a class, such as {beside[0]!r}"
        )
    others: list[str] = []
    by_name: dict[str, str] = {}
    for name in folders:
        of_class = class_name(name, folder / name)
        if of_class in by_name:
            raise InputError(
                f"{folder / name}: its name looks the same as that of another class folder, and is "
                "written in other characters: rename one"
            )
        by_name[of_class] = name
        images = sorted(_walk(folder / name, others, found.notes))
        if not images:
            raise InputError(
                f"{folder / name}: holds no images ({' '.join(SUFFIXES)}): remove the folder, or "
                "put images of the class there"
            )
        found.paths += [os.path.join(*parts) for parts in images]
        found.classes += [of_class] * len(images)
    if others:
        found.notes.append(_left_out(folder, others))
    return found


def read_images(folder: Path) -> Listing:
    """All images in `folder` or deeper, of no class. Raises InputError for a folder that holds
    none, and for one that cannot be read."""
    found, others = Listing(folder), list[str]()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: give the one that holds the images")
    found.paths = [os.path.join(*parts) for parts in sorted(_walk(folder, others, found.notes))]
    if not found.paths:
        raise InputError(f"{folder}: holds no images ({' '.join(SUFFIXES)})")
    if others:
        found.notes.append(_left_out(folder, others))
    return found


def _left_out(folder: Path, others: list[str]) -> str:
    return (
        f"{folder}: left out: {counted(len(others), 'file')} not called "
        f"{' '.join(SUFFIXES)}, such as {others[0]}"
    )


def class_name(name: str, place: object) -> str:
    """A class's name as it is compared, in composed characters (macOS writes others). Raises
    InputError for a name that cannot be shown in a line. place: where it stands, for messages."""
    name = unicodedata.normalize("NFC", name)
    if any(unicodedata.category(character) in UNSHOWN for character in name):
        raise InputError(
            f"{str(place)!r}: the name of the class has characters that cannot be shown: rename it"
        )
    return name


def is_image(name: str) -> bool:
    """Whether a file's name ends as that of an image does."""
    return name.lower().endswith(SUFFIXES)


def counted(n: int, what: str) -> str:
    """`n` and `what` in the plural that `n` asks for."""
    return f"{n:,} {what}" + "s" * (n != 1)


def split_folders(root: Path) -> dict[str, Path]:
    """The folders train, validation and test of `root`, those that are there, by their own or
    another usual name. Raises InputError where one is there twice."""
    folders, _ = _entries(root)
    return by_split(root, [(name, name) for name in folders])


def by_split(root: Path, names: Iterable[tuple[str, str]]) -> dict[str, Path]:
    """Which of (name, name without ending) are those of splits: `root` / name by split."""
    found: dict[str, Path] = {}
    for name, stem in names:
        for split, usual in SPLITS.items():
            if stem.lower() in usual:
                if split in found:
                    raise InputError(
                        f"{root}: holds both {found[split].name} and {name}, which mean the same: "
                        "keep one"
                    )
                found[split] = root / name
    return found


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in `folder`, which are classes where it is a split."""
    return _entries(folder)[0]


def lies_deeper(folder: Path) -> Path | None:
    """Where the only folder in `folder` holds train/ and others, or classes of its own: that one,
    which was probably meant."""
    folders, _ = _entries(folder)
    if len(folders) != 1:
        return None
    inner = folder / folders[0]
    deeper, files = _entries(inner)
    if split_folders(inner).get("train") or (len(deeper) > 1 and not any(map(is_image, files))):
        return inner
    return None


def splits_within_classes(folder: Path) -> bool:
    """Whether each of several class folders is divided into train/ and others, the wrong way
    round."""
    folders, _ = _entries(folder)
    inner = [split_folders(folder / name) for name in folders]
    return len(inner) > 1 and all("train" in found and len(found) > 1 for found in inner)


def _no_classes(folder: Path, images: list[str]) -> str:
    if not images:
        return f"{folder}: holds neither folders of images nor images"
    return (
        f"{folder}: holds {counted(len(images), 'image')}, such as {images[0]!r}, and no class "
        "folders, so that their classes are unknown: put each into a folder named after its class, "
        "write a CSV file of path,label, or move them elsewhere"
    )


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the other files in `folder`, sorted. Raises InputError where
    it cannot be read."""
    folders: list[str] = []
    files: list[str] = []
    for entry in _scanned(str(folder)):
        (folders if _is_folder(entry) else files).append(entry.name)
    return sorted(folders), sorted(files)


def _mark(folder: str) -> tuple[int, int]:
    """What tells a folder from others, whatever links lead to it."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
    return status.st_dev, status.st_ino


def _scanned(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from (
                e for e in entries if not e.name.startswith(".") and not is_leftover(e.name)
            )
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle of links; decoding says so
        return False


def _walk(folder: Path, others: list[str], notes: list[str]) -> Iterator[tuple[str, str]]:
    """(folder, name) of each image in `folder` or deeper; other files go into `others`."""
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(str(folder), frozenset())]
    while waiting:
        here, above = waiting.pop()
        mark = _mark(here)
        if mark in above:
            notes.append(f"{here}: links to a folder that it is in, and is left out")
            continue
        for entry in _scanned(here):
            if _is_folder(entry):
                waiting.append((entry.path, above | {mark}))
            elif is_image(entry.name):
                yield here, entry.name
            else:
                others.append(entry.path)
