"""Networks that others wrote, and runs of other kinds than the usual one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_networks import same_state, state_of

import fastdml
from fastdml.analysis import (
    flat_minima,
    kernel_alignment,
    loss_plane,
    loss_section,
    peers_of_run,
    posterior,
    posterior_of_run,
)

pytestmark = pytest.mark.slow
USUAL = {"device": "cpu", "tensorboard": False, "figures": (), "deterministic": True, "epochs": 1}


def of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.shufflenet_v2_x0_5(num_classes=4)


def of_timm():
    return pytest.importorskip("timm").create_model("resnet10t", num_classes=4)


def of_transformers():
    """Its output has logits as an attribute."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, intermediate_size=32, num_labels=4, **sizes
    )
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("make", [of_torchvision, of_timm, of_transformers])
def test_networks_of_others(make):
    torch.manual_seed(0)
    models = [make(), make()]
    before = [state_of(model) for model in models]
    x = torch.randn(16, 3, 32, 32)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, torch.arange(16) % 4), batch_size=8
    )
    noise = flat_minima(models, loader, scales=[0.1], draws=1)
    assert np.isfinite(noise.loss).all()
    assert (noise.increase[:, 1] != 0).all()
    line = loss_section(models, loader, points=3, beyond=0, batch_norm="stored")
    np.testing.assert_array_equal(line.loss[[0, -1]], noise.loss[:, 0])
    assert np.isfinite(loss_plane(models, loader, points=2).loss).all()
    alike = kernel_alignment(models, loader, debiased=False).alignment[0]
    assert 0 < alike[0, 1] < 1
    assert posterior(models, loader).images == 16
    assert all(same_state(m, was) for m, was in zip(models, before, strict=True))


def test_semi_supervised_run_with_validation_images(tmp_path):
    """Training images are those with labels; the best weights, which validation images chose."""
    folder = str(tmp_path / "run")
    fastdml.train.digits(
        ["resnet8", "resnet8"], subset=300, labelled=120, validation=20, folder=folder, **USUAL
    )
    found = peers_of_run(folder, device="cpu")
    assert found.weights == "best"
    labels = torch.cat([labels for _, labels in found.batches(0)])
    assert len(labels) == 100
    assert bool((labels >= 0).all())
    assert posterior_of_run(folder, images=30, device="cpu").images == 30


def test_run_on_images_of_ones_own(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name in ("cat", "dog"):
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (*random.integers(10, 20, 2), 3))
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    run = fastdml.train.folder(
        ["resnet8", "resnet8"],
        str(tmp_path / "photos"),
        size=12,
        batch_size=8,
        folder=str(tmp_path / "run"),
        **USUAL,
    )
    found = peers_of_run(tmp_path / "run", device="cpu")
    assert found.config.data == run.config.data == "folder"
    x = torch.cat([inputs for inputs, _ in found.batches(0)])
    assert x.shape == (16, 3, 12, 12)
    mean = x.mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-2, rtol=0)  # as the run normalised
    assert sum(len(labels) for _, labels in found.batches(0, "test")) == 8
    assert flat_minima(found.cohort, found.batches(10), scales=[0.1], draws=1).images == 10


def test_run_on_identities(tmp_path):
    """Is refused in one line that says what to do."""
    settings = tmp_path / "config.yaml"
    settings.write_text("data: market1501\n")
    with pytest.raises(fastdml.errors.InputError, match="holds no weights"):
        posterior_of_run(tmp_path)
    fastdml.Cohort(["resnet8", "resnet8"], 3, head=fastdml.ReidHead()).save(tmp_path)
    with pytest.raises(fastdml.errors.InputError, match="classification runs"):
        posterior_of_run(tmp_path, device="cpu")
