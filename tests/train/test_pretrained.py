"""Whole classification runs with --pretrained."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

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
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: refuse(address))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.fixture
def cached(offline, tmp_path):
    """Weights of NAME as the hub's cache holds them."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        source = timm.create_model(NAME).state_dict()
    repo = timm.get_pretrained_cfg(NAME).hf_hub_id
    folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    safetensors.save_file(source, snapshot / "model.safetensors")
    return source


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
