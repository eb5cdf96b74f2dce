"""The data axis: columns that share a batch train as one process with the whole batch.

`data=D` is `accumulate=D` of one process, bit for bit for two columns. Where BatchNorm takes the
statistics of the whole batch, or there is none, it is one process without accumulation too, also
for shares of unequal size and rows without a label.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mesh_runs import SIDE, C, batch, cohort, network, share, train
from ranks import run_ranks
from torch import Tensor, nn

from fastdml import Cohort, MutualLoss
from fastdml.engine import Ema
from fastdml.engine.amp import Amp, LossScale
from fastdml.errors import InputError
from fastdml.parallel import Mesh, make_mesh, sync_batchnorm, total

CPU = torch.device("cpu")
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 3.0], dtype=torch.float64)
FEW = [False, True, False, False, False, True, False, False, False, True, True]
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mimic": {"mimic_ignored": True},
    "class weights": {"class_weight": WEIGHT},
    "mimic and class weights": {"class_weight": WEIGHT, "mimic_ignored": True},
    "label smoothing": {"label_smoothing": 0.2},
    "smoothed class weights": {"label_smoothing": 0.2, "class_weight": WEIGHT},
    "reverse": {"divergence": "reverse", "temperature": 3.0},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "jeffreys": {"divergence": "jeffreys", "kl_weight": 0.5, "ce_weight": 2.0},
    "correct": {"gate": "correct"},
    "best": {"gate": "best"},
    "confidence": {"gate": "confidence", "mimic_ignored": True},
    "entropy": {"gate": "entropy"},
    "ensemble": {"target": "ensemble"},
    "ensemble of logits": {"target": "ensemble_logits"},
    "peer weights": {"peer_weights": torch.tensor([[0.0, 2.0], [0.5, 0.0]], dtype=torch.float64)},
    "gradients into teachers": {"detach_targets": False},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
}
# Which rows of a batch of 11 have a label; of three columns the first has rows 0 to 2.
LABELLED = {
    "few": (FEW, [*LOSSES]),
    "all": ([True] * 11, ["plain"]),
    "none in the first column": (
        [False] * 3 + [True] * 8, ["plain", "mimic", "mimic and class weights", "best", "none"]
    ),
    "none": ([False] * 11, ["plain", "mimic", "sum"]),
}  # fmt: skip


def labelled(rows: list[bool]) -> Any:
    def batches(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, y = batch(step, dtype, len(rows))
        return x, torch.where(torch.tensor(rows), y, -100)

    return batches


def parameters(peers: Cohort) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in peers.named_parameters()}


def figures(outputs: list[Any], mesh: Mesh | None) -> list[list[Tensor]]:
    whole = outputs if mesh is None else [total(o, mesh) for o in outputs]
    taught = [[] if o.teacher_kl is None else [o.teacher_kl] for o in whole]
    return [[o.losses, *o.stats, labelled_rows(o), *t] for o, t in zip(whole, taught, strict=True)]


def labelled_rows(output: Any) -> Tensor:
    return output.stats.layout.view(output.stats.packed, "labelled")


# ---- every option of the loss, shares of 3, 4 and 4 rows


def with_losses(mesh: Mesh | None) -> dict[Any, Any]:
    found = {}
    for rows, (labels, names) in LABELLED.items():
        for name in names:
            peers = cohort(2)
            if mesh is not None:
                mesh.distribute(peers)
                sync_batchnorm(peers, mesh)
            outputs, _ = train(
                peers, mesh, steps=1, loss=MutualLoss(**LOSSES[name]), batches=labelled(labels)
            )
            found[rows, name] = parameters(peers), figures(outputs, mesh)
    return found


def scheduled(mesh: Mesh | None) -> Any:
    """temperature and kl_weight are tensors that change in place between steps."""
    peers = cohort(2)
    loss = MutualLoss(temperature=torch.tensor(1.0), kl_weight=torch.tensor(0.0))

    def batches(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        loss.temperature.fill_(1.0 + step)
        loss.kl_weight.fill_(0.5 * step)
        return labelled(FEW)(step, dtype)

    if mesh is not None:
        mesh.distribute(peers)
        sync_batchnorm(peers, mesh)
    outputs, _ = train(peers, mesh, steps=4, loss=loss, batches=batches)
    return parameters(peers), figures(outputs, mesh)


def in_three_parts(mesh: Mesh | None) -> Any:
    peers = cohort(2)
    options = {"accumulate": 3 if mesh is None else 1, "batches": labelled(FEW[:9])}
    outputs, _ = train(peers, mesh, steps=10, **options)
    return parameters(peers), figures(outputs, mesh)


def on_three_columns() -> dict[Any, Any]:
    mesh = make_mesh(1, 3, timeout=30)
    found = {"scheduled": scheduled(mesh), "in three parts": in_three_parts(mesh)}
    return {**with_losses(mesh), **found}


@pytest.fixture(scope="module")
def three_columns() -> list[dict[Any, Any]]:
    return run_ranks(3, on_three_columns, timeout=120)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_means_of_every_loss_are_the_whole_batchs(three_columns):
    for case, (weights, whole) in with_losses(None).items():
        for rank in three_columns:
            now, found = rank[case]
            for name, w in weights.items():
                close(now[name], w)
                assert w.isfinite().all(), case
            for ours, theirs in zip(found, whole, strict=True):
                for i, value in enumerate(theirs):
                    if (case[1], i) != ("smoothed class weights", 1):  # its CE: see `GlobalMeans`
                        close(ours[i], value)


def test_schedules_of_the_loss_go_on(three_columns):
    weights, whole = scheduled(None)
    for rank in three_columns:
        close(rank["scheduled"], (weights, whole))


def test_three_columns_are_three_parts_to_rounding(three_columns):
    expected = in_three_parts(None)
    for rank in three_columns:
        close(rank["in three parts"], expected)


def test_without_any_label_nothing_is_trained_by_nan(three_columns):
    weights, whole = three_columns[1]["none", "plain"]
    assert whole[0][0].isnan().all()
    assert all(w.isfinite().all() for w in weights.values())
    _, whole = three_columns[1]["none", "mimic"]
    assert whole[0][0].isfinite().all()


# ---- two columns, bit for bit


def changed(peers: Cohort, optimizer: torch.optim.Optimizer, step: int) -> None:
    """What users do between steps: unfreeze a peer, freeze a part, replace a layer."""
    if step == 2:
        peers.peers[0].requires_grad_(True)
    if step == 4:
        peers.peers[1][0].requires_grad_(False)
    if step == 6:
        peers.peers[1][-1] = nn.Linear(6, C).double()  # of random weights
        optimizer.add_param_group({"params": [*peers.peers[1][-1].parameters()]})


def changing(mesh: Mesh | None, parts: int) -> tuple[Any, list[Tensor], Any]:
    peers = cohort(2)
    optimizer = torch.optim.SGD(peers.parameters(), 0.1, 0.9)
    peers.peers[0].requires_grad_(False)

    def batches(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0 if mesh is None else mesh.rank)  # column 0's weights count
        changed(peers, optimizer, step)
        return batch(step, dtype)

    outputs, step = train(
        peers, mesh, steps=8, batches=batches, optimizer=optimizer, accumulate=parts
    )
    return parameters(peers), [losses for losses, *_ in figures(outputs, mesh)], step


def bits(mesh: Mesh | None, parts: int, quick: bool = False) -> dict[str, Any]:
    """Runs whose parts are the same on every mesh."""
    found: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    found["statistics"] = statistics

    def run(name: str, peers: Cohort, **options: Any) -> None:
        outputs, _ = train(peers, mesh, **{"accumulate": parts, "steps": 3, **options})
        seen = figures(outputs, mesh)
        found[name] = parameters(peers), [losses for losses, *_ in seen]
        statistics[name] = [values[1:] for values in seen]

    few = labelled([True, False, False, True, False, True, True, True])
    run("unlabelled", cohort(2), batches=few)
    run("dropout", cohort(2, drop=0.5))
    if quick:
        return found
    run("twenty steps", cohort(3), steps=20)
    run("mimic", cohort(2), batches=few, loss=MutualLoss(mimic_ignored=True))
    run("clipped", cohort(2), grad_clip=0.05)
    run("adam", cohort(2), optimizer="adam")
    run("bf16", cohort(2, torch.float32), amp="bf16")
    run("fp16", cohort(2, torch.float32), amp=Amp(CPU, torch.float16, LossScale(CPU, 2.0**24)))
    run("channels_last", cohort(2).to(memory_format=torch.channels_last))
    peers = cohort(2)
    peers.teachers = [network(9, 6)]
    run("taught", peers)
    peers = cohort(2)
    ema = Ema(peers, 0.9)
    run("ema", peers, ema=ema)
    found["averages"] = {n: t for n, t in ema.state_dict().items() if "running_" not in n}, []
    weights, losses, step = changing(mesh, parts)
    found["changed"] = weights, losses
    found["trained anew"] = [*step.replicas.replicated()] if mesh and mesh.data > 1 else None
    return found


class Unused(nn.Module):
    """A peer whose parameters `head` take no part where `skip` is set."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(2 * SIDE * SIDE, C))
        self.head = nn.Linear(C, C)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        return z if self.skip else self.head(z)


