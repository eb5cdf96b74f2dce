"""Peers side by side in host threads: the eager step's bits, and who may run so."""

from __future__ import annotations

import copy
import random
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastdml import Cohort, MetricLoss, MutualLoss
from fastdml.engine import Ema, executions, make_optimizer, make_step
from fastdml.errors import InputError
from fastdml.models import ReidHead

C, STEPS = 5, 50


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def batches(steps, side=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        labels = torch.randint(C, (8,), generator=generator)
        x = torch.randn(8, 3, side, side, generator=generator)
        yield (x + labels[:, None, None, None]).to(memory_format=torch.channels_last), labels


def train(execution, peers=("resnet8", "resnet8"), steps=STEPS, head=None, **options):
    """Losses of every step, weights and buffers at the end."""
    cohort = Cohort(peers, C, seed=3, head=head).to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer(cohort, "sgd", lr=0.05, momentum=0.9, weight_decay=1e-3)
    options = {"amp": "off", **options}
    if options.pop("average", None):
        options["ema"] = Ema(cohort, 0.9)
    if head:
        dims = [peer.num_features for peer in cohort.peers]
        options["metric"] = MetricLoss(num_classes=C, dims=dims, triplet=1.0, center=0.1)
    step = make_step(cohort, MutualLoss(), optimizer, execution=execution, **options)
    losses = [step(*batch).losses for batch in batches(steps)]
    found = {f"loss.{i}": loss for i, loss in enumerate(losses)} | cohort.state_dict()
    if "ema" in options:
        found |= {f"ema.{k}": v for k, v in options["ema"].state_dict().items()}
    return found


def eager_on_one_core(*arguments, **options):
    torch.set_num_threads(1)
    found = train("eager", *arguments, **options)
    torch.set_num_threads(2)
    return found


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (STEPS, {}),
        (10, {"accumulate": 2, "grad_clip": 0.5, "average": True}),
        (10, {"peers": ("resnet8", "wrn_10_1", "resnet8")}),
        (10, {"head": ReidHead()}),
        (10, {"amp": "fp16"}),
    ],
    ids=str,
)
def test_the_bits_of_the_eager_step(steps, options):
    """Running statistics included; each peer has one core, so eager has one as well."""
    ours = train("threads", steps=steps, **options)
    theirs = eager_on_one_core(steps=steps, **options)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_peers_are_side_by_side():
    """Each waits for the other in the middle of its pass: one after the other would never end."""
    barrier, met = threading.Barrier(2, timeout=20), []

    class Meeting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 8 * 8, C)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:  # at the first step peers are looked at one by one
                barrier.wait()
                met.append(torch.get_num_threads())
            return self.linear(x.flatten(1))

    train("threads", [Meeting(), Meeting()], steps=3)
    assert met == [1, 1, 1, 1]
    assert torch.get_num_threads() == 2


def test_a_peer_without_weights_to_train():
    cohort = Cohort(["resnet8", "resnet8"], C)
    cohort.peers[1].requires_grad_(False)
    optimizer = make_optimizer(cohort, "sgd", lr=0.1, weight_decay=0.0)
    before = [w.clone() for w in cohort.peers[0].parameters()]
    step = make_step(cohort, MutualLoss(), optimizer, execution="threads", amp="off")
    step(*next(batches(1)))
    assert not all(map(torch.equal, before, cohort.peers[0].parameters()))
    assert all(w.grad is None for w in cohort.peers[1].parameters())


class Draws(nn.Module):
    """Normalises, then draws with `draw`."""

    def __init__(self, draw):
        super().__init__()
        self.norm, self.linear, self.draw = nn.BatchNorm2d(3), nn.Linear(3 * 8 * 8, C), draw

    def forward(self, x):
        return self.linear(self.draw(self.norm(x).flatten(1)))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: nn.functional.dropout(x, 0.1),
        lambda x: x if random.random() < 0.5 else 2 * x,
        lambda x: x * float(np.random.rand()),
    ],
    ids=["torch", "python", "numpy"],
)
def test_peers_that_draw_random_numbers_are_refused_and_stay(draw):
    cohort = Cohort([Draws(draw), Draws(draw)], C)
    step = made(cohort, "threads")
    before = copy.deepcopy(cohort.state_dict())
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for _ in range(2):
        with pytest.raises(InputError, match="draw random numbers") as caught:
            step(*next(batches(1)))
        assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())
    assert all(w.grad is None for w in cohort.parameters())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]


def made(cohort, execution):
    return make_step(
        cohort, MutualLoss(), make_optimizer(cohort, lr=0.1), execution=execution, amp="off"
    )


