"""Identities held out of training: who, as queries and gallery, and when there are too few."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdml.data.reid_split import ReidSplit
from fastdml.data.reid_validation import hold_out_identities
from fastdml.errors import InputError


def split_of(rng, N: int, ids: int, cameras: int) -> ReidSplit:
    """N images; identities and cameras are not numbered from 0."""
    who = torch.from_numpy(rng.integers(0, ids, N)) * 7 + 3
    where = torch.from_numpy(rng.integers(0, cameras, N)) * 2 + 1
    return ReidSplit(tuple(f"{i}.jpg" for i in range(N)), who, where)


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 80),
    ids=st.integers(1, 12),
    cameras=st.integers(1, 4),
    validation=st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0, 2.0, 3.0, 6.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_identities_are_held_out_whole(N, ids, cameras, validation, seed):
    split = split_of(np.random.default_rng(seed), N, ids, cameras)
    seen = {i: set() for i in split.ids.tolist()}
    for identity, camera in zip(split.ids.tolist(), split.cameras.tolist(), strict=True):
        seen[identity].add(camera)
    n = round(validation * len(seen)) if validation < 1 else int(validation)
    eligible = {identity for identity, places in seen.items() if len(places) > 1}
    if not 2 <= n <= min(len(eligible), len(seen) - 2):
        with pytest.raises(InputError, match=f"is {n} of {len(seen)} training identities"):
            hold_out_identities(split, validation, seed)
        return
    train, held = hold_out_identities(split, validation, seed)
    chosen = set(held.gallery.ids.tolist())
    assert len(chosen) == n
    assert chosen <= eligible
    assert set(train.ids.tolist()) == set(seen) - chosen
    assert sorted([*train.paths, *held.gallery.paths]) == sorted(split.paths)
    assert train.num_classes == len(seen) - n
    asked = list(zip(held.query.ids.tolist(), held.query.cameras.tolist(), strict=True))
    assert sorted(asked) == sorted((i, c) for i in chosen for c in seen[i])  # each once
    assert set(held.query.paths) <= set(held.gallery.paths)
    again = hold_out_identities(split, validation, seed)[1]
    assert (again.query.paths, again.gallery.paths) == (held.query.paths, held.gallery.paths)
    if n > 2:
        fewer = hold_out_identities(split, n - 1, seed)[1]
        assert set(fewer.gallery.paths) < set(held.gallery.paths)


def test_the_seed_decides():
    split = split_of(np.random.default_rng(0), 400, 40, 3)
    found = {hold_out_identities(split, 0.2, seed)[1].query.paths for seed in range(5)}
    assert len(found) == 5


def test_one_camera_is_too_few():
    split = split_of(np.random.default_rng(0), 40, 10, 1)
    told = r"0 are seen by two cameras and 2 .*: set validation to 0"
    with pytest.raises(InputError, match=told):
        hold_out_identities(split, 0.5)
