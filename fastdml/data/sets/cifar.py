"""CIFAR-10 and CIFAR-100 from the official files, binary or Python version: about a second each.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The folders that the
official archives unpack to are looked for under `root`, then their files in `root` itself; the
binary version is read where both are there, and is the one that a download fetches.

What is trusted: an archive is used only if its MD5 is the official one. Files already unpacked may
have been altered on purpose, so they are checked for structure alone: all of them there, every size
and record count the official one, every label in range. The Python version is pickled, and
unpickling can run anything: `_Unpickler` knows four names, all replaced by code of this file.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from fastdml.data import HINT
from fastdml.data.files.archive import extract, fetch
from fastdml.data.sets.image_set import ImageSet
from fastdml.errors import InputError
from fastdml.paths import expanded

BASE_URL = "https://www.cs.toronto.edu/~kriz/"
SHAPE = (3, 32, 32)
PIXELS = 3072
NAME_BYTES = 200  # more than the Python version spends on one record's labels and file name

# The statistics of CIFAR-10's training images. Wide ResNets introduced them for both sets and the
# reproductions of the paper follow; CIFAR-100's own are 129.3 124.1 112.4 and 68.2 65.4 70.4.
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)

CIFAR100_NAMES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()  # noqa: SIM905 - a hundred quoted words are no easier to read
)


@dataclass(frozen=True)
class Source:
    """The official files of one set."""

    name: str
    class_names: tuple[str, ...]
    train: tuple[str, ...]  # files without their ending
    test: str
    train_records: int  # in each training file
    test_records: int
    python_folder: str
    python_labels: str  # key of the class labels
    binary_folder: str
    label_ranges: tuple[int, ...]  # one byte each before the pixels; the last is the class
    archive: str  # of the binary version
    md5: str

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)


CIFAR10 = Source(
    name="CIFAR-10",
    class_names=(
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    train=tuple(f"data_batch_{k}" for k in range(1, 6)),
    test="test_batch",
    train_records=10_000,
    test_records=10_000,
    python_folder="cifar-10-batches-py",
    python_labels="labels",
    binary_folder="cifar-10-batches-bin",
    label_ranges=(10,),
    archive="cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
)

CIFAR100 = Source(
    name="CIFAR-100",
    class_names=CIFAR100_NAMES,
    train=("train",),
    test="test",
    train_records=50_000,
    test_records=10_000,
    python_folder="cifar-100-python",
    python_labels="fine_labels",
    binary_folder="cifar-100-binary",
    label_ranges=(20, 100),  # superclass, class
    archive="cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
)


def load_cifar10(
    root: str | Path, *, download: bool = False, hint: str = HINT
) -> tuple[ImageSet, ImageSet]:
    """(train, test): 50,000 and 10,000 images (N, 3, 32, 32). hint: what messages say that a
    download is asked for by."""
    return load_source(CIFAR10, expanded(root), download, hint)


def load_cifar100(
    root: str | Path, *, download: bool = False, hint: str = HINT
) -> tuple[ImageSet, ImageSet]:
    """(train, test): 50,000 and 10,000 images (N, 3, 32, 32), labelled with the 100 classes.
    hint: what messages say that a download is asked for by."""
    return load_source(CIFAR100, expanded(root), download, hint)


def load_source(
    source: Source, root: Path, download: bool, hint: str = HINT
) -> tuple[ImageSet, ImageSet]:
    try:
        return _load(source, root, download, hint)
    except _Damaged as error:
        raise InputError(f"{error}: delete its folder and use {hint}") from None


def _load(source: Source, root: Path, download: bool, hint: str) -> tuple[ImageSet, ImageSet]:
    found = _find(source, root)
    if found is None and download:
        if (root / source.binary_folder).exists():
            raise InputError(_absent(source, root, hint))  # before 160 MB are fetched in vain
        fetch(BASE_URL + source.archive, root / source.archive, source.md5, hint)
        extract(root / source.archive, root, source.binary_folder, hint)
        found = _find(source, root)
    if found is None:
        raise InputError(_absent(source, root, hint))
    folder, suffix = found
    read = _read_binary if suffix else _read_python
    splits = []
    train, test = (source.train, source.train_records), ((source.test,), source.test_records)
    for names, records in (train, test):
        parts = [read(source, folder / (name + suffix), records) for name in names]
        images = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, *SHAPE)
        labels = np.concatenate([labels for _, labels in parts])
        splits.append(
            ImageSet(
                torch.from_numpy(images),
                torch.from_numpy(labels),
                len(source.class_names),
                source.class_names,
                MEAN,
                STD,
            )
        )
    return splits[0], splits[1]


def _places(source: Source, root: Path) -> Iterator[tuple[Path, str]]:
    """Where the set may lie, with the ending of its files there."""
    yield root / source.binary_folder, ".bin"
    yield root / source.python_folder, ""
    yield root, ".bin"
    yield root, ""


def _find(source: Source, root: Path) -> tuple[Path, str] | None:
    for folder, suffix in _places(source, root):
        if all((folder / (name + suffix)).is_file() for name in source.files):
            return folder, suffix
    return None


def _absent(source: Source, root: Path, hint: str) -> str:
    """What to tell someone whose `root` holds no complete copy."""
    if not root.is_dir():
        return f"{root}: no such folder: name the one that holds {source.name}, or use {hint}"
    for folder, suffix in _places(source, root):
        missing = [n + suffix for n in source.files if not (folder / (n + suffix)).is_file()]
        if len(missing) < len(source.files) or (folder != root and folder.is_dir()):
            return (
                f"{folder}: {', '.join(missing)} missing from {source.name}: complete it, or move "
                f"the folder away and use {hint}"
            )
    return (
        f"{root}: holds no {source.name} (neither {source.binary_folder} nor "
        f"{source.python_folder}, nor their files): name the folder that does, or use {hint}"
    )


class _Damaged(Exception):
    """What is wrong with a file; `load_source` adds the remedy."""


def _bad(path: Path, found: str) -> NoReturn:
    raise _Damaged(f"{path}: {found}")


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        _bad(path, f"record {wrong[0]} has label {labels[wrong[0]]}, beyond 0 to {classes - 1}")


def _read_binary(source: Source, path: Path, records: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 3072) uint8 and labels (N,) int64 of one file of the binary version."""
    heads = len(source.label_ranges)
    size, expected = path.stat().st_size, records * (heads + PIXELS)
    if size != expected:
        _bad(path, f"{size:,} bytes, {expected:,} expected ({records:,} records)")
    data = np.fromfile(path, np.uint8).reshape(records, heads + PIXELS)
    for head, classes in enumerate(source.label_ranges):
        _check_labels(path, data[:, head], classes)
    return data[:, heads:], data[:, heads - 1].astype(np.int64)


