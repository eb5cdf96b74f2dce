"""CIFAR-10 and CIFAR-100 from the official files, binary or Python version: about a second each.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The folders that the
official archives unpack to are looked for under `root`, then their files in `root` itself; the
binary version is read where both are there, and is the one that a download fetches.

What is trusted: an archive is used only if its MD5 is the official one. Files already unpacked may
have been altered on purpose; `fastdml.data.files.cifar_records` says what is checked of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastdml.data.registry import HINT, register_dataset
from fastdml.errors import InputError
from fastdml.paths import expanded

if TYPE_CHECKING:
    from fastdml.data.image_set import ImageSet

BASE_URL = "https://www.cs.toronto.edu/~kriz/"
SHAPE = (3, 32, 32)

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

    @property
    def place(self) -> str:
        """Where the files are, for people."""
        return f"{self.python_folder}/ or {self.binary_folder}/"


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


@register_dataset(
    "cifar10",
    task="classification",
    image_shape=SHAPE,
    classes=CIFAR10.class_names,
    mean=MEAN,
    std=STD,
    purpose="small photographs of 10 classes; quick comparisons",
    files="download",
    place=CIFAR10.place,
)
def load_cifar10(
    root: str | Path, *, download: bool = False, hint: str = HINT
) -> tuple[ImageSet, ImageSet]:
    """(train, test): 50,000 and 10,000 images (N, 3, 32, 32) uint8. hint: what messages say that a
    download is asked for by. Raises InputError for files that are missing or damaged."""
    return load_source(CIFAR10, expanded(root), download, hint)


@register_dataset(
    "cifar100",
    task="classification",
    image_shape=SHAPE,
    classes=CIFAR100_NAMES,
    mean=MEAN,
    std=STD,
    purpose="small photographs of 100 classes; the paper's experiments",
    files="download",
    place=CIFAR100.place,
)
def load_cifar100(
    root: str | Path, *, download: bool = False, hint: str = HINT
) -> tuple[ImageSet, ImageSet]:
    """(train, test): 50,000 and 10,000 images (N, 3, 32, 32) uint8, labelled with the 100 classes.
    hint: what messages say that a download is asked for by. Raises InputError for files that are
    missing or damaged."""
    return load_source(CIFAR100, expanded(root), download, hint)


def load_source(
    source: Source, root: Path, download: bool, hint: str = HINT
) -> tuple[ImageSet, ImageSet]:
    """(train, test) from the files of `source` below `root`."""
    from fastdml.data.files.cifar_records import Damaged

    try:
        folder, suffix = _found_or_fetched(source, root, download, hint)
        train = _read_split(source, folder, source.train, suffix, source.train_records)
        return train, _read_split(source, folder, (source.test,), suffix, source.test_records)
    except Damaged as error:
        raise InputError(f"{error}: delete its folder and use {hint}") from None


def _found_or_fetched(source: Source, root: Path, download: bool, hint: str) -> tuple[Path, str]:
    """The folder of the files, and their ending."""
    from fastdml.data.files.archive import extract, fetch

    found = _find(source, root)
    if found is None and download:
        if (root / source.binary_folder).exists():
            raise InputError(_absent(source, root, hint))  # before a download of 160 MB in vain
        fetch(BASE_URL + source.archive, root / source.archive, source.md5, hint)
        extract(root / source.archive, root, source.binary_folder, hint)
        found = _find(source, root)
    if found is None:
        raise InputError(_absent(source, root, hint))
    return found


def _read_split(
    source: Source, folder: Path, names: tuple[str, ...], suffix: str, records: int
) -> ImageSet:
    """The records of all of a split's files, one after the other."""
    import numpy as np
    import torch

    from fastdml.data.files.cifar_records import read_binary, read_python
    from fastdml.data.image_set import ImageSet

    paths = [folder / (name + suffix) for name in names]
    if suffix:
        parts = [read_binary(path, records, source.label_ranges) for path in paths]
    else:
        classes = len(source.class_names)
        parts = [read_python(path, records, source.python_labels, classes) for path in paths]
    channels, height, width = SHAPE
    pixels = np.empty((len(paths), records, height, width, channels), np.uint8)
    for place, (planes, _) in zip(pixels, parts, strict=True):
        for c in range(channels):  # the files hold an image channel by channel
            place[..., c] = planes.reshape(records, *SHAPE)[:, c]
    labels = np.concatenate([labels for _, labels in parts])
    return ImageSet.from_pixels(
        torch.from_numpy(pixels).flatten(0, 1),
        torch.from_numpy(labels),
        source.class_names,
        MEAN,
        STD,
    )


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
    """The message where `root` holds no complete copy."""
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