def refusals(mesh: Mesh) -> dict[str, Any]:
    found = {}
    for name, parts in (("at once", 1), ("in parts", 2)):
        torch.manual_seed(0)
        peers = Cohort([Unused(True).double(), *cohort(1)], C)
        before = parameters(peers)
        with pytest.raises(InputError) as error:
            train(peers, mesh, steps=1, accumulate=parts)
        unmoved = all(torch.equal(before[n], w) for n, w in parameters(peers).items())
        found[name] = str(error.value), unmoved
    peers = Cohort([Unused(False).double(), *cohort(1)], C)

    def batches(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        peers.peers[0].skip = step == 2
        return batch(step, dtype)

    with pytest.raises(InputError) as error:
        train(peers, mesh, steps=4, batches=batches)
    found["later"] = str(error.value)
    # Trained by other weights in one column.
    peers = cohort(2)
    peers.peers[1][0].requires_grad_(mesh.column == 0)
    with pytest.raises(InputError) as error:
        train(peers, mesh)
    found["unlike"] = str(error.value)
    for name, wrong in (
        ("wrapped", nn.parallel.DistributedDataParallel(network(1, 4))),
        ("torch's", nn.Sequential(network(1, 4), nn.SyncBatchNorm(C))),
    ):
        with pytest.raises(InputError) as error:
            train(Cohort([*cohort(1), wrong], C), mesh)
        found[name] = str(error.value)
    peers = cohort(2)
    with torch.no_grad():  # built from other seeds: column 0's count
        peers.peers[1][0].weight += mesh.column
        peers.peers[0].requires_grad_(False)[0].weight += mesh.column
    train(peers, mesh, steps=2)
    found["weights of column 0"] = parameters(peers)
    return found


def on_two_columns() -> dict[str, Any]:
    mesh = make_mesh(1, 2, timeout=30)
    found = {"1 part": bits(mesh, 1), "2 parts": bits(mesh, 2, quick=True), **refusals(mesh)}
    peers = cohort(2)
    outputs, step = train(peers, mesh, steps=1)
    shares = outputs[0].losses
    networks = [n.module for n in step.replicas.replicated().values()]
    found["unwrapped"] = all(a is b for a, b in zip(networks, peers, strict=True))
    peers = cohort(2)
    peers.peers[0].requires_grad_(False)
    _, step = train(peers, mesh, steps=1)
    found["frozen"] = step.replicas.networks[0] is peers.peers[0], [*step.replicas.replicated()]
    found["shares"] = shares
    found["freed"] = freed(mesh)
    found["sent"] = sent(mesh)
    return found


def freed(mesh: Mesh) -> bool:
    """Whether a replica that was replaced is gone, with its copy of the gradients."""
    peers = cohort(2)
    _, step = train(peers, mesh, steps=2)
    before = weakref.ref(step.replicas.networks[0])
    peers.peers[0][0].requires_grad_(False)
    step(*share(batch(2), mesh))
    gc.collect()
    return before() is None


def sent(mesh: Mesh) -> list[tuple[str, int]]:
    """What a step of two parts gives to each collective: its name and the bytes."""
    peers = cohort(2)
    _, step = train(peers, mesh, steps=2, accumulate=2)
    calls: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "broadcast"):
            patch.setattr(dist, name, counted(name, getattr(dist, name), calls))
        step(*share(batch(2), mesh))
    return calls


