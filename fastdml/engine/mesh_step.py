"""The training step on a mesh of ranks: each trains the peers of its row on its column's share of
the batch.

A part of the batch: receptions are posted, the local peers run, the logits of each leave when its
forward pass ends, and the loss, which has the logits of all K peers, computes gradients for the
local ones alone. It costs the forward passes, the exchange of the last local peer, and the backward
passes. With accumulate of 2 or more the parts are pipelined: part i's logits travel while part i+1
runs forward, so that the exchange hides where it is shorter than a part's forward passes.

torch's generators are seeded by (seed, peer, step, part) for each forward pass of a peer and put
back behind it: what a peer draws (dropout) does not depend on which peers run beside it, nor on the
mesh, of which the parts of a batch are `accumulate` a column. That takes the host 5 microseconds
(one thread of a shared AMD EPYC), so that nobody looks whether a peer draws. Python's own and
numpy's generators are left alone.

Peers on different rows may learn from each other at every n-th step only, or from copies of each
other that are refreshed then (`exchange` and `exchange_every` of `make_step`).

A mesh of one rank runs the same code and communicates with nobody.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from fastdml_kernels.stats_layout import stats_layout
from torch import Tensor, nn

from fastdml.engine.eager import EagerStep, Outputs, WithFeatures, widened, with_metric
from fastdml.engine.execution import ExecutionName, StepOutput
from fastdml.engine.streams import StreamsStep
from fastdml.engine.update import NOTHING_TRAINED
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.metric_losses import MetricLoss
from fastdml.mutual_stats import MutualStats
from fastdml.parallel.exchange import Exchange, Kind, Transfer
from fastdml.parallel.global_means import GlobalMeans
from fastdml.parallel.mesh import Mesh
from fastdml.parallel.metric_share import MetricShare
from fastdml.parallel.replicas import Replicas
from fastdml.parallel.stale_peers import StalePeers


class Part(NamedTuple):
    """A part of the batch after its forward passes, with its logits under way."""

    outputs: list[Outputs]  # of K peers and M teachers; () of those that do not run here
    labels: Tensor
    transfer: Transfer | None
    metric: MetricShare | None


class MeshStep(EagerStep):
    """What steps of any execution do on a mesh. `number`: of steps begun, which seeds what peers
    draw and says when they exchange; a run that resumes sets it. `exchange`: counts what travels.
    The output is this column's share (`parallel.total` adds the columns'); what it says of peers
    elsewhere is not to be used. At steps without an exchange of logits the divergences and the
    ensemble's hits are 0."""

    mesh: Mesh

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        mesh, options = self.options.mesh, self.options
        assert mesh is not None
        self.mesh, self.local, self.rows = mesh, mesh.local, mesh.rows
        self.exchange = Exchange(mesh)
        self.remote = self.exchange.remote
        self.places = torch.tensor(self.local, device=self.amp.device)
        self.number = 0
        self.part = 0  # of the whole batch's, the one that runs
        self.transfer: Transfer | None = None  # of that part
        # In which dtypes each peer's logits and features come, once all ranks have said so.
        self.dtypes: dict[int, tuple[torch.dtype, ...]] = {}
        self.agreed = False
        self.broken = False  # a step failed here, and other ranks may have gone on
        self.drawing: frozenset[int] = frozenset()  # peers that drew at the first step
        self.in_graph = False  # the call is a part of a captured step
        self.stale_peers: StalePeers | None = None
        if options.exchange == "weights" and self.remote:
            self.stale_peers = StalePeers(self.cohort, mesh, self.exchange)
            for k, peer in self.stale_peers.copies.items():
                self.forwards[k] = self._wrap(peer)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy draws and exchanges from the same step on. It is made on all ranks together."""
        return (*super().__reduce__(), {"number": self.number})

    # ---- networks

    def _wrap(self, peer: nn.Module) -> nn.Module:
        return peer if self.options.metric is None else WithFeatures(peer)

    def networks(self) -> list[nn.Module]:
        assert self.options.mesh is not None
        self.replicas = Replicas(self.cohort, self.options.mesh, self._wrap)
        return [*self.replicas.networks]

    def refresh(self) -> None:
        if self.replicas.refresh(self.update.refresh()):
            for k in self.local:
                self.forwards[k] = self.replicas.networks[k]

    def tensors(self) -> list[Tensor]:
        copies = {} if self.stale_peers is None else self.stale_peers.copies
        return super().tensors() + [t for peer in copies.values() for t in peer.buffers()]

    def fetch(self) -> None:
        """Brings the copies of the other rows' peers up to date, at the steps at which that is
        due."""
        if self.stale_peers is not None:
            self.stale_peers.follow()
            if not self.stale_peers.fetched or self.number % self.options.exchange_every == 0:
                self.stale_peers.fetch()

    def state_dict(self) -> dict[str, Any]:
        """What this rank must keep to go on bit for bit, beside what `tensors` lists."""
        return {} if self.stale_peers is None else self.stale_peers.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Without a state of the same mesh the next step fetches the copies anew."""
        if self.stale_peers is not None:
            self.stale_peers.load_state_dict(state)

    # ---- a step

    def __call__(self, *batch: Tensor) -> StepOutput:
        if self.broken:
            raise InputError(
                "a step failed on this rank, so that what ranks of the mesh send each other no "
                "longer belongs together: start all ranks anew, from a checkpoint"
            )
        if self.mesh.rows is not self.rows:
            raise InputError(
                "the mesh has given rows to the peers of another cohort since this step was made: "
                "make a mesh for each cohort"
            )
        if not self.in_graph:
            self.fetch()
        return super().__call__(*batch)

    @property
    def mutual(self) -> bool:
        """Whether peers learn from each other at this step."""
        every = self.options.exchange_every
        return self.options.exchange == "weights" or self.number % every == 0

    def train(self, images: Tensor, labels: Tensor) -> StepOutput:
        batches, agreed = self.parts_of(images, labels), self.agreed
        try:
            return self._train(batches, labels)
        except BaseException:  # at the first part of all, every rank raises
            self.broken = (agreed or self.agreed) and self.mesh.world > 1 and not self.in_graph
            raise

    def _train(self, batches: Iterator[tuple[Tensor, Tensor]], labels: Tensor) -> StepOutput:
        mesh, parts = self.mesh, self.options.accumulate
        whole = parts == mesh.data == 1
        means = None if whole else GlobalMeans(self.loss, labels, mesh, parts)
        found: list[StepOutput] = []
        waiting: Part | None = None
        with self.replicas.unsynchronised() if parts > 1 else nullcontext():
            for i, (x, y) in enumerate(batches):
                self.part = mesh.column * parts + i
                part = self.forwarded(x, y)
                if waiting is not None:
                    found.append(self.finished(waiting, means.loss if means else self.loss))
                waiting = part
        assert waiting is not None
        if parts > 1:
            self.replicas.synchronise()
        found.append(self.finished(waiting, means.loss if means else self.loss))
        self.replicas.check()
        metric = found[-1].metric
        output = StepOutput(*means.whole(found)) if means else found[0]
        self.update.apply(self.local)
        output = self._of_peers(output)
        if metric is not None:
            output = output._replace(losses=with_metric(output.losses, metric), metric=metric)
        self.number += 1
        return output

    def _of_peers(self, output: StepOutput) -> StepOutput:
        if self.mutual:
            return self.of_peers(output)
        K, M = len(self.peers), len(self.teachers)
        zeros = output.losses.new_zeros(M, K) if M else None
        return output._replace(teacher_kl=zeros)

    def forwarded(self, images: Tensor, labels: Tensor) -> Part:
        """Runs the local peers and the teachers; the peers' logits leave as each is done."""
        metric = None
        if self.options.metric is not None:
            loss = self.options.metric if self.mutual else without_mutual(self.options.metric)
            metric = MetricShare(loss, self.mesh, self.exchange, len(labels))
        sends = self.mutual and self.stale_peers is None and self.mesh.peer > 1
        if self.agreed:
            self.transfer = self._begin(len(labels)) if sends else None
            outputs = self.outputs(images)
        else:
            outputs = self._first(images, labels)
            if sends:
                self.transfer = self._begin(len(labels))
                for k in self.local:  # fp16 was widened, which this undoes exactly
                    self.transfer.give(k, outputs[k][0].detach().to(self.dtypes[k][0]))
        if metric is not None:
            features = {k: out[1] for k, out in enumerate(outputs[: self.learning]) if out}
            metric.post(features, labels, {k: own[1] for k, own in self.dtypes.items()})
        return Part(outputs, labels, self.transfer, metric)

    def finished(self, part: Part, loss: MutualLoss) -> StepOutput:
        """The losses of a part whose forward passes are done, and the local peers' backward."""
        received = {} if part.transfer is None else part.transfer.wait()
        if self.mutual:
            logits = [
                out[0].detach() if out else widened(received[k])
                for k, out in enumerate(part.outputs)
            ]
            losses, stats, grads = self.logit_grads(logits, part.labels, loss, self._students())
        else:
            losses, stats, grads = self._alone(part, loss)
        of_outputs: list[Outputs] = [(grads[k],) for k in self.local]
        metric = None
        if part.metric is not None:
            metric, more = part.metric.value_and_grad()
            of_outputs = [(grads[k], more[k]) for k in self.local]
        self.backward([part.outputs[k] for k in self.local], of_outputs)
        return StepOutput(losses, stats, metric)

    def _students(self) -> Sequence[int] | None:
        """The peers that the loss computes gradients for; None for all. Gradients into teachers are
        sums over the losses of all that learn from them."""
        if not self.loss.options.detach_targets:
            return range(len(self.peers)) if self.teachers else None
        return self.local if self.remote or self.teachers else None

    def _alone(self, part: Part, loss: MutualLoss) -> tuple[Tensor, MutualStats, list[Any]]:
        """The local peers' losses at a step at which nobody learns from anybody."""
        K, index = len(self.peers), self.places
        logits = [part.outputs[k][0].detach() for k in self.local]
        losses, stats, own = without_kl(loss).value_and_grad(logits, part.labels)
        grads: list[Any] = [None] * K
        for k, grad in zip(self.local, own, strict=True):
            grads[k] = grad
        views = stats.layout.views(stats.packed)
        found = {name: views[name] for name in ("label_weight", "labelled")}
        for name in ("ce", "entropy", "correct"):
            found[name] = _spread(views[name], index, K)
        found["kl"], found["pairwise_kl"] = (stats.packed.new_zeros(s) for s in ((K,), (K, K)))
        found["ensemble_correct"] = torch.zeros_like(views["ensemble_correct"])
        whole = MutualStats.from_packed(stats_layout(K).pack(found), K)
        return _spread(losses, index, K), whole, grads

    # ---- forward passes

    def run(self, k: int, images: Tensor) -> Outputs:
        """Of a local peer, a copy or a teacher as ever; of a peer elsewhere nothing."""
        if k >= self.learning:
            return super().run(k, images) if self.mutual else ()
        if k not in self.local and self.stale_peers is None:
            return ()
        key = (self.options.seed, k, self.number, self.part)
        with nullcontext() if self.in_graph else seeded(key, images.device) as drew:
            if k not in self.local:
                with torch.no_grad():
                    return super().run(k, images)
            out = super().run(k, images)
            if not self.agreed and drew is not None and drew():
                self.drawing |= {k}
        dtypes = tuple(t.dtype for t in out)
        if self.dtypes.setdefault(k, dtypes) != dtypes:
            was, now = (", ".join(map(str, ds)) for ds in (self.dtypes[k], dtypes))
            raise InputError(
                f"peer {self.cohort.names[k]} gives {now}, and at the first step gave {was}, which "
                "other ranks expect: make a new step"
            )
        if self.transfer is not None:
            self.transfer.give(k, out[0])
        return out

    def _begin(self, rows: int) -> Transfer:
        shape = (rows, self.cohort.num_classes)
        return self.exchange.begin({k: Kind(shape, self.dtypes[k][0]) for k in self.remote})

    def _first(self, images: Tensor, labels: Tensor) -> list[Outputs]:
        """The outputs of the first part of the first step: nothing travels before all ranks know
        that all peers give logits, and in which dtype. Raises on every rank where one cannot go on,
        InputError of one rank on all."""
        self.transfer, outputs, failed = None, [], None
        try:
            outputs = self.outputs(images)
        except Exception as error:
            failed = error
        own = {} if failed else {k: [_name(d) for d in self.dtypes[k]] for k in self.local}
        told = {
            "failed": _brief(failed, self.mesh.rank),
            "own": [*own.items()],
            "rows": len(labels),
            "trains": any(w.requires_grad for ws in self.update.holdings.weights for w in ws),
            "drawing": sorted(self.drawing),
        }
        self._take(self.mesh.gather(told), failed)
        return outputs

    def _take(self, told: list[dict[str, Any]], failed: Exception | None) -> None:
        """Takes in what every rank said of its first step."""
        mesh = self.mesh
        for of_rank in told:
            if of_rank["failed"]:
                own = failed is not None and not isinstance(failed, InputError)
                raise failed if own and failed else InputError(of_rank["failed"])
        if not any(of_rank["trains"] for of_rank in told):
            raise InputError(NOTHING_TRAINED)
        column = range(mesh.column, mesh.world, mesh.data)
        rows = {rank: told[rank]["rows"] for rank in column}
        if len({*rows.values()}) > 1:
            each = ", ".join(f"rank {rank} {n}" for rank, n in rows.items())
            raise InputError(
                f"ranks whose peers learn from each other take the same batch, and got other "
                f"numbers of rows: {each}"
            )
        self.dtypes = {
            k: tuple(getattr(torch, name) for name in names)
            for rank in column
            for k, names in told[rank]["own"]
        }
        self.drawing = frozenset(k for of_rank in told for k in of_rank["drawing"])
        self.agreed = True


