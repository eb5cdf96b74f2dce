"""`fastdml plan`, `make_plan`: bytes as torch holds them, the fastest mesh that fits, mistakes in
one line."""

from __future__ import annotations

import json
import math
import shlex

import pytest
import torch
from torch import nn

from fastdml import Cohort
from fastdml.cli.main import main
from fastdml.engine import make_optimizer
from fastdml.errors import InputError
from fastdml.plan import Batch, Line, Link, make_plan, measure, plan_meshes
from fastdml.plan.costs import PeerCost

FOUR = ["resnet32", "resnet32", "wrn_16_4", "mobilenet"]
COMMAND = f"--peers {' '.join(FOUR)} --gpus 8 --link nvlink --step-ms 12 12 30 8"


class ReadsValues(nn.Module):
    """Its forward pass asks for the value of a tensor, which tensors without values have not."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, x):
        x = x.mean((2, 3))
        return self.head(x if x.sum() < 0 else 2 * x)


@pytest.fixture
def run(capsys):
    def run(command: str) -> tuple[int, str, str]:
        code = main(["plan", *shlex.split(command)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def costs_of(*names: str, seconds: float = 1.0, **options) -> list[PeerCost]:
    each = Line(0.0, seconds / 64), Line(0.0, 2 * seconds / 64), 0.0
    return measure.peer_costs(names, 10, (3, 8, 8), seconds=[each] * len(names), **options)


# --- bytes ---


@pytest.mark.parametrize(("name", "moments"), [("sgd", 1), ("adam", 2), ("adamw", 2)])
def test_weights_gradients_and_optimizer_are_what_training_holds(name, moments):
    cost = costs_of("resnet8", optimizer=name)[0]
    cohort = Cohort(["resnet8"], 10)
    optimizer = make_optimizer(cohort, name, lr=0.1)
    cohort(torch.randn(2, 3, 8, 8))[0].sum().backward()
    optimizer.step()
    held = [v for state in optimizer.state.values() for v in state.values()]
    assert cost.weights == sum(t.nbytes for t in (*cohort.parameters(), *cohort.buffers()))
    assert cost.gradients == sum(w.grad.nbytes for w in cohort.parameters())
    assert cost.optimizer == sum(t.nbytes for t in held if isinstance(t, torch.Tensor))
    assert cost.optimizer >= moments * cost.gradients
    assert sum(cost.units) == cost.gradients  # FSDP's, a block each
    assert len(cost.units) > 2


@pytest.mark.parametrize("name", ["resnet8", "mobilenet"])
def test_activations_are_what_a_real_pass_keeps(name):
    """Known from 8 and 16 images, right for 5: nothing else of a network grows with the batch."""
    cost = costs_of(name)[0]
    cohort = Cohort([name], 10).train()
    images = torch.randn(5, 3, 8, 8)
    own = {t.data_ptr() for t in (*cohort.parameters(), *cohort.buffers(), images)}
    saved = {}

    def note(t):
        if t.untyped_storage().data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        logits = cohort.peers[0](images)
    assert cost.activations(5) == sum(saved.values())
    assert logits.shape == (5, 10)


def test_half_precision_halves_the_activations():
    full, half = costs_of("resnet8")[0], costs_of("resnet8", amp="bf16")[0]
    assert 0.4 < half.activations(1000) / full.activations(1000) < 0.6


def test_a_network_that_reads_values_is_run_on_real_images(monkeypatch):
    monkeypatch.setattr("test_plan.ReadsValues", ReadsValues, raising=False)
    cost = costs_of("test_plan:ReadsValues")[0]
    assert cost.gradients == 4 * (3 * 10 + 10)
    assert cost.activations(16) > cost.activations(8) > 0


# --- which mesh ---

FAST = Link("fast", 1e15)


def peers_of(*seconds: float, fixed: float = 0.0, nbytes: int = 1000) -> list[PeerCost]:
    def line(part: float) -> Line:
        return Line(fixed * part, (1 - fixed) * part / 64)

    return [
        PeerCost(f"peer{k}", line(s / 3), line(2 * s / 3), 0.0, nbytes, nbytes, nbytes, Line(0, 10))
        for k, s in enumerate(seconds)
    ]


def best(*arguments, **options):
    return plan_meshes(*arguments, **options).best


def test_peers_apart_where_a_small_batch_takes_as_long_as_a_large_one():
    peers = peers_of(1.0, 1.0, 1.0, 1.0, fixed=0.9)
    assert best(peers, 4, Batch(64, 10), FAST).mesh == "peer=4,data=1"
    assert best(peers, 8, Batch(64, 10), FAST).mesh == "peer=4,data=2"


def test_columns_where_rows_would_be_uneven():
    peers = peers_of(1.0, 1.0, 4.0)
    found = plan_meshes(peers, 4, Batch(64, 10), FAST)
    assert found.best.mesh == "peer=1,data=4"
    assert found.speedup(found.best) == pytest.approx(4)


def test_one_device_where_the_link_costs_more_than_it_saves():
    slow = Link("slow", 1e3, 1.0, 1.0)
    assert best(peers_of(1.0, 1.0), 2, Batch(64, 10), slow).layout.devices == 1


def test_what_does_not_fit_is_not_recommended():
    peers = peers_of(1.0, 1.0, nbytes=1000)
    assert best(peers, 2, Batch(64, 2), FAST).layout.devices == 2
    both = plan_meshes(peers, 2, Batch(64, 2), FAST, device_memory=7000)
    assert [c.mesh for c in both.candidates if c.fits] == ["peer=2,data=1"]
    assert both.best.mesh == "peer=2,data=1"
    assert not any(c.layout.fsdp for c in both.candidates)


def test_fsdp_where_nothing_else_fits_and_nothing_where_it_does_not_either():
    peers = peers_of(1.0, nbytes=100_000)
    assert best(peers, 4, Batch(64, 2), FAST, device_memory=290_000).layout.fsdp
    assert best(peers, 4, Batch(64, 2), FAST, device_memory=100_000) is None


def test_two_nodes_are_two_times_the_devices_over_the_network():
    peers = peers_of(1.0, 1.0, fixed=0.5, nbytes=10**9)
    found = plan_meshes(
        peers, 16, Batch(64, 10), FAST, nodes=2, network=Link("network", 1e9, 1e-5, 1e-5)
    )
    assert found.best.mesh == "peer=2,data=8"  # a row a node: gradients stay inside
    assert found.best.layout.nodes == 2
    with pytest.raises(InputError, match="7 devices do not go evenly on 2 nodes"):
        plan_meshes(peers, 7, Batch(64, 10), FAST, nodes=2)


# --- from names ---


def test_times_of_two_batches_tell_what_does_not_shrink():
    found = make_plan(
        ["resnet8", "resnet8"], 8, FAST, image_shape=(3, 8, 8), num_classes=10,
        step_ms=[16, 16], share_ms=[9, 9],
    )  # fmt: skip
    times = {c.mesh: c.step.seconds for c in found.candidates}
    assert times["peer=1,data=1"] == pytest.approx(0.032)
    assert times["peer=1,data=8"] == pytest.approx(0.018)
    assert times["peer=2,data=4"] == pytest.approx(0.010)
    assert found.best.mesh == "peer=2,data=4"


def test_steps_are_measured_where_none_are_given():
    found = make_plan(
        ["resnet8", "resnet8"], 2, "pcie", num_classes=10, image_shape=(3, 8, 8), batch_size=8,
        device="cpu",
    )  # fmt: skip
    assert all(0 < peer.seconds(8) < 60 and peer.update > 0 for peer in found.peers)
    assert found.peers[0] == found.peers[1]
    assert found.single.step.loss > 0
    assert math.isinf(found.device_memory)


def test_the_command_prints_predictions_and_what_starts_the_best_mesh(run):
    code, out, _ = run(COMMAND)
    assert code == 0
    assert "predictions" in out
    assert "half a batch is taken to take half the time" in out
    assert "900 GB/s" in out
    last = out.splitlines()[-1].strip()
    assert last == f"fastdml train cifar100 --peers {' '.join(FOUR)} --mesh peer=1,data=8"
    code, out, _ = run(f"{COMMAND} --json")
    found = json.loads(out)
    assert (code, found["best"]) == (0, "peer=1,data=8")
    assert found["batch"]["itemsize"] == 2  # bf16


def test_what_the_command_prints_for_several_nodes(run):
    out = run(f"{COMMAND} --nodes 2 --share-ms 9 9 20 6 --network-bandwidth 9 --bandwidth 300")[1]
    assert "torchrun --nnodes 2 --nproc-per-node 4 --node-rank $NODE_RANK" in out
    assert "given: 9 GB/s" in out
    assert "given: 300 GB/s" in out
    assert "half a batch" not in out


def test_what_the_command_prints_where_nothing_fits(run):
    code, out, _ = run(f"{COMMAND} --memory 0.001")
    assert code == 0
    assert "too much" in out
    assert out.splitlines()[-1].startswith("no mesh of these fits")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--step-ms 12 12", "step_ms must be 4 times above 0, one a peer, not 12 12"),
        ("--share-ms 1 2 3 -4", "share_ms must be 4 times above 0"),
        ("--link token-ring", "invalid choice: 'token-ring'"),
        ("--gpus 0", "gpus must be"),
        ("--gpus 9 --nodes 2", "9 devices do not go evenly on 2 nodes"),
        ("--bandwidth 0", "the link's bandwidth must be above 0"),
        ("--memory -1", "memory_gb must be above 0"),
        ("--data market1501", "a plan is of classification, not of market1501"),
        ("--data folder", "folder: give --classes and --image-size"),
        ("--data cifra10", "cifar10"),
        ("--peers resnt32 resnet32 resnet32 resnet32", "resnet32"),
        ("--batch-size 0", "batch_size must be"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, more, said):
    code, out, err = run(f"{COMMAND} {more}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_times_of_a_share_need_those_of_the_whole(run):
    command = "--peers resnet8 --gpus 2 --link pcie --share-ms 3"
    assert "give step_ms too" in run(command)[2]