def counted(name: str, function: Any, calls: list[tuple[str, int]]) -> Any:
    def call(tensor: Any, *arguments: Any, **options: Any) -> Any:
        calls.append((name, tensor.nbytes if isinstance(tensor, Tensor) else -1))
        return function(tensor, *arguments, **options)

    return call


def in_one_process() -> tuple[dict[str, Any], dict[str, Any]]:
    mesh = make_mesh(1, 1)
    return bits(mesh, 2), bits(mesh, 4, quick=True)


@pytest.fixture(scope="module")
def two_columns() -> list[dict[str, Any]]:
    return run_ranks(2, on_two_columns, timeout=120)


@pytest.fixture(scope="module")
def one_process() -> tuple[dict[str, Any], dict[str, Any]]:
    """In two parts and in four."""
    return run_ranks(1, in_one_process, timeout=120)[0]


def runs_of(found: dict[str, Any]) -> dict[str, Any]:
    return {name: run for name, run in found.items() if isinstance(run, tuple)}


def test_two_columns_are_two_parts_of_one_process_bit_for_bit(two_columns, one_process):
    for name, (weights, losses) in runs_of(one_process[0]).items():
        for rank in two_columns:
            now, found = rank["1 part"][name]
            for w in weights:
                assert torch.equal(now[w], weights[w]), (name, w)
            for step, loss in enumerate(losses):
                assert torch.equal(found[step], loss), (name, step)


