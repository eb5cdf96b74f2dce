"""The paper's Algorithm 1: peer 1 is updated, its predictions on the same batch are recomputed,
peer 2 is updated against those, and so on.

Only the peer just updated is recomputed, since the others' predictions could not have changed:
2K - 1 forward and K backward passes. The recomputation runs in training mode, as the paper's does,
but leaves all buffers alone: running statistics take in each batch once, in the pass that the
peer's own update uses. A peer's loss is reported as it was just before its own update, and only
then is its metric loss computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdml.engine.eager import EagerStep, detached
from fastdml.engine.execution import StepOutput, register_execution
from fastdml.engine.rollback import Buffers
from fastdml.mutual_stats import MutualStats

# Layers that record no statistics where their track_running_stats is False.
RECORD_AS_TOLD = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


@register_execution("eager", update="sequential")
class SequentialStep(EagerStep):
    """Algorithm 1. With fp16 the scale follows once a training step, after all peers."""

    def train(self, images: Tensor, labels: Tensor) -> StepOutput:
        K = len(self.peers)
        outputs = self.outputs(images)
        predictions = [detached(out) for out in outputs]
        rounds = []  # the losses just before each peer's update
        for k in range(K):
            output, grads = self.losses_and_grads(predictions, labels, self.loss, [k])
            rounds.append(self.of_peers(output))
            if not outputs[k][0].requires_grad:
                continue
            self.backward([outputs[k]], [grads[k]])
            self.update.apply([k])
            if k + 1 < K:
                with torch.no_grad(), buffers_kept(self.peers[k]):
                    predictions[k] = self.forward(k, images)
        return _own_rounds(rounds)


def _own_rounds(rounds: list[StepOutput]) -> StepOutput:
    """Peer k's figures from the k-th round; the ensemble's from the first, before any update."""

    def own(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([value[k] for k, value in enumerate(values)])

    at, K = rounds[0].stats.layout, len(rounds)
    met = torch.stack([r.stats.packed for r in rounds])  # (K rounds, at.size)
    stats = MutualStats.from_packed(met[0].clone(), K)
    for name in ("ce", "kl", "entropy", "correct"):
        stats.packed[at.span(name)] = met[:, at.span(name)].diagonal()
    pairs = met[:, at.span("pairwise_kl")].view(K, K, K)  # of round, teacher, student
    stats.pairwise_kl.copy_(pairs.diagonal(dim1=0, dim2=2))  # column k is what student k met
    metrics = [r.metric for r in rounds if r.metric is not None]
    taught = [r.teacher_kl.T for r in rounds if r.teacher_kl is not None]  # each (K, M)
    return StepOutput(
        own(r.losses for r in rounds),
        stats,
        own(metrics) if metrics else None,
        own(taught).T if taught else None,
    )


@contextmanager
def buffers_kept(peer: nn.Module) -> Iterator[None]:
    """A forward pass in training mode within it leaves all buffers as they were.

    torch's BatchNorm is told to record nothing, which costs nothing; all others, such as the
    vectors of spectral norm or the statistics of InstanceNorm, are copied and put back.
    """
    norms: list[Any] = [m for m in peer.modules() if type(m).forward in RECORD_AS_TOLD]
    norms = [m for m in norms if m.track_running_stats]
    told = {id(t) for m in norms for t in m.buffers(recurse=False)}
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
