"""Training and evaluation batches from a set that stays in memory.

A batch is a pure function of (seed, epoch, step, rank): resuming means asking for the next step.
Order and augmentation come from `fastdml.data.philox`, so they are the same on every device. Three
ways make the same batch, to the last bit:

- on CUDA with Triton, `fastdml_kernels.augment`: one launch a batch;
- elsewhere, where images keep their size, `RowTable`;
- elsewhere, where they are resized, `fastdml.data.augment` in plain torch.

Memory: the set's bytes, once; `RowTable` takes more, see there. The order of an epoch is computed
at its first batch, in about 10 ms, and kept: 8 bytes a sample, and without the kernel 56 more for
the random choices.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from fastdml_kernels.augment_options import Augment
from torch import Tensor

from fastdml.data import augment
from fastdml.data.augment import Choices
from fastdml.data.image_set import ImageSet
from fastdml.data.loaders.batching import Batching, Files

AT_ONCE = 64  # images to lay out, so that their mirrored copy stays in the cache


def has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


class ResidentLoader(Batching):
    """Batches of `images`, normalised, in `dtype` and (if asked) channels_last, on `device`.

    In training every epoch has its own order (`sampler`'s; by default each sample once), each image
    is resized to `size` (height, width; default: as stored), cropped from a border of `pad` pixels,
    reflected or black, with `flip` mirrored half of the time, and with probability `erase` loses a
    rectangle of random size to the mean colour, or a square of `cutout` pixels. A last short batch
    is dropped. Of the `batch_size` images of each step rank `rank` of `world` shows its share:
    those of all ranks together, in their order, are the batch of one process. In evaluation the
    order is the set's, images are resized only, the last batch may be short, and every rank sees
    all of it. Files are decoded at once, to `stored` (height, width; default: the size that they
    say).

    Raises InputError for a batch size, rank, seed or augmentation out of range, for a batch larger
    than an epoch has images or too small for `world` shares, and (BadImage) for a file that cannot
    be decoded.
    """

    def _take_in(self, images: ImageSet | Files) -> None:
        if not isinstance(images, ImageSet):
            images = images.decode(self.stored)
        pixels = images.pixels.to(self.device)  # (N, H, W, ch)
        what, self._table = self.augment, None
        self._mean = torch.tensor(images.mean, device=self.device)  # (ch,)
        self._scale = 1 / torch.tensor(images.std, device=self.device)
        self._epoch: tuple[int, Tensor] | None = None  # an epoch, and the same on the device
        self._kernel = has_kernel(self.device)
        if self._kernel:
            from fastdml_kernels.augment import prepare

            prepare(what, self.device)
        elif self.stored == (what.height, what.width):
            self._table = RowTable(pixels, what, self._mean, self._scale)
            return
        self.images = pixels.contiguous()

    @property
    def nbytes(self) -> int:
        """The size of the images as they are kept, in bytes."""
        return (self.images if self._table is None else self._table.storage).nbytes

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, ch, H, W) normalised, and labels (B,) int64. Never waits for the device."""
        return self.assemble(*self.index(epoch, step))

    def samples(self, epoch: int, step: int) -> Tensor:
        return self.order(epoch, self.device).sample[self.part(epoch, step)]

    def index(self, epoch: int, step: int) -> tuple[Tensor, ...]:
        """The tensors from which `assemble` makes the batch, on the device; the last is (B,)."""
        part = self.part(epoch, step)
        order = self.order(epoch, self.device)
        if not self._kernel:
            return *(c[part] for c in self.choices(epoch, self.device)), order.sample[part]
        if self._epoch is None or self._epoch[0] != epoch:
            at = torch.full((1,), epoch, dtype=torch.int64, device=self.device)
            self._epoch = epoch, at
        if order.repetition is None:
            return self._epoch[1], order.sample[part]
        return self._epoch[1], order.repetition[part], order.sample[part]

    def assemble(self, *index: Tensor) -> tuple[Tensor, Tensor]:
        """The batch for an index; with the kernel one launch, which a CUDA graph may hold."""
        samples = index[-1]
        if not self._kernel:
            choices = Choices(*index[:-1])
            if self._table is not None:
                return self._batch(self._table.batch(samples, choices), samples)
            pixels = augment.batch(
                self.images, samples, self._mean, self._scale, self.augment, choices
            )
            return self._batch(pixels, samples)
        from fastdml_kernels.augment import augment as launch

        images, labels = launch(
            self.images, self.labels, samples, self._mean, self._scale, self.augment,
            seed=self.seed, epoch=index[0], dtype=self.dtype,
            repetitions=index[1] if len(index) == 3 else None,
        )  # fmt: skip
        return (images if self.channels_last else images.contiguous()), labels

    def epoch(self, epoch: int, start: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from step `start` on, or of these each `every`-th."""
        for step in range(start, len(self), every):
            yield self.batch(epoch, step)


class RowTable:
    """Crops and flips by one `index_select` of whole rows.

    Each row is stored with its border, W + 2 pad pixels of ch bytes, and once more mirrored. A row
    of a crop is then W * ch bytes in one piece, flipped or not, and a batch is one `index_select`
    of B * H rows; the border at the top and bottom is a matter of which row is taken. For CIFAR on
    one core of an AMD EPYC that is 0.04 ms at batch 64 and 0.06 ms at 128; gathering pixel by pixel
    took 0.34 and 0.62 ms, byte by byte 0.56 and 1.06 ms. With fp32 normalisation a batch takes 0.14
    and 0.25 ms.

    Memory: (1 + 2 pad / W) bytes a byte of the set, twice that with flips: 384 MB for CIFAR's
    training images and 31 MB for its test images.
    """

    def __init__(self, pixels: Tensor, what: Augment, mean: Tensor, scale: Tensor) -> None:
        self.n, height, width, self.ch = pixels.shape
        self.what, device = what, pixels.device
        self._lay_out(pixels)
        row, self._inside = _border(height, what, device)  # both (H + 2 pad,)
        # row t: where the H rows of a crop with top t lie, in windows, and which are in the image
        self._tops = row.unfold(0, height, 1) * (width + 2 * what.pad)  # (2 pad + 1, H)
        self._inside = self._inside.unfold(0, height, 1)
        # a row of pixels at once, so that arithmetic runs over W * ch contiguous values
        self._mean, self._scale = mean.repeat(width), scale.repeat(width)  # (W * ch,)

    def _lay_out(self, pixels: Tensor) -> None:
        """(N, H, W, ch) to windows (M, W * ch): window m begins at pixel m of the padded rows."""
        what, pad = self.what, self.what.pad
        height, width, ch = what.height, what.width, self.ch
        padded = width + 2 * pad
        inside = slice(pad, pad + width)
        shape = (1 + what.flip, self.n, height, padded, ch)
        count = (1 + what.flip) * self.n * height * padded
        self.storage = pixels.new_empty((count + padded) * ch)
        self.storage[count * ch :] = 0  # a black row
        rows = self.storage[: count * ch].view(shape)
        for start in range(0, self.n, AT_ONCE):
            part = slice(start, start + AT_ONCE)
            rows[0, part, :, inside] = pixels[part]
            if what.flip:
                rows[1, part, :, inside] = pixels[part].flip(2)
        column, within = _border(width, what, "cpu")
        for to, (source, there) in enumerate(zip(column.tolist(), within.tolist(), strict=True)):
            if not there:
                rows[:, :, :, to] = 0
            elif to != pad + source:
                rows[:, :, :, to] = rows[:, :, :, pad + source]
        self._rows = self.storage.as_strided((count + padded - width + 1, width * ch), (ch, 1))
        self._black = count

    def batch(self, samples: Tensor, choices: Choices) -> Tensor:
        """Images (B, H, W, ch), float32."""
        what = self.what
        padded = what.width + 2 * what.pad
        image = (choices.flip * self.n + samples) * what.height  # mirrored rows follow all others
        # a crop at `left` of the mirrored rows is the mirror of the crop at 2 pad - left
        left = torch.where(choices.flip == 1, 2 * what.pad - choices.left, choices.left)
        rows = (image * padded + left)[:, None] + self._tops[choices.top]  # (B, H)
        if what.pad and not what.reflect:
            rows = torch.where(self._inside[choices.top], rows, self._black)
        pixels = self._rows.index_select(0, rows.view(-1))  # (B * H, W * ch)
        images = pixels.float().sub_(self._mean).mul_(self._scale)  # in this order: see the kernel
        images = images.view(-1, what.height, what.width, self.ch)
        return augment.erase_(images, choices) if what.erase else images


def _border(size: int, what: Augment, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """For each of the `size + 2 pad` positions of a padded line: the position in the image that it
    reads, and whether it shows the image (a black border does not)."""
    position, inside = augment.source(
        torch.tensor([-what.pad], device=device), size + 2 * what.pad, size, what.reflect
    )
    return position[0], inside[0]
