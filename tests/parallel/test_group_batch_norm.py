"""Batch normalisation over the columns of a mesh against one process that sees the whole batch."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from itertools import chain

import pytest
import torch
from ranks import run_ranks
from torch import nn

from fastdml import Cohort
from fastdml.engine import Ema
from fastdml.errors import InputError
from fastdml.parallel import averaged_statistics, make_mesh, separate_batchnorm, sync_batchnorm

CUT, C = (0, 5, 6, 12), 4  # rows of three columns: 5, 1 and 6
LAYERS = {
    "1d": partial(nn.BatchNorm1d, C, momentum=0.3),
    "1d of a sequence": partial(nn.BatchNorm1d, C),
    "2d": partial(nn.BatchNorm2d, C),
    "channels_last": partial(nn.BatchNorm2d, C),
    "3d": partial(nn.BatchNorm3d, C),
    "not affine": partial(nn.BatchNorm2d, C, affine=False),
    "mean over all batches": partial(nn.BatchNorm2d, C, momentum=None),
    "no running statistics": partial(nn.BatchNorm2d, C, track_running_stats=False),
    "frozen": lambda: nn.BatchNorm2d(C).requires_grad_(False),
    "float32": partial(nn.BatchNorm2d, C),
    "bf16": partial(nn.BatchNorm2d, C),
    "autocast": partial(nn.BatchNorm2d, C),
}
SHAPES = {"1d": (C,), "1d of a sequence": (C, 7), "3d": (C, 2, 3, 2)}


def batch(case: str, step: int) -> torch.Tensor:
    shape = SHAPES.get(case, (C, 3, 5))
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(CUT[-1], *shape, generator=generator, dtype=torch.float64)
    return 3 * x + 10 * torch.arange(C).view(-1, *[1] * (len(shape) - 1))


def layer_of(case: str) -> nn.Module:
    layer = LAYERS[case]().to(
        {"float32": torch.float32, "autocast": torch.float32}.get(case, torch.float64)
    )
    if layer.weight is not None:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2.0, C))
            layer.bias.copy_(torch.linspace(-1.0, 1.0, C))
    return layer.float() if case == "bf16" else layer


def passes(case: str, layer: nn.Module, rows: slice) -> dict[str, list[torch.Tensor]]:
    """Of two training steps and an evaluation of these rows: outputs, gradients, statistics."""
    found: dict[str, list[torch.Tensor]] = {"outputs": [], "input gradients": []}
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.bfloat16}
    device = next(chain(layer.parameters(), layer.buffers())).device
    for step in range(2):
        x = batch(case, step)[rows].to(device, dtype.get(case, torch.float64))
        if case == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=case == "autocast"):
            y = layer(x)
        weights = batch(case, 10 + step)[rows].to(device)
        (weights * y.double().sin()).sum().backward()
        found["outputs"].append(y.detach())
        found["input gradients"].append(x.grad)
    found["weight gradients"] = [w.grad for w in layer.parameters() if w.grad is not None]
    found["statistics"] = [b.clone() for b in layer.buffers()]
    if layer.running_mean is not None:  # else of the batch at hand
        found["evaluated"] = [layer.eval()(x.detach()).detach()]
        layer.train()
    return {what: [t.cpu() for t in values] for what, values in found.items()}


def on_a_mesh() -> dict:
    mesh = make_mesh(1, 3, timeout=20)
    mesh.place(1)
    rows = slice(CUT[mesh.column], CUT[mesh.column + 1])
    found: dict = {}
    for case in LAYERS:
        layer = layer_of(case)
        cohort = Cohort([nn.Sequential(nn.Flatten(), nn.Linear(C, 2), layer)], 2)
        before = list(cohort.state_dict(keep_vars=True).items())
        sync_batchnorm(cohort, mesh)
        after = list(cohort.state_dict(keep_vars=True).items())
        assert [n for n, _ in before] == [n for n, _ in after]
        assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))
        found[case] = passes(case, layer, rows)
        assert type(layer) is not LAYERS["2d"].func
        assert type(copy.deepcopy(layer)) is type(pickle.loads(pickle.dumps(layer)))
        assert type(copy.deepcopy(layer)).__module__.startswith("torch.nn")
        grouped = type(layer)
        separate_batchnorm(cohort)
        assert type(layer) is grouped.plain
        assert "group" not in vars(layer)
    found["averaged"] = averages(mesh)
    return found


class Peer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.images = nn.InstanceNorm1d(width, track_running_stats=True)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.norm(x) + self.images(x[:, :, None] * x.new_tensor([1, 2, 4])).sum(2))


def averages(mesh) -> dict:
    cohort = Cohort([Peer(C), Peer(C)], 2)
    mesh.place(2)
    ema = Ema(cohort, 0.5)
    for x in (batch("1d", s)[CUT[mesh.column] : CUT[mesh.column + 1]].float() for s in range(2)):
        cohort(torch.cat([x, x + 1]))
        ema.update()
    own = {n: b.clone() for n, b in cohort.named_buffers()}
    own_averages = {n: t.clone() for n, t in ema.state_dict().items()}
    weights = {n: w.clone() for n, w in cohort.named_parameters()}
    found = {"own": own, "own averages": own_averages}
    with averaged_statistics(cohort, mesh, ema):
        found["inside"] = {n: b.clone() for n, b in cohort.named_buffers()}
        with ema.applied():
            found["inside of ema"] = {n: b.clone() for n, b in cohort.named_buffers()}
    now = {**dict(cohort.named_buffers()), **dict(cohort.named_parameters())}
    found["unchanged"] = all(torch.equal(now[n], t) for n, t in (own | weights).items())
    now = ema.state_dict()
    found["averages unchanged"] = all(torch.equal(now[n], t) for n, t in own_averages.items())
    return found


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class Named(nn.BatchNorm2d):
    """Computes what torch's does."""


