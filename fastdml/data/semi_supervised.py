"""Images without labels beside labelled ones: of a set that keeps few of its labels, and of a
folder that has none."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdml.data.files.check_files import Scan, check_bad_files, scan
from fastdml.data.files.class_folders import Listing, read_images
from fastdml.data.image_files import ImageFiles
from fastdml.data.image_set import IGNORED, ImageSet, evenly
from fastdml.errors import InputError
from fastdml.paths import expanded

logger = logging.getLogger(__name__)

NAMED = 5  # bad files that a message names
Set = TypeVar("Set", ImageSet, ImageFiles)


def split_labelled(data: Set, n: int, seed: int = 0) -> tuple[Set, Set]:
    """`n` images of `data`, as many of each class as there are, and the others without their
    labels; both in the set's order. The first are `data.subset(n, seed)`. Raises InputError for
    fewer than one of each class, and more than there are."""
    classes = len(data.labels.unique())
    if n < classes:
        raise InputError(
            f"labelled={n} is fewer than the {classes} classes: give at least one image of each"
        )
    if n >= len(data):
        raise InputError(
            f"labelled={n} leaves none of the {len(data):,} training images without a label: give "
            "fewer, or leave labelled out"
        )
    chosen = evenly(data.labels.cpu(), n, seed)
    others = torch.ones(len(data), dtype=torch.bool, device="cpu")
    others[chosen] = False
    device = data.labels.device
    rest = data.at(others.nonzero()[:, 0].to(device))
    return data.at(chosen.to(device)), without_labels(rest)


def without_labels(data: Set) -> Set:
    """The same images, none with a label."""
    return replace(data, labels=torch.full_like(data.labels, IGNORED))


def load_unlabelled(
    folder: str | Path,
    like: ImageSet | ImageFiles,
    *,
    apart: Mapping[str, Any] | None = None,
    bad_files: str | None = None,
    progress: bool | None = None,
    cache: Path | None = None,
) -> Any:
    """All images in a folder or deeper, without labels, in the form, size and normalisation of
    `like`, which they join: `ImageFiles`, or of an `ImageSet` one, decoded.

    apart: other sets by name, or None, such as "test", whose files must not be in the folder.
    bad_files: "error" or "skip", for files that cannot be decoded; None: an error, where there is
    no such setting. progress, cache: as of `scan`. Raises InputError where there are no images, for
    files that cannot be decoded, where files of `like` or of `apart` lie in the folder too, and for
    sets that are not of colours in bytes."""
    check_bad_files(bad_files or "error")
    if isinstance(like, ImageSet) and (like.image_shape[0] != 3 or like.white != 255):
        channels = like.image_shape[0]
        raise InputError(
            f"unlabelled={folder}: the set has images of {channels} channel{'s' * (channels > 1)}, "
            f"0 to {like.white}, and files are in colours of 0 to 255: leave unlabelled out, or "
            "give labelled to drop labels of the set itself"
        )
    found = read_images(expanded(folder))
    for name, images in {"labelled": like, **(apart or {})}.items():
        if isinstance(images, ImageFiles):
            _check_apart(found, name, images)
    bad = scan(found.paths, progress=progress, cache=cache).bad
    if bad:
        said = Scan(bad, files=len(found.paths)).describe(NAMED)
        if bad_files != "skip":
            skip = ", or set bad_files to skip" if bad_files else ""
            raise InputError(f"{said}: restore or remove them{skip}")
        logger.warning("left out: %s", said)
    for note in found.notes:
        logger.warning(note)
    paths = tuple(path for path in found.paths if path not in bad)
    if not paths:
        raise InputError(f"{folder}: no image that can be decoded is left")
    labels = torch.full((len(paths),), IGNORED, dtype=torch.int64)
    size = like.image_shape[1:]
    files = ImageFiles(paths, labels, like.class_names, size, like.mean, like.std)
    if isinstance(like, ImageFiles):
        return replace(files, resize=like.resize)
    return replace(files.decode(), files=paths)


def joined(*parts: Set) -> Set:
    """The images of all parts as one set, which is otherwise as the first."""
    first, labels = parts[0], torch.cat([part.labels for part in parts])
    if len(parts) == 1:
        return first
    if isinstance(first, ImageFiles):
        paths = tuple(path for part in parts for path in part.paths)
        return replace(first, paths=paths, labels=labels)
    pixels: Tensor = torch.cat([part.pixels for part in parts])  # (N, H, W, ch)
    files = tuple(path for part in parts for path in part.files)
    return replace(first, images=pixels.permute(0, 3, 1, 2), labels=labels, files=files)


def _check_apart(found: Listing, name: str, images: ImageFiles) -> None:
    """Raises InputError where images of a set are among those without labels: then the folder is a
    class of its own, or holds the classes. Peers that saw them would be judged too well."""
    known = set(map(os.path.realpath, images.paths))
    shared = [path for path in found.paths if os.path.realpath(path) in known]
    if shared:
        raise InputError(
            f"unlabelled={found.place}: {len(shared):,} of its images are {name} ones too, such "
            f"as {shared[0]}: give a folder outside of the class folders"
        )
