"""Re-identification heads: maps and strides of every backbone, pooling, BNNeck, what is refused."""

from __future__ import annotations

import copy
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdml.errors import InputError
from fastdml.models import ReidHead, ReidModel, create_model
from fastdml.models.reid_head import AveragePool, GeMPool

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)
PAPER = ReidHead(neck=False, last_stride=2)

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    num_features = 6
    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.fc = nn.Linear(6, num_classes)
    def forward_features(self, x):
        return self.conv(x)
    def forward(self, x):
        return self.fc(self.forward_features(x).mean((2, 3)))

class Pooled(Net):
    def forward_features(self, x):
        return self.conv(x).mean((2, 3))

class Misnamed(Net):
    num_features = 7

class Small(Net):
    def forward_features(self, x):
        if x.shape[2:] != (48, 24):
            raise RuntimeError("not the size of its position embedding")
        return super().forward_features(x)

class SmallPooled(Small):
    def forward_features(self, x):
        return super().forward_features(x).mean((2, 3))

def plain(num_classes): return nn.Linear(3, num_classes)
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    (tmp_path / "fastdml_test_reid_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "fastdml_test_reid_own"
    sys.modules.pop("fastdml_test_reid_own", None)


def on_meta(name: str, head: ReidHead | None, num_classes: int = 751) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, num_classes, head=head)


# ---- backbones ----


@pytest.mark.parametrize(
    ("name", "features", "side"),
    [("mobilenet", 1024, 7), ("googlenet", 1024, 7), ("resnet20", 64, 56), ("wrn_10_2", 128, 56)],
)
@pytest.mark.parametrize("last_stride", [1, 2])
def test_maps_of_large_images(name, features, side, last_stride):
    model = on_meta(name, ReidHead(last_stride=last_stride))
    assert isinstance(model, ReidModel)
    assert (model.num_features, model.num_classes) == (features, 751)
    side *= 3 - last_stride
    for h, w in ((224, 224), (256, 128)):
        x = torch.zeros(2, 3, h, w, device="meta")
        shape = (2, features, side * h // 224, side * w // 224)
        assert model.backbone.forward_features(x).shape == shape
        assert model(x).shape == (2, 751)
        assert model.embed(x).shape == (2, features)


@needs_timm
@pytest.mark.parametrize(
    ("name", "last_stride"),
    [("resnet50", 1), ("resnet50", 2), ("timm:resnetblur50", 1), ("timm:resnet10t", 1)],
)  # fmt: skip
def test_resnets_are_the_imagenet_networks(name, last_stride):
    model = on_meta(name, ReidHead(last_stride=last_stride))
    x = torch.zeros(2, 3, 256, 128, device="meta")
    features = 2048 if "50" in name else 512
    scale = 3 - last_stride
    assert model.backbone.forward_features(x).shape == (2, features, 8 * scale, 4 * scale)
    assert model.embed(x).shape == (2, features)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@needs_timm
def test_sizes_are_those_of_the_architecture_papers():
    """A neck brings F gains and F biases; the classifier has C biases less."""
    assert count(on_meta("resnet50", PAPER, 1000)) == 25_557_032  # torchvision's and timm's
    assert count(on_meta("mobilenet", PAPER, 1000)) == 4_231_976  # Howard et al.: 4.2M
    assert round(count(on_meta("googlenet", PAPER, 1000)) / 1e6, 1) == 7.0
    strong = on_meta("mobilenet", ReidHead())
    assert count(strong) == count(on_meta("mobilenet", PAPER, 1000)) - 1024 * 249 - 1000 + 2048


def test_small_images_and_the_form_without_a_head_stay():
    with torch.device("meta"):
        x = torch.zeros(1, 3, 32, 32)
        plain = create_model("resnet20", 10)
        assert plain.forward_features(x).shape == (1, 64, 8, 8)
        assert create_model("mobilenet", 10).forward_features(x).shape == (1, 1024, 4, 4)
    kept = create_model("resnet20", 10, head=ReidHead())
    assert kept.backbone.forward_features(torch.zeros(1, 3, 32, 16)).shape == (1, 64, 16, 8)
    names = {k for k in plain.state_dict() if not k.startswith("head.")}
    assert {k.removeprefix("backbone.") for k in kept.state_dict() if "backbone" in k} == names


@needs_timm
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("timm:mobilenetv3_small_050", "map"),
        ("timm:vit_tiny_patch16_224", "tokens"),
        ("timm:swin_tiny_patch4_window7_224", "channels last"),
    ],
)
def test_layouts_of_timm(name, layout):
    model = create_model(name, 5, head=ReidHead()).eval()
    assert model.layout == layout
    x = torch.randn(2, 3, 128, 64)  # not the size that it was made for
    with torch.no_grad():
        found = model.backbone.forward_features(x)
        if layout == "tokens":
            expected = found[:, 1:].mean(1)  # without the class token
        else:
            expected = found.mean((1, 2) if layout == "channels last" else (2, 3))
        torch.testing.assert_close(model.features(x), expected)
    # nothing that no image reaches
    model.train()(x).square().sum().backward()
    unreached = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unreached == []