def foreign() -> dict[str, nn.Module]:
    import timm
    import torchvision

    torch.manual_seed(0)
    return {
        "timm": timm.create_model("mobilenetv3_small_050", num_classes=5),  # BatchNormAct2d
        "torchvision": torchvision.models.shufflenet_v2_x0_5(num_classes=5),
        "own class": nn.Sequential(
            nn.Conv2d(3, 5, 3), Named(5), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()
        ),
    }


def whole_model(model: nn.Module, rows: slice) -> dict[str, torch.Tensor]:
    x = torch.randn(CUT[-1], 3, 32, 32, generator=torch.Generator().manual_seed(4)).double()
    y = model.double().train()(x[rows])
    (y * torch.arange(5)).pow(2).sum().backward()
    found = {n: b.clone() for n, b in model.named_buffers()}
    found |= {f"gradient of {n}": w.grad for n, w in model.named_parameters()}
    return found | {"outputs": y.detach()}


def models() -> dict:
    mesh = make_mesh(1, 3, timeout=20)
    mesh.place(1)
    found = {}
    for name, model in foreign().items():
        cohort = Cohort([model], 5)
        sync_batchnorm(cohort, mesh)
        found[name] = whole_model(model, slice(CUT[mesh.column], CUT[mesh.column + 1]))
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks(3, on_a_mesh, timeout=120)


@pytest.mark.parametrize("case", LAYERS)
def test_it_is_one_process_with_the_whole_batch(case, ranks):
    check(case, [rank[case] for rank in ranks])


def check(case: str, found: list[dict[str, list[torch.Tensor]]]) -> None:
    """What the columns found, against one process on the CPU."""
    low = case in ("bf16", "autocast")
    # Both compute in float32 and round to bf16 once, which can fall to either side.
    near = {"rtol": 1e-2, "atol": 1e-2} if low else {"rtol": 1e-9, "atol": 1e-9}
    if case == "float32":
        near = {"rtol": 2e-3, "atol": 5e-4}
    expected = passes(case, layer_of(case), slice(None))
    for what in expected.keys() - {"weight gradients", "statistics"}:
        for i, whole in enumerate(expected[what]):
            together = torch.cat([rank[what][i] for rank in found])
            assert together.dtype == whole.dtype
            torch.testing.assert_close(together, whole, **near)
    for i, whole in enumerate(expected["weight gradients"]):
        together = sum(rank["weight gradients"][i] for rank in found)
        torch.testing.assert_close(together, whole, **near)
    for i, whole in enumerate(expected["statistics"]):
        for rank in found:
            torch.testing.assert_close(rank["statistics"][i], whole, **near)
            assert torch.equal(rank["statistics"][i], found[0]["statistics"][i])
    if case == "channels_last":
        for rank in found:
            for t in rank["outputs"] + rank["input gradients"]:
                assert t.is_contiguous(memory_format=torch.channels_last)


