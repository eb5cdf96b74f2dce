"""The same loss on the CPU: the closed form, in torch.

The common options go to `cpu_rows`, which is native code. This file handles every case: all
options, float64 and float16, logits that are not finite, an installation without a C compiler. It
takes one pass for each pair of peers, O(K**2 C), in which a class of probability 0 contributes 0.
Rows are taken in blocks whose intermediates stay in cache, so that each logit is read from memory
and each gradient written to it about once, as in the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_rows import rows_loss, takes
from .options import Options, Scalar, default_edge
from .stats_layout import stats_layout

BLOCK_BYTES = 1 << 19  # of float32 logits a block; it and its copies share one core's cache


def log_softmax(z: Sequence[Tensor], scale: float, out: Tensor) -> None:
    """log softmax(scale z_k) of K tensors (n, C) into `out` (K, n, C)."""
    for z_k, out_k in zip(z, out.unbind(), strict=True):
        if z_k.dtype != out.dtype or scale != 1.0:
            z_k = z_k.to(out.dtype) * scale
        torch.log_softmax(z_k, dim=1, out=out_k)


def _times(p: Tensor, gap: Tensor) -> Tensor:
    """p * gap, where a factor of 0 (a class without probability, no edge) gives 0, never 0 * inf or
    0 * NaN."""
    return torch.where(p == 0, 0.0, p * gap)


def _weighted(weight: float, term: Tensor) -> Tensor:
    """weight * term; 0 where the weight is 0, even if the term is infinite or NaN."""
    return weight * term if weight else torch.zeros_like(term)


def _find_labelled(labels: Tensor, ignore_index: int, C: int) -> Tensor | None:
    """Which rows have a label, (N,) bool, or None where all have. Raises ValueError for a label
    that is no class."""
    if labels.numel() == 0:
        return None
    low, high = torch.stack(torch.aminmax(labels)).tolist()
    if low >= 0 and high < C and not low <= ignore_index <= high:
        return None
    labelled = labels != ignore_index
    misfit = labels[labelled & ((labels < 0) | (labels >= C))]
    if misfit.numel():
        raise ValueError(
            f"labels hold {int(misfit[0])}, which is no class of logits with C = {C}: a label is "
            f"in 0..{C - 1}, or ignore_index={ignore_index} for a row without one"
        )
    return None if bool(labelled.all()) else labelled


class _BlockStats(NamedTuple):
    """Sums over a block's rows."""

    entropy: Tensor  # (K,)
    correct: Tensor  # (K,)
    ensemble_correct: Tensor  # ()
    pairwise: Tensor  # (K, K)


class _BlockResult(NamedTuple):
    ce: Tensor  # (K, n)
    kl: Tensor  # (K, n)
    stats: _BlockStats | None  # None if not wanted


