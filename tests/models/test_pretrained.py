"""Pretrained weights of timm: from the cache without a network, else one line."""

from __future__ import annotations

import pytest
import torch

from fastdml.cohort import Cohort
from fastdml.errors import InputError
from fastdml.models import ReidHead, create_model, pretrained_normalisation

timm = pytest.importorskip("timm")
hub = pytest.importorskip("huggingface_hub")
safetensors = pytest.importorskip("safetensors.torch")

NAME = "resnet18"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache and a hub that cannot be reached; the list of attempts."""
    attempts = []

    class Session:
        def head(self, url, timeout):
            attempts.append(url)
            raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "get_session", Session)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return attempts


@pytest.fixture
def cached(offline, tmp_path, cache_weights):
    """Weights of NAME as the hub's cache holds them."""
    return cache_weights(NAME, tmp_path / "hub")


@pytest.mark.parametrize(("name", "head"), [(f"timm:{NAME}", None), (NAME, ReidHead())])
def test_offline_and_uncached_is_one_line(offline, name, head):
    with pytest.raises(InputError) as caught:
        create_model(name, 5, head=head, pretrained=True)
    message = str(caught.value)
    assert "\n" not in message
    for word in (
        f"timm:{NAME}",
        "timm/resnet18",
        "hub",
        "ConnectionError",
        "for peers, set pretrained to false",  # teachers are always pretrained
    ):
        assert word in message
    assert len(offline) == 1  # asked once


def test_cached_weights_need_no_network(cached, offline):
    plain = create_model(f"timm:{NAME}", 5, pretrained=True)
    reid = create_model(f"timm:{NAME}", 5, head=ReidHead(), pretrained=True)
    assert offline == []
    for key, value in cached.items():
        if not key.startswith("fc."):
            assert torch.equal(plain.state_dict()[key], value), key
            assert torch.equal(reid.backbone.state_dict()[key], value), key
    assert plain.fc.out_features == 5
    assert reid.backbone.layer4[0].conv1.stride == (1, 1)


def test_a_cohort_of_pretrained_peers_and_no_download_when_it_is_loaded(cached, offline, tmp_path):
    cohort = Cohort([f"timm:{NAME}", NAME], 5, head=ReidHead(), pretrained=True)
    first, second = (peer.classifier.weight for peer in cohort.peers)
    assert not torch.equal(first, second)
    key = "layer1.0.conv1.weight"
    assert all(torch.equal(p.backbone.state_dict()[key], cached[key]) for p in cohort.peers)
    cohort.save(tmp_path / "run")
    for file in (tmp_path / "hub").rglob("*.safetensors"):
        file.unlink()
    loaded = Cohort.load(tmp_path / "run")
    assert offline == []
    for name, value in cohort.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_peers_of_one_name_differ_in_their_heads_alone(cached):
    """Also with as many classes as timm's own classifier has."""
    cohort = Cohort([f"timm:{NAME}", f"timm:{NAME}"], 1000, pretrained=True)
    first, second = (peer.state_dict() for peer in cohort.peers)
    differ = [key for key in first if not torch.equal(first[key], second[key])]
    assert differ == ["fc.weight", "fc.bias"]
    assert not torch.equal(first["fc.weight"], cached["fc.weight"])
    again = Cohort([f"timm:{NAME}"], 1000, pretrained=True)[0].state_dict()
    assert torch.equal(again["fc.weight"], first["fc.weight"])  # by the seed and the peer's number


def test_a_size_behind_the_name_keeps_the_weights(cached):
    model = create_model(f"timm:{NAME}@40", 5, pretrained=True).model.state_dict()
    assert all(torch.equal(model[k], v) for k, v in cached.items() if not k.startswith("fc."))


def test_images_are_normalised_as_the_networks_were(caplog):
    caplog.set_level("INFO", "fastdml")
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    halves = ((0.5,) * 3, (0.5,) * 3)
    vit, resnet = "timm:vit_tiny_patch16_224@96", f"timm:{NAME}"
    assert tuple(timm.get_pretrained_cfg("vit_tiny_patch16_224").mean) == halves[0]
    assert pretrained_normalisation([resnet, f"{resnet}@64"], 3) == imagenet
    assert pretrained_normalisation([vit, vit], 3) == halves
    assert "normalised as the peers' were: mean 0.5 0.5 0.5" in caplog.text
    assert "ImageNet" not in caplog.text
    assert pretrained_normalisation([vit, resnet], 3) == imagenet
    assert (
        "as ImageNet is, since the peers' own ways differ: mean 0.485 0.456 0.406, std 0.229"
        in caplog.text
    )
    mean, std = pretrained_normalisation([resnet], 1)
    assert (mean, std) == (pytest.approx((0.449,)), pytest.approx((0.226,)))


@pytest.mark.parametrize("name", ["mobilenet", "resnet20", "own.module:net", "resnet50"])
def test_only_models_of_timm_have_weights(name):
    with pytest.raises(InputError, match=r"has no pretrained weights, .*timm:NAME.*to false"):
        create_model(name, 5, pretrained=True)


def test_a_model_of_timm_without_weights(offline):
    name = next(n for n in timm.list_models("mixer*") if not timm.get_pretrained_cfg(n).has_weights)
    with pytest.raises(InputError, match=f"timm has no pretrained weights for '{name}'"):
        create_model(f"timm:{name}", 5, pretrained=True)
    assert offline == []


def test_weights_that_cannot_be_loaded_are_one_line(offline, monkeypatch):
    monkeypatch.setattr(hub, "get_session", lambda: type("S", (), {"head": lambda *a, **k: None})())

    def fails(*_, **__):
        raise OSError("disk full\nand more")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", fails)
    with pytest.raises(InputError, match=r"cannot load the weights of 'resnet18': disk full$"):
        create_model(f"timm:{NAME}", 5, pretrained=True)
