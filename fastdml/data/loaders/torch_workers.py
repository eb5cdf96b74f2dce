"""Batches by torch's DataLoader: each image decoded and transformed by itself, in worker processes.

The familiar way, and the slowest here; it needs nothing but Pillow and works where DALI is absent
and a set does not fit into memory. `transform` is also the plainest statement of the augmentation:
the other loaders make the same bits in other ways.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from fastdml_kernels.augment_options import Augment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdml import host
from fastdml.data import policies
from fastdml.data.files.decode import BadImage, decode
from fastdml.data.image_set import ImageSet
from fastdml.data.loaders.batching import Batching, Files
from fastdml.errors import InputError
from fastdml.torch_private import fetches_from_worker

if TYPE_CHECKING:
    from fastdml.image_record import Resize

TERM = {signal.SIGTERM}
DEAD = ("DataLoader worker (pid", "Pin memory thread exited")  # torch's messages begin so


def transform(
    image: np.ndarray,  # (H, W, ch) uint8
    what: Augment,
    choices: tuple[int, ...],  # as in `Choices`
    mean: np.ndarray,  # (ch,) float32
    scale: np.ndarray,  # (ch,) float32, 1 / std
) -> np.ndarray:
    """One augmented image (height, width, ch) float32."""
    top, left, flip, erase_top, erase_left, erase_rows, erase_columns = choices
    height, width, pad = what.height, what.width, what.pad
    if image.shape[:2] != (height, width):
        image = resize(image, height, width)
    if pad:
        border = ((pad, pad), (pad, pad), (0, 0))
        image = np.pad(image, border, mode="reflect" if what.reflect else "constant")
        image = image[top : top + height, left : left + width]
    if flip:
        image = image[:, ::-1]
    lines = np.array(image, np.float32, order="C").reshape(height, -1)
    lines -= np.tile(mean, width)  # whole lines: a loop over channels inside is slower
    lines *= np.tile(scale, width)
    image = lines.reshape(height, width, -1)
    if erase_rows:
        bottom, right = erase_top + erase_rows, erase_left + erase_columns
        image[max(erase_top, 0) : max(bottom, 0), max(erase_left, 0) : max(right, 0)] = 0
    return image


@cache
def taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `out` positions: the two of `size` it lies between, (out,) int64 both, and the
    second's weight, (out,) float32. Half-pixel centres, in 256ths, no antialiasing."""
    at = np.maximum((2 * np.arange(out) + 1) * size - out, 0)  # in 2 * out parts of a pixel
    at = (at * 256 + out) // (2 * out)
    first = np.minimum(at // 256, size - 1)
    return first, np.minimum(first + 1, size - 1), (at % 256 / 256).astype(np.float32)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, ch) uint8 to (height, width, ch) float32, exactly: every value is a multiple of 2**-16
    below 2**8. No matrix products, whose threads would fight with those of the other workers."""
    H, W, ch = image.shape
    x = image.astype(np.float32)
    first, second, weight = taps(W, width)
    near, far = (x.take(where, 1).reshape(H, width * ch) for where in (first, second))
    x = near + (far - near) * weight.repeat(ch)
    first, second, weight = taps(H, height)
    near, far = x[first], x[second]
    x = near + (far - near) * weight[:, None]
    return x.reshape(height, width, ch)


class _Item(NamedTuple):
    """A request to a worker: one image and its random choices."""

    sample: int
    choices: tuple[int, ...]
    seed: int  # of the policy


class _Images(Dataset[np.ndarray | str]):
    """Transformed images. For a bad file it returns a message instead of raising, since a worker's
    exception arrives wrapped in its traceback."""

    def __init__(
        self,
        source: ImageSet | Files,
        what: Augment,
        stored: tuple[int, int],
        policy: str | None,
    ) -> None:
        self.what, self.stored, self.policy = what, stored, policy
        self.white = getattr(source, "white", 255)
        self.paths: tuple[str, ...] = ()
        self.images = np.empty((0, *stored, 3), np.uint8)  # (N, H, W, ch); files are decoded later
        self.how: Resize = "stretch"
        if isinstance(source, ImageSet):
            self.images = source.pixels.cpu().numpy()
        else:
            self.paths, self.how = source.paths, source.resize
        self.mean = np.array(source.mean, np.float32)
        self.scale = 1 / np.array(source.std, np.float32)

    def __getitem__(self, item: _Item) -> np.ndarray | str:
        try:
            if self.paths:
                image = decode(self.paths[item.sample], self.stored, self.how)
            else:
                image = self.images[item.sample]
        except BadImage as bad:
            return str(bad)
        if self.policy:
            image = policies.apply(self.policy, image, item.seed, self.white)
        return transform(image, self.what, item.choices, self.mean, self.scale)


def _collate(images: list[np.ndarray | str]) -> Tensor | str:
    for image in images:
        if isinstance(image, str):
            return image
    return torch.from_numpy(np.stack(images))  # (B, H, W, ch)


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """`loader`'s batches. Its workers are started with garbage collection off and ignore SIGTERM:
    see `_prepare_worker`."""
    collecting = gc.isenabled()
    gc.disable()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, TERM)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if collecting:
            gc.enable()


def _prepare_worker(worker: int) -> None:
    """Runs in each worker when it starts.

    A worker is a fork of the parent and inherits the parent's garbage, which may hold a DALI
    pipeline: collecting that would wait for threads that exist in the parent alone, or crash.
    `gc.freeze` keeps all that is inherited from being collected.

    A scheduler's SIGTERM reaches all processes of a run. The parent then saves, for which it needs
    the batch under way, so that a worker ends at a SIGTERM from its parent alone.
    """
    gc.freeze()
    gc.enable()
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_when_told, daemon=True).start()
    else:  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TERM)


def _end_when_told() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    while signal.sigwaitinfo(TERM).si_pid != parent.pid:
        pass
    os._exit(0)


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turns torch's error about a DataLoader's worker that the system ended into an InputError."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if not _of_dead_worker(error):
            raise
        if threading.current_thread() is threading.main_thread():
            # Torch's handler of SIGCHLD raises wherever the process happens to be: at the death of
            # another worker it would raise again. Without it torch finds a dead worker when it
            # waits for a batch.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        text = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"a process that loads images has died ({text}): where memory ran out, end what else "
            "takes some; training goes on with resume"
        ) from None


def _of_dead_worker(error: Exception) -> bool:
    """Whether the error is of a worker that died. Torch raises from its handler of SIGCHLD or when
    it waits for a batch; where the batch was sent before the worker died, fetching its memory
    from the worker fails."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith(DEAD)
    if "in pin memory thread" in text:
        return True
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(map(fetches_from_worker, frames))


