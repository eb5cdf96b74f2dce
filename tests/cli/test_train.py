"""`fastdml train` as a user types it: a whole run leaves what it promises."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from fastdml import cli
from fastdml.cli.evaluate import evaluate
from fastdml.cli.parsing import Parser
from fastdml.cli.runs import add_run_options
from fastdml.train.tasks import classification


def test_a_builder_of_torchvision_trains(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    import torch

    from fastdml.data import ImageSet

    data = ImageSet(
        torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8),
        torch.arange(16) % 10, 10, tuple("abcdefghij"), (1.0,) * 3, (1.0,) * 3,
    )  # fmt: skip
    monkeypatch.setattr(classification, "load", lambda *args, **options: (data, data))
    folder = tmp_path / "run"
    options = f"--folder {folder} --epochs 1 --batch-size 8 --no-tensorboard --lr 0.001"
    peers = ["--peers", "torchvision.models:resnet18", "resnet8"]
    assert cli.main(["train", "cifar10", *options.split(), *peers]) == 0
    assert json.loads((folder / "cohort.json").read_text())["peers"][0]["model"] == peers[1]


def test_training_prints_the_table_and_the_folder(tmp_path, capfd):
    folder = tmp_path / "run"
    options = "--peers resnet8 --epochs 1 --subset 128 --no-tensorboard --figures pdf,svg --folder"
    assert cli.main(["train", "digits", *options.split(), str(folder)]) == 0
    assert sorted(p.name for p in folder.glob("curves.*")) == ["curves.pdf", "curves.svg"]
    out = capfd.readouterr().out
    assert re.search(r"^peer +parameters +mutual % +ensemble % +images/s$", out, re.M)
    assert re.search(r"^resnet8 +[\d,]+ +\d+\.\d\d +\d+\.\d\d +-$", out, re.M)
    assert f"run folder: {folder}" in out


def test_a_run_leaves_what_it_promises(run):
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "last.ckpt",
        "curves.png",
        "pairwise_kl.png",
        "summary.json",
        "cohort.json",
        "independent/summary.json",
    ):
        assert (run / name).stat().st_size > 0, name
    assert len(list((run / "peers").glob("*.safetensors"))) == 2
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ensemble_independent"] is not None
    assert all(0 < p["accuracy_independent"] <= 1 for p in summary["peers"])


def test_lists_with_commas(capfd):
    assert cli.main(["train", "digits", "--peers", "resnet8,resnet14", "--dry-run"]) == 0
    assert [line.split()[2] for line in capfd.readouterr().out.splitlines()[1:3]] == [
        "resnet8,",
        "resnet14,",
    ]
    parser = Parser("evaluate", evaluate)
    add_run_options(parser)
    for options in (["--peers", "a,b"], ["--peers=a,b"], ["--peers", "a,", "b"]):
        assert parser.parse(["~/run,1", *options]).peers == ["a", "b"]
    assert parser.parse(["~/run,1"]).run == Path("~/run,1").expanduser()


def test_settings_through_a_pipe(capfd):
    reader, writer = os.pipe()
    os.write(writer, b"epochs: 3\npeers: [resnet8]\n")
    os.close(writer)
    assert cli.main(["train", "digits", "--config", f"/dev/fd/{reader}", "--dry-run"]) == 0
    os.close(reader)
    assert ", 3 epochs, " in capfd.readouterr().out