def _read_python(source: Source, path: Path, records: int) -> tuple[np.ndarray, np.ndarray]:
    """The same from one file of the Python version."""
    size = path.stat().st_size
    low, high = records * PIXELS, records * (PIXELS + NAME_BYTES)
    if not low < size < high:
        _bad(path, f"{size:,} bytes, {low:,} to {high:,} expected ({records:,} records)")
    content = _unpickle(path)
    if not isinstance(content, dict):
        _bad(path, f"holds a {type(content).__name__}, not a dictionary")
    content = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
    pixels, labels = content.get("data"), content.get(source.python_labels)
    if not isinstance(pixels, _Array):
        _bad(path, "holds no array 'data'")
    pixels = pixels.numpy(path)
    if pixels.shape != (records, PIXELS):
        _bad(path, f"'data' is {pixels.shape}, expected {(records, PIXELS)}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        _bad(path, f"holds no list of integers {source.python_labels!r}")
    if len(labels) != records:
        _bad(path, f"{len(labels):,} {source.python_labels!r} for {records:,} records")
    if not 0 <= min(labels) <= max(labels) < len(source.class_names):  # also what int64 cannot hold
        _check_labels(path, np.array(labels, object), len(source.class_names))
    return pixels, np.array(labels, np.int64)


class _Dtype:
    """Stands in for `numpy.dtype`: its name, never a numpy object."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        pass  # byte order and fields mean nothing to bytes


class _Array:
    """Stands in for `numpy.ndarray`: what the pickle says of it, checked before use."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.fortran, self.raw = state

    def numpy(self, path: Path) -> np.ndarray:
        state = vars(self)
        name = getattr(state.get("dtype"), "name", None)
        if name not in ("u1", "uint8") or not isinstance(state.get("raw"), bytes):
            _bad(path, f"'data' holds {name!r}, not bytes")
        try:
            flat = np.frombuffer(self.raw, np.uint8)
            return flat.reshape(self.shape, order="F" if self.fortran else "C")
        except (TypeError, ValueError):
            _bad(path, f"'data' holds {len(self.raw):,} bytes for the shape {self.shape!r}")


def _reconstruct(*_: object) -> _Array:
    return _Array()


class _Refused(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    """Builtin containers, numbers and strings need no names; every name but these is refused."""

    NAMES = {  # noqa: RUF012 - constant
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # its name since numpy 2
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.NAMES[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


def _unpickle(path: Path) -> Any:
    try:
        return _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except _Refused as refused:
        _bad(path, f"refused, because its pickle asks for {refused}, and nothing was run")
    except Exception as error:  # a damaged pickle can raise nearly anything
        _bad(path, f"truncated or not a pickle ({error or type(error).__name__})")
