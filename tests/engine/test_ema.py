"""What the averages take in: weights and running statistics, and nothing else."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.ao.quantization import MovingAverageMinMaxObserver

from fastdml.cohort import Cohort
from fastdml.engine import Ema, make_optimizer, make_step
from fastdml.errors import InputError
from fastdml.loss import MutualLoss

C, DECAY = 4, 0.75


class Net(nn.Module):
    """A body and one more part, whose buffers are what the case is about."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.part, self.head = part, nn.Linear(4, C)

    def forward(self, x):
        return self.head(self.part(self.body(x)).mean((2, 3)))


class CausalMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))

    def forward(self, x):
        return torch.einsum("bchw,cd->bdhw", x, self.mask.softmax(1))


class MaskingBias(nn.Module):
    """A weight that holds -inf, frozen or not."""

    def __init__(self, trained):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.0, 0.0, -math.inf, 0.0]), requires_grad=trained)

    def forward(self, x):
        return x * self.bias.softmax(0).view(1, 4, 1, 1)


class Counted(nn.Module):
    """Counts images in a float, which no average may touch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.tensor(0.0))

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return x


class Observer(MovingAverageMinMaxObserver):
    """Begins at infinity and -infinity."""


PARTS = {
    "causal mask": CausalMask,
    "trained bias with -inf": lambda: MaskingBias(True),
    "frozen bias with -inf": lambda: MaskingBias(False),
    "count of images": Counted,
    "quantiser's observer": Observer,
    "frozen batch norm": lambda: pytest.importorskip("torchvision.ops").FrozenBatchNorm2d(4),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
}


def averaged(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in ("weight", "bias", "original", "running_mean", "running_var")


@pytest.mark.parametrize("part", PARTS)
def test_weights_and_running_statistics_are_averaged_and_the_rest_is_the_cohorts_own(part):
    torch.manual_seed(0)
    cohort = Cohort([Net(PARTS[part]()), Net(PARTS[part]())], C)
    ema = Ema(cohort, DECAY)
    step = make_step(cohort, MutualLoss(), make_optimizer(cohort, lr=0.1), ema=ema, amp="off",
                     execution="eager")  # fmt: skip
    expected = {n: t.double().clone() for n, t in cohort.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(8, 3, 6, 6, generator=generator)
        step(x, torch.randint(C, (8,), generator=generator))
        for name, t in cohort.state_dict().items():
            was = expected[name]
            mean = torch.where(was == t, was, DECAY * was + (1 - DECAY) * t)
            expected[name] = mean if averaged(name) else t.double().clone()
    own = copy.deepcopy(cohort.state_dict())
    with ema.applied():
        inside = copy.deepcopy(cohort.state_dict())
        twin = copy.deepcopy(cohort).eval()  # observers follow what they see here too
        assert all(z.isfinite().all() for z in twin(torch.randn(2, 3, 6, 6)))
    for name, value in inside.items():
        if averaged(name):
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, own[name]), name
    assert all(torch.equal(v, own[n]) for n, v in cohort.state_dict().items())
    ema.copy_to_cohort()
    assert all(torch.equal(v, inside[n]) for n, v in cohort.state_dict().items())


def test_a_model_of_timm_with_masks_and_tables():
    """Swin has a mask of shifted windows and tables of relative positions beside its weights."""
    timm = pytest.importorskip("timm")
    kwargs = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (2,),
              "num_heads": (2,), "num_classes": C}  # fmt: skip
    cohort = Cohort([timm.models.SwinTransformer(**kwargs) for _ in range(2)], C)
    buffers = {n: t.clone() for n, t in cohort.named_buffers()}
    assert any(t.is_floating_point() for t in buffers.values())
    ema = Ema(cohort, DECAY)
    assert set(ema.state_dict()) == {n for n, _ in cohort.named_parameters()}
    with torch.no_grad():
        for w in cohort.parameters():
            w.add_(1)
    ema.update()
    with ema.applied():
        assert all(torch.equal(t, buffers[n]) for n, t in cohort.named_buffers())


def test_weights_frozen_now_are_copied_and_unfrozen_again_averaged():
    cohort = Cohort([nn.Linear(2, C), nn.Linear(2, C)], C)
    ema, weight = Ema(cohort, DECAY), cohort.peers[0].weight
    weight.requires_grad_(False).fill_(2.0)
    ema.update()
    assert (ema.state_dict()["peers.0.weight"] == 2).all()
    weight.fill_(6.0).requires_grad_(True)
    ema.update()
    assert (ema.state_dict()["peers.0.weight"] == 3).all()


def test_layers_replaced_and_moved_are_followed():
    cohort = Cohort([nn.Sequential(nn.Linear(2, 3), nn.Linear(3, C)) for _ in range(2)], C)
    ema = Ema(cohort, DECAY)
    cohort.peers[0][0] = nn.Sequential(nn.Linear(2, 3))  # under another name
    cohort.double()  # in place
    ema.update()
    state = ema.state_dict()
    assert "peers.0.0.weight" not in state
    assert torch.equal(state["peers.0.0.0.weight"], cohort.peers[0][0][0].weight)
    with torch.no_grad():
        cohort.peers[1][1].weight.add_(1.0)
    ema.update()
    moved = cohort.peers[1][1].weight - ema.state_dict()["peers.1.1.weight"]
    torch.testing.assert_close(moved.detach(), torch.full_like(moved, DECAY), rtol=1e-5, atol=1e-6)


def test_averages_follow_to_another_dtype():
    cohort = Cohort([nn.Linear(2, C), nn.Linear(2, C)], C)  # no buffer that would be replaced
    ema = Ema(cohort, DECAY)
    cohort.double()
    with torch.no_grad():
        cohort.peers[0].bias.add_(4.0)
    ema.update()
    assert ema.state_dict()["peers.0.bias"].dtype == torch.float64
    moved = cohort.peers[0].bias - ema.state_dict()["peers.0.bias"]
    torch.testing.assert_close(moved.detach(), torch.full_like(moved, 3.0))


def test_complex_weights_are_averaged():
    class Spectral(nn.Linear):
        def __init__(self):
            super().__init__(2, C)
            self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))

    cohort = Cohort([Spectral(), Spectral()], C)
    ema, phase = Ema(cohort, DECAY), cohort.peers[0].phase
    before = phase.detach().clone()
    with torch.no_grad():
        phase.add_(4j)
    ema.update()
    torch.testing.assert_close(ema.state_dict()["peers.0.phase"], before + 1j)


def test_states_of_earlier_versions_hold_all_buffers_and_load():
    cohort = Cohort([Net(CausalMask()), Net(CausalMask())], C)
    state = {n: t.clone() for n, t in cohort.state_dict().items() if t.is_floating_point()}
    state["peers.0.part.mask"] = torch.full((4, 4), math.nan)  # as it was averaged then
    state["peers.0.head.bias"] = torch.ones(C)
    ema = Ema(cohort, DECAY)
    ema.load_state_dict(state)
    with ema.applied():
        assert torch.equal(cohort.peers[0].head.bias, torch.ones(C))
        assert all(z.isfinite().all() for z in cohort(torch.randn(2, 3, 6, 6)))


@pytest.mark.parametrize("shape", [None, (1,), (C + 1,)])
def test_averages_of_another_cohort_are_refused_before_any_is_taken(shape):
    cohort = Cohort([nn.Linear(2, C), nn.Linear(2, C)], C)
    ema = Ema(cohort, DECAY)
    state = {n: torch.zeros_like(t) for n, t in ema.state_dict().items()}
    del state["peers.1.bias"]
    if shape:
        state["peers.1.bias"] = torch.zeros(shape)
    message = r"another cohort: peers.1.bias needs \(4,\), and the state has"
    with pytest.raises(InputError, match=message):
        ema.load_state_dict(state)
    assert (ema.state_dict()["peers.0.weight"] != 0).all()
