"""A set's images divided into those to train on and those that choose the best weights."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdml.data.image_set import IGNORED
from fastdml.data.philox import VALIDATION, check_seed, draw, permutation, rank_in_class
from fastdml.errors import InputError

logger = logging.getLogger(__name__)

Set = TypeVar("Set", bound=Any)  # an ImageSet or another with `labels`, `class_names` and `at`


def split_validation(data: Set, validation: float, seed: int = 0) -> tuple[Set, Set]:
    """`data` in two: the images to train on and those to validate on, both in the set's order.

    validation: below 1 a share of the images, from 1 on a number of them. Each class gives its
    share; at least one image, and never its last, so that a class of one image has none to validate
    on, which is logged. A smaller validation set of the same seed lies within a larger one. Raises
    InputError where there are fewer images than that takes, or fewer are asked for than classes.
    """
    labels = data.labels.cpu()
    chosen = validation_places(labels, validation, seed)
    kept = torch.ones(len(labels), dtype=torch.bool, device="cpu")
    kept[chosen] = False
    lacking = set(labels.tolist()) - set(labels[chosen].tolist())
    if lacking:
        names = ", ".join(str(data.class_names[c]) for c in sorted(lacking)[:3])
        more = ", ..." if len(lacking) > 3 else ""
        logger.warning("no validation images of classes with a single image: %s%s", names, more)
    device = data.labels.device
    return data.at(kept.nonzero()[:, 0].to(device)), data.at(chosen.to(device))


def validation_places(labels: Tensor, validation: float, seed: int) -> Tensor:
    """The places in labels (N,) that `split_validation` validates on, rising."""
    if (labels == IGNORED).any():
        raise InputError("validation images need labels: take them from the labelled images alone")
    N, sizes = len(labels), torch.bincount(labels)
    divisible = int((sizes > 1).sum())  # classes
    most = N - int((sizes > 0).sum())
    n = round(validation * N) if validation < 1 else int(validation)
    if n < divisible or n < 1:
        raise InputError(
            f"validation={validation:g} is {n} of {N:,} images, for {divisible} classes: give at "
            f"least {max(divisible, 1)}, one of each class (below 1 it is a share, from 1 on a "
            "number of images)"
        )
    if n > most:
        raise InputError(
            f"validation={validation:g} is {n:,} of {N:,} images: give at most {most:,}, so that "
            "each class keeps an image to train on"
        )
    words = draw(check_seed(seed), 0, torch.arange(N, device="cpu"), VALIDATION)[0]
    rank = rank_in_class(labels, words)
    turn = (rank.double() + 0.5) / sizes[labels]  # (N,) classes advance in proportion to their size
    turn[rank == 0] = 0.0  # an image of each class comes first
    turn[rank == sizes[labels] - 1] = 2.0  # and its last one never
    shuffled = permutation(words)
    order = shuffled[torch.argsort(turn[shuffled], stable=True)]
    return order[:n].sort().values