def test_the_formula_of_torchs_sync_batch_norm(ranks):
    """Statistics, output and gradient as its code has them, in float64 (it runs on CUDA alone)."""
    layer, x, dims = layer_of("2d"), batch("2d", 0), (0, 2, 3)
    mean, var = x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True)
    weight, bias = (w.detach().view(-1, 1, 1) for w in (layer.weight, layer.bias))
    invstd = (var + layer.eps).rsqrt()
    y = (x - mean) * invstd * weight + bias
    dy = batch("2d", 10) * y.cos()
    proj = (dy * (x - mean)).mean(dims, keepdim=True) * invstd.square()
    dx = (dy - dy.mean(dims, keepdim=True) - (x - mean) * proj) * invstd * weight
    for what, whole in (("outputs", y), ("input gradients", dx)):
        together = torch.cat([rank["2d"][what][0] for rank in ranks])
        torch.testing.assert_close(together, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_models_that_others_wrote():
    pytest.importorskip("timm")
    ranks = run_ranks(3, models, timeout=120)
    for name, model in foreign().items():
        expected = whole_model(model, slice(None))
        found = [rank[name] for rank in ranks]
        together = torch.cat([rank["outputs"] for rank in found])
        torch.testing.assert_close(together, expected.pop("outputs"), rtol=1e-8, atol=1e-8)
        for what, whole in expected.items():
            values = [rank[what] for rank in found]
            now = sum(values) if what.startswith("gradient") else values[0]
            torch.testing.assert_close(now, whole, rtol=1e-6, atol=1e-8)


def test_averaged_statistics(ranks):
    found = [rank["averaged"] for rank in ranks]
    for where, inside in (("own", "inside"), ("own averages", "inside of ema")):
        for name, mean in found[0][inside].items():
            own = torch.stack(
                [rank[where if name in rank[where] else "own"][name] for rank in found]
            )
            if "running_" in name:
                assert not torch.equal(own[0], own[1])
                torch.testing.assert_close(mean, own.mean(0))
            assert all(torch.equal(rank[inside][name], mean) for rank in found)
    assert all(rank["unchanged"] and rank["averages unchanged"] for rank in found)


class OneColumn:
    data, rows = 1, (0,)


class TwoColumns:
    data, rows, local = 2, (0,), (0,)

    def data_group_of(self, k):
        raise AssertionError("refused before")


@pytest.mark.parametrize("norm", [OwnNorm, nn.SyncBatchNorm])
def test_layers_of_their_own_kind_are_refused_by_name(norm):
    layer = norm(5)
    cohort = Cohort([nn.Sequential(nn.Conv2d(3, 5, 3), layer)], 5)
    with pytest.raises(InputError, match=f"1 of peer Sequential is a {norm.__name__}"):
        sync_batchnorm(cohort, TwoColumns())
    sync_batchnorm(cohort, OneColumn())
    assert type(layer) is norm


def test_a_cohort_that_is_not_distributed_is_refused():
    mesh = TwoColumns()
    mesh.rows = ()
    cohort = Cohort([nn.Linear(3, 5)], 5)
    for call in (sync_batchnorm, lambda *given: averaged_statistics(*given).__enter__()):
        with pytest.raises(InputError, match=r"mesh\.distribute\(cohort\) on every rank first"):
            call(cohort, mesh)


@pytest.mark.slow
def test_a_running_variance_of_an_unknown_layer_is_refused():
    EvoNorm2dB0 = pytest.importorskip("timm.layers").EvoNorm2dB0
    from torchvision.ops import FrozenBatchNorm2d

    cohort = Cohort([nn.Sequential(FrozenBatchNorm2d(3), EvoNorm2dB0(3))], 5)
    with pytest.raises(InputError, match="1 of peer Sequential is a EvoNorm2dB0"):
        sync_batchnorm(cohort, TwoColumns())
