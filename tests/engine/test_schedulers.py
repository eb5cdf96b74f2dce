"""torch's schedulers on an optimizer over all peers, against plain SGD with as many groups."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torchs
from torch.optim.swa_utils import SWALR

from fastdml.cohort import Cohort
from fastdml.engine import Schedule, make_optimizer, make_step
from fastdml.loss import MutualLoss

C, STEPS, RATE = 3, 14, 0.5


def sequential(o):
    return torchs.SequentialLR(
        o, [torchs.LinearLR(o, 0.25, total_iters=4), torchs.ExponentialLR(o, 0.8)], [5]
    )


SCHEDULERS = {
    "LambdaLR": lambda o: torchs.LambdaLR(o, lambda t: 0.9**t),
    "LambdaLR, one a group": lambda o: torchs.LambdaLR(
        o, [lambda t, k=k: 1 / (1 + k + t) for k in range(len(o.param_groups))]
    ),
    "MultiplicativeLR": lambda o: torchs.MultiplicativeLR(o, lambda t: 0.75),
    "StepLR": lambda o: torchs.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: torchs.MultiStepLR(o, [2, 5, 6], 0.5),
    "ConstantLR": lambda o: torchs.ConstantLR(o, 0.25, 5),
    "LinearLR": lambda o: torchs.LinearLR(o, 0.25, 1.0, 6),
    "ExponentialLR": lambda o: torchs.ExponentialLR(o, 0.75),
    "CosineAnnealingLR": lambda o: torchs.CosineAnnealingLR(o, 10, 0.01),
    "PolynomialLR": lambda o: torchs.PolynomialLR(o, 12, 2.0),
    "ChainedScheduler": lambda o: torchs.ChainedScheduler(
        [torchs.ConstantLR(o, 0.5, 4), torchs.ExponentialLR(o, 0.8)]
    ),
    "SequentialLR": sequential,
    "OneCycleLR": lambda o: torchs.OneCycleLR(o, 0.5, total_steps=STEPS + 1),
    "CyclicLR": lambda o: torchs.CyclicLR(o, 0.1, 0.5, step_size_up=3, mode="triangular2"),
    "CosineAnnealingWarmRestarts": lambda o: torchs.CosineAnnealingWarmRestarts(o, 4, 2),
    "ReduceLROnPlateau": lambda o: torchs.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=6),
}


def cohort_of(K: int) -> Cohort:
    torch.manual_seed(0)
    return Cohort([nn.Linear(4, C) for _ in range(K)], C).double()


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(8, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(C, (8,), generator=generator)


def step_of(scheduler, metric: float) -> None:
    with warnings.catch_warnings():  # SequentialLR's own use of a deprecated argument
        warnings.simplefilter("ignore")
        scheduler.step(*[metric] * isinstance(scheduler, torchs.ReduceLROnPlateau))


def options(optimizer) -> list[list[float]]:
    """Rate and momentum of every group."""
    return [[float(g["lr"]), g["momentum"]] for g in optimizer.param_groups]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("K", [1, 3])
def test_rates_and_weights_are_those_of_plain_groups(name, K):
    ours, theirs = cohort_of(K), cohort_of(K)
    optimizer = make_optimizer(ours, "sgd", lr=RATE)
    step = make_step(ours, MutualLoss(), optimizer, execution="eager", amp="off")
    plain = torch.optim.SGD(
        [{"params": list(p.parameters())} for p in theirs.peers], RATE, 0.9, nesterov=True
    )
    ours_at, theirs_at = SCHEDULERS[name](optimizer), SCHEDULERS[name](plain)
    for i in range(STEPS):
        x, y = batch(i)
        step(x, y)
        plain.zero_grad()
        MutualLoss()([p(x) for p in theirs.peers], y).sum().backward()
        plain.step()
        metric = (3.0, 2.0, 2.0, 2.5, 2.0)[i % 5]
        step_of(ours_at, metric)
        step_of(theirs_at, metric)
        assert torch.allclose(*map(torch.tensor, (options(optimizer), options(plain))), rtol=1e-5)
    for w, v in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(w, v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_schedulers_of_other_libraries(library):
    """timm's assign numbers, and count by themselves; Hugging Face's are LambdaLR."""
    cohort = cohort_of(2)
    optimizer = make_optimizer(cohort, lr=RATE)
    step = make_step(cohort, MutualLoss(), optimizer, execution="eager", amp="off")
    plain = torch.optim.SGD([{"params": list(p.parameters())} for p in cohort_of(2).peers], RATE)
    if library == "timm":
        kind = pytest.importorskip("timm.scheduler").CosineLRScheduler
        ours, theirs = (kind(o, t_initial=10, warmup_t=3) for o in (optimizer, plain))
    else:
        make = pytest.importorskip("transformers").get_cosine_schedule_with_warmup
        ours, theirs = (make(o, 3, 10) for o in (optimizer, plain))
    seen = set()
    for i in range(8):
        step(*batch(i))
        plain.step()
        for scheduler in (ours, theirs):
            scheduler.step(*[i + 1] * (library == "timm"))
        rates, expected = ([float(g["lr"]) for g in o.param_groups] for o in (optimizer, plain))
        assert rates == pytest.approx(expected, rel=1e-6, abs=1e-9)
        seen.update(expected)
    assert len(seen) > 5


def cuts(optimizer) -> list[float]:
    """The rates after two cuts to a half."""
    for _ in range(2):
        step_of(plateau := torchs.ReduceLROnPlateau(optimizer, factor=0.5, patience=0), 1.0)
        step_of(plateau, 1.0)
    return [float(group["lr"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_state_with_a_shared_rate_is_loaded_into_rates_of_their_own(name):
    saved = io.BytesIO()
    optimizer = make_optimizer(cohort_of(3), name, lr=RATE)
    Schedule(optimizer, torch.tensor([0.25]))
    assert len({id(group["lr"]) for group in optimizer.param_groups}) == 1
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    optimizer.load_state_dict(torch.load(saved))
    assert cuts(optimizer) == [0.0625] * 3


def test_groups_added_later_have_rates_of_their_own():
    optimizer = make_optimizer(cohort_of(2), lr=RATE)
    for _ in range(2):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 1.0})
    assert cuts(optimizer) == [0.125] * 4 + [0.25]


def test_a_copy_has_rates_of_its_own():
    optimizer = make_optimizer(cohort_of(2), lr=RATE)
    twin = copy.deepcopy(optimizer)
    assert cuts(optimizer) == [0.125] * 2
    assert [float(group["lr"]) for group in twin.param_groups] == [RATE] * 2
