"""What tells the data of a run from others: on other images a resumed run would go on without a
word, and images kept for validation might be some that were trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdml.data.image_set import IGNORED
from fastdml.data.loaders.batching import Batching
from fastdml.errors import InputError
from fastdml.train.checkpoint_reading import run_part
from fastdml.train.own_batches import ArrayBatches
from fastdml.train.unlabelled import PairedBatches

Marks = Mapping[str, str | None]  # by use: "training", "validation", "test"


def data_mark(batches: Any) -> str | None:
    """A digest of the labels in their order and, of files, of their names and lengths; not of the
    folder that they are all in, which may move, nor of that of those without labels. None of
    batches that fastdml does not make. Looks at each file's entry, and opens none."""
    if isinstance(batches, PairedBatches):
        marks = [data_mark(batches.labelled), data_mark(batches.others)]
        return None if None in marks else "-".join(map(str, marks))
    if not isinstance(batches, (Batching, ArrayBatches)):
        return None
    labels = batches.labels.cpu()
    digest = hashlib.blake2b(labels.contiguous().numpy().tobytes(), digest_size=16)
    paths = getattr(batches, "paths", None)
    if paths:
        without = (labels == IGNORED).tolist()  # those may lie in a folder of their own
        for kind in (False, True):
            _add(digest, [path for path, one in zip(paths, without, strict=True) if one == kind])
    _add(digest, getattr(batches, "files", ()))
    return digest.hexdigest()


def _add(digest: Any, paths: Sequence[str]) -> None:
    """The files' names below the folder that all of them are in, and their lengths."""
    if not paths:
        return
    common = len(os.path.commonpath([os.path.dirname(path) for path in paths]))
    for path in paths:
        digest.update(os.fsencode(f"{path[common:]}\0{_length(path)}\0"))


def check_same_data(saved: Marks | None, found: Marks, what: str) -> None:
    """Raises InputError, which `what` begins, where data are others than they were, as far as both
    are known. saved: None in checkpoints of earlier versions."""
    for use, was in (saved or {}).items():
        now = found.get(use)
        if None not in (was, now) and was != now:
            raise InputError(
                f"{what}: the {use} data are others than before (their number, labels or order, or "
                "names or lengths of files): restore them, or start a new run in another folder"
            )


def marks_of(run: Path) -> Marks | None:
    """What the run in a folder has saved of its data; None where that is not known."""
    found = run_part(run) or {}
    marks = found.get("data")
    return marks if isinstance(marks, dict) else None


def _length(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None
