from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import numbered_set

from fastdml.data import PKSampler, RandomSampler, RepeatedSampler, ResidentLoader
from fastdml.data.samplers import check_share, part
from fastdml.errors import InputError

seeds = st.integers(0, 2**63 - 1)
sets = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 3)), min_size=1, max_size=60)


def batches(n, batch_size, seed, epoch, world, *, start=0, train=True, sampler=None):
    """What each rank shows from step `start` on, by step."""
    options = {"seed": seed, "train": train, "pad": 0, "sampler": sampler, "world": world}
    ranks = [
        ResidentLoader(
            numbered_set(n), batch_size, **options, rank=rank
        )  # as after a restart: nothing is shared
        for rank in range(world)
    ]
    return [
        [loader.order(epoch).sample[loader.part(epoch, step)].tolist() for loader in ranks]
        for step in range(start, len(ranks[0]))
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 150), st.integers(4, 40), st.integers(1, 4), seeds, st.integers(0, 99))
def test_each_sample_once_an_epoch(n, batch_size, world, seed, epoch):
    batch_size = min(batch_size, n)
    shown = [s for step in batches(n, batch_size, seed, epoch, world) for b in step for s in b]
    assert len(set(shown)) == len(shown) == n // batch_size * batch_size
    if n % batch_size == 0:
        assert set(shown) == set(range(n))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9), st.integers(1, 70), st.integers(1, 9), st.integers(1, 4))
def test_shares_are_the_batch_in_pieces_that_differ_by_one(step, groups, world, together):
    batch_size = groups * together
    if groups < world:
        with pytest.raises(InputError, match=f"for {world} ranks.*give {world * together} or more"):
            check_share(batch_size, world, together)
        return
    check_share(batch_size, world, together)
    shares = [part(step, batch_size, rank, world, together) for rank in range(world)]
    shown = [place for share in shares for place in range(share.start, share.stop)]
    assert shown == list(range(step * batch_size, (step + 1) * batch_size))
    sizes = [share.stop - share.start for share in shares]
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= together
    assert all(size % together == 0 for size in sizes)
    assert part(step, batch_size) == slice(step * batch_size, (step + 1) * batch_size)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 150), st.integers(1, 40))
def test_evaluation_shows_all_in_order(n, batch_size):
    shown = [s for step in batches(n, batch_size, 0, 0, 1, train=False) for b in step for s in b]
    assert shown == list(range(n))


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 90), st.integers(2, 8), st.integers(1, 2), seeds, st.data())
def test_resuming_goes_on_where_it_was(n, batch_size, world, seed, data):
    sampler = data.draw(st.sampled_from([None, RepeatedSampler(n, 2)]))
    whole = batches(n, batch_size, seed, 3, world, sampler=sampler)
    start = data.draw(st.integers(0, len(whole)))
    assert batches(n, batch_size, seed, 3, world, sampler=sampler, start=start) == whole[start:]


