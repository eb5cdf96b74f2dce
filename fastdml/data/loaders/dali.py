"""Batches by NVIDIA DALI: from files, decoded as they are needed, or from a set in memory.

Extra `dali`. With a CUDA device JPEGs are decoded by nvJPEG ("mixed") and everything else runs
there too; without one the same pipeline runs on the CPU. DALI reads, decodes, resizes, crops,
flips, erases and normalises. The samples and the random choices are passed to it: they come from
`fastdml.data.philox`, as in `ResidentLoader`, so a batch is a pure function of (seed, epoch, step,
rank). The pipeline has no random state, so that a checkpoint needs nothing but the position.

Pixels differ from `ResidentLoader`'s by rounding: 1e-5 after normalisation without a resize or
where sizes are doubled, else 0.02, since bilinear weights are exact here and multiples of 1/256
there. Both first resize files of another size to 128x64; there DALI's filter and Pillow's differ by
up to twelve grey levels in a pixel, and less than one in a picture's mean.

One bad file ends a pipeline, and its error does not say which file it was. So files are checked
before (`data/files/check_files.py`, decoder "dali"), and after an error the batch's files are
looked at.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdml.data.augment import Choices
from fastdml.data.files.check_files import scan
from fastdml.data.files.check_worker import decoded
from fastdml.data.files.decode import BadImage, check_file, decode
from fastdml.data.image_files import ImageFiles
from fastdml.data.image_set import ImageSet
from fastdml.data.loaders.batching import Batching, Files
from fastdml.data.reid_split import ReidSplit
from fastdml.errors import InputError, require

logger = logging.getLogger(__name__)

DTYPES = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "FLOAT"}


class DALILoader(Batching):
    """`ResidentLoader`'s batches, from a `ReidSplit` (files) or an `ImageSet`. Of `ImageFiles` it
    would make other pictures: it does not read all forms that Pillow reads, and where it resizes
    photographs to cover 64 or 224 pixels a side, pixels differ by up to 27 grey levels.

    Padding by reflection needs an `ImageSet` without a resize: DALI has no such border, so the set
    is padded once, in memory. Files are taken to be decodable: `checked` makes sure. threads: of
    the CPU, for decoding. options: `ResidentLoader`'s.

    Raises MissingExtra where DALI is not installed, InputError for `ImageFiles`, for padding by
    reflection of files or with a resize, and what `ResidentLoader` raises.
    """

    def __init__(
        self,
        source: ImageSet | Files,
        batch_size: int,
        *,
        threads: int = 2,
        **options: Any,
    ) -> None:
        require("nvidia.dali", "dali")
        if isinstance(source, ImageFiles):
            raise InputError(
                "DALI would make other pictures of these files than Pillow does: set loader to "
                "auto, resident or torch"
            )
        self.threads = threads
        super().__init__(source, batch_size, **options)

    def _take_in(self, source: ImageSet | Files) -> None:
        what = self.augment
        self._resized = self.stored != (what.height, what.width)
        bordered = what.pad and what.reflect
        if bordered and (self._resized or self.paths):
            raise InputError(
                "DALI has no border by reflection for files or a resize: use padding='black'"
            )
        self._mean, self._std = list(source.mean), list(source.std)
        # What the pipeline is fed with: the files' names as bytes, or pixels (H, W, ch)
        self._sources: Sequence[np.ndarray] | np.ndarray
        if isinstance(source, ImageSet):
            images = source.pixels.cpu().numpy()
            if bordered:
                border = ((0, 0), (what.pad,) * 2, (what.pad,) * 2, (0, 0))
                images = np.pad(images, border, mode="reflect")
            self._sources = np.ascontiguousarray(images)
        else:
            self._sources = [np.frombuffer(os.fsencode(path), np.uint8) for path in source.paths]
        self._pipe: Any = None
        self._ahead: tuple[int, int] | None = None  # the (epoch, step) that the pipeline makes

    def _build(self) -> Any:
        dali = require("nvidia.dali", "dali")
        fn = require("nvidia.dali.fn", "dali")
        types = require("nvidia.dali.types", "dali")
        what, gpu, index = self.augment, self.device.type == "cuda", self.device.index
        if gpu and index is None:
            index = torch.cuda.current_device()
        pipe = dali.Pipeline(
            batch_size=self.rows,
            num_threads=self.threads,
            device_id=index if gpu else None,
            prefetch_queue_depth=1,  # the next batch is made while this one, a copy, is used
            exec_dynamic=True,  # outputs may be bound to a stream
        )
        with pipe:
            if self.paths:
                x = fn.external_source(name="source", dtype=types.UINT8, ndim=1)
                x = decoded(fn.io.file.read(x), "mixed" if gpu else "cpu")
                height, width = self.stored  # as when the set is kept in memory
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
        feed, samples = self._pipe.feed_input, order.sample[part].tolist()
        if self.paths:
            for i in samples:
                check_file(self.paths[i])
        feed("source", [self._sources[i] for i in samples])
        choices = Choices(*(c[part] for c in self.choices(epoch)))
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
        self._ahead = epoch, step

    def _take(self) -> Tensor:
        """(B, H, W, ch), a copy: the pipeline reuses its memory."""
        # Bound to torch's stream, so that neither side waits for the device: the copy comes after
        # the batch is made, and the memory is free again after the copy.
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        (out,) = self._pipe.share_outputs(stream)
        images = torch.from_dlpack(out.as_tensor()).clone()
        self._pipe.release_outputs()
        self._ahead = None
        return images

    def epoch(self, epoch: int, start: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from step `start` on, or of these each `every`-th."""
        for step in range(start, len(self), every):
            try:
                if self._pipe is None:
                    self._pipe = self._build()
                if self._ahead != (epoch, step):
                    if self._ahead:  # of an iterator that was left
                        self._take()
                    self._feed(epoch, step)
                images = self._take()
                if step + every < len(self):
                    with contextlib.suppress(BadImage):  # raised again when that batch is asked for
                        self._feed(epoch, step + every)
            except RuntimeError as error:
                at = self._ahead or (epoch, step)
                self._pipe, self._ahead = None, None  # it is of no further use
                raise self._explain(error, *at) from None
            yield self._finished(epoch, step, images)

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
    """`split` without the files that DALI cannot decode; with bad_files="error" raises InputError
    that lists them."""
    found = scan(split.paths, decoder="dali", progress=progress)
    if found.bad and bad_files == "error":
        raise InputError(
            f"{found.describe()}: restore them, set bad_files to skip, or set loader to resident"
        )
    if found.bad:
        logger.warning("left out: %s", found.describe())
    return split.without(found.bad)