@dataclass
class _Problem:
    """One call of the loss: tensors over all N rows, and values shared by all blocks of rows."""

    logits: Sequence[Tensor]  # K tensors (N, C)
    y: Tensor  # (N,) int64, 0 where there is no label
    labelled: Tensor | None  # (N,) bool; None: every row has a label
    w_y: Tensor | None  # (N,) class weight of each label, 0 without one; None: all 1
    w_c: Tensor | None  # (C,)
    w_total: float
    options: Options
    edges: Tensor  # (K, K)
    temperature: float
    ce_factor: float
    kl_factor: float
    mutual: bool  # whether the KL term counts
    grads: Sequence[Tensor]
    upstream: Tensor | None
    want_stats: bool
    scratch: Tensor  # (2 or 4, K, step, C)

    def block(self, rows: slice) -> _BlockResult:
        """Loss terms of some rows; writes their gradients."""
        K, n = len(self.logits), rows.stop - rows.start
        log_p, p, *tempered = self.scratch[:, :, :n]
        z = [z_k[rows] for z_k in self.logits]
        log_softmax(z, 1.0, log_p)
        torch.exp(log_p, out=p)
        y = self.y[rows]
        index = y.expand(K, n).unsqueeze(2)  # (K, n, 1)
        labelled = None if self.labelled is None else self.labelled[rows]

        nll = log_p.gather(2, index).squeeze(2).neg_()
        ce = nll
        if self.w_y is not None:
            ce = _times(self.w_y[rows], ce)
        eps = self.options.label_smoothing
        spread = eps / max(log_p.shape[2], 1)
        if eps:
            towards_all = (log_p if self.w_c is None else _times(self.w_c, log_p)).sum(2)
            if labelled is not None:
                towards_all = torch.where(labelled, towards_all, 0.0)
            ce = (1 - eps) * ce - spread * towards_all

        stats = None
        if self.want_stats:
            has_label = slice(None) if labelled is None else labelled
            together = p.sum(0)
            stats = _BlockStats(
                entropy=torch.special.entr(p).sum((1, 2)),
                correct=self._right(log_p, nll, y)[:, has_label].sum(1),
                ensemble_correct=self._right(together, together[:, 0], y)[has_label].sum(),
                pairwise=p.new_zeros(K, K),  # filled by _general_kl
            )

        kl, pull = torch.zeros_like(nll), None
        if K > 1 and (self.mutual or self.want_stats):
            log_q, q = log_p, p
            if tempered:
                log_q, q = tempered
                log_softmax(z, 1.0 / self.temperature, log_q)
                torch.exp(log_q, out=q)
            pairwise = None if stats is None else stats.pairwise
            kl, pull = self._general_kl(rows, log_q, q, nll, pairwise)
        if self.grads:
            self._write_grads(rows, p, index, labelled, pull)
        return _BlockResult(ce, kl, stats)

    @staticmethod
    def _right(scores: Tensor, row: Tensor, y: Tensor) -> Tensor:
        """Which rows have their largest score at the label. `row` holds a number of each row that
        is NaN where a score is: such a row counts as wrong."""
        return (scores.argmax(-1) == y) & ~row.isnan()

    def _general_kl(
        self, rows: slice, log_q: Tensor, q: Tensor, nll: Tensor, pairwise: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """KL terms (K, n) and their gradient without the shared factor kl_weight T, (K, n, C)."""
        K, n, _ = q.shape
        options = self.options
        edges = self._row_edges(rows, log_q, nll)  # (K, K, n)
        up = q.new_ones(K, n)
        if self.upstream is not None:
            up = self.upstream[:, rows] if self.upstream.dim() == 2 else self.upstream[:, None]
            up = up.expand(K, n)
        kl = q.new_zeros(K, n)
        pull = torch.zeros_like(q) if self.grads and self.mutual else None
        half = 0.5 if options.symmetric else 1.0

        def learn(k: int, log_t: Tensor, t: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            """Adds weight * divergence(t, q_k) to student k's KL term and gradient. Returns
            log t - log q_k and KL(t || q_k), of which the teachers' gradients are made."""
            gap = log_t - log_q[k]
            value = _times(t, gap).sum(1)
            kl[k] += _times(weight, half * value)
            if pull is not None:
                pull[k] += _times((half * weight * up[k])[:, None], q[k] - t)
            if options.symmetric:
                back = _times(q[k], -gap)
                back_value = back.sum(1)
                kl[k] += _times(weight, half * back_value)
                if pull is not None:
                    slope = back - q[k] * back_value[:, None]
                    pull[k] += _times((half * weight * up[k])[:, None], slope)
            return gap, value

        for k in range(K):
            teachers = [teacher for teacher in range(K) if teacher != k]
            if options.target == "peers":
                for teacher in teachers:
                    w = edges[k, teacher]
                    gap, value = learn(k, log_q[teacher], q[teacher], w)
                    if pull is None or options.detach_targets:
                        continue
                    slope = _times(q[teacher], gap) - q[teacher] * value[:, None]
                    if options.symmetric:
                        slope += q[teacher] - q[k]
                    pull[teacher] += _times((half * w * up[k])[:, None], slope)
                continue
            w_sum = edges[k, teachers].sum(0)  # (n,)
            log_t = self._mix(rows, log_q, edges[k], teachers, w_sum)
            log_t = torch.where((w_sum != 0)[:, None], log_t, log_q[k])
            t = log_t.exp()
            gap, value = learn(k, log_t, t, w_sum)
            if pull is None or options.detach_targets:
                continue
            for teacher in teachers:
                if options.target == "ensemble":
                    toward = _times(q[teacher], gap)
                    slope = toward - q[teacher] * toward.sum(1, keepdim=True)
                    if options.symmetric:
                        ratio = torch.where(t == 0, 0.0, q[teacher] * q[k] / t)
                        slope += q[teacher] * ratio.sum(1, keepdim=True) - ratio
                else:
                    slope = _times(t, gap) - t * value[:, None]
                    if options.symmetric:
                        slope += t - q[k]
                pull[teacher] += _times((half * edges[k, teacher] * up[k])[:, None], slope)

        if pairwise is not None:
            for teacher in range(K):
                for k in range(K):
                    gap = log_q[teacher] - log_q[k]
                    pairwise[teacher, k] = _times(q[teacher], gap).sum()
        return kl, pull

    def _row_edges(self, rows: slice, log_q: Tensor, nll: Tensor) -> Tensor:
        """How much each peer learns from each on each row, (K student, K teacher, n)."""
        K, n = nll.shape
        edges = self.edges[:, :, None].expand(K, K, n)
        if self.options.gate == "none":
            return edges
        if self.options.gate == "correct":  # temperature does not move the maximum
            teaches = self._right(log_q, nll, self.y[rows])
        else:
            best = torch.where(nll.isnan(), torch.inf, nll).argmin(0)
            teaches = (best == torch.arange(K, device=nll.device)[:, None]) & ~nll.isnan()
        if self.labelled is not None:
            teaches = teaches & self.labelled[rows]
        return edges * teaches

    def _mix(
        self, rows: slice, log_q: Tensor, edges: Tensor, teachers: list[int], w_sum: Tensor
    ) -> Tensor:
        """log of the mixed teacher, (n, C): of probabilities, or of logits then normalised."""
        shares = edges[teachers] / torch.where(w_sum != 0, w_sum, 1.0)  # (K-1, n)
        if self.options.target == "ensemble":
            top = torch.where((shares != 0)[:, :, None], log_q[teachers], -torch.inf).amax(0)
            top = torch.where(top == -torch.inf, 0.0, top)
            mixed = torch.zeros_like(top)
            for s, teacher in zip(shares, teachers, strict=True):
                mixed += _times(s[:, None], (log_q[teacher] - top).exp())
            return top + mixed.log()
        # differences to the first teacher make the mean of identical peers exactly themselves
        z_of = [self.logits[teacher][rows].to(log_q.dtype) for teacher in teachers]
        base = z_of[0]
        for s, z in zip(shares.flip(0), reversed(z_of), strict=True):
            base = torch.where(s[:, None] != 0, z, base)
        mixed, lowest = torch.zeros_like(base), base
        for s, z in zip(shares, z_of, strict=True):
            lowest = torch.where(s[:, None] != 0, torch.minimum(lowest, z), lowest)
            mixed += _times(s[:, None], torch.where(z == base, 0.0, z - base))
        mixed = torch.where(lowest == -torch.inf, lowest, base + mixed)
        return torch.log_softmax(mixed / self.temperature, dim=1)

    def _write_grads(
        self, rows: slice, p: Tensor, index: Tensor, labelled: Tensor | None, pull: Tensor | None
    ) -> None:
        """dL/dz_k = ce_factor (w_y (p_k - y) ...) + kl_factor pull_k; overwrites p and pull."""
        eps = self.options.label_smoothing
        spread = self.ce_factor * eps / p.shape[2]
        target: float | Tensor = self.ce_factor * (1 - eps)
        if self.w_y is not None:
            target = target * self.w_y[rows][:, None]  # (n, 1)
        smooth: float | Tensor = spread
        if eps and labelled is not None:
            smooth = spread * labelled[:, None]
        p.mul_(target + smooth * self.w_total)
        if eps:
            p.sub_(smooth if self.w_c is None else smooth * self.w_c)
        minus = torch.as_tensor(target, dtype=p.dtype, device=p.device).neg().expand(index.shape)
        p.scatter_add_(2, index, minus)
        if self.upstream is not None:
            up = self.upstream[:, rows] if self.upstream.dim() == 2 else self.upstream[:, None]
            p.mul_(up[:, :, None])
        for k, grad in enumerate(self.grads):
            if pull is None:
                grad[rows] = p[k]
            elif grad.dtype == p.dtype:
                torch.add(p[k], pull[k], alpha=self.kl_factor, out=grad[rows])
            else:
                grad[rows] = p[k].add_(pull[k], alpha=self.kl_factor)


def mutual_loss_cpu(
    logits: Sequence[Tensor],  # K tensors (N, C)
    labels: Tensor,  # (N,)
    options: Options,
    *,
    temperature: Scalar = 1.0,
    ce_weight: Scalar = 1.0,
    kl_weight: Scalar = 1.0,
    peer_weights: Tensor | None = None,  # (K, K)
    class_weight: Tensor | None = None,  # (C,)
    grads: Sequence[Tensor] = (),  # K tensors (N, C) to be written; () for none
    want_stats: bool = False,
    upstream: Tensor | None = None,  # the losses' own gradient, (K,) or (K, N); None is 1
) -> tuple[Tensor, Tensor | None]:
    """Losses, (K,) or (K, N), and packed statistics (`StatsLayout`; None if not wanted), both
    float32, or float64 where any logits are; writes `grads`. Raises ValueError for a label that is
    no class."""
    K, (N, C) = len(logits), logits[0].shape
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in logits) else torch.float32
    temperature, ce_weight, kl_weight = float(temperature), float(ce_weight), float(kl_weight)
    weights = (peer_weights, class_weight, upstream)
    if N and all(w is None for w in weights) and takes(logits, options):
        done = rows_loss(
            logits, labels, options, temperature, ce_weight, kl_weight, grads, want_stats
        )
        if done is not None:
            return done
    labelled = _find_labelled(labels, options.ignore_index, C)
    if labelled is not None and not options.mimic_ignored:
        # Rows without a label take no part: work on the others, then put their results in place.
        kept = labelled.nonzero()[:, 0]
        part = [g.new_empty(len(kept), C) for g in grads]
        if upstream is not None and upstream.dim() == 2:
            upstream = upstream[:, kept]
        losses, stats = mutual_loss_cpu(
            [z[kept] for z in logits], labels[kept], options, temperature=temperature,
            ce_weight=ce_weight, kl_weight=kl_weight, peer_weights=peer_weights,
            class_weight=class_weight, grads=part, want_stats=want_stats, upstream=upstream,
        )  # fmt: skip
        for grad, grad_rows in zip(grads, part, strict=True):
            grad.zero_()[kept] = grad_rows
        if options.reduction == "none":
            losses = losses.new_zeros(K, N).index_copy_(1, kept, losses)
        return losses, stats

    averaged = options.reduction == "mean"
    # Every new tensor takes dtype and device from this one, never from torch's defaults.
    edges = labels.new_full((K, K), default_edge(K, options.gate), dtype=dtype)
    y = labels.long() if labelled is None else torch.where(labelled, labels, 0).long()
    w_c = None if class_weight is None else class_weight.to(dtype)
    w_y = None if w_c is None else w_c[y]
    if labelled is not None:
        w_y = torch.where(labelled, edges.new_ones(N) if w_y is None else w_y, 0.0)
    labelled_rows = N if labelled is None else int(labelled.sum())
    ce_count = float(N if w_y is None else w_y.sum())
    if options.mimic_ignored and not labelled_rows:
        ce_count = 1.0  # a batch without any label teaches by the KL term alone
    per_ce = 1 / ce_count if ce_count > 0 else 0.0

    tempered = temperature != 1.0 and K > 1
    step = min(max(1, BLOCK_BYTES // (4 * K * max(C, 1))), max(N, 1))
    problem = _Problem(
        logits=logits, y=y, labelled=labelled, w_y=w_y, w_c=w_c,
        w_total=float(C if w_c is None else w_c.sum()), options=options,
        edges=edges if peer_weights is None else peer_weights.to(dtype), temperature=temperature,
        ce_factor=ce_weight * (per_ce if averaged else 1.0),
        kl_factor=kl_weight * temperature / (max(N, 1) if averaged else 1.0),
        mutual=kl_weight != 0,
        grads=grads, upstream=None if upstream is None else upstream.to(dtype),
        want_stats=want_stats,
        scratch=edges.new_empty(4 if tempered else 2, K, step, C),
    )  # fmt: skip

    kl_scale = temperature * temperature
    ce_sum, kl_sum = edges.new_zeros(K), edges.new_zeros(K)
    by_row = edges.new_empty(K, N) if options.reduction == "none" else None
    sums: _BlockStats | None = None
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        result = problem.block(rows)
        ce_sum += result.ce.sum(1)
        kl_sum += result.kl.sum(1)
        if by_row is not None:
            by_row[:, rows] = _weighted(ce_weight, result.ce)
            if K > 1:
                by_row[:, rows] += _weighted(kl_weight, kl_scale * result.kl)
        if sums is None:
            sums = result.stats
        elif result.stats is not None:
            sums = _BlockStats(*map(torch.add, sums, result.stats))

    # NaN where nothing is counted, as torch's cross_entropy without any label
    ce_mean, kl_mean = ce_sum / (ce_count or torch.nan), kl_sum * kl_scale / (N or torch.nan)
    if by_row is None:
        ce, kl = (ce_mean, kl_mean) if averaged else (ce_sum, kl_sum * kl_scale)
        losses = _weighted(ce_weight, ce)
        if K > 1:
            losses += _weighted(kl_weight, kl)
    else:
        losses = by_row
    if not want_stats:
        return losses, None
    if sums is None:  # no rows at all
        none, unknown = edges.new_zeros(K), edges.new_full((K, K), torch.nan)
        sums = _BlockStats(unknown[0], none, none.sum(), unknown)
    return losses, stats_layout(K).pack({
        "ce": ce_mean, "kl": kl_mean,
        "label_weight": edges.new_tensor(ce_count),
        "labelled": edges.new_tensor(labelled_rows),
        "entropy": sums.entropy / max(N, 1),
        "correct": sums.correct, "ensemble_correct": sums.ensemble_correct,
        "pairwise_kl": sums.pairwise * (kl_scale / max(N, 1)),
    })  # fmt: skip