class MeshEagerStep(MeshStep):
    name: ExecutionName = "eager"


class MeshStreamsStep(MeshStep, StreamsStep):
    name: ExecutionName = "streams"


def without_kl(loss: MutualLoss) -> MutualLoss:
    """The cross-entropy of `loss` alone, of any number of peers."""
    options = loss.options
    return MutualLoss(
        ce_weight=loss.ce_weight,
        kl_weight=0.0,
        class_weight=loss.class_weight,
        label_smoothing=options.label_smoothing,
        ignore_index=options.ignore_index,
        mimic_ignored=options.mimic_ignored,
        reduction=options.reduction,
    )


def without_mutual(metric: MetricLoss) -> MetricLoss:
    """`metric` without what peers learn from each other's distances; the centres are its own."""
    own = copy.copy(metric)
    own.weights = metric.weights | {"distance_mutual": 0.0}
    return own


def _spread(values: Tensor, index: Tensor, K: int) -> Tensor:
    """Values of some peers (L, ...) at their places among K, and 0 elsewhere."""
    return values.new_zeros(K, *values.shape[1:]).index_copy_(0, index, values)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _brief(error: Exception | None, rank: int) -> str:
    """An error in one line; "" for none."""
    if error is None or isinstance(error, InputError):
        return str(error or "")
    return f"rank {rank}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def seeded(key: tuple[int, int, int, int], device: torch.device) -> Iterator[Callable[[], bool]]:
    """Within it torch's generators, the host's and the device's, draw what belongs to `key`: (seed,
    peer, step, part). Behind it they go on as if nothing had been drawn. Gives a function that says
    whether anything was."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    before = [g.get_state() for g in generators]
    for g in generators:
        g.manual_seed(seed)

    def drew() -> bool:
        now = [g.get_state().numpy().tobytes() for g in generators]
        for g in generators:
            g.manual_seed(seed)
        return now != [g.get_state().numpy().tobytes() for g in generators]

    try:
        yield drew
    finally:
        for g, state in zip(generators, before, strict=True):
            g.set_state(state)
