"""The same loss on the CPU: the closed form, in torch.

Constant teachers go to `cpu_rows`, which is native code. This file handles every case: gradients
into the teachers, float64 and float16, logits that are not finite, no C compiler at hand. It
takes one pass for each pair of peers, O(K**2 C), in which a class of probability 0 contributes 0.
Rows are taken in blocks whose intermediates stay in cache, so that each logit is read from memory
and each gradient written to it about once, as in the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .cpu_divergences import Part, divergence_of, times
from .cpu_rows import rows_loss
from .cpu_teacher_weights import right, teacher_weights
from .options import Options, Scalar, default_edge
from .stats_layout import stats_layout

BLOCK_BYTES = 1 << 19  # of float32 logits a block; it and its copies share one core's cache


def log_softmax(z: Sequence[Tensor], scale: float, out: Tensor) -> None:
    """log softmax(scale z_k) of K tensors (n, C) into `out` (K, n, C)."""
    for z_k, out_k in zip(z, out.unbind(), strict=True):
        if z_k.dtype != out.dtype or scale != 1.0:
            z_k = z_k.to(out.dtype) * scale
        torch.log_softmax(z_k, dim=1, out=out_k)


def _added(slopes: Sequence[Tensor]) -> Tensor:
    return slopes[0] if len(slopes) == 1 else slopes[0] + slopes[1]


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


def _refuse_weights(sample_weight: Tensor) -> None:
    """Raises ValueError for a weight that counts no rows: the native code leaves them to torch."""
    misfit = sample_weight[~((sample_weight >= 0) & (sample_weight < float("inf")))]
    if misfit.numel():
        raise ValueError(
            f"sample_weight holds {misfit[0].item():g}: a row counts as so many rows; give 0, "
            "which leaves it out, or more, and finite numbers"
        )


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
    sample_weight: Tensor | None  # (N,)
    options: Options
    edges: Tensor  # (K, K)
    temperature: float
    ce_factor: float
    kl_factor: float
    mutual: bool  # whether the KL term counts
    grads: Sequence[Tensor | None]
    upstream: Tensor | None  # (K,) or (K, N), times the rows' weights
    want_stats: bool
    scratch: Tensor  # (2 or 4, K, step, C)

    @torch.no_grad()  # logits of peers that only teach may require a gradient
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
            ce = times(self.w_y[rows], ce)
        eps = self.options.label_smoothing
        spread = eps / max(log_p.shape[2], 1)
        if eps:
            towards_all = (log_p if self.w_c is None else times(self.w_c, log_p)).sum(2)
            if labelled is not None:
                towards_all = torch.where(labelled, towards_all, 0.0)
            ce = (1 - eps) * ce - spread * towards_all

        stats = self._stats(rows, log_p, p, nll) if self.want_stats else None
        kl, pull = torch.zeros_like(nll), cast(dict[int, Tensor], {})
        if K > 1 and (self.mutual or self.want_stats):
            log_q, q = log_p, p
            if tempered:
                log_q, q = tempered
                log_softmax(z, 1.0 / self.temperature, log_q)
                torch.exp(log_q, out=q)
            weights = teacher_weights(self.options, self.edges, y, labelled, log_p, nll)
            kl, pull = self._divergences(rows, log_q, q, weights)
            if stats is not None:
                self._fill_pairwise(rows, log_q, q, stats.pairwise)
        if self.grads:
            self._write_grads(rows, p, index, labelled, pull)
        if self.sample_weight is not None:
            ce, kl = ce * self.sample_weight[rows], kl * self.sample_weight[rows]
        return _BlockResult(ce, kl, stats)

    def _stats(self, rows: slice, log_p: Tensor, p: Tensor, nll: Tensor) -> _BlockStats:
        """All but the pairwise divergences, which are 0."""
        K, y = len(p), self.y[rows]
        together = p.sum(0)
        entropy, found = torch.special.entr(p), right(log_p, nll, y)
        of_all = right(together, together[:, 0], y)
        if self.labelled is not None:
            found, of_all = found & self.labelled[rows], of_all & self.labelled[rows]
        if self.sample_weight is None:
            return _BlockStats(entropy.sum((1, 2)), found.sum(1), of_all.sum(), p.new_zeros(K, K))
        w = self.sample_weight[rows]
        return _BlockStats(
            (entropy.sum(2) * w).sum(1), (found * w).sum(1), (of_all * w).sum(), p.new_zeros(K, K)
        )

    def _fill_pairwise(self, rows: slice, log_q: Tensor, q: Tensor, pairwise: Tensor) -> None:
        for teacher in range(len(q)):
            for k in range(len(q)):
                terms = times(q[teacher], log_q[teacher] - log_q[k])
                if self.sample_weight is not None:
                    terms = terms.sum(1) * self.sample_weight[rows]
                pairwise[teacher, k] = terms.sum()

    def _divergences(
        self, rows: slice, log_q: Tensor, q: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """KL terms (K, n) and, of each student, their gradient without the shared factor
        kl_weight T, (n, C). weights: (K student, K teacher, n)."""
        K, n, _ = q.shape
        options = self.options
        up = q.new_ones(K, n)
        if self.upstream is not None:
            up = self.upstream[:, rows] if self.upstream.dim() == 2 else self.upstream[:, None]
            up = up.expand(K, n)
        kl = q.new_zeros(K, n)
        pull: dict[int, Tensor] = {}
        if self.mutual:
            pull = {k: torch.zeros_like(q[0]) for k in self.students}

        def learn(
            k: int, log_t: Tensor, t: Tensor, weight: Tensor, gradient: bool = True
        ) -> tuple[float, Sequence[Part]]:
            """Adds weight * divergence(t, q_k) to peer k's KL term and, with `gradient`, to its
            gradient. Returns what `divergence_of` does, of which the teachers' gradients are
            made."""
            share, parts = divergence_of(options, log_t, t, log_q[k], q[k])
            for part in parts:
                kl[k] += times(weight, share * part.value())
                if gradient and k in pull:
                    pull[k] += times((share * weight * up[k])[:, None], part.of_student())
            return share, parts

        for k in range(K):
            teachers = [teacher for teacher in range(K) if teacher != k]
            taught = [] if options.detach_targets else [t for t in teachers if t in pull]
            if options.target == "peers":
                for teacher in teachers:
                    w = weights[k, teacher]
                    share, parts = learn(k, log_q[teacher], q[teacher], w)
                    if teacher in taught:
                        slope = _added([part.of_teacher() for part in parts])
                        pull[teacher] += times((share * w * up[k])[:, None], slope)
                continue
            w_sum = weights[k, teachers].sum(0)  # (n,)
            log_t = self._mix(rows, log_q, weights[k], teachers, w_sum)
            log_t = torch.where((w_sum != 0)[:, None], log_t, log_q[k])
            # Of the forward KL a student's gradient is that of the teachers one by one, as cross-
            # entropy is linear in its target: taken so, it is the same number bit for bit.
            by_each = options.target == "ensemble" and options.divergence == "forward"
            for teacher in teachers if by_each and k in pull else ():
                w = (weights[k, teacher] * up[k])[:, None]
                pull[k] += (q[k] - q[teacher]).mul_(w).masked_fill_(w == 0, 0.0)
            share, parts = learn(k, log_t, log_t.exp(), w_sum, gradient=not by_each)
            for teacher in taught:
                if options.target == "ensemble":
                    slope = _added([part.of_mixed(q[teacher], log_q[teacher]) for part in parts])
                else:
                    slope = _added([part.of_teacher() for part in parts])
                pull[teacher] += times((share * weights[k, teacher] * up[k])[:, None], slope)
        return kl, pull

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
                mixed += times(s[:, None], (log_q[teacher] - top).exp())
            return top + mixed.log()
        # differences to the first teacher make the mean of identical peers exactly themselves
        z_of = [self.logits[teacher][rows].to(log_q.dtype) for teacher in teachers]
        base = z_of[0]
        for s, z in zip(shares.flip(0), reversed(z_of), strict=True):
            base = torch.where(s[:, None] != 0, z, base)
        mixed, lowest = torch.zeros_like(base), base
        for s, z in zip(shares, z_of, strict=True):
            lowest = torch.where(s[:, None] != 0, torch.minimum(lowest, z), lowest)
            mixed += times(s[:, None], torch.where(z == base, 0.0, z - base))
        mixed = torch.where(lowest == -torch.inf, lowest, base + mixed)
        return torch.log_softmax(mixed / self.temperature, dim=1)

    @cached_property
    def students(self) -> list[int]:
        """Peers whose gradient is wanted."""
        return [k for k, grad in enumerate(self.grads) if grad is not None]

    def _write_grads(
        self,
        rows: slice,
        p: Tensor,
        index: Tensor,
        labelled: Tensor | None,
        pull: dict[int, Tensor],
    ) -> None:
        """dL/dz_k = ce_factor (w_y (p_k - y) ...) + kl_factor pull_k; overwrites p and pull."""
        students = self.students
        if len(students) < len(p):
            p, index = p[students], index[students]
        eps = self.options.label_smoothing
        spread = self.ce_factor * eps / p.shape[2]
        target: float | Tensor = self.ce_factor * (1 - eps)
        if self.w_y is not None:
            target = target * self.w_y[rows][:, None]  # (n, 1)
        smooth: float | Tensor = spread
        if eps and labelled is not None:
            smooth = spread * labelled[:, None].to(p.dtype)
        p.mul_(target + smooth * self.w_total)
        if eps:
            p.sub_(smooth if self.w_c is None else smooth * self.w_c)
        minus = torch.as_tensor(target, dtype=p.dtype, device=p.device).neg().expand(index.shape)
        p.scatter_add_(2, index, minus)
        if self.upstream is not None:
            up = self.upstream[:, rows] if self.upstream.dim() == 2 else self.upstream[:, None]
            p.mul_(up[students, :, None])
        for p_k, k in zip(p.unbind(), students, strict=True):
            grad = cast(Tensor, self.grads[k])
            if not pull:
                grad[rows] = p_k
            elif grad.dtype == p.dtype:
                torch.add(p_k, pull[k], alpha=self.kl_factor, out=grad[rows])
            else:
                grad[rows] = p_k.add_(pull[k], alpha=self.kl_factor)


def _sums(
    N: int, labelled: Tensor | None, w_y: Tensor | None, w_n: Tensor | None
) -> tuple[float, float, float]:
    """The number of rows, of those with a label, and the sum of their labels' class weights; rows
    of weight w count w times."""
    if w_n is None:
        return (
            N,
            N if labelled is None else int(labelled.sum()),
            N if w_y is None else float(w_y.sum()),
        )
    of_all = float(w_n.sum())
    return (
        of_all,
        of_all if labelled is None else float(w_n[labelled].sum()),
        of_all if w_y is None else float((w_y * w_n).sum()),
    )


def _upstream(upstream: Tensor | None, w_n: Tensor | None, edges: Tensor) -> Tensor | None:
    """The gradient of each loss, (K,), or of each row's, (K, N); in the dtype of edges (K, K)."""
    if upstream is not None:
        upstream = upstream.to(edges.dtype)
    if w_n is None:
        return upstream
    if upstream is None:
        return w_n.expand(len(edges), -1)
    return w_n * (upstream if upstream.dim() == 2 else upstream[:, None])


