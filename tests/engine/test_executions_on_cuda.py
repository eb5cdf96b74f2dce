"""Every execution takes the steps that the eager one takes, with real graphs and streams."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from fastdml.cohort import Cohort
from fastdml.data import ImageSet, ResidentLoader
from fastdml.engine import Amp, make_optimizer, make_step
from fastdml.engine.amp import LossScale
from fastdml.engine.execution import EXECUTIONS
from fastdml.engine.graph import CudaCapture
from fastdml.grouped_loss import GroupedLoss
from fastdml.loss import MutualLoss

from .small_runs import CASES, SIDE, C, Run, batches, peer


def cuda_run(execution, *, update="simultaneous", precision="off", **options):
    device = torch.device("cuda")

    def make(*arguments):
        return EXECUTIONS[execution].builders[update](*arguments)

    run = Run("", make=make, device=device, precision=precision, **options)
    if "optimizer" in options:
        freeze_noise(run.cohort)
    return run


def freeze_noise(cohort) -> None:
    """The gradient of a convolution's bias before BatchNorm is zero but for rounding, which Adam
    divides by its own size: such a bias wanders by the whole rate at each step."""
    for network in cohort.peers:
        network[3].bias.requires_grad_(False)


# Adam enlarges the rounding of small gradients. What is within this share of the rate is half the
# smallest step of a run, so that a step left out shows.
OF_RATE = 0.05


def close(found, expected, name, **tolerances) -> None:
    torch.testing.assert_close(found, expected, msg=lambda how: f"{name}: {how}", **tolerances)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("execution", ["streams", "graph"])
def test_on_cuda_fifty_steps_are_the_eager_ones(execution, options):
    eager = cuda_run("eager", **options).train()
    other = cuda_run(execution, **options).train()
    assert getattr(other.step, "failure", None) is None
    atol = options["rate"] * OF_RATE if "optimizer" in options else 1e-5
    a, b = eager.state(), other.state()
    for name in a:
        sums = 4 if "running_" in name else 1  # BatchNorm's statistics are sums over many weights
        close(b[name], a[name], name, rtol=1e-4, atol=sums * atol)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
def test_on_cuda_a_sequential_step_is_captured():
    eager = cuda_run("eager", update="sequential").train(20)
    graph = cuda_run("graph", update="sequential").train(20)
    assert graph.step.failure is None
    for (name, a), b in zip(eager.state().items(), graph.state().values(), strict=True):
        close(b, a, name, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("options", [CASES[0], CASES[3], CASES[5]], ids=str)
def test_on_cuda_fifty_stacked_steps_follow_the_eager_ones(options):
    """To rounding, which 50 steps magnify."""
    eager, stacked = (cuda_run(name, **options).train() for name in ("eager", "stacked"))
    assert stacked.step.failure is None
    close_for_stacked(eager, stacked)


def close_for_stacked(eager, stacked) -> None:
    a, b = eager.state(), stacked.state()
    for name in a:
        loose = {"correct": 1.5, "ensemble_correct": 1.5}.get(name, 5e-3)
        close(b[name], a[name], name, rtol=5e-3, atol=loose, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("execution", ["streams", "graph", "stacked"])
def test_on_cuda_groups_of_peers_take_the_eager_steps(execution):
    """What peers of different groups would say of each other stays NaN."""
    eager, other = (
        cuda_run(name, peers=range(4), loss=GroupedLoss(2, 4, label_smoothing=0.1).cuda()).train()
        for name in ("eager", execution)
    )
    assert getattr(other.step, "failure", None) is None
    assert eager.state()["pairwise_kl"].isnan().float().mean() == 0.5
    if execution == "stacked":
        close_for_stacked(eager, other)
        return
    for (name, a), b in zip(eager.state().items(), other.state().values(), strict=True):
        close(b, a, name, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_on_cuda_warm_up_and_capture_leave_no_trace(precision, optimizer):
    run = cuda_run("graph", precision=precision, optimizer=optimizer, average=0.9)
    held = [(t, t.detach().clone()) for t in run.step.tensors()]
    rng = torch.cuda.get_rng_state()
    run.step._capture(next(batches(1, torch.device("cuda"))))
    assert run.step.failure is None
    assert torch.equal(torch.cuda.get_rng_state(), rng)
    for t, value in held:
        assert torch.equal(t, value)


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["streams", "graph", "stacked"])
@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
def test_on_cuda_nothing_waits_for_the_device(execution, precision):
    run = cuda_run(execution, precision=precision, grad_clip=1.0, average=0.9).train(3)
    data = list(batches(4, torch.device("cuda")))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in data:
            run.step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(w.isfinite().all() for w in run.cohort.parameters())


@pytest.mark.gpu
def test_on_cuda_a_model_that_looks_at_a_value_falls_back():
    class Looks(nn.Module):
        num_classes = C

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            z = self.inner(x)
            return z * (1.0 if z.sum().item() > -1e30 else 0.0)

    cohort = Cohort([Looks(peer(0)), peer(1)], C).cuda()
    optimizer = make_optimizer(cohort, lr=0.01)
    step = make_step(cohort, MutualLoss(), optimizer, execution="graph", amp="off")
    before = copy.deepcopy(cohort.state_dict())
    batch = next(batches(1, torch.device("cuda")))
    with pytest.warns(UserWarning, match="cannot be captured"):
        step._capture(batch)
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())
    assert step(*batch).losses.isfinite().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
def test_on_cuda_a_capture_that_breaks_off_leaves_streams_and_generators_usable():
    class Waits(nn.Module):
        num_classes = C

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            torch.cuda.synchronize()  # which nothing reports before the capture
            return self.inner(x)  # with dropout

    runs = []
    for execution in ("eager", "graph"):
        torch.manual_seed(5)
        cohort = Cohort([Waits(peer(0)), peer(1)], C).cuda()
        optimizer = make_optimizer(cohort, lr=0.01)
        step = make_step(cohort, MutualLoss(), optimizer, execution=execution, amp="off")
        main = torch.cuda.current_stream()
        context = contextlib.nullcontext()
        if execution == "graph":
            context = pytest.warns(UserWarning, match="cannot be captured")
        with context:
            losses = [step(*batch).losses for batch in batches(3, torch.device("cuda"))]
        assert torch.cuda.current_stream() == main
        torch.cuda.empty_cache()
        runs.append(torch.stack(losses))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
def test_on_cuda_any_optimizer_that_can_be_captured_skips_overflows_in_the_graph():
    """Its state is copied and put back by the graph itself."""
    device, states = torch.device("cuda"), []
    for execution in ("eager", "graph"):
        torch.manual_seed(5)
        cohort = Cohort([peer(0), peer(1)], C).to(device).train()
        freeze_noise(cohort)
        groups = [{"params": list(p.parameters())} for p in cohort.peers]
        rate = torch.tensor(0.01, device=device)
        optimizer = torch.optim.Adam(groups, rate, foreach=True, capturable=True)
        precision = Amp(device, torch.float16, LossScale(device, init=2.0**30))
        step = make_step(cohort, MutualLoss(), optimizer, execution=execution, amp=precision)
        for batch in batches(30, device):
            step(*batch)
        assert getattr(step, "failure", None) is None
        assert precision.scaler.scale < 2.0**30
        states.append([*cohort.state_dict().values(), precision.scaler.scale])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=0.01 * OF_RATE)


@pytest.mark.gpu
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("execution", ["streams", "graph", "stacked"])
def test_on_cuda_batches_are_made_inside_the_step(execution):
    """Three epochs of augmented images: nothing of the first is frozen in the graph."""
    device, states = torch.device("cuda"), []
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (64, 2, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(C, (64,), generator=generator)
    images = ImageSet(pixels, labels, C, tuple("abcd"), mean=(128.0,) * 2, std=(64.0,) * 2)
    loader = ResidentLoader(images, 16, train=True, pad=1, erase=0.5, device=device)

    for name in ("eager", execution):
        inside = name != "eager"
        run = cuda_run(name, **({"assemble": loader.assemble} if inside else {}))
        given = loader.index if inside else loader.batch
        places = [(epoch, step) for epoch in range(3) for step in range(len(loader))]
        run.outputs = [run.step(*given(*place)) for place in places]
        assert getattr(run.step, "failure", None) is None
        states.append(run.state())
    tolerance = 2e-2 if execution == "stacked" else 1e-4
    for name, value in states[0].items():
        if "correct" not in name:
            close(states[1][name], value, name, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_on_cuda_compiled_peers_are_captured():
    device, states = torch.device("cuda"), []
    for execution in ("eager", "graph"):
        torch.manual_seed(0)
        sizes = (2 * SIDE * SIDE, 16)
        peers = [
            nn.Sequential(
                nn.Flatten(), nn.Linear(*sizes), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, C)
            )
            for _ in range(2)
        ]
        cohort = Cohort(peers, C).to(device).train()
        optimizer = make_optimizer(cohort, lr=0.01)
        how = {"execution": execution, "compile": execution == "graph"}
        step = make_step(cohort, MutualLoss(), optimizer, amp="off", **how)
        losses = [step(*batch).losses for batch in batches(5, device)]
        assert getattr(step, "failure", None) is None
        states.append([*cohort.state_dict().values(), torch.stack(losses)])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
def test_on_cuda_auto_says_what_it_chose(capfd, fused):
    cohort = Cohort([peer(0), peer(1)], C).cuda()
    before = copy.deepcopy(cohort.state_dict())
    optimizer = make_optimizer(cohort, "adam", lr=0.01)
    if not fused:  # counts its steps on the host until it is captured
        rate = torch.tensor(0.01, device="cuda")
        optimizer = torch.optim.Adam(cohort.parameters(), rate)
    loss = MutualLoss()
    step = make_step(cohort, loss, optimizer, amp="off")
    step._measure(next(batches(1, torch.device("cuda"))))
    assert loss.kl_weight == 1
    assert all((state["step"] == 0).all() for state in optimizer.state.values())
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())
    line = capfd.readouterr().err
    assert line.startswith("execution: ")
    assert all(f"{name} " in line for name in ("eager", "streams", "graph", "stacked"))


@pytest.mark.gpu
def test_on_cuda_the_capture_supervises_its_last_warm_up_step():
    capture = CudaCapture(torch.device("cuda"))
    with pytest.raises(RuntimeError), capture.supervised():
        torch.ones((), device="cuda").item()
    assert torch.cuda.get_sync_debug_mode() == 0
