"""The eager training step: forward all peers, one fused loss, one backward, one update.

The loss returns the gradients of the logits, so autograd starts there: no loss graph, no scalar
to sum, one backward pass through all peers. Nothing waits for the device. Each peer's backward
touches that peer alone, since the targets are constants. A metric loss returns the gradients of the
features that its peers give beside their logits, and the same pass takes both.

"simultaneous" updates all peers from the same predictions: K forward and K backward passes a step.

"sequential" is the paper's Algorithm 1: peer 1 is updated, its predictions on the same batch are
recomputed, peer 2 is updated against those, and so on. Only the peer just updated is recomputed,
since the others' predictions could not have changed: 2K - 1 forward and K backward passes. The
recomputation runs in training mode, as the paper's does, but leaves all buffers alone: running
statistics take in each batch once, in the pass that the peer's own update uses. A peer's loss is
reported as it was just before its own update, and its metric loss is computed then alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.optim import Optimizer

from fastdml.cohort import check_logits
from fastdml.engine.accumulate import Split
from fastdml.engine.amp import Amp
from fastdml.engine.ema import Ema
from fastdml.engine.update import Update
from fastdml.engine.weights import Buffers
from fastdml.errors import InputError
from fastdml.loss import MutualLoss, MutualStats

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.metric_losses import MetricLoss

# Layers that record no statistics where their track_running_stats is False.
RECORD_AS_TOLD = (_BatchNorm.forward, SyncBatchNorm.forward)

Outputs = tuple[Tensor, ...]  # of a peer: logits (N, C), and with a metric loss features (N, D)


class StepOutput(NamedTuple):
    """Device tensors; reading one waits for the step to finish."""

    losses: Tensor  # (K,), metric losses included
    stats: MutualStats
    metric: Tensor | None = None  # (K,), where the step has a metric loss


class After(Protocol):
    """What a caller adds to the end of a step, with tensors on the device alone: it may become part
    of a graph and is then called only while that is captured."""

    def __call__(self, output: StepOutput, update: Update) -> None: ...

    def tensors(self) -> list[Tensor]:
        """Those that it changes, the same ones always."""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What every execution understands; the meaning of each is documented at `make_step`."""

    compile: bool = False
    grad_clip: float | None = None
    accumulate: int = 1
    ema: Ema | None = None
    assemble: Callable[..., tuple[Tensor, Tensor]] | None = None
    after: After | None = None
    metric: MetricLoss | None = None
    output: Callable[[Any], Tensor] | None = None


class WithFeatures(nn.Module):
    """What a step with a metric loss runs of a peer: logits (N, C) and features (N, D)."""

    def __init__(self, peer: nn.Module) -> None:
        super().__init__()
        self.peer = peer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.peer.logits_and_features(x)


