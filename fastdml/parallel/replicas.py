"""The peers of a row in all columns of a mesh: torch's DistributedDataParallel around each, on a
group of its own, so that every column has the sum of all columns' gradients after a backward pass.

The sum and not the mean: the loss of each column is divided by the rows of the whole batch already
(`fastdml.parallel.global_means`). Of two columns it is bit for bit what one process has that
computes the two shares one after the other; of more it differs by the order of the sums.

A parameter that takes no part in a backward pass would leave its bucket, and all behind it, without
a sum, and DistributedDataParallel would say so at the next step, when the weights have moved on.
`check` says so before they move, by name.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastdml.errors import InputError
from fastdml.parallel import ending
from fastdml.parallel.shards import is_sharded, sum_gradients
from fastdml.torch_private import sum_in_next_backward

if TYPE_CHECKING:
    from fastdml.cohort import Cohort
    from fastdml.parallel.mesh import Mesh

STATISTICS = "running_"  # buffers of these names are each column's own
# The argument was renamed; the name of old warns.
_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


class Replica(DistributedDataParallel):
    """A network whose gradients are summed over the processes of a group, which all make it at the
    same time from the same weights."""

    def __init__(self, network: nn.Module, group: dist.ProcessGroup) -> None:
        options: dict[str, Any] = {_BUFFERS: False}
        super().__init__(
            network,
            process_group=group,
            init_sync=False,
            gradient_as_bucket_view=True,  # no second copy of the gradients
            **options,
        )
        self.sums = Sums(group)
        self.register_comm_hook(self.sums, _sum)
        ending.hold(self)


class Sums:
    """What the communication of a replica's gradients knows. Not the replica: that would never be
    freed, since the garbage collector does not see who holds a hook. `all`: whether the sum of the
    last bucket has begun, and with it all."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.all = group, False