class TorchLoader(Batching):
    """`ResidentLoader`'s batches, to the last bit, from files or an `ImageSet`.

    workers: processes; 0: none but this one; None: one for each CPU that this process may use, from
    2 to 8. Batches do not depend on it. policy: what changes an image in training before it is
    resized, cropped and mirrored, one of `policies.POLICIES`; a function of seed, epoch and sample
    as all else. options: `ResidentLoader`'s.
    """

    def __init__(
        self,
        source: ImageSet | Files,
        batch_size: int,
        *,
        workers: int | None = None,
        policy: str | None = None,
        **options: Any,
    ) -> None:
        self.workers = min(max(2, host.cpus()), 8) if workers is None else workers
        self.policy = policy
        super().__init__(source, batch_size, **options)

    def _take_in(self, source: ImageSet | Files) -> None:
        if self.policy:
            policies.check_policy(self.policy, len(self.mean))
        policy = self.policy if self.train else None
        self._images = _Images(source, self.augment, self.stored, policy)

    def epoch(self, epoch: int, start: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from step `start` on, or of these each `every`-th."""
        rows = torch.stack(self.choices(epoch), 1).tolist()
        order = self.order(epoch)
        samples = order.sample.tolist()
        seeds = [0] * len(samples)
        if self._images.policy:
            seeds = policies.seeds(self.seed, epoch, order.sample, order.repetition).tolist()
        drawn = list(map(_Item, samples, map(tuple, rows), seeds))
        steps = range(start, len(self), every)
        parts = [self.part(epoch, step) for step in steps]
        asked = [drawn[part] for part in parts]
        loader: Any = DataLoader(
            self._images,
            batch_sampler=asked,
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),  # or it would draw from the one that peers draw from
            pin_memory=self.device.type == "cuda",
        )
        for step, images in zip(steps, _started(loader), strict=True):
            if isinstance(images, str):
                raise InputError(images)
            yield self._finished(epoch, step, images.to(self.device, non_blocking=True))
