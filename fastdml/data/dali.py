"""Batches by NVIDIA DALI: from files, decoded as they are needed, or from a set in memory.

Extra `dali`. With a CUDA device JPEGs are decoded by nvJPEG ("mixed") and everything else runs
there too; without one the same pipeline runs on the CPU. DALI reads, decodes, resizes, crops,
flips, erases and normalises; which samples and which choices, it is told: they come from
`fastdml.data.counter`, as in `ResidentLoader`, so a batch is a pure function of (seed, epoch, step,
rank). The pipeline has no random state: what a checkpoint must hold to go on with the stream is the
position alone.

Pixels differ from `ResidentLoader`'s by rounding: 1e-5 after normalisation without a resize or
where sizes are doubled, else 0.02, since bilinear weights are exact here and multiples of 1/256
there. Files of another size than 128x64 are made so first, as there, where the libraries' filters
differ by up to twelve grey levels, less than one in a picture's mean.

One bad file ends a pipeline, and its error does not say which file it was. So files are checked
before (`fastdml.data.scan`, decoder "dali"), and after an error the batch's files are looked at.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdml.data import augment
from fastdml.data.augment import Choices
from fastdml.data.batching import Batching
from fastdml.data.decode import BadImage, decode
from fastdml.data.image_set import ImageSet
from fastdml.data.probe import decoded
from fastdml.data.reid import STORED, ReidSplit
from fastdml.data.samplers import Sampler
from fastdml.data.scan import scan
from fastdml.errors import InputError, require

DTYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "FLOAT"}


class DALILoader(Batching):
    """`ResidentLoader`'s batches, from a `ReidSplit` (files) or an `ImageSet`.

    Padding by reflection needs an `ImageSet` without a resize: DALI has no such border, so the set
    is padded once, in memory. Files are trusted here: `checked` looks at them.
    """

    def __init__(
        self,
        source: ReidSplit | ImageSet,
        batch_size: int,
        *,
        seed: int = 0,
        train: bool,
        size: tuple[int, int] | None = None,
        pad: int = 4,
        padding: str = "reflect",
        flip: bool = True,
        erase: float = 0.0,
        cutout: int = 0,
        sampler: Sampler | None = None,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        threads: int = 2,
    ) -> None:
        require("nvidia.dali", "dali")
        super().__init__(
            len(source), batch_size, seed=seed, train=train, sampler=sampler, rank=rank, world=world
        )
        self.files = isinstance(source, ReidSplit)
        stored = STORED if self.files else tuple(source.images.shape[2:])
        self.augment = what = augment.options(
            stored, train, size=size, pad=pad, padding=padding, flip=flip, erase=erase,
            cutout=cutout,
        )  # fmt: skip
        resized = stored != (what.height, what.width)
        if what.pad and what.reflect and (resized or self.files):
            raise InputError(
                "DALI has no border by reflection for files or a resize: use padding='black'"
            )
        self.device, self.dtype, self.channels_last = torch.device(device), dtype, channels_last
        self.num_classes, self.threads = source.num_classes, threads
        self.labels = source.labels.to(self.device)
        self._mean, self._std = list(source.mean), list(source.std)
        self._resized = resized
        if self.files:
            self._names = [np.frombuffer(os.fsencode(path), np.uint8) for path in source.paths]
            self.paths = source.paths
        else:
            images = source.images.permute(0, 2, 3, 1).cpu().numpy()
            if what.pad and what.reflect:
                border = ((0, 0), (what.pad,) * 2, (what.pad,) * 2, (0, 0))
                images = np.pad(images, border, mode="reflect")
            self._names, self.paths = np.ascontiguousarray(images), None
        self._pipe: Any = None
        self._ahead = False  # whether the pipeline is making a batch, or holds one ready
        self._chosen: tuple[int, Choices] | None = None

    def _build(self) -> Any:
        dali = require("nvidia.dali", "dali")
        fn = require("nvidia.dali.fn", "dali")
        types = require("nvidia.dali.types", "dali")
        what, gpu = self.augment, self.device.type == "cuda"
        pipe = dali.Pipeline(
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if gpu else None,
            prefetch_queue_depth=1,  # the next batch is made while this one, a copy, is used
        )
        with pipe:
            if self.files:
                x = fn.external_source(name="source", dtype=types.UINT8, ndim=1)
                x = decoded(fn.io.file.read(x), "mixed" if gpu else "cpu")
                height, width = STORED  # as when the set is kept in memory
                x = fn.resize(x, resize_y=height, resize_x=width, interp_type=types.INTERP_LINEAR)
            else:
                x = fn.external_source(name="source", dtype=types.UINT8, ndim=3, layout="HWC")
                x = x.gpu() if gpu else x
            if self._resized:
                x = fn.resize(
                    x,
                    resize_y=what.height,
                    resize_x=what.width,
                    interp_type=types.INTERP_LINEAR,
                    antialias=False,
                    dtype=types.FLOAT,
                )
            if what.pad:
                x = fn.slice(
                    x,
                    start=fn.external_source(name="corner", dtype=types.INT32, ndim=1),
                    shape=[what.height, what.width],
                    axes=[0, 1],
                    out_of_bounds_policy="pad",
                    fill_values=0.0,
                )
            options = {}
            if what.flip:
                options["mirror"] = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            x = fn.crop_mirror_normalize(
                x,
                mean=self._mean,
                std=self._std,
                dtype=getattr(types, DTYPES[self.dtype]),
                output_layout="HWC",
                **options,
            )
            if what.erase:
                x = fn.erase(
                    x,
                    anchor=fn.external_source(name="erase", dtype=types.FLOAT, ndim=1),
                    shape=fn.external_source(name="erase_shape", dtype=types.FLOAT, ndim=1),
                    axes=[0, 1],
                    fill_value=0.0,
                )
            pipe.set_outputs(x)
        pipe.build()
        return pipe

    def _feed(self, epoch: int, step: int) -> None:
        part, order, what = self.part(epoch, step), self.order(epoch), self.augment
        samples = order.sample[part].tolist()
        feed = self._pipe.feed_input
        feed("source", [self._names[i] for i in samples])
        if self._chosen is None or self._chosen[0] != epoch:
            self._chosen = (
                epoch,
                augment.choose(what, self.seed, epoch, order.sample, order.repetition),
            )
        choices = Choices(*(c[part] for c in self._chosen[1]))
        if what.pad:
            shift = 0 if what.reflect else what.pad  # a set padded in memory begins at its border
            corner = torch.stack([choices.top, choices.left], 1) - shift
            feed("corner", list(corner.to(torch.int32).numpy()))
        if what.flip:
            feed("flip", list(choices.flip.to(torch.int32).numpy()))
        if what.erase:
            top, left = choices.erase_top, choices.erase_left
            anchor = torch.stack([top, left], 1).float()
            shape = torch.stack([choices.erase_rows, choices.erase_columns], 1).float()
            feed("erase", list(anchor.numpy()))
            feed("erase_shape", list(shape.numpy()))
        self._pipe.schedule_run()
        self._ahead = True

    def _take(self) -> Tensor:
        """(B, H, W, ch), a copy: the pipeline reuses its memory."""
        self._ahead = False
        (out,) = self._pipe.share_outputs()
        images = torch.from_dlpack(out.as_tensor()).clone()
        self._pipe.release_outputs()
        return images

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from step `start` on. One iterator at a time."""
        if self._pipe is None:
            self._pipe = self._build()
        if self._ahead:  # of an iterator that was left
            self._take()
        for step in range(start, len(self)):
            try:
                if not self._ahead:
                    self._feed(epoch, step)
                images = self._take().permute(0, 3, 1, 2).to(self.dtype)
                if step + 1 < len(self):
                    self._feed(epoch, step + 1)
            except RuntimeError as error:
                self._pipe, self._ahead = None, False  # it is of no further use
                raise self._explain(error, epoch, step) from None
            labels = self.labels[self.order(epoch).sample[self.part(epoch, step)].to(self.device)]
            yield (images if self.channels_last else images.contiguous()), labels

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """One batch by itself, which nothing prepared: for looking at."""
        return next(iter(self.epoch(epoch, step)))

    def _explain(self, error: RuntimeError, epoch: int, step: int) -> Exception:
        """What to raise for DALI's error: the file, where it was one."""
        if self.paths is None:
            return error
        samples = self.order(epoch).sample[self.part(epoch, step)].tolist()
        names = [self.paths[i] for i in samples]
        for path in names:
            decode(path)  # raises what is wrong with a file that vanished or was damaged
        bad = scan(names, decoder="dali").bad
        if bad:
            path, why = next(iter(bad.items()))
            return BadImage(path, why)
        return error


def checked(split: ReidSplit, bad_files: str, *, progress: bool | None = None) -> ReidSplit:
    """`split` without the files that DALI cannot decode, or an error that lists them."""
    found = scan(split.paths, decoder="dali", progress=progress)
    if found.bad and bad_files == "error":
        raise InputError(
            f"{found.describe()}: restore them, leave them out with --bad-files skip, or use "
            "--loader resident"
        )
    if found.bad:
        print(f"left out: {found.describe()}", file=sys.stderr)
    return split.without(found.bad)
