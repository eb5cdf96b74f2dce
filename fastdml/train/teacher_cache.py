"""The teachers' logits on images that are shown without augmentation, computed once and kept on the
disk: `--cache-teachers`.

RUN/teacher_logits.safetensors holds a table (N, C) a teacher, a row for each image of the set, in
the dtype that its forward pass gives under the run's autocast, so that no bit is lost. Its header
says what it was made of: the teachers' weights, the data, how images are prepared, precision,
device and batch size. A file of anything else, or damaged, is made anew with a line that says so;
so is one whose rows differ from what the teachers say of the first batch. Rows are computed in the
batches that training shows. A teacher's row may depend on its place in a batch in the last bits
(matrix products are tiled), and so may a run's by as much.

Costs: a pass of the teachers over the set, once a run; N C numbers on the disk and, on a CPU, of
the page cache, on CUDA of the device's memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdml.cohort import Cohort
from fastdml.data.loaders.make import free_bytes
from fastdml.engine.amp import Amp
from fastdml.errors import InputError, require
from fastdml.files import replacing, writing
from fastdml.train.same_data import data_mark
from fastdml.units import size

logger = logging.getLogger(__name__)

TABLES = "teacher_logits.safetensors"
KEY, SUMS = "made_of", "sha256"  # in the header's metadata
SHARE = 0.5  # of the device's free memory that the tables may take
EPOCHS = 1000  # in which every image must have been shown
# Relative to the largest logit of the batch: rounding, and far below what another image makes.
CLOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class TeacherCache:
    """`cache(samples)` gives the logits (B, C) of each teacher for images of these numbers, on the
    device; None until `open` has found or made the tables.

    train: batches that say which images they show (`samples`). Raises InputError for others, and
    where these are augmented or there are no teachers.
    """

    def __init__(self, cohort: Cohort, train: Any, amp: Amp) -> None:
        self.cohort, self.train, self.amp = cohort, train, amp
        self.tables: list[Tensor] | None = None
        _check(cohort, train)

    def __call__(self, samples: Tensor) -> list[Tensor] | None:
        if self.tables is None:
            return None
        return [table.index_select(0, samples) for table in self.tables]

    def __deepcopy__(self, memo: dict[int, Any]) -> TeacherCache:
        return self  # nothing changes the tables

    def open(self, folder: Path) -> None:
        """Reads the tables of the run in `folder`, or makes them; logs which."""
        path, made_of = folder / TABLES, self._made_of()
        tables, why = _read(path, made_of)
        if tables is not None and not self._fits(tables):
            tables, why = None, "its rows are not what the teachers say of the first batch"
        if tables is None:
            if why:
                logger.warning(f"{path} is made anew: {why}")
            tables = self._made()
            _write(path, tables, made_of)
            shown = size(sum(t.nbytes for t in tables))
            logger.info(f"the teachers' logits on {len(tables[0]):,} images: {path}, {shown}")
            tables = _read(path, made_of)[0] or tables  # mapped, in place of the memory
        self.tables = [self._on_device(t) for t in tables]

    def _on_device(self, table: Tensor) -> Tensor:
        device = self.amp.device
        if device.type == "cuda" and table.nbytes > SHARE * free_bytes(device):
            raise InputError(
                f"the teachers' logits take {size(table.nbytes)}, more than {SHARE:.0%} of what is "
                f"free on {device}: leave cache_teachers out"
            )
        return table.to(device)

    def _made_of(self) -> str:
        """All that the tables depend on, as JSON."""
        record = self.cohort.record()
        images = {key: record[key] for key in ("image_shape", "mean", "std", "resize", "stored")}
        facts = {
            "teachers": [teacher.identity().sha256 for teacher in self.cohort.teachers],
            "images": images,
            "data": data_mark(self.train),
            "batch_size": self.train.batch_size,
            "precision": self.amp.name,
            "device": self.amp.device.type,
        }
        return json.dumps(facts, sort_keys=True)

    def _of_batch(self, images: Tensor) -> list[Tensor]:
        with self.amp.autocast():
            return [teacher(images) for teacher in self.cohort.teachers]

    def _fits(self, tables: list[Tensor]) -> bool:
        """Whether there is a table for each teacher, in the form of its logits, and the first
        batch's rows are those of the tables, to rounding."""
        samples, images = next(self._batches())
        found, n = self._of_batch(images), len(self.train.labels)
        forms = [((n, z.shape[1]), z.dtype) for z in found]
        if [(tuple(table.shape), table.dtype) for table in tables] != forms:
            return False
        for table, now in zip(tables, found, strict=True):
            rows = table.index_select(0, samples.cpu()).to(now)
            apart = (rows.float() - now.float()).abs().max()
            if not apart <= CLOSE.get(now.dtype, 1e-4) * now.float().abs().max():
                return False
        return True

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(samples, images) of batches that show every image at least once: those of the first
        epoch, and of later ones those with an image that has not been shown."""
        shown = torch.zeros(len(self.train.labels), dtype=torch.bool, device=self.amp.device)
        for step, (images, _) in enumerate(self.train.epoch(0)):
            samples = self.train.samples(0, step)
            shown[samples] = True
            yield samples, images
        for epoch in range(1, EPOCHS):
            if shown.all():
                return
            for step in range(len(self.train)):
                samples = self.train.samples(epoch, step)
                if not shown[samples].all():
                    shown[samples] = True
                    yield samples, next(iter(self.train.epoch(epoch, step)))[0]
        raise InputError(
            f"cache_teachers: {int((~shown).sum())} images are not shown in {EPOCHS} epochs: leave "
            "it out"
        )

    def _made(self) -> list[Tensor]:
        """The tables, on the host."""
        tables: list[Tensor] = []
        n = len(self.train.labels)
        for samples, images in self._batches():
            found = self._of_batch(images)
            if not tables:
                tables = [z.new_empty((n, z.shape[1]), device="cpu") for z in found]
            for table, z in zip(tables, found, strict=True):
                table[samples.cpu()] = z.cpu()
        return tables


def _check(cohort: Cohort, train: Any) -> None:
    if not cohort.teachers:
        raise InputError("cache_teachers: there are no teachers whose logits it could keep")
    if not callable(getattr(train, "samples", None)) or data_mark(train) is None:
        raise InputError(
            f"cache_teachers: a {type(train).__name__} does not say which images a batch shows: "
            "use a loader of fastdml or arrays, or leave it out"
        )
    what = getattr(train, "augment", None)  # arrays have none
    drawn = [n for n in ("pad", "flip", "erase", "cutout") if getattr(what, n, 0)]
    if policy := getattr(train, "policy", None):
        drawn.append(f"augment {policy}")
    if drawn:
        raise InputError(
            f"cache_teachers keeps one prediction for each image, and these are augmented "
            f"({', '.join(drawn)}): set augment to none, or leave cache_teachers out"
        )


def _read(path: Path, made_of: str) -> tuple[list[Tensor] | None, str]:
    """The tables of a file, mapped, or None and why it cannot be used; without a reason where there
    is no file."""
    if not path.exists():
        return None, ""
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tables = [file.get_tensor(str(t)) for t in range(len(file.keys()))]
    except Exception as error:  # a damaged or forged header can raise nearly anything
        return None, f"it cannot be read ({type(error).__name__})"
    if facts.get(KEY) != made_of:
        return None, "it was made of other teachers or images, or in another precision"
    if facts.get(SUMS) != _digest(tables):
        return None, "it is damaged"
    return tables, ""


def _write(path: Path, tables: list[Tensor], made_of: str) -> None:
    safetensors = require("safetensors.torch", "train")
    facts = {KEY: made_of, SUMS: _digest(tables)}
    named = {str(t): table for t, table in enumerate(tables)}
    with writing(path), replacing(path) as file:
        file.write(safetensors.save(named, facts))


def _digest(tables: list[Tensor]) -> str:
    found = hashlib.sha256()
    for table in tables:
        found.update(str(table.dtype).encode())
        found.update(table.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
