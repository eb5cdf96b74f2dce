"""Batch normalisation by the statistics of the whole batch, where it is cut into columns.

torch's SyncBatchNorm does this on CUDA alone, and waits for the device at every layer. Here the
number of rows stays on the device, so that a step can be captured, and a CPU will do. The formulas
are the same: every column sends its mean, its mean squared deviation and its number of values a
channel, and combines all of them (Chan, Golub, LeVeque, "Algorithms for Computing the Sample
Variance", 1983), which loses nothing to large means, as sums of squares would; in the backward pass
two sums a channel are added. One collective each way. Statistics are in float32, of float64 in
float64, also under autocast.

A layer changes its class in place: parameters, buffers, hooks and names stay what they are. A copy
or pickle of it is the layer that it was, which communicates with nobody.

The path on a CPU is tested against one process with the whole batch. That on CUDA calls the kernels
of torch's SyncBatchNorm; it is tested with ranks that share a device, not between devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastdml.errors import InputError
from fastdml.parallel.replicas import STATISTICS
from fastdml.torch_private import batch_norm_input_gradient, batch_norm_stats, batch_norm_sums

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.parallel.mesh import Mesh


class HasAverages(Protocol):
    """Of moving averages what is needed: those of running statistics, by their names."""

    def state_dict(self) -> Mapping[str, Tensor]: ...


class GroupBatchNorm(nn.Module):
    """Put before a batch normalisation among the bases of a class, its training mode by the
    statistics of a group of processes. `after`: submodules that the layer applies behind it."""

    group: dist.ProcessGroup
    plain: type[nn.Module]  # the class of the layer before
    after: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        layer: Any = self
        y, mean, var, n = _GroupNorm.apply(x, layer.weight, layer.bias, layer.eps, self.group)
        if layer.track_running_stats and layer.running_mean is not None:
            _record(layer, mean, var, n)
        for name in self.after:
            y = getattr(self, name)(y)
        return y

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name != "group"}
        return _blank, (self.plain,), state


def _blank(kind: type[nn.Module]) -> nn.Module:
    """A layer whose state is still to be set."""
    return kind.__new__(kind)


@torch.no_grad()
def _record(layer: Any, mean: Tensor, var: Tensor, n: Tensor) -> None:
    """Moves the running statistics as torch's layers do, without asking the device for a number."""
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    for running, value in (
        (layer.running_mean, mean),
        (layer.running_var, var * (n / (n - 1))),  # the unbiased variance
    ):
        old = running.to(value.dtype)
        if layer.momentum is not None:
            moved = old.lerp(value, layer.momentum)
        elif layer.num_batches_tracked is not None:  # the mean over all batches
            moved = old.lerp(value, layer.num_batches_tracked.to(value.dtype).reciprocal())
        else:
            moved = old
        running.copy_(moved)


class _GroupNorm(torch.autograd.Function):
    """x (N, C, ...) -> normalised x, and mean (C,), biased variance (C,) and number of values a
    channel () over the group, without gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = _dense(x)
        mean, var = _statistics(x)
        C = len(mean)
        own = torch.cat([mean, var, mean.new_full((1,), x.numel() // C)])
        found = own.new_empty((dist.get_world_size(group), len(own)))
        dist.all_gather(list(found.unbind(0)), own, group=group)
        means, variances, counts = found.split((C, C, 1), dim=1)
        n = counts.sum()
        mean = (means * counts).sum(0) / n
        var = ((variances + (means - mean).square()) * counts).sum(0) / n
        invstd = (var + eps).rsqrt()
        y = F.batch_norm(x, mean, var, _like(weight, mean), _like(bias, mean), eps=eps)
        ctx.save_for_backward(x, weight, mean, invstd, counts)
        ctx.group = group
        ctx.mark_non_differentiable(mean, var, n)
        return y, mean, var, n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, counts = ctx.saved_tensors
        dy = _dense(dy)
        sum_dy, sum_dy_away = batch_norm_sums(dy, x, mean, invstd)
        of_weight, of_bias = ctx.needs_input_grad[1:3]
        d_weight = sum_dy_away.to(weight.dtype) if of_weight else None
        d_bias = sum_dy.to(weight.dtype) if of_bias else None
        dx = None
        if ctx.needs_input_grad[0]:
            both = torch.cat([sum_dy, sum_dy_away / invstd])
            dist.all_reduce(both, group=ctx.group)
            dx = _input_gradient(dy, x, weight, mean, invstd, both, counts)
        return dx, d_weight, d_bias, None, None


def _dense(x: Tensor) -> Tensor:
    """In a layout that the kernels take as it is: contiguous, or channels_last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last):
        return x
    return x.contiguous()


