"""Identities held out of training, as queries and gallery that choose the best weights."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastdml.data.philox import VALIDATION, check_seed, draw, permutation
from fastdml.data.reid_split import ReidSplit
from fastdml.errors import InputError


class HeldOut(NamedTuple):
    """What `train.tasks.retrieval` evaluates on, as the test images of a set are."""

    query: ReidSplit
    gallery: ReidSplit
    multi_query: ReidSplit | None = None


def hold_out_identities(
    split: ReidSplit, validation: float, seed: int = 0
) -> tuple[ReidSplit, HeldOut]:
    """The images to train on, and those of the identities that are held out.

    validation: below 1 a share of the identities, from 1 on a number of them, drawn by the seed
    from those seen by two cameras or more; those of a smaller number lie within those of a larger
    one. Of each and each of its cameras one image is a query. The gallery is all their images: what
    a query shares identity and camera with, itself among them, is left out of its ranked list, so
    that even an identity with one image a camera can be found.

    Raises InputError where fewer than two are asked for, more than two cameras have seen, or so
    many that fewer than two are left to train on.
    """
    labels, count = split.labels.cpu(), split.num_classes
    cameras = split.cameras.cpu().unique(return_inverse=True)[1]
    places = labels * (int(cameras.max()) + 1) + cameras  # an identity before a camera
    seen = places.unique() // (int(cameras.max()) + 1)
    eligible = torch.bincount(seen, minlength=count) > 1
    n = round(validation * count) if validation < 1 else int(validation)
    most = min(int(eligible.sum()), count - 2)
    if not 2 <= n <= most:
        remedy = f"give 2 to {most:,}, or such a share" if most >= 2 else "set validation to 0"
        raise InputError(
            f"validation={validation:g} is {n:,} of {count:,} training identities, of which "
            f"{int(eligible.sum()):,} are seen by two cameras and 2 must be left: {remedy}"
        )
    seed = check_seed(seed)
    order = permutation(draw(seed, 0, torch.arange(count), VALIDATION)[0])
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[order[eligible[order]][:n]] = True
    held = chosen[labels]

    words = draw(seed, 1, torch.arange(len(labels)), VALIDATION)[0]
    shuffled = permutation(words)
    by_place = shuffled[torch.argsort(places[shuffled], stable=True)]
    first = torch.ones(len(labels), dtype=torch.bool)
    first[1:] = places[by_place].diff() != 0
    query = torch.zeros(len(labels), dtype=torch.bool)
    query[by_place[first]] = True
    train, asked, gallery = (
        split.at(kept.nonzero()[:, 0].to(split.ids.device)) for kept in (~held, held & query, held)
    )
    return train, HeldOut(asked, gallery)