@settings(max_examples=60, deadline=None)
@given(sets, st.integers(1, 4), st.integers(1, 5), st.booleans(), seeds, st.integers(0, 9))
def test_pk_batches(images, p, k, by_camera, seed, epoch):
    ids, cameras = (torch.tensor(values) for values in zip(*images, strict=True))
    if p > len(ids.unique()):
        with pytest.raises(InputError, match=rf"batches of {p} identities from \d"):
            PKSampler(ids, p, k)
        return
    sampler = PKSampler(ids, p, k, cameras if by_camera else None)
    sample, repetition = sampler.order(seed, epoch)
    assert len(sample) == sampler.places > 0
    shown = ids[sample].view(-1, p, k)
    assert (shown == shown[:, :, :1]).all(), "K images of one identity"
    for batch in shown[:, :, 0].tolist():
        assert len(set(batch)) == p, "P different identities"
    groups = -(-torch.bincount(ids) // k)
    most = int(groups.clamp(max=sampler.steps + 1).sum())
    assert most < p * (sampler.steps + 1), "no more batches were possible"
    # an image comes again only where its identity's images do not fill their last group
    for identity in ids.unique().tolist():
        times = torch.bincount(sample, minlength=len(ids))[ids == identity]
        n, count = len(times), int(times.sum())
        assert count <= -(-n // k) * k
        if count == -(-n // k) * k:
            assert times.min() >= 1, "every image is shown"
            assert times.max() <= max(-(-k // n), 1) + (n % k != 0)
    assert len(set(zip(sample.tolist(), repetition.tolist(), strict=True))) == len(sample)
    again = PKSampler(ids, p, k, cameras if by_camera else None).order(seed, epoch)
    assert torch.equal(again.sample, sample)


def test_equal_identities_are_shown_whole():
    ids = torch.arange(12).repeat_interleave(8)
    for epoch in range(5):
        sample = PKSampler(ids, 4, 4).order(1, epoch).sample
        assert sorted(sample.tolist()) == list(range(96))
    orders = [PKSampler(ids, 4, 4).order(seed, epoch).sample for seed, epoch in ((1, 0), (1, 1))]
    assert not torch.equal(*orders)


def test_ranks_of_pk_batches_share_the_epoch():
    ids = torch.arange(12).repeat_interleave(8)
    steps = batches(96, 16, 0, 0, 2, sampler=PKSampler(ids, 4, 4))
    assert len(steps) == 6
    assert sorted(s for step in steps for rank in step for s in rank) == list(range(96))
    for rank in (rank for step in steps for rank in step):
        assert ids[rank].unique(return_counts=True)[1].tolist() == [4, 4]  # whole identities


def test_groups_take_turns_through_cameras():
    ids = torch.zeros(24, dtype=torch.int64)
    cameras = torch.arange(24) // 4  # six cameras, four images of each
    for epoch in range(20):
        sample = PKSampler(ids, 1, 6, cameras).order(0, epoch).sample.view(-1, 6)
        assert all(sorted(cameras[group].tolist()) == list(range(6)) for group in sample)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), seeds, st.integers(0, 20))
def test_repeated_augmentation(n, repeats, seed, cycle):
    repeats = min(repeats, n)
    sampler = RepeatedSampler(n, repeats)
    times = torch.zeros(n, dtype=torch.int64)
    for turn in range(repeats):
        sample, repetition = sampler.order(seed, cycle * repeats + turn)
        assert len(sample) == n
        whole = n // repeats * repeats
        assert (sample[:whole].view(-1, repeats) == sample[:whole:repeats, None]).all()
        assert len(set(zip(sample.tolist(), repetition.tolist(), strict=True))) == n
        times += torch.bincount(sample, minlength=n)
    if n % repeats == 0:
        assert (times == repeats).all()
    else:
        assert times.min() >= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PKSampler(torch.arange(3), 4, 2), "batches of 4 identities from 3"),
        (lambda: PKSampler(torch.arange(3), 0, 2), "0 identities x 2 images"),
        (lambda: RepeatedSampler(5, 6), "6 repeats of 5 images"),
        (lambda: batches(10, 12, 0, 0, 2), "batch size 12 is larger than the 10.*give 10 or less"),
        (lambda: batches(10, 2, 0, 0, 3), "batch size 2 for 3 ranks.*give 3 or more"),
        (
            lambda: batches(6, 4, 0, 0, 3, sampler=PKSampler(torch.arange(6), 2, 2)),
            r"batch size 4 \(2 identities\) for 3 ranks.*give 6 or more",
        ),
        (lambda: batches(10, 0, 0, 0, 1), "batch size 0"),
        (
            lambda: ResidentLoader(numbered_set(9), 3, train=True, pad=0, rank=2, world=2),
            "rank 2 of 2",
        ),
        (lambda: batches(6, 5, 0, 0, 1, sampler=PKSampler(torch.arange(6), 2, 2)), "give 4"),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_random_order_is_that_of_the_counter():
    orders = [RandomSampler(50).order(0, epoch).sample.tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
