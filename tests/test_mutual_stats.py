"""`MutualStats`: fields that are views of one vector, and everything a named tuple of them does."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from fastdml_kernels.stats_layout import stats_layout
from torch.testing import assert_close
from torch.utils._pytree import tree_map

from fastdml import MutualStats, mutual_loss

K, NAMES = 3, ("ce", "kl", "pairwise_kl", "entropy", "correct", "ensemble_correct")
SHAPES = ((K,), (K,), (K, K), (K,), (K,), ())


@pytest.fixture
def stats() -> MutualStats:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(K, 6, 5, generator=generator)
    labels = torch.randint(5, (6,), generator=generator)
    return mutual_loss(z, labels, return_stats=True)[1]


def test_fields_are_views_of_the_vector(stats):
    assert stats.packed.shape == (stats_layout(K).size,)
    for name, shape in zip(NAMES, SHAPES, strict=True):
        field = getattr(stats, name)
        assert field.shape == shape
        field.fill_(7.0)
        assert (getattr(stats, name) == 7.0).all(), name
        assert (stats.packed[stats.layout.span(name)] == 7.0).all(), name


def test_it_is_used_as_a_named_tuple(stats):
    ce, kl, pairwise_kl, entropy, correct, ensemble_correct = stats
    fields = (ce, kl, pairwise_kl, entropy, correct, ensemble_correct)
    assert len(stats) == len(NAMES)
    assert stats._fields == NAMES
    for position, (name, field) in enumerate(zip(NAMES, fields, strict=True)):
        for same in (getattr(stats, name), stats[position], stats._asdict()[name]):
            assert torch.equal(field, same), name
    assert torch.equal(stats[-2], correct)
    assert torch.equal(stats[1:3][1], pairwise_kl)
    with pytest.raises(IndexError):
        stats[6]
    with pytest.raises(AttributeError):
        stats.ce = kl
    changed = stats._replace(kl=kl + 1)
    assert torch.equal(changed.kl, kl + 1)
    assert torch.equal(changed.pairwise_kl, pairwise_kl)
    assert not torch.equal(stats.kl, changed.kl)


def test_made_of_fields(stats):
    made = MutualStats(**stats._asdict())
    assert_close(tuple(made), tuple(stats), rtol=0, atol=0)
    views = made.layout.views(made.packed)
    assert views["labelled"].isnan()
    assert views["label_weight"].isnan()
    assert_close(tuple(MutualStats(*stats)), tuple(stats), rtol=0, atol=0)


def test_how_it_prints(stats):
    said = repr(stats)
    assert said.startswith(f"MutualStats(ce={stats.ce!r}, kl={stats.kl!r}, pairwise_kl=")
    assert said.endswith(f", ensemble_correct={stats.ensemble_correct!r})")


def pickled(stats):
    return pickle.loads(pickle.dumps(stats))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copies_and_pickles_are_whole(copied, stats):
    again = copied(stats)
    assert type(again) is MutualStats
    assert again.K == K
    assert torch.equal(again.packed, stats.packed)


def test_what_an_older_version_pickled_still_loads(stats):
    """A named tuple is pickled as a call of __new__ with its fields."""
    old = MutualStats.__new__(MutualStats, *stats)
    assert_close(tuple(old), tuple(stats), rtol=0, atol=0)


def test_tree_map_reaches_the_fields(stats):
    double = tree_map(torch.Tensor.double, stats)
    assert type(double) is MutualStats
    assert double.pairwise_kl.dtype == torch.float64
    assert_close(tuple(double), tuple(stats), rtol=0, atol=0, check_dtype=False)
    lists = tree_map(torch.Tensor.tolist, stats)
    assert lists.pairwise_kl == stats.pairwise_kl.tolist()


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_code_makes_and_reads_it(dynamic):
    """As one graph, for stacked logits of several numbers of peers too."""

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def step(z, labels):
        losses, stats = mutual_loss(z, labels, return_stats=True)
        return losses + stats.kl, stats

    torch._dynamo.reset()
    for peers in (2, 3):
        z, labels = torch.randn(peers, 6, 5), torch.randint(5, (6,))
        total, found = step(z, labels)
        losses, stats = mutual_loss(z, labels, return_stats=True)
        assert type(found) is MutualStats
        assert_close(total, losses + stats.kl)
        assert_close(tuple(found), tuple(stats))


def test_a_new_number_of_peers_compiles_nothing_again():
    """The compiled code for two peers does not depend on which layouts were made since."""
    counted = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counted)
    def step(z, labels):
        losses, stats = mutual_loss(z, labels, return_stats=True)
        return losses + stats.kl

    torch._dynamo.reset()
    labels = torch.randint(5, (6,))
    step(torch.randn(2, 6, 5), labels)
    other = mutual_loss(torch.randn(11, 6, 5), labels, return_stats=True)[1]
    assert other.layout == stats_layout(11)
    step(torch.randn(2, 6, 5), labels)
    assert counted.frame_count == 1
