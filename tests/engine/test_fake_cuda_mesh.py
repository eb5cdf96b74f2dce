"""On CUDA a step on a mesh mixes no devices, waits for nothing, and posts the same broadcasts in
the same order on all ranks.

On the device of `fake_cuda`; broadcasts are noted and do nothing, and so hold a communicator.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer, make_step
from fastdml.engine.mesh_graph import MeshGraphStep
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.metric_losses import MetricLoss
from fastdml.models import ReidHead, create_model
from fastdml.parallel import RemotePeer, stale_peers

from .fake_cuda import CUDA, FAKE, Capture, Device, device, moved
from .small_runs import SIDE, C, peer

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
N, K, ROWS = 16, 4, (0, 0, 0, 1)
DTYPES = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Work:
    def wait(self) -> None:
        pass


class StandIn:
    """A mesh of two rows as one of its ranks has it."""

    peer, data, column, world, device, control = 2, 1, 0, 2, CUDA, None
    peers_group = data_group = None

    def __init__(self, row: int, dtypes: list[str]) -> None:
        self.row = self.rank = row
        self.rows = ROWS
        self.local = tuple(k for k, own in enumerate(ROWS) if own == row)
        self.dtypes = dtypes

    def peer_group_of(self, k: int) -> int:
        return k

    def data_group_of(self, k: int) -> None:
        return None

    def owner(self, k: int) -> int:
        return self.rows[k]

    def gather(self, value: Any) -> list[Any]:
        if not isinstance(value, dict):
            return [value, value]
        other = [k for k in range(K) if k not in self.local]
        told = {**value, "own": [(k, self.dtypes) for k in other], "drawing": []}
        return [value, told] if self.row == 0 else [told, value]


class Generator:
    """The host's or the device's; a capture forbids to ask for its state."""

    def get_state(self) -> Generator:
        if FAKE[-1].in_capture:
            FAKE[-1].offence("the generator's state is asked for inside a capture")
        return self

    def numpy(self) -> np.ndarray:
        return np.zeros(16)

    def set_state(self, state: Generator) -> None:
        self.get_state()

    def manual_seed(self, seed: int) -> None:
        self.get_state()


@pytest.fixture
def cuda(monkeypatch):
    with device() as found:
        posted: list[tuple[int, int, torch.dtype]] = []

        def broadcast(t: Tensor, source: int, group: int, async_op: bool) -> Work:
            assert t.device == CUDA
            assert t.is_contiguous()
            assert async_op
            assert source == ROWS[group]
            posted.append((group, t.numel(), t.dtype))
            return Work()

        found.posted = posted  # type: ignore[attr-defined]
        monkeypatch.setattr(dist, "broadcast", broadcast)
        monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: Work())
        monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
        monkeypatch.setattr(torch, "default_generator", Generator())
        monkeypatch.setattr(torch.cuda, "default_generators", (Generator(),))
        monkeypatch.setattr(stale_peers, "_copied", lambda p: p.original.requires_grad_(False))
        monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
        monkeypatch.setattr(MeshGraphStep.__init__, "__defaults__", (Capture,))
        yield found


def steps(
    cuda: Device, row: int, execution: str, amp: str = "off", metric: bool = False, **options: Any
) -> Any:
    """Three steps; the broadcasts of the last two, each with a call of its own."""
    mesh = StandIn(row, [DTYPES[amp]] * (1 + metric))
    with cuda.off():
        if metric:
            names = ["resnet8"] * K
            cohort = Cohort([create_model(n, C, head=ReidHead("gem")) for n in names], C)
        else:
            cohort = Cohort([peer(k, 8 + 4 * k) for k in range(K)], C)
            for network in cohort:
                network[8] = nn.Identity()  # in place of dropout
        dims = tuple(getattr(p, "num_features", 0) for p in cohort)
    for k in range(K):
        if k not in mesh.local:
            whole = moved(cohort[k]) if options.get("exchange") == "weights" else None
            cohort.peers[k] = RemotePeer("resnet", None, 1, ROWS[k], whole)
    cohort = moved(cohort).train()
    optimizer = None
    with cuda.answering(False):
        optimizer = make_optimizer(cohort, lr=0.1)
    extra = None
    if metric:
        extra = moved(MetricLoss(num_classes=C, dims=dims, triplet=1.0, distance_mutual=1.0))
    step = make_step(
        cohort, MutualLoss(), optimizer, execution=execution, amp=amp, metric=extra,
        mesh=mesh, **options,
    )  # fmt: skip
    shape = (N, 3, 32, 32) if metric else (N, 2, SIDE, SIDE)
    batch = cuda.images(*shape), cuda.labels(N)
    step(*batch)
    found = []
    for _ in range(2):
        cuda.posted.clear()
        # A capture, at the second step, watches by itself.
        with nullcontext() if execution == "graph" else cuda.watched():
            step(*batch)
        found.append([*cuda.posted])
    return step, found


CASES = [
    ("streams", "off", {"accumulate": 2}),
    ("streams", "fp16", {}),
    ("eager", "bf16", {"accumulate": 2}),
    ("streams", "bf16", {"metric": True}),
    ("streams", "off", {"exchange_every": 3}),
    ("eager", "off", {"exchange": "weights"}),
    ("streams", "off", {"exchange": "weights"}),
]


@pytest.mark.parametrize(("execution", "amp", "options"), CASES)
def test_no_step_mixes_devices_or_waits(cuda, execution, amp, options):
    ranks = [steps(cuda, row, execution, amp, **options)[1] for row in (0, 1)]
    assert not cuda.offences
    assert ranks[0] == ranks[1]  # one order
    dtype = getattr(torch, DTYPES[amp])
    rounds = [0, 3, 1, 2]  # the first of each row, then the others
    logits = [(k, N * C, dtype) for k in rounds]
    parts = options.get("accumulate", 1)
    if parts == 2:
        logits = [(k, N * C // 2, dtype) for k in rounds] * 2
    if options.get("metric"):
        logits += [(k, N * N, torch.float32) for k in rounds]
    if options.get("exchange_every") == 3:
        logits = []
    if options.get("exchange") == "weights":
        assert {k for k, *_ in ranks[0][0]} == {*rounds}
    else:
        assert ranks[0] == [logits, logits]


def test_a_captured_step_holds_its_broadcasts(cuda):
    step, _ = steps(cuda, 0, "graph")
    assert step.failure is None
    assert step.captured.replays == 2
    assert step.exchange.sent == 3 * 3 * N * C * 4
    assert step.exchange.received == 3 * N * C * 4
    assert not cuda.offences


def test_a_graph_of_two_kinds_of_steps_is_refused(cuda):
    with pytest.raises(InputError, match="exchange_every=2 there are two kinds: use streams"):
        steps(cuda, 0, "graph", exchange_every=2)
