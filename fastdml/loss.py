"""`mutual_loss`: the Deep Mutual Learning loss of K peers, its options checked.

One kernel launch on CUDA (a handful of torch calls on the CPU) computes every peer's cross-entropy,
the KL divergences between the peers, the statistics and the gradients; see `fastdml_kernels`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

import torch
from fastdml_kernels import Call, Options, losses_and_grads
from fastdml_kernels import linear_mutual_loss as _linear_mutual_loss
from fastdml_kernels import mutual_loss as _mutual_loss
from fastdml_kernels import mutual_losses as _mutual_losses
from fastdml_kernels.options import Scalar
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Unpack

FARTHEST = 1e18  # of temperatures from 1
CALL_TENSORS = ("labels", "temperature", "ce_weight", "kl_weight", "peer_weights", "class_weight")
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class MutualStats(NamedTuple):
    """What the peers did on one batch: device tensors, without gradient; reading one waits."""

    ce: Tensor  # (K,) cross-entropy, mean over the labelled rows
    kl: Tensor  # (K,) the KL term before kl_weight, mean over the rows that take part
    pairwise_kl: Tensor  # (K, K) T**2 KL(p_l || p_k) of [teacher l, student k], mean over rows
    entropy: Tensor  # (K,) of softmax(z), in nats, mean over rows
    correct: Tensor  # (K,) rows whose largest logit is the label's; ties go to the first class
    ensemble_correct: Tensor  # () the same of the mean of the K probabilities


def _unpack(packed: Tensor, K: int) -> MutualStats:
    """Views of the packed statistics, in the order that `fastdml_kernels.options` gives."""
    ce, kl, _, entropy, correct, ensemble, pairwise = packed[: 4 * K + 3 + K * K].split(
        [K, K, 2, K, K, 1, K * K]
    )
    return MutualStats(ce, kl, pairwise.view(K, K), entropy, correct, ensemble[0])


def _refuse_unusual(name: str, tensors: Sequence[Tensor | None]) -> None:
    """Tensors whose values are not all here, side by side in memory."""
    distributed = sys.modules.get("torch.distributed.tensor")  # no tensor of it without
    for t in tensors:
        if distributed is not None and isinstance(t, distributed.DTensor):
            raise TypeError(
                f"{name}: a DTensor, of which this process may hold a part: give its .to_local(), "
                "or its .full_tensor() where rows or classes are split over processes"
            )
        if isinstance(t, Tensor) and (t.layout != torch.strided or t.is_nested):
            kind = "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
            raise TypeError(f"{name}: a {kind} tensor: give a dense one")


def _check(logits: Tensor | Sequence[Tensor], call: Call) -> list[Tensor]:
    """The logits as K tensors (N, C) or one (K, N, C), after every check that needs no value on
    the device."""
    tensors = [logits] if isinstance(logits, Tensor) else list(logits)
    _refuse_unusual("logits", tensors)
    for name in CALL_TENSORS:
        value = getattr(call, name)
        if value is not None and type(value) is not float:
            _refuse_unusual(name, [value])
    if isinstance(logits, Tensor):
        if logits.dim() != 3:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)}: give (K, N, C), or a list of K (N, C)"
            )
        K, N, C = logits.shape
    else:
        if not tensors or any(not isinstance(z, Tensor) or z.dim() != 2 for z in tensors):
            shapes = [
                tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__ for z in tensors
            ]
            raise ValueError(f"logits {shapes}: give at least one tensor, each of shape (N, C)")
        K, (N, C) = len(tensors), tensors[0].shape
        if any(z.shape != tensors[0].shape for z in tensors):
            shapes = [tuple(z.shape) for z in tensors]
            raise ValueError(f"logits of shapes {shapes}: peers need the same rows and classes")
    if K < 1 or C < 1:
        raise ValueError(f"logits with K = {K} peers and C = {C} classes: at least one of each")
    z = tensors[0]
    for other in tensors:
        if other.dtype not in LOGIT_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in LOGIT_DTYPES)
            raise TypeError(f"logits of {other.dtype}: cast them to one of {names}")
        if other.dtype == torch.float64 and other.device.type != "cpu":
            raise TypeError("float64 logits are for the CPU: the kernels compute in float32")
        if other.device != z.device:
            raise ValueError(f"peers on {z.device} and {other.device}: bring the logits together")
    if z.device.type not in ("cpu", "cuda"):
        raise ValueError(f"logits on {z.device}: fastdml computes on CPU and CUDA devices")
    labels = call.labels
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels of type {type(labels).__name__}: give a tensor ({N},) of int64 or int32"
        )
    if labels.shape != (N,):
        raise ValueError(f"labels of shape {tuple(labels.shape)} for N = {N} rows: give ({N},)")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels of {labels.dtype}: give class indices, int64 or int32")
    if labels.device != z.device:
        raise ValueError(f"labels on {labels.device}, logits on {z.device}: move the labels")
    for name, tensor, shape in (
        ("peer_weights", call.peer_weights, (K, K)),
        ("class_weight", call.class_weight, (C,)),
    ):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} of type {type(tensor).__name__}: give a tensor {shape}")
        if tensor.shape != shape or tensor.device != z.device:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} on {tensor.device}: "
                f"give {shape} on {z.device}"
            )
        if tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, which the loss does not compute")
    for name in ("temperature", "ce_weight", "kl_weight"):
        value = getattr(call, name)
        if not isinstance(value, Tensor):
            if not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
                raise TypeError(f"{name}={value!r}: give a number, or a 0-d tensor on {z.device}")
            continue
        if value.dim() != 0 or value.device != z.device:
            raise ValueError(
                f"{name} of shape {tuple(value.shape)} on {value.device}: give a number, or a 0-d "
                f"tensor on {z.device}"
            )
        if value.requires_grad:
            raise ValueError(f"{name} requires a gradient, which the loss does not compute")
    T = call.temperature
    if not isinstance(T, Tensor) and not 1 / FARTHEST <= T <= FARTHEST:
        raise ValueError(
            f"temperature={T}: it divides the logits and must be above 0, and finite "
            f"({1 / FARTHEST:g} to {FARTHEST:g}: its square is a float32)"
        )
    for name in ("ce_weight", "kl_weight"):
        value = getattr(call, name)
        if not isinstance(value, Tensor) and not 0 <= value < math.inf:
            raise ValueError(
                f"{name}={value}: below 0 the loss would be without a lower bound; give 0 or more, "
                "and a finite number"
            )
    ignore = call.options.ignore_index
    if not isinstance(ignore, int) and not hasattr(ignore, "__index__"):
        raise TypeError(f"ignore_index={ignore!r}: give a whole number")
    return tensors


def _count(tensors: list[Tensor]) -> int:
    return tensors[0].shape[0] if tensors[0].dim() == 3 else len(tensors)


def _losses(tensors: list[Tensor], call: Call) -> Tensor | tuple[Tensor, MutualStats]:
    losses, packed = _mutual_loss(tensors, call)
    return (losses, _unpack(packed, _count(tensors))) if call.want_stats else losses


class MutualLoss(nn.Module):
    """`mutual_loss` with its options kept: `MutualLoss(temperature=2.0)(logits, labels)`.

    ce_weight, kl_weight and temperature are attributes that a schedule may assign or, as 0-d
    tensors, fill in place. `peer_weights` and `class_weight` are buffers and move with the module.
    """

    def __init__(
        self,
        *,
        temperature: Scalar = 1.0,
        ce_weight: Scalar = 1.0,
        kl_weight: Scalar = 1.0,
        target: str = "peers",
        peer_weights: Tensor | None = None,
        gate: str = "none",
        symmetric: bool = False,
        detach_targets: bool = True,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        mimic_ignored: bool = False,
        reduction: str = "mean",
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        self.options = Options(
            target, gate, symmetric, detach_targets, label_smoothing, ignore_index, mimic_ignored,
            reduction,
        )  # fmt: skip
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kl_weight = kl_weight
        self.register_buffer("peer_weights", peer_weights, persistent=False)
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.return_stats = return_stats

    def forward(
        self, logits: Tensor | Sequence[Tensor], labels: Tensor
    ) -> Tensor | tuple[Tensor, MutualStats]:
        """As `mutual_loss(logits, labels)` with this module's options."""
        return _losses(*self._call(logits, labels, self.return_stats))

    def value_and_grad(
        self, logits: Tensor | Sequence[Tensor], labels: Tensor
    ) -> tuple[Tensor, MutualStats, list[Tensor]]:
        """Losses, statistics, and the gradient of `losses.sum()` with respect to the logits, in
        their shape and dtype: K tensors (N, C), or one (K, N, C) for stacked logits.

        For `torch.autograd.backward(logits, gradients)`: no loss graph, no backward launch. With a
        loss scale give float16 logits as float32: here they are rounded before anyone scales them.
        """
        tensors, call = self._call(logits, labels, True)
        with torch.no_grad():
            losses, packed, grads = losses_and_grads(tensors, call, True)
        return losses, _unpack(packed, _count(tensors)), grads

    def _call(
        self, logits: Tensor | Sequence[Tensor], labels: Tensor, want_stats: bool
    ) -> tuple[list[Tensor], Call]:
        call = Call(
            labels, self.options, self.temperature, self.ce_weight, self.kl_weight,
            self.peer_weights, self.class_weight, want_stats,
        )  # fmt: skip
        return _check(logits, call), call

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, kl_weight={self.kl_weight}, {self.options}"


