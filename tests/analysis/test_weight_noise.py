"""The loss under noise on the weights, against a quadratic whose rise is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from toy_networks import Quadratic, images, label_one, same_state, small_conv, state_of

from fastdml import Cohort
from fastdml.analysis import flat_minima, kernel_alignment, loss_section, posterior
from fastdml.errors import InputError

HESSIAN = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 4.0]])


def test_rise_of_a_quadratic():
    """sigma^2 / 2 tr(H) at the minimum and away from it, where the gradient averages out; over
    draws it varies by sigma^4 / 2 tr(H^2) + sigma^2 |g|^2."""
    draws, sigmas = 600, (0.05, 0.3)
    minimum = Quadratic([0.0, 0, 0], HESSIAN)
    slope = Quadratic([0.2, -0.1, 0.05], HESSIAN)
    found = flat_minima(
        [minimum, slope], label_one(), scales=sigmas, draws=draws, noise="absolute", seed=3
    )
    gradient = HESSIAN @ slope.weight.detach().numpy()[0]
    for k, g in enumerate([np.zeros(3), gradient]):
        for s, sigma in enumerate(sigmas, 1):
            rise = sigma**2 / 2 * np.trace(HESSIAN)
            spread = math.sqrt(sigma**4 / 2 * np.trace(HESSIAN @ HESSIAN) + sigma**2 * g @ g)
            assert abs(found.increase[k, s] - rise) < 4 * spread / math.sqrt(draws)
            assert found.spread[k, s] == pytest.approx(spread, rel=0.25)
    assert found.loss[0, 0] == pytest.approx(0.5, abs=1e-12)
    assert found.increase[:, 0].tolist() == [0, 0]
    assert found.spread[:, 0].tolist() == [0, 0]


def test_noise_relative_to_filters_is_the_absolute_one_times_their_root_mean_square():
    model = Quadratic([0.3, -0.4, 1.2], HESSIAN)  # one filter of length 1.3
    rms = 1.3 / math.sqrt(3)
    relative = flat_minima(model, label_one(), scales=[0.1], draws=7)
    absolute = flat_minima(model, label_one(), scales=[0.1 * rms], draws=7, noise="absolute")
    np.testing.assert_allclose(relative.loss, absolute.loss, rtol=1e-6)


def test_longer_filters_before_batch_norm_decide_nothing():
    """The same function with filters ten times as long is ten times as flat by absolute noise."""
    model, longer = small_conv(), small_conv()
    with torch.no_grad():
        longer[0].weight *= 10
        longer[1].running_mean *= 10
        longer[1].running_var *= 100
        model[1].eps = longer[1].eps = 1e-30
    options = {"scales": [0.3], "draws": 3, "seed": 1}
    relative = flat_minima([model, longer], images(), **options)
    assert abs(relative.increase[0, 1]) > 1e-3
    np.testing.assert_allclose(relative.loss[0], relative.loss[1], rtol=1e-5)
    absolute = flat_minima([model, longer], images(), noise="absolute", **options)
    assert not np.isclose(absolute.increase[0, 1], absolute.increase[1, 1], rtol=0.1)


def test_a_draw_is_the_same_for_all_scales_and_batches():
    model, data = small_conv(), images()
    both = flat_minima(model, data, scales=[0.1, 0.2], draws=2, seed=5)
    one = flat_minima(model, iter(data), scales=[0.2], draws=2, seed=5)
    assert both.loss[0, 2] == one.loss[0, 1]
    whole = (torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    np.testing.assert_allclose(
        flat_minima(model, whole, scales=[0.2], draws=2, seed=5).loss, one.loss, rtol=1e-6
    )
    other = flat_minima(model, data, scales=[0.2], draws=2, seed=6)
    assert other.loss[0, 1] != one.loss[0, 1]
    assert other.loss[0, 0] == one.loss[0, 0]


def test_what_is_noised():
    """Weights of two dimensions and more; with "all" also the others."""
    seen = []
    model = small_conv()
    model[1].register_forward_hook(lambda m, *_: seen.append((m.weight.clone(), m.bias.clone())))
    before = model[1].weight.clone()
    flat_minima(model, images(), scales=[0.5], draws=1)
    assert all(torch.equal(weight, before) for weight, _ in seen)
    seen.clear()
    flat_minima(model, images(), scales=[0.5], draws=1, noised="all")
    assert not torch.equal(seen[-1][0], before)
    with pytest.raises(InputError, match='noised="all"'):
        flat_minima(nn.BatchNorm1d(2), [(torch.zeros(2, 2), torch.zeros(2).long())])


@pytest.mark.parametrize("at", [1, 5, 9])
def test_networks_come_back_bit_for_bit_even_when_interrupted(at):
    model = small_conv().train()
    model[1].eval()  # as a user keeps a layer
    before, calls = state_of(model), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    flat_minima(model, images(), draws=2)
    assert same_state(model, before)
    with model[0].register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        flat_minima(model, images(), draws=2)
    assert len(calls) == at
    assert same_state(model, before)


def test_peers_of_a_cohort_and_a_network_of_torchvision():
    cohort = Cohort(["resnet8", "resnet8"], 4, seed=1)
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = [(x, torch.arange(6) % 4)]
    found = flat_minima(cohort, data, scales=[0.1], draws=1)
    assert found.peers == tuple(cohort.names)
    assert found.images == 6
    alone = flat_minima(cohort[1], data, scales=[0.1], draws=1)
    np.testing.assert_array_equal(alone.loss[0], found.loss[1])
    assert math.isnan(found.spread[0, 1])
    plain = found.to_dict()
    assert plain["scales"] == [0.0, 0.1]
    assert plain["loss"] == found.loss.tolist()

    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.squeezenet1_1(num_classes=4)
    assert flat_minima(network, data, scales=[0.01], draws=1).increase[0, 1] != 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales": [0.1, 0.0]}, "above 0"),
        ({"scales": []}, "above 0"),
        ({"draws": 0}, "draws"),
        ({"noise": "layer"}, "layer"),
        ({"noised": "biases"}, "biases"),
    ],
)
def test_options_that_mean_nothing(options, words):
    with pytest.raises(InputError, match=words):
        flat_minima(small_conv(), images(), **options)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "no batches"),
        ([(torch.zeros(2, 3, 8, 8), torch.zeros(2, 4))], "class indices"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([0, 4]))], "labels are 0 to 4"),
        ([(torch.zeros(2, 3, 8, 8), torch.tensor([-100, -100]))], "no row"),
    ],
)
def test_batches_that_have_no_loss(batches, words):
    with pytest.raises(InputError, match=words):
        flat_minima(small_conv(), batches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_take_inputs_in_the_precision_of_their_weights(dtype):
    exact, model = flat_minima(small_conv(), images(), draws=1), small_conv().to(dtype)
    before = state_of(model)
    found = flat_minima(model, images(), draws=1)
    np.testing.assert_allclose(found.loss, exact.loss, rtol=0.05)
    assert posterior(model, images()).entropy[0] > 0
    assert np.isfinite(loss_section(model, images(), points=2).loss).all()
    assert kernel_alignment([model, small_conv(1)], images()).alignment[0, 0, 1] < 1
    assert same_state(model, before)


def test_nothing_global_decides_or_is_changed():
    """Neither torch's generator, from which a DataLoader draws, nor its default precision."""
    whole = images(batch=48)[0]
    data = torch.utils.data.TensorDataset(*whole)
    before = flat_minima(small_conv(), whole).loss
    model, state = small_conv(), torch.get_rng_state()
    loader = torch.utils.data.DataLoader(data, 10, shuffle=True)
    np.testing.assert_allclose(flat_minima(model, loader).loss, before, rtol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_array_equal(flat_minima(model, whole).loss, before)
    finally:
        torch.set_default_dtype(torch.float32)
