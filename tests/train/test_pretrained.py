"""Whole classification runs with --pretrained."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdml import cli
from fastdml.cohort import Cohort

timm = pytest.importorskip("timm")
hub = pytest.importorskip("huggingface_hub")
safetensors = pytest.importorskip("safetensors.torch")

NAME = "test_resnet"  # timm's smallest
SMALL = "--subset 32 --batch-size 16 --epochs 1 --no-tensorboard --threads 1 --execution eager"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache in a temporary folder, and no network; the hosts that were asked for."""
    asked = []

    def refuse(host, *_, **__):
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    connect = socket.socket.connect

    def within_the_machine(one, address):  # worker processes talk by such sockets
        return connect(one, address) if one.family == socket.AF_UNIX else refuse(address)

    monkeypatch.setattr(socket.socket, "connect", within_the_machine)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.fixture
def cached(offline, tmp_path, cache_weights):
    """Weights of NAME as the hub's cache holds them."""
    return cache_weights(NAME, tmp_path / "hub")


def train(*options: str) -> int:
    return cli.main(["train", "digits", *SMALL.split(), *options])


def test_two_pretrained_peers_from_the_cache(cached, offline, capsys):
    peers = ["--peers", f"timm:{NAME}@32", f"timm:{NAME}@48"]
    options = ["--pretrained", "--folder", "run", "--lr", "1e-12", "--warmup-epochs", "0"]
    assert train(*peers, *options) == 0, capsys.readouterr().err
    assert offline == []
    told = capsys.readouterr().err
    assert "images are normalised as the peers' were: mean 0.5, std 0.5" in told
    cohort = Cohort.load("run")
    # digits are from 0 to 16, so that white is 16
    assert cohort.mean == cohort.std == [8.0]
    for peer in cohort.peers:
        weight = peer.model.state_dict()["layer1.0.conv1.weight"]
        torch.testing.assert_close(weight, cached["layer1.0.conv1.weight"])
    # the command scores them on images normalised as in training
    assert cli.main(["evaluate", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    trained = json.loads(Path("run/summary.json").read_text())
    assert found["scores"]["top1"] == pytest.approx(trained["mutual"]["scores"]["top1"])


def test_a_run_that_goes_on_needs_no_weights_but_its_own(cached, offline, tmp_path, capsys):
    """Without the cache, and to the same bits as a run that is not interrupted."""
    options = ["--peers", f"timm:{NAME}@32", "--pretrained", "--schedule", "step"]
    assert train(*options, "--epochs", "2", "--folder", "whole") == 0, capsys.readouterr().err
    assert train(*options, "--folder", "parts") == 0
    for file in (tmp_path / "hub").rglob("*.safetensors"):
        file.unlink()
    argv = ["train", "digits", "--resume", "--folder", "parts", "--epochs", "2"]
    assert cli.main(argv) == 0, capsys.readouterr().err
    assert offline == []
    whole, parts = (Cohort.load(folder).state_dict() for folder in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    # one that was killed before its first checkpoint does need them
    (tmp_path / "parts" / "last.ckpt").unlink()
    assert cli.main(argv) == 2
    assert "are not in" in capsys.readouterr().err


def test_on_a_folder_of_ones_own(cached, offline, tmp_path, capsys):
    """With sizes of their own, a policy by worker processes, and images for validation."""
    pytest.importorskip("torchvision")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 256, (50, 44, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    peers = ["--peers", f"timm:{NAME}@32", f"timm:{NAME}@48"]
    options = "--root photos --validation 0.25 --augment rand --size 40 --epochs 1 --batch-size 8"
    some = "--no-tensorboard --threads 1 --execution eager --pretrained --folder run --csv"
    argv = ["train", "folder", *options.split(), *some.split(), *peers]
    assert cli.main(argv) == 0, capsys.readouterr().err
    assert offline == []
    told = capsys.readouterr().err
    assert "augment rand takes an image at a time: streamed by torch" in told
    assert "images are normalised as the peers' were: mean 0.5 0.5 0.5" in told
    cohort = Cohort.load("run/best")
    assert (cohort.image_shape, cohort.classes, cohort.resize) == (
        [3, 40, 40], ["cat", "dog"], "crop",
    )  # fmt: skip
    assert cohort.mean == cohort.std == [127.5] * 3
    assert [peer.size for peer in cohort.peers] == [32, 48]
    assert cli.main(["evaluate", "run"]) == 0
    assert cli.main(["predict", "run", "photos/cat/0.png"]) == 0
    assert "validation/ensemble_top1" in (tmp_path / "run" / "metrics.csv").read_text()


@pytest.mark.parametrize("offline_mode", [False, True])
def test_offline_and_uncached_is_one_line_at_once(offline, offline_mode, monkeypatch, capsys):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline_mode)
    assert train("--peers", f"timm:{NAME}@32", "--pretrained") == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    for word in (f"timm:{NAME}", "hub", "cannot be reached", "set pretrained to false"):
        assert word in message
    assert len(offline) <= 1  # asked once, not for a minute


def test_peers_without_weights_beside_those_that_have_some(cached, capsys):
    assert train("--peers", f"timm:{NAME}@32", "resnet8", "--pretrained") == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert "model 'resnet8' has no pretrained weights, only models of timm have" in message