def test_own_backbones(own):
    head = ReidHead(last_stride=2)
    model = create_model(f"{own}:Net", 5, head=head)
    assert isinstance(model.backbone.fc, nn.Identity)  # its own classifier is dropped
    assert isinstance(model.backbone.frozen, nn.Linear)  # nobody knows what this is for
    assert model.training
    assert model(torch.randn(3, 3, 9, 5)).shape == (3, 5)
    small = create_model(f"{own}:Small", 5, head=head)  # of a size that cannot be tried
    assert small(torch.randn(3, 3, 48, 24)).shape == (3, 5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("plain", r"without a feature map to pool: it needs forward_features\(images\)"),
        ("Pooled", r"feature map to pool: .*must return \(N, 6, H, W\), and returned \(1, 6\)"),
        ("Misnamed", r"must return \(N, 7, H, W\), and returned \(1, 6, 31, 31\)"),
    ],
)
def test_a_backbone_without_a_map_is_refused(own, function, message):
    with pytest.raises(InputError, match=message) as caught:
        create_model(f"{own}:{function}", 5, head=ReidHead())
    assert f"'{own}:{function}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_backbone_that_turns_out_to_have_no_map(own):
    model = create_model(f"{own}:SmallPooled", 5, head=ReidHead())
    with pytest.raises(InputError, match=r"must return \(N, 6, H, W\), and returned \(2, 6\)"):
        model(torch.randn(2, 3, 48, 24))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling must be avg or gem, not 'max'"),
        ({"neck": 1}, "neck must be True or False, not 1"),
        ({"last_stride": 3}, "last_stride must be 1 or 2, not 3"),
    ],
)
def test_head_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        ReidHead(**options)


def test_head_must_be_a_head():
    with pytest.raises(InputError, match="head must be a ReidHead or None, not 'gem'"):
        create_model("resnet8", 5, head="gem")


# ---- the head ----


def test_neck_normalises_what_retrieval_gets_and_metric_losses_do_not():
    torch.manual_seed(0)
    model = create_model("resnet8", 7, head=ReidHead())
    x = torch.randn(16, 3, 16, 8)
    logits, features = model.logits_and_features(x)
    pooled = model.backbone.forward_features(x).mean((2, 3))
    torch.testing.assert_close(features, pooled)
    assert model.classifier.bias is None
    normal = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(logits, normal @ model.classifier.weight.T, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model(x), logits)
    model.eval()
    state = model.neck.running_mean, model.neck.running_var
    pooled = model.backbone.forward_features(x).mean((2, 3))
    expected = (pooled - state[0]) / (state[1] + 1e-5).sqrt()
    torch.testing.assert_close(model.embed(x), expected, rtol=1e-4, atol=1e-5)
    assert model.classifier.weight.std().item() == pytest.approx(0.001, rel=0.1)


def test_paper_head_has_no_neck():
    model = create_model("resnet8", 7, head=PAPER).eval()
    x = torch.randn(4, 3, 16, 8)
    pooled = model.backbone.forward_features(x).mean((2, 3))
    torch.testing.assert_close(model.embed(x), pooled)
    assert (model.classifier.bias == 0).all()
    expected = F.linear(pooled, model.classifier.weight, model.classifier.bias)
    torch.testing.assert_close(model(x), expected)


def test_neck_bias_stays_at_zero_in_training():
    torch.manual_seed(0)
    model = create_model("resnet8", 4, head=ReidHead())
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], 0.01)
    losses = []
    x, y = torch.randn(16, 3, 16, 8), torch.arange(16) % 4
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert (model.neck.bias == 0).all()
    assert not torch.equal(model.neck.weight, torch.ones(64))
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["neck.bias"]


@given(
    n=st.integers(1, 3), f=st.integers(1, 4), h=st.integers(1, 5), w=st.integers(1, 5),
    p=st.floats(1, 8), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_gem_is_the_generalised_mean(n, f, h, w, p, seed):
    x = torch.rand(n, f, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pool = GeMPool().double()
    with torch.no_grad():
        pool.p.fill_(p)
    expected = (x.clamp(min=1e-6) ** p).flatten(2).mean(2) ** (1 / p)
    found = pool(x)
    torch.testing.assert_close(found, expected)
    # between average and maximum, and at p = 1 the average
    assert (found >= AveragePool()(x) - 1e-5).all()
    assert (found <= x.flatten(2).amax(2) + 1e-5).all()
    with torch.no_grad():
        pool.p.fill_(1.0)
    torch.testing.assert_close(pool(x), AveragePool()(x), atol=2e-6, rtol=0)


def test_gem_gradients_and_dead_channels():
    pool = GeMPool().double()
    x = torch.rand(2, 3, 4, 2, dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, p: torch.func.functional_call(pool, {"p": p}, (x,)),
                                    (x, pool.p))  # fmt: skip
    dead = torch.zeros(2, 3, 4, 2, requires_grad=True)  # after a ReLU
    out = GeMPool()(dead)
    out.sum().backward()
    assert out.isfinite().all()
    assert dead.grad.isfinite().all()
    assert GeMPool().p.item() == 3


@pytest.mark.parametrize("pooling", ["avg", "gem"])
def test_features_are_float32_under_half_precision(pooling):
    model = create_model("resnet8", 7, head=ReidHead(pooling=pooling))
    x = torch.randn(8, 3, 16, 8)
    full = copy.deepcopy(model)(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits, features = model.logits_and_features(x)
        assert model.embed(x).dtype == torch.float32
    assert features.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - full).norm() < 0.1 * full.norm()


@pytest.mark.parametrize("head", [ReidHead("gem"), PAPER], ids=str)
def test_state_dict_round_trip(head):
    torch.manual_seed(0)
    one, two = (create_model("resnet8", 5, head=head) for _ in range(2))
    x = torch.randn(4, 3, 16, 8)
    one(x)
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one.eval().embed(x), two.eval().embed(x))
        assert torch.equal(one(x), two(x))
