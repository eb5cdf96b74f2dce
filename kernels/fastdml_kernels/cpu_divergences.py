"""The divergences between a teacher's and a student's probabilities in torch, in closed form: their
values and their slopes, each made of the difference of the logarithms.

`divergence_of` returns a `Part` for each term that a divergence consists of; "jeffreys" is half the
sum of two. Slopes are per class, with respect to z / T where p = softmax(z / T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import Options


def times(p: Tensor, gap: Tensor) -> Tensor:
    """p * gap, where a factor of 0 (a class without probability, no edge) gives 0, never 0 * inf or
    0 * NaN."""
    return torch.where(p == 0, 0.0, p * gap)


@dataclass
class Part:
    """One term of a divergence between a teacher t and a student q, over rows (n, C)."""

    log_t: Tensor
    t: Tensor
    q: Tensor
    gap: Tensor  # log t - log q

    def value(self) -> Tensor:
        """(n,)"""
        raise NotImplementedError

    def of_student(self) -> Tensor:
        """Its derivative in the student's z / T, (n, C)."""
        raise NotImplementedError

    def of_teacher(self) -> Tensor:
        """Its derivative in the teacher's z / T, (n, C)."""
        raise NotImplementedError

    def of_mixed(self, p: Tensor, log_p: Tensor) -> Tensor:
        """Its derivative in z / T of one peer p = softmax(z / T), of which the teacher's
        probabilities hold a share, but for that share, (n, C)."""
        raise NotImplementedError


class Forward(Part):
    """KL(t || q)"""

    def value(self) -> Tensor:
        self.kl = times(self.t, self.gap).sum(1)
        return self.kl

    def of_student(self) -> Tensor:
        return self.q - self.t

    def of_teacher(self) -> Tensor:
        return times(self.t, self.gap) - self.t * self.kl[:, None]

    def of_mixed(self, p: Tensor, log_p: Tensor) -> Tensor:
        toward = times(p, self.gap)
        return toward - p * toward.sum(1, keepdim=True)


class Reverse(Part):
    """KL(q || t)"""

    def value(self) -> Tensor:
        self.terms = times(self.q, -self.gap)
        self.kl = self.terms.sum(1)
        return self.kl

    def of_student(self) -> Tensor:
        return self.terms - self.q * self.kl[:, None]

    def of_teacher(self) -> Tensor:
        return self.t - self.q

    def of_mixed(self, p: Tensor, log_p: Tensor) -> Tensor:
        # p / t is no more than one over the share, also where both are too small for a number.
        ratio = torch.where(self.log_t == -torch.inf, 0.0, self.q * (log_p - self.log_t).exp())
        return p * ratio.sum(1, keepdim=True) - ratio


@dataclass
class JensenShannon(Part):
    """beta KL(t || m) + (1 - beta) KL(q || m), m = beta t + (1 - beta) q"""

    beta: float

    def value(self) -> Tensor:
        # log m relative to the larger of the two, L = log(m / max(t, q)), is exactly 0 where they
        # are equal, and finite where one of them is 0, and where the larger's share rounds to 0.
        of_q = self.gap.new_full((), 1 - self.beta)  # torch.where takes numbers for float32
        share_of_smaller = torch.where(self.gap >= 0, of_q, self.beta)
        above_minus_1 = torch.finfo(self.gap.dtype).eps / 2 - 1
        less = share_of_smaller * torch.expm1(-self.gap.abs())
        log_m = torch.log1p(less.clamp(min=above_minus_1))
        self.over_t = self.gap.clamp(max=0) - log_m  # log(t / m)
        self.t_terms = times(self.t, self.over_t)
        self.q_terms = times(self.q, (-self.gap).clamp(max=0) - log_m)
        self.kl_t, self.kl_q = self.t_terms.sum(1), self.q_terms.sum(1)
        return self.beta * self.kl_t + (1 - self.beta) * self.kl_q

    def of_student(self) -> Tensor:
        return (1 - self.beta) * (self.q_terms - self.q * self.kl_q[:, None])

    def of_teacher(self) -> Tensor:
        return self.beta * (self.t_terms - self.t * self.kl_t[:, None])

    def of_mixed(self, p: Tensor, log_p: Tensor) -> Tensor:
        toward = times(p, self.over_t)
        return self.beta * (toward - p * toward.sum(1, keepdim=True))


def divergence_of(
    options: Options, log_t: Tensor, t: Tensor, log_q: Tensor, q: Tensor
) -> tuple[float, Sequence[Part]]:
    """The divergence is the sum of the parts' values times the number. A part's slopes may be asked
    for after its value."""
    gap = log_t - log_q
    if options.divergence == "jsd":
        return 1.0, [JensenShannon(log_t, t, q, gap, options.jsd_beta)]
    if options.divergence == "jeffreys":
        return 0.5, [Forward(log_t, t, q, gap), Reverse(log_t, t, q, gap)]
    return 1.0, [
        Forward(log_t, t, q, gap) if options.divergence == "forward" else Reverse(log_t, t, q, gap)
    ]