class LossOptions(TypedDict, total=False):
    """The options of `mutual_loss`, but for return_stats, which decides what it returns."""

    temperature: Scalar
    ce_weight: Scalar
    kl_weight: Scalar
    target: str
    peer_weights: Tensor | None
    gate: str
    symmetric: bool
    detach_targets: bool
    label_smoothing: float
    class_weight: Tensor | None
    ignore_index: int
    mimic_ignored: bool
    reduction: str


@overload
def mutual_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...


@overload
def mutual_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[Tensor, MutualStats]: ...


def mutual_loss(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    temperature: Scalar = 1.0,
    ce_weight: Scalar = 1.0,
    kl_weight: Scalar = 1.0,
    target: str = "peers",
    peer_weights: Tensor | None = None,
    gate: str = "none",
    symmetric: bool = False,
    detach_targets: bool = True,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    mimic_ignored: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, MutualStats]:
    """The Deep Mutual Learning loss of each of K peers (Zhang et al., CVPR 2018, section 3).

    L_k = ce_weight CE(y, p_k) + kl_weight T**2 sum_l w_kl KL(p_l || p_k), w_kl = 1 / (K - 1),
    with p_k = softmax(z_k / T) inside the KL. `loss.sum().backward()` trains all peers; with
    constant teachers the k-th loss touches the k-th logits only. K = 1 is plain cross-entropy.
    For a loop with a backward and an optimizer per peer there is `mutual_losses`.

    logits: (K, N, C), or a sequence of K tensors (N, C), which is not copied; float32, bfloat16,
        float16, or float64 on the CPU; any strides; dtypes may differ between peers. Sums are in
        float32 (float64 for float64 logits), gradients in each peer's dtype, rounded once: those of
        float16 after a GradScaler's scale, in the backward, which then reads the logits again.
    labels: (N,) int64 or int32. On the CPU a label that is no class raises ValueError. On CUDA,
        where the host never waits for a value, its row's losses and gradients are NaN.
    temperature: T, for the KL term only, which is multiplied by T**2 (Hinton et al. 2015).
    ce_weight, kl_weight, temperature: numbers, the weights not below 0, where the loss would have
        no lower bound; or 0-d tensors on the logits' device, whose values are not looked at, and
        which a schedule can change inside a captured graph, and without compiling anew.
    target: what a peer learns from. "peers": each other peer, KL(p_l || p_k). "ensemble": the
        probability mean of the others, the paper's DML_e: the same gradient as "peers", since
        cross-entropy is linear in its target, and a smaller value. "ensemble_logits": the softmax
        of the mean of the others' logits (Chen et al. 2020, OKDDip's baseline).
    peer_weights: (K, K), not negative; row k says how much peer k learns from each peer, 0 is no
        edge, the diagonal is not used. A mixed teacher is the weighted mean, times the row's sum.
    gate: "none". "correct": a teacher counts only on rows that it classifies right (Minami et al.
        2020). "best": on each row only the peer of lowest cross-entropy teaches, with weight 1
        (or its peer weight). Rows without a label have no such teacher.
    symmetric: (KL(t || p_k) + KL(p_k || t)) / 2 for every teacher t.
    detach_targets: False lets gradients flow into the teachers as well.
    label_smoothing, class_weight (C,), ignore_index: as in `torch.nn.functional.cross_entropy`.
    mimic_ignored: True keeps rows without a label in the KL term (semi-supervised, section 3.4);
        a batch without any label then has a cross-entropy of 0 instead of NaN.
    reduction: "mean" over rows (the CE's weighted as in cross_entropy; the KL's as in
        `kl_div(reduction="batchmean")`) or "sum", both (K,); "none", (K, N).
    return_stats: also return `MutualStats`, from the same pass.

    Raises ValueError and TypeError for shapes, dtypes, devices and values that do not fit;
    RuntimeError for a second derivative and under torch.func transforms.
    """
    options = Options(target, gate, symmetric, detach_targets, label_smoothing, ignore_index,
                      mimic_ignored, reduction)  # fmt: skip
    call = Call(labels, options, temperature, ce_weight, kl_weight, peer_weights, class_weight,
                return_stats)  # fmt: skip
    return _losses(_check(logits, call), call)


