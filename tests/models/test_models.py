"""The models: the papers' sizes, shapes for every input, gradients, and one fixed graph."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdml.models import create_model, model_names

SMALL = ["resnet8", "resnet20", "wrn_10_1", "wrn_16_2", "mobilenet", "googlenet"]
# (channels, height, width): the digits, CIFAR, twice CIFAR, a pedestrian crop of odd size
INPUTS = [(1, 8, 8), (3, 32, 32), (3, 64, 64), (3, 65, 33)]


def parameters(name: str, num_classes: int = 100) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, num_classes).parameters())


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet32", 0.5), ("mobilenet", 3.3), ("wrn_28_10", 36.5)]
)
def test_sizes_are_those_printed_in_the_mutual_learning_paper(name, millions):
    assert round(parameters(name) / 1e6, 1) == millions


def test_sizes_are_those_printed_in_the_architecture_papers():
    # He et al. 2015, table 6 and Zagoruyko and Komodakis 2016, tables 4 and 5: CIFAR-10
    printed = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85}
    assert {name: round(parameters(name, 10) / 1e6, 2) for name in printed} == printed
    assert round(parameters("resnet110", 10) / 1e6, 1) == 1.7
    assert round(parameters("wrn_16_8", 10) / 1e6, 1) == 11.0
    assert round(parameters("wrn_40_4", 10) / 1e6, 1) == 8.9


def test_googlenet_has_the_size_its_documentation_states():
    assert parameters("googlenet") == 6_075_652


@pytest.mark.parametrize("name", model_names())
@pytest.mark.parametrize("shape", INPUTS, ids=str)
def test_shapes_for_every_name_and_input(name, shape):
    with torch.device("meta"):
        model = create_model(name, 7, in_channels=shape[0])
        x = torch.zeros(3, *shape)
        assert model(x).shape == (3, 7)
        features = model.forward_features(x)
    assert features.shape[:2] == (3, model.num_features)
    assert features.shape[2] >= 1
    assert model.num_classes == 7


@pytest.mark.parametrize(
    ("name", "size"), [("resnet20", 8), ("wrn_16_4", 8), ("mobilenet", 4), ("googlenet", 8)]
)
def test_last_map_of_a_cifar_image(name, size):
    with torch.device("meta"):
        features = create_model(name, 100).forward_features(torch.zeros(1, 3, 32, 32))
    assert features.shape[2:] == (size, size)


@given(
    n=st.integers(1, 8), width=st.integers(1, 3), classes=st.integers(1, 200),
    channels=st.integers(1, 5), wide=st.booleans(),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_every_depth_and_width_has_that_many_weighted_layers(n, width, classes, channels, wide):
    depth = 6 * n + (4 if wide else 2)
    name = f"wrn_{depth}_{width}" if wide else f"resnet{depth}"
    if depth in (50, 152):
        return
    with torch.device("meta"):
        model = create_model(name, classes, in_channels=channels)
        assert model(torch.zeros(2, channels, 8, 8)).shape == (2, classes)
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    # A Wide ResNet's depth counts 6n + 1 convolutions of 3x3, three projections, no head.
    projections = [m for m in weighted if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(weighted) - len(projections) == 6 * n + 2
    assert len(projections) == (0 if not wide else 2 if width == 1 else 3)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_parameter_and_the_loss_falls(name):
    torch.manual_seed(0)
    model = create_model(name, 10)
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for parameter_name, p in model.named_parameters():
            assert p.grad is not None, parameter_name
            assert p.grad.isfinite().all(), parameter_name
            assert p.grad.abs().max() > 0, parameter_name
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1"])
def test_real_digits_are_learnt(name):
    digits = pytest.importorskip("sklearn.datasets", reason="scikit-learn is missing").load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8)
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = create_model(name, 10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for rows in torch.randint(1400, (60, 64)):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        predicted = model.eval()(x[1400:]).argmax(1)
    assert (predicted == y[1400:]).float().mean() > 0.75


@pytest.mark.parametrize("name", SMALL)
def test_evaluation_of_a_row_does_not_depend_on_its_batch(name):
    torch.manual_seed(0)
    model = create_model(name, 10)
    x = torch.randn(6, 3, 8, 8)
    model(x)  # moves the running statistics off their start
    before = copy.deepcopy(model.state_dict())
    model.eval()
    with torch.no_grad():
        whole, single = model(x), torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-5)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"evaluation changed {key}"
    model.train()
    with torch.no_grad():
        assert not torch.allclose(model(x), whole)  # batch statistics again


@pytest.mark.parametrize("name", SMALL)
def test_running_statistics_converge_to_the_batch(name):
    """In evaluation, after many passes over one batch, the numbers of training mode come back."""
    torch.manual_seed(0)
    model = create_model(name, 10).double()
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        trained = model(x)
        for module in model.modules():  # running variances are unbiased, batch ones are not
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(_rescale_variance)
        torch.testing.assert_close(model.eval()(x), trained, rtol=1e-6, atol=1e-8)


def _rescale_variance(module: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
    n = inputs[0].numel() / inputs[0].shape[1]
    module.running_var.mul_((n - 1) / n)


@pytest.mark.parametrize("name", SMALL)
def test_state_dict_round_trip(name):
    torch.manual_seed(0)
    one, two = create_model(name, 10), create_model(name, 10)
    x = torch.randn(4, 3, 8, 8)
    one(x)
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one.eval()(x), two.eval()(x))


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_stays_and_gives_the_same_numbers(name):
    torch.manual_seed(0)
    model = create_model(name, 10).eval()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        layouts = []
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(
                    lambda _m, inputs, _out: layouts.append(
                        inputs[0].is_contiguous(memory_format=torch.channels_last)
                    )
                )
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert layouts
    assert all(layouts), "a layer was given a map in the wrong layout"


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_one_fixed_graph(name):
    """`torch.fx` can trace it: nothing in it depends on the data, as a captured graph needs."""
    torch.manual_seed(0)
    model = create_model(name, 10)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
    assert torch.equal(traced.state_dict()["head.weight"], model.state_dict()["head.weight"])


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_autocast_stays_close(name):
    torch.manual_seed(0)
    model = create_model(name, 10).eval()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    with torch.no_grad():
        full = model(x)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.1 * full.norm()


def test_depthwise_layers_start_at_the_scale_of_the_others():
    """After initialisation, signal variance neither dies nor explodes through the network."""
    torch.manual_seed(0)
    for module in create_model("mobilenet", 10).modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            assert module.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.2)