def _of_some_rows(
    present: Tensor,  # (N,) bool
    logits: Sequence[Tensor],
    labels: Tensor,
    options: Options,
    *,
    sample_weight: Tensor | None,
    grads: Sequence[Tensor | None],
    upstream: Tensor | None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """`mutual_loss_cpu` of the rows that are present; the others' results are 0."""
    kept = present.nonzero()[:, 0]
    part = [None if g is None else g.new_empty(len(kept), g.shape[1]) for g in grads]
    if upstream is not None and upstream.dim() == 2:
        upstream = upstream[:, kept]
    losses, stats = mutual_loss_cpu(
        [z[kept] for z in logits], labels[kept], options,
        sample_weight=None if sample_weight is None else sample_weight[kept],
        grads=part, upstream=upstream, **rest,
    )  # fmt: skip
    for grad, grad_rows in zip(grads, part, strict=True):
        if grad is not None and grad_rows is not None:
            grad.zero_()[kept] = grad_rows
    if options.reduction == "none":
        losses = losses.new_zeros(len(logits), len(labels)).index_copy_(1, kept, losses)
    return losses, stats


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
    sample_weight: Tensor | None = None,  # (N,)
    grads: Sequence[Tensor | None] = (),  # (N, C) each, to be written; None: only teaches; () none
    want_stats: bool = False,
    upstream: Tensor | None = None,  # the losses' own gradient, (K,) or (K, N); None is 1
) -> tuple[Tensor, Tensor | None]:
    """Losses, (K,) or (K, N), and packed statistics (`StatsLayout`; None if not wanted), both
    float32, or float64 where any logits are; writes `grads`. Raises ValueError for a label that is
    no class, and for a row's weight that is below 0 or not finite."""
    temperature, ce_weight, kl_weight = float(temperature), float(ce_weight), float(kl_weight)
    if upstream is None:
        done = rows_loss(
            logits, labels, options, temperature, ce_weight, kl_weight, grads, want_stats,
            peer_weights, class_weight, sample_weight,
        )  # fmt: skip
        if done is not None:
            return done
    K, (N, C) = len(logits), logits[0].shape
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in logits) else torch.float32
    present = None
    if sample_weight is not None:
        _refuse_weights(sample_weight)
        if not bool(sample_weight.all()):
            present = sample_weight != 0
    labelled = None
    if present is None:
        labelled = _find_labelled(labels, options.ignore_index, C)
        present = None if options.mimic_ignored else labelled
    if present is not None:
        return _of_some_rows(
            present, logits, labels, options, temperature=temperature, ce_weight=ce_weight,
            kl_weight=kl_weight, peer_weights=peer_weights, class_weight=class_weight,
            sample_weight=sample_weight, grads=grads, want_stats=want_stats, upstream=upstream,
        )  # fmt: skip

    averaged = options.reduction == "mean"
    # Every new tensor takes dtype and device from this one, never from torch's defaults.
    edges = labels.new_full((K, K), default_edge(K, options.gate), dtype=dtype)
    y = labels.long() if labelled is None else torch.where(labelled, labels, 0).long()
    w_c = None if class_weight is None else class_weight.to(dtype)
    w_y = None if w_c is None else w_c[y]
    if labelled is not None:
        w_y = torch.where(labelled, edges.new_ones(N) if w_y is None else w_y, 0.0)
    w_n = None if sample_weight is None else sample_weight.to(dtype)
    rows_weight, labelled_rows, ce_count = _sums(N, labelled, w_y, w_n)
    if options.mimic_ignored and not labelled_rows:
        ce_count = 1.0  # a batch without any label teaches by the KL term alone
    per_ce = 1 / ce_count if ce_count > 0 else 0.0

    tempered = temperature != 1.0 and K > 1
    step = min(max(1, BLOCK_BYTES // (4 * K * max(C, 1))), max(N, 1))
    problem = _Problem(
        logits=logits, y=y, labelled=labelled, w_y=w_y, w_c=w_c,
        w_total=float(C if w_c is None else w_c.sum()), sample_weight=w_n, options=options,
        edges=edges if peer_weights is None else peer_weights.to(dtype), temperature=temperature,
        ce_factor=ce_weight * (per_ce if averaged else 1.0),
        kl_factor=kl_weight * temperature / ((rows_weight or 1) if averaged else 1.0),
        mutual=kl_weight != 0,
        grads=grads, upstream=_upstream(upstream, w_n, edges), want_stats=want_stats,
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
    ce_mean = ce_sum / (ce_count or torch.nan)
    kl_mean = kl_sum * kl_scale / (rows_weight or torch.nan)
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
        "entropy": sums.entropy / (rows_weight or 1),
        "correct": sums.correct, "ensemble_correct": sums.ensemble_correct,
        "pairwise_kl": sums.pairwise * (kl_scale / (rows_weight or 1)),
    })  # fmt: skip
