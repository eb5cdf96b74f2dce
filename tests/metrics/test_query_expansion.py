"""Query expansion against its formula, and against retrieval that it should better."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastdml.errors import InputError
from fastdml.metrics import average_query_expansion, reid_scores


def formula(query, gallery, n, alpha):
    """A query at a time, in float64."""
    query, gallery = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query.numpy(), gallery.numpy())
    )
    found = []
    for q in query:
        similarity = gallery @ q
        near = np.argsort(-similarity)[:n]
        weights = np.maximum(similarity[near], 0) ** alpha
        total = q + (weights[:, None] * gallery[near]).sum(axis=0)
        found.append(total / np.linalg.norm(total))
    return np.stack(found)


@pytest.mark.parametrize("block", [1, 200, 1 << 24])
@pytest.mark.parametrize(("n", "alpha"), [(1, 0.0), (5, 0.0), (5, 3.0), (99, 0.5)])
def test_equal_to_the_formula(n, alpha, block):
    generator = torch.Generator().manual_seed(0)
    q, g = (torch.randn(k, 6, generator=generator).double() for k in (9, 40))
    found = average_query_expansion(q, g, n, alpha=alpha, block=block)
    assert found.dtype == torch.float64
    assert found.numpy() == pytest.approx(formula(q, g, n, alpha), abs=1e-12)
    half = average_query_expansion(q.float(), g.half(), n, alpha=alpha)
    assert half.dtype == torch.float32


def test_it_raises_map_where_neighbours_help(people):
    query, gallery, labels = people
    plain = reid_scores(query, gallery, *labels).mAP
    for alpha in (0.0, 3.0):
        expanded = average_query_expansion(query, gallery, 5, alpha=alpha)
        assert reid_scores(expanded, gallery, *labels).mAP > plain + 0.03


ONES = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ONES, torch.ones(3, 4), 1), {}, r"\(3, 2\) and \(3, 4\)"),
        ((ONES, ONES, 0), {}, "n=0"),
        ((ONES, ONES, 1), {"alpha": -1.0}, r"alpha=-1\.0"),
        ((ONES, ONES, 1), {"alpha": math.nan}, "alpha=nan"),
        ((ONES, ONES, 1), {"block": 0}, "block=0"),
        ((ONES, torch.ones(0, 2), 1), {}, "3 queries against 0 gallery images"),
        ((ONES, ONES / 0, 1), {}, "3 of 3 gallery features are not finite"),
        ((ONES * 1e20, ONES, 1), {}, "3 of 3 query features are too large to be squared in .*32"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(InputError, match=message):
        average_query_expansion(*arguments, **options)