def _like(w: Tensor | None, mean: Tensor) -> Tensor | None:
    return None if w is None else w.to(mean.dtype)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance a channel, (C,) each, in float32 at least."""
    if x.is_cuda:
        return batch_norm_stats(x)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(dims, keepdim=True)
    # In two passes: torch.var_mean takes 12 to 19 times as long (a thread of a shared AMD EPYC).
    return mean.flatten(), (x - mean).square_().mean(dims)


def _input_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sums: Tensor,
    counts: Tensor,
) -> Tensor:
    """weight * invstd * (dy - mean of dy - (x - mean) * invstd**2 * mean of dy * (x - mean)),
    from the `sums` (2 C,) of both over the group."""
    weight, (sum_dy, sum_dy_away) = _like(weight, mean), sums.split(len(mean))
    if x.is_cuda:
        return batch_norm_input_gradient(
            dy, x, weight, mean, invstd, sum_dy, sum_dy_away, counts.view(-1)
        )
    n, shape = counts.sum(), (-1, *[1] * (x.dim() - 2))
    scale = invstd if weight is None else invstd * weight
    dx = x - mean.view(shape)
    dx *= (-scale * invstd.square() * (sum_dy_away / n)).view(shape)
    dx.addcmul_(dy.to(dx.dtype), scale.view(shape))
    dx -= (scale * (sum_dy / n)).view(shape)
    return dx.to(x.dtype)


@cache
def _grouped(kind: Any) -> type[nn.Module] | None:
    """The class over a group of layers of this one; None where their formula is not known."""
    known = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    facts: dict[str, Any] = {"plain": kind, "__module__": __name__}
    if (kind.__module__, kind.__name__) == ("timm.layers.norm_act", "BatchNormAct2d"):
        facts["after"] = ("drop", "act")
    elif not any(getattr(kind, "forward", None) is plain.forward for plain in known):
        return None
    return type(f"Group{kind.__name__}", (GroupBatchNorm, kind), facts)


def sync_batchnorm(cohort: Cohort, mesh: Mesh) -> None:
    """Has the batch normalisations of the local peers take the statistics of the whole batch: in
    training mode, and in evaluation mode nothing changes. Without effect where data is 1. All ranks
    call it, after `mesh.distribute`.

    The layers stay the objects that they are, with their parameters, buffers and names. Raises
    InputError for layers that normalise by a batch in a way of their own, and for a cohort that the
    mesh has not distributed.
    """
    _check_placed(cohort, mesh)
    if mesh.data == 1:
        return
    found = []
    for k in mesh.local:
        for where, m in cohort.peers[k].named_modules():
            if isinstance(m, GroupBatchNorm) or not _normalises_batches(m):
                continue
            kind = _grouped(cast("Any", type(m)))
            if kind is None:
                raise InputError(
                    f"{where} of peer {cohort.names[k]} is a {type(m).__name__}, whose statistics "
                    "cannot be taken over the data axis: use nn.BatchNorm, or leave sync_batchnorm "
                    "out"
                )
            found.append((m, kind, mesh.data_group_of(k)))
    for m, kind, group in found:
        m.__class__ = kind
        m.group = group


def separate_batchnorm(cohort: Cohort) -> None:
    """Makes the layers that `sync_batchnorm` changed what they were before."""
    for m in cohort.modules():
        if isinstance(m, GroupBatchNorm):
            del m.group
            m.__class__ = m.plain  # type: ignore[assignment]


def _normalises_batches(m: nn.Module) -> bool:
    """Whether it normalises by statistics of the batch: torch's batch normalisations, and others
    that keep a running variance, but for those whose statistics are frozen or of an image."""
    if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)):
        return True
    of_an_image = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    if isinstance(m, of_an_image) or type(m).__name__.startswith("Frozen"):
        return False
    return "running_var" in dict(m.named_buffers(recurse=False))


@contextmanager
def averaged_statistics(
    cohort: Cohort, mesh: Mesh, ema: HasAverages | None = None
) -> Iterator[None]:
    """Within it the running statistics of the local peers, and of their moving averages, are the
    means over the columns; afterwards each column has its own again. A collective along the data
    axis at the beginning, and for evaluations and saved weights: training goes on as if it had not
    been. Raises InputError for a cohort that the mesh has not distributed.
    """
    _check_placed(cohort, mesh)
    own = _statistics_of(cohort, mesh, ema) if mesh.data > 1 else []
    with torch.no_grad():
        kept = [t.clone() for t in own]
        for dtype in sorted({t.dtype for t in own}, key=str):
            same = [t for t in own if t.dtype == dtype]
            flat = torch.cat([t.flatten() for t in same])
            dist.all_reduce(flat, group=mesh.data_group)
            flat /= mesh.data
            parts = flat.split([t.numel() for t in same])
            for t, mean in zip(same, parts, strict=True):
                t.copy_(mean.view_as(t))
    try:
        yield
    finally:
        with torch.no_grad():
            for t, value in zip(own, kept, strict=True):
                t.copy_(value)


def _check_placed(cohort: Cohort, mesh: Mesh) -> None:
    if len(mesh.rows) != len(cohort):
        raise InputError(
            f"the mesh has placed {len(mesh.rows)} peers, and the cohort has {len(cohort)}: call "
            "mesh.distribute(cohort) on every rank first"
        )


def _statistics_of(cohort: Cohort, mesh: Mesh, ema: HasAverages | None) -> list[Tensor]:
    """Those that differ between the columns, in one order on all of them."""
    averages = {} if ema is None else ema.state_dict()
    found: list[Tensor] = []
    for k in mesh.local:
        for where, m in cohort.peers[k].named_modules():
            if isinstance(m, GroupBatchNorm):
                continue  # the same in all columns
            for name, t in m.named_buffers(recurse=False):
                if name.startswith(STATISTICS) and t.is_floating_point():
                    full = ".".join(p for p in ("peers", str(k), where, name) if p)
                    found += [t, averages[full]] if full in averages else [t]
    return found
