"""The references that the loss is tested against, and the tolerances.

A `Problem` is one call's input. `reference` answers it in float64 from the definitions; `pairwise`
answers it as people write it today, torch's cross_entropy and kl_div for each pair, in any dtype.
`check` holds an implementation to

    |ours - float64| <= |torch in the same dtype - float64| + a little

on every loss, statistic and gradient, and for half precision also with torch in float32 on the
right: half-precision logits lose nothing before the sums. "A little" is `LITTLE` float32 roundings
of the terms that are added up, and for a gradient the rounding to its own dtype.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
from fastdml_kernels import Options
from fastdml_kernels.cpu import mutual_loss_cpu
from fastdml_kernels.launch import launch
from fastdml_kernels.reference import mutual_loss_reference
from fastdml_kernels.stats_layout import stats_layout
from fastdml_kernels.tiles import Tile
from hypothesis import assume
from hypothesis import strategies as st
from quick_interpreter import patch_once_a_launch
from torch import Tensor

if not torch.cuda.is_available():
    patch_once_a_launch()
    # Triton 3.6's interpreter lets NaN through a maximum, which a GPU, and later ones, do not.
    from triton.runtime import interpreter

    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        setattr(
            interpreter.InterpreterBuilder, name,
            lambda self, lhs, rhs, function=function: self.binary_op(lhs, rhs, function),
        )  # fmt: skip
    # A GPU takes a logarithm's argument for 0 where it is below the smallest normal number.
    interpreter.InterpreterBuilder.create_log = lambda self, arg: self.unary_op(
        arg, lambda x: np.log(np.where(np.abs(x) < np.finfo(x.dtype).tiny, x * 0, x))
    )

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the kernels run
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LITTLE = 16
LAYOUTS = ("contiguous", "padded", "sliced", "every_other", "transposed", "expanded", "stacked",
           "stacked_inside")  # fmt: skip
OPTION_NAMES = {f.name for f in fields(Options)}


@dataclass(frozen=True)
class Problem:
    logits: Sequence[Tensor]  # K tensors (N, C)
    labels: Tensor  # (N,)
    options: Options = Options()  # noqa: RUF009
    weights: dict[str, Any] = field(default_factory=dict)  # temperature, ce_weight, ...

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.logits), *self.logits[0].shape

    def on(self, device: str) -> Problem:
        """The same values on a device, where it is another; views stay views on their own."""
        if self.logits[0].device.type == device:
            return self
        move = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.weights.items()}
        logits = [place(z.to(device), z.stride()) for z in self.logits]
        return Problem(logits, self.labels.to(device), self.options, move)


@dataclass(frozen=True)
class Answer:
    losses: Tensor  # (K,) or (K, N)
    grads: Sequence[Tensor] | None  # K tensors (N, C)
    stats: dict[str, Tensor] | None = None

    def cpu(self) -> Answer:
        """The same beside a reference, which is on the CPU."""
        grads = self.grads and [None if g is None else g.cpu() for g in self.grads]
        stats = self.stats and {name: value.cpu() for name, value in self.stats.items()}
        return Answer(self.losses.cpu(), grads, stats)


def place(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    """(N, C) values with the given strides."""
    if 0 in strides:
        return values[:1].expand_as(values) if len(values) else values
    return torch.empty_strided(values.shape, strides, dtype=values.dtype,
                               device=values.device).copy_(values)  # fmt: skip


def lay_out(z: Tensor, layout: str) -> list[Tensor]:
    """K views (N, C) of the values (K, N, C); "expanded" repeats each peer's first row."""
    K, N, C = z.shape
    if layout == "stacked":
        return list(z.clone().unbind())
    if layout == "stacked_inside":
        return list(z.transpose(0, 1).contiguous().unbind(1))
    if layout == "contiguous":
        return [x.clone() for x in z]
    if layout == "padded":
        wide = torch.full((K, N, -(-C // 8) * 8 + 8), torch.nan, dtype=z.dtype)
        return [w[:, :C].copy_(x) for w, x in zip(wide.unbind(), z, strict=True)]
    if layout == "sliced":
        wide = [torch.full((N + 1, C + 3), torch.nan, dtype=z.dtype) for _ in z]
        return [w[1:, 2 : C + 2].copy_(x) for w, x in zip(wide, z, strict=True)]
    if layout == "every_other":
        wide = [torch.full((N, 2, C, 2), torch.nan, dtype=z.dtype) for _ in z]
        return [w[:, 0, :, 1].copy_(x) for w, x in zip(wide, z, strict=True)]
    if layout == "transposed":
        return [x.t().contiguous().t() for x in z]
    return [x[:1].clone().expand(N, C) if N else x.clone() for x in z]


def make(
    K: int,
    N: int,
    C: int,
    *,
    dtype: torch.dtype | Sequence[torch.dtype] = torch.float32,
    layout: str = "contiguous",
    label_dtype: torch.dtype = torch.int64,
    label_stride: int = 1,
    ignored: float = 0.0,
    spread: float = 3.0,
    seed: int = 0,
    peer_weights: bool = False,
    class_weight: bool = False,
    sample_weight: bool = False,
    students: str | tuple[int, ...] | None = None,
    **settings: Any,
) -> Problem:
    """A random problem. `ignored` is the share of rows without a label; `settings` are options
    and weights under their public names; divergence="jsd 0.2" is "jsd" with that jsd_beta; students
    are "first" or "others", which are all but the first, or their indices."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = [dtype] * K if isinstance(dtype, torch.dtype) else list(dtype)
    values = torch.randn(K, N, C, generator=generator, dtype=torch.float64) * spread
    logits = [lay_out(values.to(d), layout)[k] for k, d in enumerate(dtypes)]
    labels = torch.randint(0, C, (N, label_stride), generator=generator, dtype=label_dtype)
    if settings.get("divergence", "").startswith("jsd "):
        settings["jsd_beta"] = float(settings["divergence"].split()[1])
        settings["divergence"] = "jsd"
    if isinstance(students, str):
        students = (0,) if students == "first" or K == 1 else tuple(range(1, K))
    options = Options(**{k: v for k, v in settings.items() if k in OPTION_NAMES}, students=students)
    without = torch.rand(N, generator=generator) < ignored
    labels[without] = options.ignore_index
    weights = {k: v for k, v in settings.items() if k not in OPTION_NAMES}
    if peer_weights:  # one edge is missing
        weights["peer_weights"] = torch.rand(K, K, generator=generator)
        weights["peer_weights"][0, -1] = 0
    if class_weight:
        weights["class_weight"] = torch.rand(C, generator=generator) + 0.1
    if sample_weight:  # a quarter of the rows is absent
        weights["sample_weight"] = torch.rand(N, generator=generator) * 2
        weights["sample_weight"][torch.rand(N, generator=generator) < 0.25] = 0
    return Problem(logits, labels[:, 0], options, weights)


# ---- three ways to answer


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it `torch.empty` is filled with NaN, so that values that nobody writes show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def unpack(packed: Tensor, K: int) -> dict[str, Tensor]:
    """The statistics by name, as far as the reference has them."""
    names = ("ce", "kl", "entropy", "correct", "ensemble_correct", "pairwise_kl")
    return {name: stats_layout(K).view(packed, name) for name in names}


def run(compute: Callable, p: Problem, *, grad: bool = True, stats: bool = True,
        **extra: Any) -> Answer:  # fmt: skip
    """The answer of `mutual_loss_cpu` or `launch`, every buffer poisoned beforehand. Neither looks
    where its arguments are: an address of another memory ends the process."""
    if extra.get("upstream") is not None:
        extra["upstream"] = extra["upstream"].to(p.logits[0].device)
    given = (*p.logits, p.labels, *p.weights.values())
    assert len({t.device for t in given if isinstance(t, Tensor)}) == 1
    students = p.options.students or range(len(p.logits))
    grads = [
        torch.full(z.shape, torch.nan, dtype=z.dtype, device=z.device) if k in students else None
        for k, z in enumerate(p.logits)
    ]
    before = [z._version for z in p.logits]
    with torch.no_grad(), poisoned():
        losses, packed = compute(
            list(p.logits), p.labels, p.options, grads=grads if grad else (), want_stats=stats,
            **p.weights, **extra,
        )  # fmt: skip
    assert before == [z._version for z in p.logits], "the logits were written to"
    named = unpack(packed, len(p.logits)) if stats else None
    return Answer(losses, grads if grad else None, named)


def cpu(p: Problem, **extra: Any) -> Answer:
    return run(mutual_loss_cpu, p.on("cpu"), **extra)


def register(p: Problem, **extra: Any) -> Answer:
    """The register kernel on the GPU; without one interpreted, in blocks of so many rows that a
    few programs share them, since the interpreter pays for each block, not for each element."""
    _, N, C = p.shape
    if DEVICE == "cpu" and "tile" not in extra and N > 6:
        rows = triton.next_power_of_2(triton.cdiv(N, 3))
        extra["tile"] = Tile(rows, triton.next_power_of_2(max(C, 2)), 4)
    return run(launch, p.on(DEVICE), regime="register", **extra)


def one_row(p: Problem, **extra: Any) -> Answer:
    """The register kernel in blocks of one row, whose usual row takes shorter ways."""
    return register(p, **{"tile": Tile(1, triton.next_power_of_2(max(p.shape[2], 2)), 4)} | extra)


def wide(p: Problem, **extra: Any) -> Answer:
    """The block-wise kernel in blocks of classes so small that a row has several."""
    block_c = max(4, triton.next_power_of_2(p.shape[2]) // 4)
    return run(launch, p.on(DEVICE), **{"regime": "wide", "tile": Tile(1, block_c, 4)} | extra)


def launched(p: Problem, **extra: Any) -> Answer:
    """The kernel and the tile that the launcher chooses."""
    return run(launch, p.on(DEVICE), **extra)


PATHS = {"cpu": cpu, "register": register, "one_row": one_row, "wide": wide}
IN_REGISTERS = (register, one_row)


def reference(p: Problem, upstream: Tensor | None = None, grad: bool = True) -> Answer:
    """The float64 answer, with the gradient that autograd finds for it."""
    p = p.on("cpu")
    z = [x.double().requires_grad_() for x in p.logits]
    losses, stats = mutual_loss_reference(z, p.labels, p.options, **p.weights)
    up = torch.ones_like(losses) if upstream is None else upstream.to("cpu", torch.float64)
    grads = torch.autograd.grad(losses, z, up) if grad else None
    return Answer(losses.detach(), grads, stats)


def pairwise(p: Problem, dtype: torch.dtype, upstream: Tensor | None = None) -> Answer:
    """The loss as torch's own functions spell it, one pair of peers at a time, in `dtype`."""
    p = p.on("cpu")
    times = p.weights.get("sample_weight")
    if times is not None and not times.all():
        return _of_present_rows(p, times != 0, dtype, upstream)
    o, (K, N, _) = p.options, p.shape
    T = float(p.weights.get("temperature", 1.0))
    leaves = [x.detach().clone().requires_grad_() for x in p.logits]
    z = [x.to(dtype) for x in leaves]
    labelled = p.labels != o.ignore_index
    mimics = torch.ones_like(labelled) if o.mimic_ignored else labelled
    y = torch.where(labelled, p.labels, 0).long()
    class_weight = p.weights.get("class_weight")
    ce_options = {
        "weight": None if class_weight is None else class_weight.to(dtype),
        "ignore_index": o.ignore_index, "label_smoothing": o.label_smoothing,
        "reduction": o.reduction if times is None else "none",
    }  # fmt: skip
    ce = torch.stack([F.cross_entropy(x, p.labels.long(), **ce_options) for x in z])
    if times is not None:
        times = times.to(dtype)
        ce = ce * times
        if o.reduction == "mean":
            of_label = times if class_weight is None else times * class_weight.to(dtype)[y]
            ce = ce.sum(1) / (of_label * labelled).sum()
        elif o.reduction == "sum":
            ce = ce.sum(1)
    if o.mimic_ignored and not labelled.any():
        ce = torch.nan_to_num(ce)

    exact = [x.detach().double() for x in p.logits]  # the gates' choices are discrete
    edges = p.weights.get("peer_weights")
    if edges is None:
        edge = 1.0 if o.gate == "best" else 1.0 / max(K - 1, 1)
        edges = torch.full((K, K), edge, dtype=torch.float64)
    edges = edges.to(dtype)[:, :, None].expand(K, K, N)
    if o.gate == "correct":
        right = torch.stack([x.argmax(1) == y for x in exact]) & labelled
        edges = edges * right
    elif o.gate == "best":
        nll = torch.stack([F.cross_entropy(x, y, reduction="none") for x in exact])
        edges = edges * ((nll.argmin(0) == torch.arange(K)[:, None]) & labelled)
    elif o.gate in ("confidence", "entropy"):
        log_p = torch.stack([torch.log_softmax(x, 1) for x in exact])
        worth = torch.special.entr(log_p.exp()).sum(2).neg()
        if o.gate == "confidence":
            worth = log_p.gather(2, y.expand(K, N)[:, :, None])[:, :, 0]
            worth = torch.where(labelled, worth, -torch.inf)
        edges = edges.double() * (1 - torch.eye(K))[:, :, None]
        soft = torch.softmax(edges.log() + worth, 1).nan_to_num(0.0)
        edges = (soft * edges.sum(1, keepdim=True)).to(dtype)

    log_q = [torch.log_softmax(x / T, 1) for x in z]
    fixed = [x.detach() for x in log_q] if o.detach_targets else log_q
    fixed_z = [x.detach() for x in z] if o.detach_targets else z

    def divergence(log_t: Tensor, log_student: Tensor) -> Tensor:
        def kl(log_a: Tensor, log_b: Tensor) -> Tensor:  # KL(a || b)
            return F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(1)

        if o.divergence == "jsd":
            beta = torch.tensor(o.jsd_beta, dtype=dtype)
            parts = torch.stack([log_t + beta.log(), log_student + torch.log1p(-beta)])
            log_m = torch.logsumexp(parts, 0)
            return beta * kl(log_t, log_m) + (1 - beta) * kl(log_student, log_m)
        ahead, back = kl(log_t, log_student), kl(log_student, log_t)
        return {"forward": ahead, "reverse": back, "jeffreys": (ahead + back) / 2}[o.divergence]

    kl = torch.zeros(K, N, dtype=dtype)
    for k in range(K):
        others = [i for i in range(K) if i != k]
        total = torch.zeros(N, dtype=dtype)
        if o.target == "peers":
            for i in others:
                total = total + edges[k, i] * divergence(fixed[i], log_q[k])
        elif others:
            w = edges[k, others]  # (K - 1, N)
            w_sum = w.sum(0)
            share = torch.where(w_sum > 0, w / w_sum, 1.0 / len(others))[:, :, None]
            if o.target == "ensemble":
                mixed = (share * torch.stack([fixed[i].exp() for i in others])).sum(0).log()
            else:
                mean = (share * torch.stack([fixed_z[i] for i in others])).sum(0)
                mixed = torch.log_softmax(mean / T, 1)
            total = w_sum * divergence(mixed, log_q[k])
        kl[k] = torch.where(mimics, total * T**2, 0)
    counted = mimics.to(dtype)
    if times is not None:
        kl, counted = kl * times, counted * times
    if o.reduction == "mean":
        kl = kl.sum(1) / counted.sum()
    elif o.reduction == "sum":
        kl = kl.sum(1)
    ce_weight, kl_weight = (float(p.weights.get(n, 1.0)) for n in ("ce_weight", "kl_weight"))
    losses = ce_weight * ce + kl_weight * kl if K > 1 else ce_weight * ce
    up = torch.ones_like(losses) if upstream is None else upstream.to("cpu", dtype)
    return Answer(losses.detach(), torch.autograd.grad(losses, leaves, up))


def _of_present_rows(
    p: Problem, present: Tensor, dtype: torch.dtype, upstream: Tensor | None
) -> Answer:
    """`pairwise` of the rows whose weight is not 0, and 0 for the others."""
    weights = p.weights | {"sample_weight": p.weights["sample_weight"][present]}
    part = Problem([z[present] for z in p.logits], p.labels[present], p.options, weights)
    if upstream is not None and upstream.dim() == 2:
        upstream = upstream[:, present.to(upstream.device)]
    found = pairwise(part, dtype, upstream)
    losses, grads = found.losses, [torch.zeros(z.shape, dtype=z.dtype) for z in p.logits]
    for grad, rows in zip(grads, found.grads, strict=True):
        grad[present] = rows
    if p.options.reduction == "none":
        losses = torch.zeros(len(grads), len(present), dtype=dtype)
        losses[:, present] = found.losses
    return Answer(losses, grads)


# ---- how closely


def reach_of(p: Problem) -> float:
    """The size of log-probabilities: of the logits, or of log(C) where these are all alike. What is
    rounded in one is a relative error of its exponential: a probability, and whatever is added up
    of probabilities, is this many roundings off."""
    z = torch.cat([x.double().flatten().cpu() for x in p.logits])
    largest = z[z.isfinite()].abs().max().item() if z.isfinite().any() else 0.0
    return max(1.0 + largest, math.log(max(p.shape[2], 1)))


def scale_of(p: Problem) -> tuple[float, float, float]:
    """Sizes of the terms added up in a row's loss, in its gradient, and the rows that a summed
    loss adds up: what a float32 rounding is relative to."""
    N = p.shape[1]
    w = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in p.weights.items()}
    T = float(w.get("temperature", 1.0))
    edges = w["peer_weights"].sum(1).max().item() if w.get("peer_weights") is not None else 1.0
    class_weight = w["class_weight"].max().item() if w.get("class_weight") is not None else 1.0
    ce = abs(float(w.get("ce_weight", 1.0))) * class_weight
    kl = abs(float(w.get("kl_weight", 1.0))) * edges * T
    if w.get("sample_weight") is not None and N:
        most = w["sample_weight"].max().item()
        ce, kl = ce * most, kl * most
    reach = reach_of(p)
    if p.options.gate in ("confidence", "entropy"):  # a weight is as exact as what it is made of
        kl *= reach
    return (ce + kl * T) * reach, (ce + kl) * reach, float(max(N, 1))


def within(
    name: str, ours: Tensor, exact: Tensor, yardstick: Tensor | None, little: Tensor
) -> None:
    """|ours - exact| <= |yardstick - exact| + little, elementwise; NaN only where exact is NaN."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double()
    assert ours.shape == exact.shape, (name, ours.shape, exact.shape)
    error = (ours - exact).abs()
    allowed = little
    if yardstick is not None:  # where torch itself is not finite, nothing is allowed for it
        allowed = (yardstick.double() - exact).abs().nan_to_num(0, 0) + little
    same = (ours == exact) | (ours.isnan() & exact.isnan())  # infinities among them
    bad = ~(same | (error <= allowed))
    if bad.any():
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{name}{list(at)}: {ours[at]:.9g}, exact {exact[at]:.9g}, error {error[at]:.3g} > "
            f"{allowed.expand_as(exact)[at]:.3g}; {int(bad.sum())} of {bad.numel()} off"
        )


def check(p: Problem, compute: Callable[..., Answer] = cpu, *, upstream: Tensor | None = None,
          yardsticks: bool = True, **extra: Any) -> Answer:  # fmt: skip
    """Holds `compute` to the tolerance rule on losses, gradients and statistics."""
    if upstream is not None:
        extra["upstream"] = upstream
    ours, exact = compute(p, **extra), reference(p, upstream)
    K = len(p.logits)
    eps = torch.finfo(torch.float32).eps
    if all(z.dtype == torch.float64 for z in p.logits):
        eps = torch.finfo(torch.float64).eps
    class_weight = p.weights.get("class_weight")
    lightest = 1.0 if class_weight is None else min(1.0, class_weight.min().item())
    loss_scale, grad_scale, rows = scale_of(p)
    relative = eps * reach_of(p)
    counted = max(float((p.labels != p.options.ignore_index).sum()), 1.0)
    if p.weights.get("sample_weight") is not None:
        times = p.weights["sample_weight"].cpu() * (p.labels.cpu() != p.options.ignore_index)
        counted = times.sum().item() or 1.0
    loss_little = LITTLE * eps * loss_scale * (rows if p.options.reduction == "sum" else 1.0)
    if p.options.reduction == "mean":
        grad_scale /= counted * lightest
        loss_little /= lightest
    if upstream is not None:
        grad_scale *= max(1.0, K * upstream.abs().max().item() if upstream.numel() else 1.0)

    dtypes = {z.dtype for z in p.logits}
    used: list[torch.dtype] = []
    if yardsticks:
        used = list(dtypes) if len(dtypes) == 1 else [torch.float32]
        if used[0].itemsize == 2:
            used.append(torch.float32)
    for torch_answer in [pairwise(p, d, upstream) for d in used] or [Answer(None, [None] * K)]:
        within("losses", ours.losses, exact.losses, torch_answer.losses,
               loss_little + relative * finite_size(exact.losses))  # fmt: skip
        for k, (g, want, theirs) in enumerate(
            zip(ours.grads or (), exact.grads or (), torch_answer.grads or (), strict=False)
        ):
            if g is None:  # of a peer that only teaches
                assert k not in (p.options.students or ())
                continue
            assert g.dtype == p.logits[k].dtype
            within(f"grads[{k}]", g, want, theirs,
                   LITTLE * eps * grad_scale + rounding(want, g.dtype))  # fmt: skip
    unweighted = {k: v for k, v in p.weights.items() if k not in ("ce_weight", "kl_weight")}
    stats_little = LITTLE * eps * scale_of(replace(p, weights=unweighted))[0] / lightest
    for name, want in exact.stats.items() if ours.stats else ():
        little = stats_little + relative * finite_size(want)
        if name == "ensemble_correct":
            little = little + torch.tensor(2.0 * close_calls(p)[1])
        within(name, ours.stats[name], want, None, little)
    return ours


def assert_finite_on_the_verge_of_zero(
    compute: Callable[..., Answer], K: int, teacher: float, **options: Any
) -> None:
    """The first of K peers is sure of a class for which the others have this logit, and 0 for all
    others; a mean of their probabilities teaches it."""
    others = torch.zeros(1, 1024)
    others[0, 0] = teacher
    student = torch.full((1, 1024), -50.0)
    student[0, 0] = 100.0
    p = Problem([student] + [others] * (K - 1), torch.tensor([3]),
                Options(target="ensemble", **options))  # fmt: skip
    answer = check(p, compute, upstream=upstream_of(p), yardsticks=False)
    assert answer.losses.isfinite().all()
    assert all(g.isfinite().all() for g in answer.grads)


def close_calls(p: Problem) -> tuple[int, int]:
    """Rows in which float32 may pick another best peer, or another class of the ensemble."""
    K, N, C = p.shape
    log_p = torch.stack([torch.log_softmax(z.cpu().double(), 1) for z in p.logits])
    y = p.labels.cpu().long().clamp(0, C - 1)
    nll = -log_p.gather(2, y.expand(K, N).unsqueeze(2)).squeeze(2).T  # (N, K)

    def ties(values: Tensor) -> int:
        top = values.topk(min(2, values.shape[1]), dim=1).values
        return int((top[:, 0] - top[:, -1] < 1e-5).sum()) if values.shape[1] > 1 else 0

    return ties(-nll), ties(log_p.exp().sum(0))


def rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of writing float64 values in a dtype. The interpreter truncates where a
    GPU rounds to nearest: a whole unit in the last place instead of half of one."""
    info = torch.finfo(dtype)
    return info.eps * finite_size(values) + info.smallest_normal * info.eps


def finite_size(values: Tensor) -> Tensor:
    return values.detach().double().cpu().abs().nan_to_num(0, 0)


# ---- what hypothesis draws

OPTIONS: dict[str, tuple] = {  # every option and weight away from its default
    "temperature": (0.5, 4.0),
    "ce_weight": (0.0, 0.7),
    "kl_weight": (0.0, 2.5),
    "target": ("ensemble", "ensemble_logits"),
    "gate": ("correct", "best", "confidence", "entropy"),
    "divergence": ("reverse", "jeffreys", "jsd", "jsd 0.2"),
    "students": ("first", "others"),
    "detach_targets": (False,),
    "label_smoothing": (0.1, 1.0),
    "mimic_ignored": (True,),
    "reduction": ("sum", "none"),
    "ignore_index": (7, -1),
    "peer_weights": (True,),
    "class_weight": (True,),
    "sample_weight": (True,),
}
REGISTER_OPTIONS = {
    name: values[:1] if name == "target" else values
    for name, values in OPTIONS.items()
    if name != "detach_targets"
}


def settings_of(options: dict[str, tuple], most: int) -> st.SearchStrategy[dict[str, Any]]:
    """Up to `most` options away from their defaults."""
    names = st.lists(st.sampled_from(sorted(options)), unique=True, max_size=most)
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries({n: st.sampled_from(options[n]) for n in chosen})
    )


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    most_peers: int = 8,
    most_rows: int = 130,
    most_classes: int = 2100,
    most_logits: int,
    options: dict[str, tuple] = OPTIONS,
) -> tuple[Problem, Tensor | None]:
    """A problem with at most `most_logits` logits a peer, and the losses' own gradient where the
    options need it in the forward pass."""
    C = draw(st.integers(1, most_classes) | st.sampled_from([1, 2, 8, 10, 100]), label="C")
    C = min(C, most_classes)
    N = draw(st.integers(0, min(most_rows, most_logits // C)), label="N")
    p = make(
        draw(st.integers(1, most_peers), label="K"), N, C,
        dtype=draw(st.sampled_from(DTYPES)), layout=draw(st.sampled_from(LAYOUTS)),
        label_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        label_stride=draw(st.sampled_from([1, 3])), ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        spread=draw(st.sampled_from([0.1, 3.0, 20.0])), seed=draw(st.integers(0, 2**16)),
        **draw(settings_of(options, 3)),
    )  # fmt: skip
    assume(p.options.gate != "best" or close_calls(p)[0] == 0)
    return p, upstream_of(p)


def upstream_of(p: Problem, seed: int = 0) -> Tensor | None:
    """A gradient of the losses for gradients into the teachers, which cannot wait for it."""
    if p.options.detach_targets:
        return None
    K, N, _ = p.shape
    shape = (K, N) if p.options.reduction == "none" else (K,)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