def _sum(sums: Sums, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sums a bucket over the group: DistributedDataParallel's own divides by the group's size."""
    sums.all = sums.all or bucket.is_last()  # they begin in order
    work = dist.all_reduce(bucket.buffer(), group=sums.group, async_op=True)
    assert work is not None  # this process is in the group
    return work.get_future().then(lambda done: done.value()[0])


# DistributedDataParallel compares annotations with these types, and not with their names.
_sum.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}


class Replicas:
    """The networks that a step on a mesh runs, one a peer: `networks`.

    A peer of the own row is replicated where the mesh has several columns and the peer something to
    train, unless it is sharded: its shards have a sum of their own. Its weights become those of
    column 0, and its buffers but for running statistics. wrap: makes what runs of a peer, such as
    one that gives its features too.

    Raises InputError for peers that communicate by themselves, and for those that are not the same
    network in all columns.
    """

    def __init__(
        self, cohort: Cohort, mesh: Mesh, wrap: Callable[[nn.Module], nn.Module] = lambda peer: peer
    ) -> None:
        self.cohort, self.mesh, self.wrap = cohort, mesh, wrap
        self.networks: list[nn.Module] = list(cohort.peers)
        self.weights: dict[int, list[nn.Parameter]] = {}  # of the local peers
        self.trained: dict[int, list[bool]] = {}
        for k in mesh.local:
            self._replicate(k)

    def _replicate(self, k: int) -> None:
        peer = self.cohort.peers[k]
        self.weights[k] = list(peer.parameters())
        self.trained[k] = [w.requires_grad for w in self.weights[k]]
        # An earlier replica goes first: its hooks on the parameters go with it.
        self.networks[k] = network = self.wrap(peer)
        name, group = self.cohort.names[k], self.mesh.data_group_of(k)
        if self.mesh.world > 1:
            _check_silent(peer, name)
        if self.mesh.data > 1 and not is_sharded(peer):
            assert group is not None  # of the own row
            _check_alike(peer, name, group)
            _follow_first(peer, group)
            if any(self.trained[k]):
                self.networks[k] = Replica(network, group)

    def refresh(self, replaced: bool) -> bool:
        """Replicates peers anew that train other parameters than before, in all columns at the same
        step. replaced: whether parameters or layers may be other ones; else it is looked at which
        of them train. Returns whether `networks` has changed."""
        changed = []
        for k, weights in self.weights.items():
            now = list(self.cohort.peers[k].parameters()) if replaced else weights
            same = not replaced or (len(now) == len(weights) and all(map(_is, now, weights)))
            if not same or [w.requires_grad for w in now] != self.trained[k]:
                changed.append(k)
        for k in changed:
            self._replicate(k)
        return bool(changed)

    @contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """Backward passes within it add gradients up in this process alone: those of all parts of a
        batch but the last. Forward passes of all parts run within it too."""
        with ExitStack() as stack:
            for network in self.replicated().values():
                stack.enter_context(network.no_sync())
            for peer in self._sharded():
                sum_gradients(peer, False)
            yield

    def synchronise(self) -> None:
        """Has the next backward pass, of the last part of a batch whose forward passes ran
        `unsynchronised`, sum what has come together."""
        for network in self.replicated().values():
            sum_in_next_backward(network)
        for peer in self._sharded():
            sum_gradients(peer, True)

    def _sharded(self) -> list[nn.Module]:
        return [p for p in map(self.cohort.peers.__getitem__, self.mesh.local) if is_sharded(p)]

    def replicated(self) -> dict[int, Replica]:
        """The networks whose gradients are summed, by peer."""
        return {k: n for k, n in enumerate(self.networks) if isinstance(n, Replica)}

    def check(self) -> None:
        """After the last backward pass of a step, before weights change: raises InputError where a
        gradient was not summed, with the parameters that have none."""
        for k, network in self.replicated().items():
            complete, network.sums.all = network.sums.all, False
            if complete:
                continue
            name, peer = self.cohort.names[k], self.cohort.peers[k]
            named = [(n, w) for n, w in peer.named_parameters() if w.requires_grad]
            without = [n for n, w in named if w.grad is None]
            what = ", ".join(without[:5]) + (", ..." if len(without) > 5 else "")
            which = f"{len(without)} of {len(named)} parameters" if without else "some parameters"
            raise InputError(
                f"peer {name}: {which} took no part in the backward pass"
                f"{f' ({what})' if what else ''}, so that its gradients cannot be summed over the "
                "data axis: freeze them with requires_grad_(False), or train with data=1"
            )


def _is(a: object, b: object) -> bool:
    return a is b


def _check_silent(peer: nn.Module, name: str) -> None:
    """Refuses what communicates over all ranks, among which are those of other peers."""
    remedies = {
        DistributedDataParallel: "give the network without it, which a mesh replicates itself",
        nn.SyncBatchNorm: "use nn.BatchNorm and parallel.sync_batchnorm (--sync-batchnorm)",
    }
    for where, m in peer.named_modules():
        for kind, remedy in remedies.items():
            if isinstance(m, kind):
                at = f" at {where}" if where else ""
                raise InputError(
                    f"peer {name} has a {kind.__name__}{at}, which knows nothing of a mesh: "
                    f"{remedy}"
                )


def _check_alike(network: nn.Module, name: str, group: dist.ProcessGroup) -> None:
    """Raises InputError on every process where they disagree on names, shapes, dtypes or on what
    trains. Waits for the others."""
    parameters = [
        (n, tuple(w.shape), str(w.dtype), w.requires_grad) for n, w in network.named_parameters()
    ]
    buffers = [(n, tuple(b.shape), str(b.dtype)) for n, b in network.named_buffers()]
    digest = hashlib.sha256(repr((parameters, buffers)).encode()).digest()
    own = int.from_bytes(digest[:7], "big")
    device = next(network.parameters()).device  # every peer has some
    found = torch.tensor([own, -own], dtype=torch.int64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    if found.tolist() != [own, -own]:
        raise InputError(
            f"peer {name} is not the same network in all processes of the data axis: its "
            "parameters, their shapes or requires_grad differ; build and change it alike in each"
        )


@torch.no_grad()
def _follow_first(network: nn.Module, group: dist.ProcessGroup) -> None:
    tensors: list[Tensor] = [*network.parameters()]
    for name, buffer in network.named_buffers():
        if not name.rpartition(".")[2].startswith(STATISTICS):
            tensors.append(buffer)
    pending: list[tuple[Any, Tensor, Tensor]] = []
    for t in tensors:
        if t.numel():
            flat = t.detach().contiguous().view(-1)
            # As bytes: backends know every number of them, but not every dtype.
            work = dist.broadcast(flat.view(torch.uint8), group=group, group_src=0, async_op=True)
            pending.append((work, t, flat))
    for work, t, flat in pending:
        work.wait()
        if flat.data_ptr() != t.data_ptr():
            t.copy_(flat.view(t.shape))