@pytest.fixture
def job():
    """A distributed job of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def dense(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8), nn.ReLU(), nn.Linear(8, C))


def sharded(peer):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(peer, mesh=init_device_mesh("cpu", (1,)))


def sharded_flat(peer):
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    strategy = ShardingStrategy.NO_SHARD
    return FullyShardedDataParallel(peer, sharding_strategy=strategy, device_id=torch.device("cpu"))


def part_sharded(peer):
    sharded(peer[1])
    return peer


class Grouped(nn.Module):
    """Holds the group that its own code would reduce over."""

    def __init__(self, peer):
        super().__init__()
        self.peer, self.group = peer, dist.group.WORLD


@pytest.mark.parametrize(
    ("wrap", "found"),
    [
        (DistributedDataParallel, "DistributedDataParallel"),
        (nn.DataParallel, "DataParallel"),
        (lambda p: nn.Sequential(DistributedDataParallel(p)), "DistributedDataParallel at 0"),
        (sharded, "sharded"),  # refused by every execution
        (part_sharded, "sharded"),
        (sharded_flat, "FullyShardedDataParallel"),
        (lambda p: nn.Sequential(nn.SyncBatchNorm(3), p), "SyncBatchNorm at 0"),
        (Grouped, r"ProcessGroup \(group\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.filterwarnings("ignore")  # of FSDP's, about one process
@pytest.mark.usefixtures("job")
def test_peers_of_a_distributed_job_are_refused(wrap, found):
    cohort = Cohort([dense(0), dense(1)], C)
    cohort.peers[1] = wrap(cohort.peers[1])
    with pytest.raises(InputError, match=f"peer Sequential-2 (has|is) {found}") as caught:
        made(cohort, "threads")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("job")
def test_wrapping_after_the_step_was_made_is_noticed():
    cohort = Cohort([dense(0), dense(1)], C)
    step = made(cohort, "threads")
    cohort.peers[0].append(nn.SyncBatchNorm(C))
    with pytest.raises(InputError, match="SyncBatchNorm at 4; use eager"):
        step(*next(batches(1)))


class Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad)
        return grad


def reduced(x):
    dist.all_reduce(y := x.detach().clone())
    return x + 0 * y


@pytest.mark.parametrize("reduce", [reduced, Reduced.apply], ids=["forward", "backward"])
@pytest.mark.usefixtures("job")
def test_collectives_of_a_peers_own_code_are_refused(reduce):
    cohort = Cohort([Draws(reduce), Draws(reduce)], C)
    step = made(cohort, "threads")
    before = copy.deepcopy(cohort.state_dict())
    with pytest.raises(
        InputError, match=r"talk to other processes \(c10d::allreduce_\): use eager"
    ):
        step(*next(batches(1)))
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())
    assert all(w.grad is None for w in cohort.parameters())


@pytest.mark.usefixtures("job")
def test_plain_peers_in_a_distributed_job_have_threads():
    assert (
        made(Cohort(["resnet8", "resnet8"], C), "threads")(*next(batches(1)))
        .losses.isfinite()
        .all()
    )


@pytest.mark.usefixtures("job")
def test_auto_leaves_threads_to_peers_without_a_replicated_part(capsys):
    cohort = Cohort(["resnet8", "resnet8"], C)
    cohort.peers[1].stage2 = DistributedDataParallel(cohort.peers[1].stage2)
    step = made(cohort, "auto")
    step(*next(batches(1, side=72)))
    assert step.name == "eager"
    line = capsys.readouterr().err
    assert line.startswith("execution: eager, ")
    assert line.endswith(" (by rule: several processes might choose differently)\n")


def replicas(rank, folder):
    """A process of two: the same step, over other images, in every execution that takes it."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for execution in ("eager", "auto", "threads", "stacked"):
        cohort = Cohort([DistributedDataParallel(dense(k)) for k in range(2)], C)
        try:
            step = made(cohort, execution)
            generator = torch.Generator().manual_seed(rank)
            for _ in range(3):
                images = torch.randn(8, 3, 8, 8, generator=generator)
                step(images, torch.randint(C, (8,), generator=generator))
            found[execution] = step.name, [w.detach() for w in cohort.parameters()]
        except InputError as error:
            found[execution] = str(error)
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_replicas_of_two_processes_stay_equal_or_are_refused(tmp_path):
    torch.multiprocessing.spawn(replicas, (tmp_path,), 2)
    one, two = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for found in (one, two):
        assert found["threads"].startswith("execution 'threads' does not go with peers that talk")
        assert found["stacked"].startswith("execution 'stacked' does not know Distributed")
    for execution in ("eager", "auto"):
        assert one[execution][0] == "eager"
        assert all(map(torch.equal, one[execution][1], two[execution][1]))
        assert all(map(torch.equal, one["eager"][1], one[execution][1]))


def test_an_error_in_a_peer_reaches_the_caller():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(3 * 8 * 8, C), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("the third call")
            return self.linear(x.flatten(1))

    with pytest.raises(RuntimeError, match="the third call"):
        train("threads", [Fails(), Fails()], steps=4)
    assert torch.get_num_threads() == 2


def test_threads_are_for_a_cpu():
    assert "threads" in executions(torch.device("cpu"))
    assert "threads" not in executions(torch.device("cuda"))