def test_statistics_add_up(two_columns, one_process):
    for rank in two_columns:
        for name in ("twenty steps", "taught"):
            close(rank["1 part"]["statistics"][name], one_process[0]["statistics"][name])


def test_two_columns_of_two_parts_are_four_parts_to_rounding(two_columns, one_process):
    for name, expected in runs_of(one_process[1]).items():
        for rank in two_columns:
            close(rank["2 parts"][name], expected)


def test_accumulation_without_a_mesh_is_the_same(one_process):
    outputs, _ = train(alone := cohort(3), steps=20, accumulate=2)
    weights, losses = one_process[0]["twenty steps"]
    assert all(torch.equal(w, weights[n]) for n, w in parameters(alone).items())
    assert torch.equal(torch.stack([o.losses for o in outputs]), torch.stack(losses))


def test_peers_that_change_are_replicated_anew(two_columns):
    assert all(rank["1 part"]["trained anew"] == [0, 1] for rank in two_columns)


@pytest.mark.parametrize("when", ["at once", "in parts"])
def test_parameters_without_a_gradient_are_refused_by_name_before_weights_move(when, two_columns):
    for rank in two_columns:
        message, unmoved = rank[when]
        assert "peer Unused: 2 of 4 parameters took no part" in message
        assert "(head.weight, head.bias)" in message
        assert unmoved


def test_parameters_that_lose_their_gradient_are_refused_later(two_columns):
    assert "(head.weight, head.bias)" in two_columns[0]["later"]


def test_peers_that_differ_between_columns(two_columns):
    for rank in two_columns:
        assert "is not the same network in all processes of the data axis" in rank["unlike"]
        expected = two_columns[0]["weights of column 0"]
        assert all(torch.equal(rank["weights of column 0"][n], w) for n, w in expected.items())


def test_peers_that_communicate_by_themselves_are_refused(two_columns):
    for rank in two_columns:
        assert "has a DistributedDataParallel, which knows nothing of a mesh" in rank["wrapped"]
        assert "has a SyncBatchNorm at 1, which knows nothing of a mesh" in rank["torch's"]


def test_what_was_replaced_is_freed(two_columns):
    assert all(rank["freed"] for rank in two_columns)


def test_a_step_sends_each_gradient_once_and_the_numbers_of_labels(two_columns):
    gradients = [8 * sum(w.numel() for w in peer.parameters()) for peer in cohort(2)]
    for rank in two_columns:
        calls = sorted(rank["sent"])
        assert calls == sorted([("all_reduce", 3 * 8), *(("all_reduce", n) for n in gradients)])


def test_frozen_peers_are_not_wrapped(two_columns):
    for rank in two_columns:
        assert rank["unwrapped"]
        assert rank["frozen"] == (True, [1])


def test_losses_are_shares(two_columns):
    outputs, _ = train(cohort(2), steps=1, accumulate=2)
    assert torch.equal(sum(rank["shares"] for rank in two_columns), outputs[0].losses)
    assert not torch.equal(two_columns[0]["shares"], two_columns[1]["shares"])