@overload
def mutual_losses(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, ...]: ...


@overload
def mutual_losses(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    return_stats: Literal[True],
    **options: Unpack[LossOptions],
) -> tuple[tuple[Tensor, ...], MutualStats]: ...


def mutual_losses(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    temperature: Scalar = 1.0,
    ce_weight: Scalar = 1.0,
    kl_weight: Scalar = 1.0,
    target: str = "peers",
    peer_weights: Tensor | None = None,
    gate: str = "none",
    symmetric: bool = False,
    detach_targets: bool = True,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    mimic_ignored: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], MutualStats]:
    """`mutual_loss` as a tuple of K losses, for a loop with a backward and an optimizer per peer:

        losses = mutual_losses([peer(images) for peer in peers], labels)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()  # peer k's graph alone: no retain_graph, no gradient for another peer
            optimizer.step()

    One launch computes all losses and gradients, the same bits as `mutual_loss(...).sum()` and its
    backward. `losses[k]` has an autograd node of its own, which goes to `logits[k]` only, so that
    the others' gradients stay None. All are of the predictions given here: a peer that has stepped
    is not run again (Algorithm 1 of the paper runs it: `fastdml.engine.make_step` with
    update="sequential"). A GradScaler per peer works too. What torch.compile makes of a region has
    one backward: compile the peers and call this outside, or sum the losses inside.

    logits: K tensors (N, C). One stacked tensor is refused: through it every peer's backward would
        run into the others'. Gradients of float16 logits are kept in float32 until the backward.
    reduction: "mean" or "sum", K losses of no dimension; "none", K of (N,).
    detach_targets: False is refused: a teacher's gradient is a sum over its students' losses.
    Everything else is as in `mutual_loss`.
    """
    if isinstance(logits, Tensor):
        raise ValueError(
            f"logits as one tensor {tuple(logits.shape)}: mutual_losses takes a list of K tensors "
            "(N, C), whose graphs are apart; of one tensor use mutual_loss(...).sum().backward()"
        )
    if not detach_targets:
        raise ValueError(
            "detach_targets=False: gradients into the teachers mix the peers' losses, which "
            "mutual_losses keeps apart; use mutual_loss(...).sum().backward()"
        )
    options = Options(target, gate, symmetric, True, label_smoothing, ignore_index, mimic_ignored,
                      reduction)  # fmt: skip
    call = Call(labels, options, temperature, ce_weight, kl_weight, peer_weights, class_weight,
                return_stats)  # fmt: skip
    tensors = _check(logits, call)
    losses, packed = _mutual_losses(tensors, call)
    return (losses, _unpack(packed, len(tensors))) if return_stats else losses


