"""The loader for a set: in memory where it fits, else streamed."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from typing import Any

import torch

from fastdml import host
from fastdml.data.files.check_files import check_bad_files
from fastdml.data.image_files import ImageFiles
from fastdml.data.image_set import ImageSet
from fastdml.data.loaders.batching import Files
from fastdml.data.loaders.dali import DALILoader, checked
from fastdml.data.loaders.resident import ResidentLoader, has_kernel
from fastdml.data.loaders.torch_workers import TorchLoader
from fastdml.data.reid_split import ReidSplit
from fastdml.errors import InputError
from fastdml.units import size

logger = logging.getLogger(__name__)

Loader = ResidentLoader | DALILoader | TorchLoader
KINDS = ("auto", "resident", "dali", "torch")
SHARE = 0.5  # of the free memory that a set may take


def make_loader(
    kind: str,
    source: ImageSet | Files,
    batch_size: int,
    *,
    bad_files: str = "error",
    policy: str | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Loader:
    """The loader of `source`, whose batches are images (B, ch, H, W), normalised, and labels (B,)
    int64, on `device`.

    kind: "resident", "dali", "torch", or "auto": resident, or where the set would take more than
    half of the free memory, dali, or where DALI is not installed or cannot do what is asked for,
    torch. bad_files: "error" or "skip", for files that DALI cannot decode. policy: `TorchLoader`'s,
    which the others do not have. options: `ResidentLoader`'s, of which train must be given. Logs
    what a resident set takes, or why a set is streamed.

    Raises InputError for an unknown kind or bad_files, for options that `ResidentLoader` refuses or
    DALI cannot do, and for files that cannot be decoded; MissingExtra where kind is "dali" and DALI
    is not installed.
    """
    check_bad_files(bad_files)
    device = torch.device(device)
    kind = choose_loader(kind, source, device, policy=policy, **options)
    if kind == "resident":
        loader = ResidentLoader(source, batch_size, device=device, **options)
        what = "images" if loader.train else "evaluation images"
        logger.info(f"{len(source):,} {what} stay in {_where(device)}: {size(loader.nbytes)}")
        return loader
    if kind == "torch":
        return TorchLoader(source, batch_size, policy=policy, device=device, **options)
    if isinstance(source, ReidSplit):
        source = checked(source, bad_files)
    return DALILoader(source, batch_size, device=device, **options)


def choose_loader(
    kind: str,
    source: ImageSet | Files,
    device: torch.device,
    *,
    policy: str | None = None,
    **options: Any,
) -> str:
    """The kind of loader that `make_loader` chooses: "resident", "dali" or "torch". Raises
    InputError for an unknown kind, and one that does not have the policy."""
    if kind not in KINDS:
        raise InputError(f"loader {kind!r}: give one of {', '.join(KINDS)}")
    if policy:
        if kind in ("resident", "dali"):
            raise InputError(
                f"augment {policy} is done by torch's worker processes, not by the {kind} loader: "
                "set loader to auto or torch, or augment to standard"
            )
        if kind == "auto":
            logger.info(f"augment {policy} takes an image at a time: streamed by torch")
        return "torch"
    if kind in ("dali", "torch"):
        return kind
    need, free = needed_bytes(source, device, **options), free_bytes(device)
    if need <= SHARE * free:
        return "resident"
    kind = "dali" if has_dali() and not isinstance(source, ImageFiles) else "torch"
    if kind == "dali" and options.get("padding", "reflect") == "reflect":
        kind = "torch" if isinstance(source, ReidSplit) or options.get("size") else "dali"
    logger.info(
        f"{len(source):,} images would take {size(need)}, more than "
        f"{SHARE:.0%} of the {size(free)} free in {_where(device)}: "
        f"streamed by {kind} instead"
    )
    return kind


def has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even `nvidia`
        return False


def needed_bytes(
    source: ImageSet | Files,
    device: torch.device,
    *,
    train: bool,
    size: tuple[int, int] | None = None,
    pad: int = 4,
    flip: bool = True,
    **others: Any,
) -> int:
    """The bytes that a `ResidentLoader` would keep its images in, or take in while it makes them.
    others: options without effect on that."""
    if isinstance(source, ImageSet):
        _, height, width, channels = source.pixels.shape
    else:
        (height, width), channels = source.size, 3
    pixels = channels * height * width
    if has_kernel(device) or (size or (height, width)) != (height, width):
        return len(source) * pixels
    table = (1 + 2 * pad / width) * (1 + flip) if train else 1.0
    if isinstance(source, ImageFiles):  # decoded pixels, which the table is made of
        table += 1
    return int(len(source) * pixels * table)


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    _, free = host.memory()
    if math.isnan(free):  # the system does not say
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(free)


def _where(device: torch.device) -> str:
    return "the GPU's memory" if device.type == "cuda" else "memory"
