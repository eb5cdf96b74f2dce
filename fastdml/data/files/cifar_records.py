"""One file of CIFAR-10 or CIFAR-100 to pixels and labels, in the binary or the Python version.

The files may have been altered on purpose, so their structure is checked: every size and record
count the official one, every label in range. The Python version is pickled, and unpickling can run
anything: `_Unpickler` knows four names, all replaced by code of this file.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

PIXELS = 3072  # bytes of an image
NAME_BYTES = 200  # more than the Python version spends on one record's labels and file name


class Damaged(Exception):
    """A file is damaged; the message says how, and the caller adds the remedy."""


def _bad(path: Path, found: str) -> NoReturn:
    raise Damaged(f"{path}: {found}")


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        _bad(path, f"record {wrong[0]} has label {labels[wrong[0]]}, beyond 0 to {classes - 1}")


def read_binary(
    path: Path, records: int, label_ranges: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 3072) uint8, channel by channel, and labels (N,) int64 of one file of the binary
    version. label_ranges: of the bytes before a record's pixels, the last of which is the class."""
    heads = len(label_ranges)
    size, expected = path.stat().st_size, records * (heads + PIXELS)
    if size != expected:
        _bad(path, f"{size:,} bytes, {expected:,} expected ({records:,} records)")
    data = np.fromfile(path, np.uint8).reshape(records, heads + PIXELS)
    for head, classes in enumerate(label_ranges):
        _check_labels(path, data[:, head], classes)
    return data[:, heads:], data[:, heads - 1].astype(np.int64)


def read_python(
    path: Path, records: int, label_key: str, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same from one file of the Python version, which keeps the labels under `label_key`."""
    size = path.stat().st_size
    low, high = records * PIXELS, records * (PIXELS + NAME_BYTES)
    if not low < size < high:
        _bad(path, f"{size:,} bytes, {low:,} to {high:,} expected ({records:,} records)")
    content = _unpickle(path)
    if not isinstance(content, dict):
        _bad(path, f"holds a {type(content).__name__}, not a dictionary")
    content = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
    pixels, labels = content.get("data"), content.get(label_key)
    if not isinstance(pixels, _Array):
        _bad(path, "holds no array 'data'")
    pixels = pixels.numpy(path)
    if pixels.shape != (records, PIXELS):
        _bad(path, f"'data' is {pixels.shape}, expected {(records, PIXELS)}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        _bad(path, f"holds no list of integers {label_key!r}")
    if len(labels) != records:
        _bad(path, f"{len(labels):,} {label_key!r} for {records:,} records")
    if not 0 <= min(labels) <= max(labels) < classes:  # also what int64 cannot hold
        _check_labels(path, np.array(labels, object), classes)
    return pixels, np.array(labels, np.int64)


class _Dtype:
    """Stands in for `numpy.dtype`: its name, never a numpy object."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        pass  # byte order and fields mean nothing to bytes


class _Array:
    """Stands in for `numpy.ndarray`: its fields from the pickle, checked before use."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
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
    """Refuses every name but these four. Containers, numbers and strings are pickled without
    one."""

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
