"""The logarithms that the Jensen-Shannon divergence is made of, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from fastdml_kernels.divergences import log_ratios
from oracle import DEVICE


@triton.jit
def ratios_of(gaps, of_teacher, of_student, BETA: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    a, b = log_ratios(tl.load(gaps + i), BETA)
    tl.store(of_teacher + i, a)
    tl.store(of_student + i, b)


def ratios(d: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.empty(2, len(d), device=DEVICE)
    ratios_of[(1,)](d.to(DEVICE), found[0], found[1], beta, len(d))
    return found[0].cpu(), found[1].cpu()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.999])
def test_the_logarithms_keep_their_digits_at_every_distance(beta):
    """Relative to the distance, of which a small one is itself a difference of logarithms; to
    themselves where the weights are equal."""
    size = torch.logspace(-12, 2.2, 1 << 12)
    d = torch.cat([size, -size])
    D = d.double()
    above = -torch.log1p(torch.where(D > 0, 1 - beta, beta) * torch.expm1(-D.abs()))
    below = above - D.abs()
    wanted = torch.where(D > 0, above, below), torch.where(D > 0, below, above)
    for got, want in zip(ratios(d, beta), wanted, strict=True):
        assert ((got - want).abs() <= 2e-6 * D.abs()).all()
        if beta == 0.5:
            assert ((got - want).abs() <= 1e-6 * want.abs()).all()


def test_equal_absent_and_unknown_probabilities():
    d = torch.tensor([0.0, math.inf, -math.inf, math.nan])
    a, b = ratios(d, 0.25)
    assert a[0] == b[0] == 0
    torch.testing.assert_close(a[1:3], torch.tensor([math.log(4), -math.inf]))
    torch.testing.assert_close(b[1:3], torch.tensor([-math.inf, -math.log(0.75)]))
    assert a[3].isnan()
    assert b[3].isnan()