def linear_mutual_loss(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    labels: Tensor,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    chunk_rows: int | None = None,
    temperature: Scalar = 1.0,
    ce_weight: Scalar = 1.0,
    kl_weight: Scalar = 1.0,
    target: str = "peers",
    peer_weights: Tensor | None = None,
    gate: str = "none",
    symmetric: bool = False,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    mimic_ignored: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`mutual_loss` of K linear layers' outputs, without ever holding (K, N, C) logits.

    Losses (K,) of logits z_k = hidden_k weight_k^T + bias_k, computed a chunk of rows at a time,
    with the gradients of hidden, weight and bias. For wide C, such as a language model's
    vocabulary, the logits are most of a training step's memory.

    hidden: K tensors (N, D_k), or one (K, N, D); their widths may differ between peers.
    weight: K tensors (C, D_k), or one (K, C, D). bias: K tensors (C,) or None each, or one (K, C).
    chunk_rows: rows at a time; by default as many as 256 MB of logits hold (16 MB on the CPU).
    reduction: "mean" or "sum". The other options are those of `mutual_loss`; teachers are
        constants.

    One backward a forward: the gradients are ready when the loss is, and are given away (compiled
    code keeps them). Those of weight and bias are added up over the chunks in float32. Layers
    compute in their own dtypes, within autocast too. Raises ValueError and TypeError for arguments
    that do not fit, RuntimeError for a second backward or derivative and under torch.func.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: linear_mutual_loss has 'mean' and 'sum'")
    layers = []
    for name, value in (("hidden", hidden), ("weight", weight)):
        whole = isinstance(value, Tensor)
        value = value if whole else list(value)
        _refuse_unusual(name, [value] if whole else value)
        tensors = list(value.unbind() if whole and value.dim() == 3 else () if whole else value)
        if not tensors or any(not isinstance(t, Tensor) or t.dim() != 2 for t in tensors):
            shapes = tuple(value.shape) if whole else [
                tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in tensors
            ]  # fmt: skip
            raise ValueError(f"{name} {shapes}: give K tensors, each 2-d, or one 3-d tensor")
        layers.append(tensors)
    hiddens, weights = layers
    K = len(hiddens)
    biases = [None] * K if bias is None else list(bias)
    _refuse_unusual("bias", biases)
    if len(weights) != K or len(biases) != K:
        raise ValueError(
            f"{K} hidden, {len(weights)} weight and {len(biases)} bias tensors: one of each a peer"
        )
    C = weights[0].shape[0]
    for k, (h, w, b) in enumerate(zip(hiddens, weights, biases, strict=True)):
        if h.shape[1] != w.shape[1] or w.shape[0] != C or (b is not None and b.shape != (C,)):
            found = None if b is None else tuple(b.shape)
            raise ValueError(
                f"peer {k}: hidden {tuple(h.shape)}, weight {tuple(w.shape)}, bias {found}: "
                f"give (N, D), ({C}, D) and ({C},)"
            )
        given = [t for t in (h, w, b) if t is not None]
        if len({t.dtype for t in given}) != 1:
            raise TypeError(
                f"peer {k}: hidden, weight and bias of {', '.join(str(t.dtype) for t in given)}: "
                "cast them to one dtype (a fused layer is not touched by autocast)"
            )
        if len({t.device for t in given}) != 1:
            raise ValueError(
                f"peer {k}: hidden, weight and bias on {', '.join(str(t.device) for t in given)}: "
                "bring them to one device"
            )
    if chunk_rows is not None and not (isinstance(chunk_rows, int) and chunk_rows >= 1):
        raise ValueError(f"chunk_rows={chunk_rows!r}: give a whole number, at least 1 row")
    options = Options(target, gate, symmetric, True, label_smoothing, ignore_index, mimic_ignored,
                      reduction)  # fmt: skip
    call = Call(labels, options, temperature, ce_weight, kl_weight, peer_weights, class_weight,
                False)  # fmt: skip
    _check([h.new_empty(()).expand(h.shape[0], C) for h in hiddens], call)  # no memory to speak of
    return _linear_mutual_loss(hiddens, weights, biases, call, chunk_rows)