class EagerStep:
    """`step(images, labels)`. Afterwards, with fp16, `step.update.overflow` (K,) is 1 where a peer
    skipped its update, and `step.update.skipped` () is 1 where all did."""

    name = "eager"

    def __init__(
        self,
        cohort: Cohort,
        loss: MutualLoss,
        optimizer: Optimizer,
        amp: Amp,
        options: StepOptions,
    ) -> None:
        self.cohort, self.peers = cohort, list(cohort.peers)
        self.loss, self.optimizer, self.amp, self.options = loss, optimizer, amp, options
        self.update = Update(cohort, optimizer, amp, grad_clip=options.grad_clip, ema=options.ema)
        self.forwards = self.networks()
        if options.compile:
            self.forwards = [torch.compile(network) for network in self.forwards]

    def __reduce__(self) -> tuple[type[EagerStep], tuple]:
        """Copies and pickles are made anew of copies of what the step was made of."""
        return type(self), (self.cohort, self.loss, self.optimizer, self.amp, self.options)

    def networks(self) -> list[nn.Module]:
        """What is run, and compiled if asked."""
        return self.peers if self.options.metric is None else [WithFeatures(p) for p in self.peers]

    def stale(self) -> bool:
        """Whether what runs was made from peers that have changed since."""
        return False

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes."""
        parts = (self.update, self.options.after, self.options.metric)
        return [t for part in parts if part is not None for t in part.tensors()]

    def __call__(self, *batch: Tensor) -> StepOutput:
        check_gradients_wanted()
        self.update.refresh()
        images, labels = self.options.assemble(*batch) if self.options.assemble else batch
        if isinstance(images, Tensor) and images.is_inference():
            images = images.clone()  # autograd keeps no inference tensor
        try:
            output = self.train(images, labels)
            self.update.finish()
        except BaseException:  # out of memory, perhaps, and the caller goes on with a smaller batch
            self.update.drop_gradients()
            raise
        if self.options.after:
            self.options.after(output, self.update)
        return output

    def train(self, images: Tensor, labels: Tensor) -> StepOutput:
        parts = self.options.accumulate
        if parts == 1:
            output = self.gradients(images, labels, self.loss)
        else:
            if not isinstance(images, Tensor):
                raise InputError(
                    f"accumulate={parts} splits images that are one tensor, not "
                    f"{type(images).__name__}: use accumulate=1"
                )
            if len(labels) % parts:
                raise InputError(
                    f"a batch of {len(labels)} images does not split into accumulate={parts} equal "
                    "parts: choose a batch size that does"
                )
            split = Split(self.loss, labels, parts)
            batches = zip(images.chunk(parts), labels.chunk(parts), strict=True)
            found = [self.gradients(x, y, split.loss) for x, y in batches]
            output = StepOutput(*split.whole(found))
        self.update.apply(range(len(self.peers)))
        return output

    def gradients(self, images: Tensor, labels: Tensor, loss: MutualLoss) -> StepOutput:
        """Adds the gradients of a part of the batch to the weights' own."""
        outputs = self.outputs(images)
        output, grads = self.losses_and_grads([_detached(out) for out in outputs], labels, loss)
        self.backward(outputs, grads)
        return output

    def outputs(self, images: Tensor) -> list[Outputs]:
        """Of all K peers."""
        return [self.forward(k, images) for k in range(len(self.peers))]

    def forward(self, k: int, images: Tensor) -> Outputs:
        """Of peer k; fp16 ones as fp32, so that their gradients are scaled before they are rounded
        to fp16, not after."""
        with self.amp.autocast():
            out = self.forwards[k](images)
        out = self.checked(k, out, images)
        return tuple(t.float() if t.dtype == torch.float16 else t for t in out)

    def checked(self, k: int, out: Any, images: Tensor) -> Outputs:
        """What peer k gave, as far as it is wanted."""
        wanted = 1 if self.options.metric is None else 2
        if self.options.output is not None:
            out = self.options.output(out)
        tensors = out if isinstance(out, (tuple, list)) and len(out) == wanted else (out,)
        name, num_classes = self.cohort.names[k], self.cohort.num_classes
        check_logits(name, tensors[0], images, num_classes, "make_step(output=lambda out: {it})")
        if len(tensors) != wanted:
            raise InputError(f"peer {name} must return logits and features for a metric loss")
        return tuple(tensors)

    def losses_and_grads(
        self,
        outputs: list[Outputs],
        labels: Tensor,
        loss: MutualLoss,
        metric_of: Sequence[int] | None = None,
    ) -> tuple[StepOutput, list[Outputs]]:
        """The losses, and the gradients of all outputs, both unscaled.

        metric_of: the peers whose metric loss is wanted, and whose centres follow; all by default.
        """
        losses, stats, grads = loss.value_and_grad([out[0] for out in outputs], labels)
        if self.options.metric is None:
            return StepOutput(losses, stats), [(g,) for g in grads]
        features = [out[1] for out in outputs]
        metric, more = self.options.metric.value_and_grad(features, labels, metric_of)
        return StepOutput(losses + metric, stats, metric), list(zip(grads, more, strict=True))

    def backward(self, outputs: Sequence[Outputs], grads: Sequence[Outputs]) -> None:
        pairs = zip(chain(*outputs), chain(*grads), strict=True)
        trained = [(t, g) for t, g in pairs if t.requires_grad]
        if not trained:
            return
        tensors, grads = map(list, zip(*trained, strict=True))
        if self.amp.scaler is not None:
            torch._foreach_mul_(grads, self.amp.scaler.scale)
        torch.autograd.backward(tensors, grads)


class SequentialStep(EagerStep):
    """Algorithm 1. With fp16 the scale follows once a training step, after all peers."""

    def train(self, images: Tensor, labels: Tensor) -> StepOutput:
        K = len(self.peers)
        outputs = self.outputs(images)
        predictions = [_detached(out) for out in outputs]
        rounds = []  # the loss as each peer met it
        for k in range(K):
            output, grads = self.losses_and_grads(predictions, labels, self.loss, [k])
            rounds.append(output)
            if not outputs[k][0].requires_grad:
                continue
            self.backward([outputs[k]], [grads[k]])
            self.update.apply([k])
            if k + 1 < K:
                with torch.no_grad(), buffers_kept(self.peers[k]):
                    predictions[k] = self.forward(k, images)
        return _own_rounds(rounds)


def check_gradients_wanted() -> None:
    """A training step that autograd does not follow trains nothing, or leaves half of it out."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        raise InputError(
            f"a training step under torch.{mode}() computes no gradients: call the step outside of "
            "it, and cohort(images) for predictions"
        )


def _detached(out: Outputs) -> Outputs:
    return tuple(t.detach() for t in out)


def _own_rounds(rounds: list[StepOutput]) -> StepOutput:
    """Peer k's figures from the k-th round; the ensemble's from the first, before any update."""

    def own(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([value[k] for k, value in enumerate(values)])

    stats = [r.stats for r in rounds]
    return StepOutput(
        own(r.losses for r in rounds),
        stats[0]._replace(
            ce=own(s.ce for s in stats),
            kl=own(s.kl for s in stats),
            entropy=own(s.entropy for s in stats),
            correct=own(s.correct for s in stats),
            pairwise_kl=own(s.pairwise_kl.T for s in stats).T,  # column k is what student k met
        ),
        None if rounds[0].metric is None else own(r.metric for r in rounds),
    )


@contextmanager
def buffers_kept(peer: nn.Module) -> Iterator[None]:
    """A pass in training mode inside leaves no buffer changed.

    torch's BatchNorm is told to record nothing, which costs nothing; all others, such as the
    vectors of spectral norm or the statistics of InstanceNorm, are copied and put back.
    """
    norms = [m for m in peer.modules() if type(m).forward in RECORD_AS_TOLD]
    norms = [m for m in norms if m.track_running_stats]
    told = {id(t) for m in norms for t in m._buffers.values()}
    buffers = Buffers(peer)
    kept = [(t, t.clone()) for t in peer.buffers() if id(t) not in told]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True
        buffers.put_back()
        for t, value in kept:
            t.copy_(value)
