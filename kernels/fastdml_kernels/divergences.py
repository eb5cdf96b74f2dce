"""The divergences of a student q from a teacher t, class by class, for every kernel.

With d = log t - log q, and m = BETA t + (1 - BETA) q for "jsd":

    DIVERGENCE    value                             ahead        back
    "forward"     ahead                             KL(t || q)
    "reverse"     back                                           KL(q || t)
    "jeffreys"    (ahead + back) / 2                KL(t || q)   KL(q || t)
    "jsd"         BETA ahead + (1 - BETA) back      KL(t || m)   KL(q || m)

`ahead` and `back` are sums over the classes of `ahead_terms` and `back_terms`. The slopes are
gradients with respect to logits / T: the student's contains `back`, the teacher's `ahead`. All take
tensors of any shape. A class without probability gives 0, also where d is infinite or NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device_functions import times


@triton.jit
def log_ratios(d, BETA: tl.constexpr):
    """log t - log m and log q - log m, both 0 for d = 0 and finite for the larger of t and q.

    m is the larger one times 1 - w (1 - exp(-|d|)), where w is the smaller one's weight. Near 0,
    1 - exp(-a) comes of its series, and -log(1 - x) of that of 2 artanh(x / (2 - x)): neither has
    digits cancelled there, as the difference and the logarithm themselves would. With equal weights
    x is a half at most, where the series is good to the last digit."""
    a = tl.abs(d)
    smaller = tl.where(d > 0, 1.0 - BETA, BETA)
    decay = tl.exp(-a)
    series = a * (1 - a * (1 / 2 - a * (1 / 6 - a * (1 / 24 - a * (1 / 120 - a * (1 / 720))))))
    x = smaller * tl.where(a < 0.25, series, 1.0 - decay)
    y = x / (2.0 - x)
    v = y * y
    above = 1 / 7 + v * (1 / 9 + v * (1 / 11 + v * (1 / 13)))
    above = 2 * y * (1 + v * (1 / 3 + v * (1 / 5 + v * above)))
    if BETA != 0.5:
        larger = tl.where(d > 0, BETA, 1.0 - BETA)
        above = tl.where(x < 0.5, above, -tl.log(larger + smaller * decay))
    below = above - a
    return tl.where(d > 0, above, below), tl.where(d > 0, below, above)


@triton.jit
def ahead_terms(t, d, DIVERGENCE: tl.constexpr, BETA: tl.constexpr):
    """Each class's part of `ahead`."""
    gap = d
    if DIVERGENCE == "jsd":
        gap, _ = log_ratios(d, BETA)
    return times(t, gap)


@triton.jit
def back_terms(q, d, DIVERGENCE: tl.constexpr, BETA: tl.constexpr):
    """Each class's part of `back`."""
    gap = -d
    if DIVERGENCE == "jsd":
        _, gap = log_ratios(d, BETA)
    return times(q, gap)


@triton.jit
def divergence_of(ahead, back, DIVERGENCE: tl.constexpr, BETA: tl.constexpr):
    """The divergence from its two parts; also a class's part of it from its parts of these."""
    if DIVERGENCE == "forward":
        value = ahead
    elif DIVERGENCE == "reverse":
        value = back
    elif DIVERGENCE == "jeffreys":
        value = 0.5 * (ahead + back)
    else:
        value = BETA * ahead + (1.0 - BETA) * back
    return value


@triton.jit
def student_slope(t, q, d, back, DIVERGENCE: tl.constexpr, BETA: tl.constexpr):
    """The gradient of the divergence through the student's own prediction."""
    if DIVERGENCE == "forward":
        slope = q - t
    else:
        slope = back_terms(q, d, DIVERGENCE, BETA) - times(q, back)
        if DIVERGENCE == "jeffreys":
            slope = 0.5 * (q - t + slope)
        elif DIVERGENCE == "jsd":
            slope = (1.0 - BETA) * slope
    return slope


@triton.jit
def teacher_slope(t, q, d, ahead, DIVERGENCE: tl.constexpr, BETA: tl.constexpr):
    """The gradient of the divergence through the teacher's prediction."""
    if DIVERGENCE == "reverse":
        slope = t - q
    else:
        slope = ahead_terms(t, d, DIVERGENCE, BETA) - times(t, ahead)
        if DIVERGENCE == "jeffreys":
            slope = 0.5 * (slope + t - q)
        elif DIVERGENCE == "jsd":
            slope = BETA * slope
    return slope
