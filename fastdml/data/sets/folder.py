"""Images of one's own: class folders, or CSV files of path,label.

Three layouts, tried in this order; other usual names of the parts serve too (`SPLITS`):

- `train/` beside `val/`, `test/` or both, each with a folder for every class;
- `train.csv` beside `val.csv`, `test.csv` or both, or one CSV file as the root;
- one folder of class folders.

The classes are those of the training images. Every file is decoded once before training (see
`data/files/check_files.py`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastdml.data.files.check_files import Scan, check_bad_files, scan
from fastdml.data.files.class_folders import (
    Listing,
    by_split,
    class_folders,
    lies_deeper,
    read_class_folders,
    split_folders,
    splits_within_classes,
)
from fastdml.data.files.label_list import read_label_list, sorted_classes
from fastdml.data.files.same_files import same_files
from fastdml.data.registry import register_dataset
from fastdml.errors import InputError
from fastdml.names import advice
from fastdml.paths import expanded

if TYPE_CHECKING:
    from fastdml.data.image_files import ImageFiles, Splits

logger = logging.getLogger(__name__)

NAMED = 5  # bad files that a message names


@register_dataset(
    "folder",
    task="own_images",
    purpose="images of your own, in class folders or listed in CSV files",
    files="own",
    place="train/, val/ or test/ of class folders; class folders; a CSV file",
)
def load_folder(
    root: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    otherwise: int = 224,
    bad_files: str = "error",
    progress: bool | None = None,
    cache: Path | None = None,
) -> Splits:
    """(train, validation, test) as `ImageFiles`, the last two None where they are not there.

    size: that images are brought to by a resize and a crop of the middle, (height, width) or a
    square's side; None: the images' own if all have one of at most 64 a side, else `otherwise`, by
    default what ImageNet's networks take. bad_files: "error" or "skip", for files that cannot be
    decoded. progress, cache: as of `scan`.

    Raises InputError where no images are found, for classes that do not fit each other, for fewer
    than two classes, and for files that cannot be decoded. What else is odd is logged.
    """
    from fastdml.data.image_files import Splits

    check_bad_files(bad_files)
    square = (size, size) if isinstance(size, int) else size
    if square is not None and min(square) < 1:
        raise InputError(f"size {size}: give the pixels of a side, 1 or more, or None")
    found = read(expanded(root))
    listed = found["train"].place.is_file()
    classes = sorted_classes(set(found["train"].classes), listed)
    _check_classes(found, classes)
    bad = _bad_files(found, bad_files, progress, cache)
    parts: dict[str, ImageFiles] = {}
    for name, listing in found.items():
        for note in listing.notes:
            logger.warning(note)
        parts[name] = _labelled(listing, classes).without(bad)
    _check_left(found, parts)
    square = square or parts["train"].own_size() or (otherwise, otherwise)
    parts = {name: replace(part, size=square) for name, part in parts.items()}
    return Splits(parts["train"], parts.get("validation"), parts.get("test"))


def read(root: Path) -> dict[str, Listing]:
    """The listing of each split that there is, of "train" always. Raises InputError."""
    if root.is_file():
        if root.suffix.lower() != ".csv":
            raise InputError(
                f"{root}: is neither a folder nor a .csv file: give a folder of class folders, or "
                "a CSV file of path,label"
            )
        return {"train": read_label_list(root)}
    if not root.is_dir():
        raise InputError(f"{root}: no such folder: set root to the one that holds your images")
    folders = split_folders(root)
    files = sorted(file for file in root.glob("*.[cC][sS][vV]") if file.is_file())
    lists = by_split(root, [(file.name, file.stem) for file in files])
    if "train" in folders and class_folders(folders["train"]):
        found = {name: read_class_folders(folder) for name, folder in folders.items()}
        beside = [n for n in class_folders(root) if root / n not in folders.values()]
        beside += [file.name for file in lists.values()]
        if beside:
            found["train"].notes.append(
                f"{root}: read are {', '.join(folder.name for folder in folders.values())}, and "
                f"not {', '.join(beside[:NAMED])}"
            )
    elif "train" in lists:
        found = {name: read_label_list(file) for name, file in lists.items()}
    elif "train" in folders and len(folders) > 1:
        found = {"train": read_class_folders(folders["train"])}  # raises: it has no classes
    else:
        _check_no_lone_test(root, folders, lists)
        found = {"train": _one_folder(root)}
    return {name: found[name] for name in ("train", "validation", "test") if name in found}


def _check_no_lone_test(root: Path, folders: Mapping[str, Path], lists: Mapping[str, Path]) -> None:
    """Raises InputError where there are images to evaluate on and none to train on."""
    known = {**lists, **folders}
    classes = set(class_folders(root)) - {folder.name for folder in folders.values()}
    if known and "train" not in known and not classes:
        names = " and ".join(path.name for path in known.values())
        raise InputError(
            f"{root}: holds {names} and no train folder: put the training images there"
        )


def _one_folder(root: Path) -> Listing:
    if splits_within_classes(root):
        name = class_folders(root)[0]
        raise InputError(
            f"{root}: each class folder, such as {name!r}, holds train and others: make them "
            f"train/{name} and so on"
        )
    inner = lies_deeper(root)
    if inner is not None:
        shown = ", ".join(class_folders(inner)[:NAMED])
        raise InputError(
            f"{root}: holds one folder, {inner.name!r}, with the folders {shown} in it: set root "
            f"to {inner}"
        )
    return read_class_folders(root)


def _check_classes(found: Mapping[str, Listing], classes: Sequence[str]) -> None:
    """Raises InputError for fewer than two classes, and where a split has one that training lacks;
    notes those that a split lacks."""
    place = found["train"].place
    if len(classes) < 2:
        inner = lies_deeper(place) if place.is_dir() else None
        why = "two or more are needed to tell apart"
        if inner is not None:
            shown = ", ".join(class_folders(inner)[:NAMED])
            why = f"and in it are the folders {shown}: move them up, into {place}"
        raise InputError(f"{place}: holds one class, {classes[0]!r}: {why}")
    for listing in found.values():
        own = set(listing.classes)
        for name in sorted(own - set(classes)):
            raise InputError(
                f"{listing.place}: the class {name!r} has no training images in {place}; "
                f"{advice(name, classes, others='the classes are {}')}"
            )
        lacking = [name for name in classes if name not in own]
        if lacking:
            listing.notes.append(
                f"{listing.place}: holds no images of {len(lacking):,} of {len(classes):,} "
                f"classes: {', '.join(lacking[:NAMED])}{' ...' * (len(lacking) > NAMED)}"
            )


def _bad_files(
    found: Mapping[str, Listing], bad_files: str, progress: bool | None, cache: Path | None
) -> dict[str, str]:
    """The files that are no images, with the reason; with bad_files="error" raises InputError."""
    bad = {path: why for listing in found.values() for path, why in listing.bad.items()}
    every = [path for listing in found.values() for path in listing.paths]
    checked = scan([path for path in every if path not in bad], progress=progress, cache=cache)
    bad |= checked.bad
    if not bad:
        return bad
    said = Scan(bad, files=len(every)).describe(NAMED)
    if bad_files == "error":
        raise InputError(f"{said}: restore or remove them, or set bad_files to skip")
    logger.warning("left out: %s", said)
    return bad


def _labelled(listing: Listing, classes: tuple[str, ...]) -> ImageFiles:
    import torch

    from fastdml.data.image_files import ImageFiles

    label = {name: k for k, name in enumerate(classes)}
    labels = torch.tensor([label[name] for name in listing.classes], dtype=torch.int64)
    return ImageFiles(tuple(listing.paths), labels, classes, (1, 1))  # the size follows


def _check_left(found: Mapping[str, Listing], parts: Mapping[str, ImageFiles]) -> None:
    """Raises InputError where no image is left of a split, or of a class in training."""
    for name, part in parts.items():
        if not len(part):
            raise InputError(f"{found[name].place}: no image that can be decoded is left")
    train = parts["train"]
    counts = train.labels.bincount(minlength=train.num_classes).tolist()
    for name, count in zip(train.class_names, counts, strict=True):
        if not count:
            raise InputError(
                f"{found['train'].place}: no image of class {name!r} is left that can be decoded"
            )


def warn_of_copies(splits: Splits, divided: bool = False) -> None:
    """Logs images that are there twice where that matters: to train on and to evaluate on, or under
    two classes; divided: or in training at all, since a part of it will be for validation. Reads
    the files that have the length of another."""
    names = {"train": "training", "validation": "validation", "test": "test"}
    parts = {name: part for name, part in splits._asdict().items() if part is not None}
    shared: Counter[str] = Counter()
    contradictory = repeated = 0
    example: dict[str, str] = {}
    for group in same_files({name: part.paths for name, part in parts.items()}):
        first, place = group[0]
        if first == "train":
            for name, other in group:
                if name != "train":
                    shared[name] += 1
                    example.setdefault(name, parts[name].paths[other])
        of_training = [other for name, other in group if name == "train"]
        if divided and len(of_training) > 1:
            repeated += len(of_training) - 1
            example.setdefault("train", parts["train"].paths[of_training[1]])
        labels = {int(parts[name].labels[other]) for name, other in group}
        if len(labels) > 1:
            contradictory += 1
            example.setdefault("classes", parts[first].paths[place])
    for name, count in shared.items():
        logger.warning(
            f"{count:,} of {len(parts[name]):,} {names[name]} images are training images too, byte "
            f"for byte, which flatters the scores: {example[name]} for one"
        )
    if repeated:
        logger.warning(
            f"{repeated:,} of {len(parts['train']):,} training images repeat another, byte for "
            "byte, so that some may be both trained and validated on: "
            f"{example['train']} for one"
        )
    if contradictory:
        logger.warning(
            f"the same image is there under two classes, byte for byte, {contradictory:,} times: "
            f"{example['classes']} for one"
        )
