"""The eager training step: forward all peers, one fused loss, one backward, one update.

The loss returns the gradients of the logits, so autograd starts there: no loss graph, no scalar
to sum, one backward pass through all peers. Nothing waits for the device. Each peer's backward
touches that peer alone, since the targets are constants. A metric loss returns the gradients of the
features that its peers give beside their logits, and the same pass takes both.

All peers are updated from the same predictions: K forward and K backward passes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdml.cohort import REMEDY, check_logits
from fastdml.engine.amp import Amp
from fastdml.engine.execution import ExecutionName, StepOptions, StepOutput, register_execution
from fastdml.engine.update import Update
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.mutual_stats import MutualStats
from fastdml.parallel.global_means import GlobalMeans
from fastdml.torch_private import foreach_mul_

if TYPE_CHECKING:
    from fastdml.cohort import Cohort

Outputs = tuple[Tensor, ...]  # of a peer: logits (N, C), and with a metric loss features (N, D)


class WithFeatures(nn.Module):
    """A peer as a step with a metric loss runs it: to logits (N, C) and features (N, D)."""

    def __init__(self, peer: nn.Module) -> None:
        super().__init__()
        self.peer = peer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        peer: Any = self.peer
        return peer.logits_and_features(x)


@register_execution("eager", turn=0)
class EagerStep:
    """`step(images, labels)`. Afterwards, with fp16, `step.update.overflow` (K,) is 1 where a peer
    skipped its update, and `step.update.skipped` () is 1 where all did."""

    name: ExecutionName = "eager"
    failure: str | None = None

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
        self.update = Update(
            cohort,
            optimizer,
            amp,
            grad_clip=options.grad_clip,
            ema=options.ema,
            mesh=options.mesh,
        )
        networks = self.networks()
        self.learning = len(networks)
        self.teachers = cohort.teachers
        self.given: list[Tensor] | None = None  # their logits on the batch, where they are known
        # The networks that learn, then the teachers.
        self.forwards: list[Callable[[Tensor], Any]] = [*networks, *self.teachers]
        if options.compile:
            self.forwards = [torch.compile(network) for network in self.forwards]

    def __reduce__(self) -> tuple[type[EagerStep], tuple[Any, ...]]:
        """A copy or pickle holds the arguments that the step was made from, and makes it anew."""
        return type(self), (self.cohort, self.loss, self.optimizer, self.amp, self.options)

    def networks(self) -> list[nn.Module]:
        """The networks to run, one a peer; the caller compiles them if asked."""
        return self.peers if self.options.metric is None else [WithFeatures(p) for p in self.peers]

    def stale(self) -> bool:
        """Whether the peers have changed since the networks that run were made from them."""
        return False

    def refresh(self) -> None:
        """Takes the peers and the optimizer's groups as they are now."""
        self.update.refresh()

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes."""
        parts = (self.update, self.options.after, self.options.metric)
        return [t for part in parts if part is not None for t in part.tensors()]

    def release(self) -> None:
        """Does nothing: eager steps leave the peers' memory as it is."""

    def rehearse(self) -> None:
        """Does nothing: a timed step runs as any other."""

    def __call__(self, *batch: Tensor) -> StepOutput:
        check_gradients_wanted()
        self.refresh()
        if self.cohort.teachers is not self.teachers:
            raise InputError(
                "the cohort has other teachers than when the step was made: make a new step"
            )
        if self.options.taught is not None:
            *given, key = batch
            batch, self.given = tuple(given), self.options.taught(key)
        images, labels = self.options.assemble(*batch) if self.options.assemble else batch
        if isinstance(images, Tensor) and images.is_inference():
            images = images.clone()  # autograd cannot save inference tensors
        try:
            output = self.train(images, labels)
            self.update.finish()
        except BaseException:  # a caller that ran out of memory may go on with a smaller batch
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
            batches = self.parts_of(images, labels)
            means = GlobalMeans(self.loss, labels, parts=parts)
            found = [self.gradients(x, y, means.loss) for x, y in batches]
            output = StepOutput(*means.whole(found))
        self.update.apply(range(len(self.peers)))
        return self.of_peers(output)

    def parts_of(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch in its parts; `given` is the current part's while they are run."""
        parts = self.options.accumulate
        if parts == 1:
            return iter([(images, labels)])
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
        return self._parts_of(images, labels, parts)

    def _parts_of(
        self, images: Tensor, labels: Tensor, parts: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        given = self.given
        for i, pair in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            self.given = given and [z.chunk(parts)[i] for z in given]
            yield pair

    def of_peers(self, output: StepOutput) -> StepOutput:
        """The peers' figures alone, and beside them their divergence from the teachers."""
        return output.of_peers(len(self.peers)) if self.teachers else output

    def gradients(self, images: Tensor, labels: Tensor, loss: MutualLoss) -> StepOutput:
        """Computes a part of the batch and adds its gradients to those in the weights."""
        outputs = self.outputs(images)
        output, grads = self.losses_and_grads([detached(out) for out in outputs], labels, loss)
        self.backward(outputs, grads)
        return output

    def outputs(self, images: Tensor) -> list[Outputs]:
        """The outputs of all K peers, then the logits of each teacher."""
        return [self.forward(k, images) for k in range(len(self.forwards))]

    def forward(self, k: int, images: Tensor) -> Outputs:
        """The outputs of peer k, or from K on of a teacher. fp16 is cast to fp32, so that gradients
        are multiplied by the loss scale before they are rounded to fp16, not after."""
        out = self.run(k, images)
        return tuple(map(widened, out))

    def run(self, k: int, images: Tensor) -> Outputs:
        """The outputs as the network gives them, checked."""
        taught = k - self.learning
        out: Any
        if taught >= 0 and self.given is not None:
            out = self.given[taught]
        else:
            with self.amp.autocast():
                out = self.forwards[k](images)
        return self.checked(k, out, images) if taught < 0 else self.lesson(taught, out, images)

    def lesson(self, t: int, out: Any, images: Tensor) -> Outputs:
        """The logits in what teacher t returned. Raises InputError where they are not in it."""
        if self.options.output is not None and not isinstance(out, Tensor):
            out = self.options.output(out)
        name, num_classes = self.teachers[t].name, self.cohort.num_classes
        check_logits(name, out, images, num_classes, REMEDY, role="teacher")
        return (out,)

    def checked(self, k: int, out: Any, images: Tensor) -> Outputs:
        """Logits, and features if there is a metric loss, from what peer k returned. Raises
        InputError where they are not in it."""
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
        learning: Sequence[int] | None = None,
    ) -> tuple[StepOutput, list[Outputs]]:
        """The losses, and the gradients of the peers' outputs, both unscaled.

        learning: the peers that are about to be updated, all by default: of these the metric loss
        is computed and the centres move. Where there are teachers, the others' logits get no
        gradient, but None.
        """
        K = len(self.peers)
        students: Sequence[int] | None = None
        if self.teachers:
            students = range(K) if learning is None else learning
        logits = [out[0] for out in outputs]
        losses, stats, grads = self.logit_grads(logits, labels, loss, students)
        if self.options.metric is None:
            return StepOutput(losses, stats), [(g,) for g in grads]
        features = [out[1] for out in outputs[:K]]
        metric, more = self.options.metric.value_and_grad(features, labels, learning)
        output = StepOutput(with_metric(losses, metric), stats, metric)
        return output, list(zip(grads, more, strict=True))

    def logit_grads(
        self,
        logits: Sequence[Tensor],
        labels: Tensor,
        loss: MutualLoss,
        students: Sequence[int] | None,
    ) -> tuple[Tensor, MutualStats, list[Any]]:
        """Losses and statistics of peers and teachers, and the gradients of the peers' logits, None
        for those that are no students. students: None for all, where there are no teachers."""
        K = len(self.peers)
        if students is not None:
            for k, z in enumerate(logits):  # detached: this tells the loss who learns, no more
                z.requires_grad_(k in students)
        losses, stats, grads = loss.value_and_grad(logits, labels)
        if self.teachers:
            count_ensemble(stats, logits[:K], labels, self.cohort.groups)
        return losses, stats, grads[:K]

    def backward(self, outputs: Sequence[Outputs], grads: Sequence[Outputs]) -> None:
        pairs = zip(chain(*outputs[: len(grads)]), chain(*grads), strict=True)
        trained = [(t, g) for t, g in pairs if t.requires_grad]
        if not trained:
            return
        tensors, grads = map(list, zip(*trained, strict=True))
        if self.amp.scaler is not None:
            foreach_mul_(grads, self.amp.scaler.scale)
        torch.autograd.backward(tensors, grads)


def check_gradients_wanted() -> None:
    """A training step that autograd does not follow trains nothing, or leaves half of it out."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        raise InputError(
            f"a training step under torch.{mode}() computes no gradients: call the step outside of "
            "it, and cohort(images) for predictions"
        )


def with_metric(losses: Tensor, metric: Tensor) -> Tensor:
    """The losses of peers and teachers (K + M,) with those on features (K,) added to the peers'."""
    K = len(metric)
    return losses + metric if len(losses) == K else torch.cat([losses[:K] + metric, losses[K:]])


@torch.no_grad()
def count_ensemble(
    stats: MutualStats, logits: Sequence[Tensor], labels: Tensor, groups: int = 1
) -> None:
    """Makes `ensemble_correct` that of the peers' `logits` alone, of groups the mean; the loss
    counted teachers too."""
    size, found = len(logits) // groups, []
    for start in range(0, len(logits), size):
        right = stats.correct[start]
        if size > 1:
            kind = torch.promote_types(logits[0].dtype, torch.float32)
            own = logits[start : start + size]
            mean = torch.stack([z.softmax(1, dtype=kind) for z in own]).mean(0)
            right = (mean.argmax(1) == labels).sum()
        found.append(right)
    stats.ensemble_correct.copy_(found[0] if groups == 1 else torch.stack(found).double().mean())


def widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype == torch.float16 else t


def detached(out: Outputs) -> Outputs:
    return tuple(t.detach() for t in out)
