"""A stand-in for Market-1501, whose terms forbid passing it on: its exact layout and file naming,
made of CIFAR-100's real images. About three seconds and 9 MB.

A class plays a person: the first `train_ids` classes of a random order are for training, the next
`test_ids` for query and gallery, the others supply distractors (0000) and junk (-1). Each picture
is enlarged to 128x64 and given to one of six cameras, each with a tint and a brightness of its own,
so that retrieval across cameras is not trivial. In every split some files are greyscale, CMYK,
progressive, or stored turned by 90 degrees with the EXIF orientation that says so. Accuracies
obtained on it say nothing of Market-1501.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdml.data.registry import HINT
from fastdml.data.sets.cifar import load_cifar100
from fastdml.errors import InputError, require
from fastdml.files import draft_folder
from fastdml.paths import expanded

if TYPE_CHECKING:
    import numpy as np

    from fastdml.data.image_set import ImageSet

FOLDER = "Market-1501-v15.09.15"
NOTE = "standin.json"
CAMERAS = 6
SIZE = (128, 64)
ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class StandIn:
    """The size of a stand-in: identities, images, distractors."""

    train_ids: int = 50
    test_ids: int = 40
    images: int = 24  # of each identity
    train_images: int = 0  # of each training identity; 0: as many as of the others
    junk: int = 40
    distractors: int = 100
    odd_every: int = 16  # one file in so many is stored unusually
    seed: int = 0


def build_standin(
    root: str | Path,
    cifar_root: str | Path | ImageSet = "data",
    what: StandIn = StandIn(),
    hint: str = HINT,
) -> Path:
    """Writes the stand-in and returns `root`; one that is there already is kept. `cifar_root`:
    the folder of CIFAR-100, or another set of 100 classes of RGB images; `hint`: as
    `load_cifar100` takes it. Raises InputError for numbers out of range, for another set in its
    place, and where it cannot be written."""
    from fastdml.data.image_set import ImageSet
    from fastdml.data.philox import check_seed

    root = expanded(root)
    target = root / FOLDER
    note = json.dumps(asdict(what), sort_keys=True)
    if target.exists():
        _check_same(target, note)
        return root
    check_seed(what.seed)
    if what.train_ids < 1 or what.test_ids < 1 or what.train_ids + what.test_ids > 98:
        raise InputError(
            f"{what.train_ids} training and {what.test_ids} test identities: CIFAR-100's 100 "
            "classes allow 98 together, and two for distractors and junk"
        )
    for count in (what.images, what.train_images or what.images):
        if not 2 * CAMERAS <= count <= 500:
            raise InputError(f"{count} images an identity: give {2 * CAMERAS} to 500")
    if isinstance(cifar_root, ImageSet):
        images = cifar_root
    else:
        images = load_cifar100(cifar_root, hint=hint)[0]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with draft_folder(target) as part:
            _write(part, images, what)
            (part / NOTE).write_text(note, encoding="utf-8")
            try:
                part.rename(target)
            except OSError:
                if not target.exists():
                    raise
                _check_same(target, note)  # another process was faster
    except OSError as error:
        raise InputError(f"cannot write the stand-in to {root}: {error.strerror}") from None
    return root


def _check_same(target: Path, note: str) -> None:
    with contextlib.suppress(OSError):
        if (target / NOTE).read_text(encoding="utf-8") == note:
            return
    raise InputError(
        f"{target}: is there and is not this stand-in (it may be the real set): "
        "choose another folder"
    )


def _write(folder: Path, images: ImageSet, what: StandIn) -> None:
    import numpy as np

    random = np.random.default_rng(what.seed)
    classes = random.permutation(100)
    by_class = [np.flatnonzero(images.labels.numpy() == c) for c in range(100)]
    for name in ("bounding_box_train", "bounding_box_test", "query", "gt_bbox"):
        (folder / name).mkdir(parents=True)
    writer = _Writer(images.pixels.numpy(), what.odd_every)
    for place in range(what.train_ids + what.test_ids):
        # identities in two interleaved series, as in the real set, and neither without gaps
        identity = 2 * place + 2 if place < what.train_ids else 2 * (place - what.train_ids) + 1
        count = what.images if place >= what.train_ids else what.train_images or what.images
        chosen = random.permutation(by_class[classes[place]])[:count]
        for number, index in enumerate(chosen):
            camera = (number + place) % CAMERAS + 1
            name = f"{identity:04d}_c{camera}s1_{index:06d}_{number % 7:02d}.jpg"
            if place < what.train_ids:
                writer.write(folder / "bounding_box_train" / name, index, camera)
            elif number < CAMERAS:  # the first picture of each camera asks, as in the real set
                writer.write(folder / "query" / name, index, camera)
            else:
                writer.write(folder / "bounding_box_test" / name, index, camera)
                if number < 3 * CAMERAS:
                    shutil.copy(folder / "bounding_box_test" / name, folder / "gt_bbox" / name)
    rest = random.permutation(np.concatenate([by_class[c] for c in classes[98:]]))
    for number, index in enumerate(rest[: what.junk + what.distractors]):
        shown = "-1" if number < what.junk else "0000"
        camera = number % CAMERAS + 1
        name = f"{shown}_c{camera}s1_{index:06d}_00.jpg"
        writer.write(folder / "bounding_box_test" / name, index, camera)


class _Writer:
    """Writes one picture of the set as a camera would have it."""

    def __init__(self, pixels: np.ndarray, odd_every: int) -> None:
        self.image = require("PIL.Image", "train")
        self.pixels = pixels  # (N, 32, 32, 3) uint8
        self.odd_every, self.written = odd_every, 0

    def write(self, path: Path, index: int, camera: int) -> None:
        import numpy as np

        tint = 1 + 0.25 * np.cos(camera + np.arange(3) * 2.1)  # of each channel
        pixels = np.clip(self.pixels[index] * (0.6 + 0.1 * camera) * tint, 0, 255)
        picture = self.image.fromarray(pixels.astype(np.uint8))
        picture = picture.resize(SIZE[::-1], self.image.Resampling.BICUBIC)
        options: dict[str, Any] = {"quality": 92}
        turn, kind = divmod(self.written, self.odd_every)
        self.written += 1
        if kind == self.odd_every - 1:
            match turn % 4:
                case 0:
                    picture = picture.convert("L")
                case 1:
                    picture = picture.convert("CMYK")
                case 2:
                    options["progressive"] = True
                case 3:
                    picture = picture.transpose(self.image.Transpose.ROTATE_90)
                    exif = self.image.Exif()
                    exif[ORIENTATION] = 6  # turn it back by 270 degrees to look at it
                    options["exif"] = exif
        picture.save(path, "JPEG", **options)
