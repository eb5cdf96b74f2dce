"""predictions.npz: what the peers of a classification run say of each test image.

Some hundred kB for CIFAR's 10,000 images: of each image the label and, of every peer and of the
ensemble, the class and the numbers that accuracy, confusion and calibration are made from; and
small pictures of the images on which the peers disagree most. The K peers come in the run's order,
then the ensemble, the mean of their probabilities; a lone peer is its own ensemble.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdml.errors import InputError
from fastdml.files import write_atomically
from fastdml.paths import expanded

PREDICTIONS = "predictions.npz"
PICTURES = 24  # at most
PICTURE_SIDE = 96  # pixels, at most
VERSION = 1
TEXTS = ("peers", "classes", "files")
READ = "fastdml.report.predictions.read_predictions(folder of a run)"  # for messages


@dataclass(frozen=True)
class Predictions:
    """Of N test images, by K peers and their ensemble, in the order of the test set."""

    peers: tuple[str, ...]  # K display names
    classes: tuple[str, ...]  # a name for each class; empty where they have none
    num_classes: int
    weights: str  # "last" or "best"
    label: np.ndarray  # (N,) int32
    top: np.ndarray  # (K + 1, N) int32: the most probable class; -1 where probabilities are NaN
    confidence: np.ndarray  # (K + 1, N) float32: its probability
    label_log: np.ndarray  # (K + 1, N) float32: log-probability of the label, in nats
    disagreement: np.ndarray
    """(N,) float32, in nats: generalised Jensen-Shannon divergence between the peers."""
    pictured: np.ndarray  # (M,) int64: images of which there are pictures, in order of interest
    pictures: np.ndarray  # (M, height, width, 1 or 3) uint8
    true_colours: bool
    """Whether the pictures are as stored; else each is stretched from black to white, since nobody
    told how the images were normalised."""
    files: tuple[str, ...] = ()
    """Of each picture the path of its file, below the folder that all test images have in common;
    empty where the images are no files."""

    def class_name(self, index: int) -> str:
        if index < 0:
            return "nothing (NaN)"
        return self.classes[index] if self.classes else str(index)


def write_predictions(folder: str | Path, found: Predictions) -> Path:
    """Writes predictions.npz into a run folder in one step. Raises InputError where it cannot."""
    values: dict[str, Any] = {name: getattr(found, name) for name in found.__dataclass_fields__}
    for name in TEXTS:  # so that no character is lost
        values[name] = np.array(list(values[name]), dtype=np.str_)
    file = io.BytesIO()
    np.savez_compressed(file, version=VERSION, **values)
    path = Path(folder) / PREDICTIONS
    write_atomically(path, file.getvalue())
    return path


def read_predictions(folder: str | Path) -> Predictions | None:
    """The predictions of a run, checked; None where it has none. Raises InputError for a file that
    is damaged or of a later version."""
    path = expanded(folder) / PREDICTIONS
    if not path.exists():
        return None
    if not path.is_file():
        raise InputError(f"{path} is not a file")  # reading a pipe could wait for ever
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            values = {name: file[name] for name in file.files}
        version = int(values.pop("version"))
        if version > VERSION:
            raise InputError(f"{path} is of a later version of fastdml ({version}): update fastdml")
        found = _from_arrays(values)
        _check(found)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or 'damaged'}") from None
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many kinds for damage
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path} does not hold a run's predictions: {reason}; delete it") from None
    return found


def _from_arrays(values: dict[str, np.ndarray]) -> Predictions:
    plain: dict[str, Any] = dict(values)
    for name in TEXTS:
        if name == "files" and name not in values:  # of an earlier version
            continue
        plain[name] = tuple(str(text) for text in values[name].tolist())
    plain["weights"] = str(values["weights"])
    plain["num_classes"] = int(values["num_classes"])
    plain["true_colours"] = bool(values["true_colours"])
    return Predictions(**plain)


def _check(found: Predictions) -> None:
    """Raises ValueError for arrays that do not fit together."""
    N, rows, C = len(found.label), len(found.peers) + 1, found.num_classes
    M = len(found.pictured)
    shapes = {
        "label": (N,),
        "top": (rows, N),
        "confidence": (rows, N),
        "label_log": (rows, N),
        "disagreement": (N,),
        "pictured": (M,),
        "pictures": (M, *found.pictures.shape[1:3], found.pictures.shape[-1]),
    }
    for name, shape in shapes.items():
        if getattr(found, name).shape != shape or found.pictures.ndim != 4:
            raise ValueError(f"{name} is of another shape")
    if not N or not found.peers or (found.classes and len(found.classes) != C):
        raise ValueError("no images, no peers, or another number of classes")
    if found.files and len(found.files) != M:
        raise ValueError("another number of files than of pictures")
    if found.weights not in ("last", "best"):
        raise ValueError("weights that are neither the last nor the best")
    for name, low, high in (("label", 0, C), ("top", -1, C), ("pictured", 0, N)):
        values = getattr(found, name)
        if values.dtype.kind != "i" or (
            values.size and not low <= values.min() <= values.max() < high
        ):
            raise ValueError(f"{name} is out of range")
    if found.pictures.dtype != np.uint8 or (M and found.pictures.shape[-1] not in (1, 3)):
        raise ValueError("pictures that are none")
    for name in ("confidence", "label_log", "disagreement"):
        if getattr(found, name).dtype.kind != "f":
            raise ValueError(f"{name} is not of numbers")
