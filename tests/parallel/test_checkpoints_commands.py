"""What commands say of a run on a mesh that has not ended, whose peers are in its checkpoint."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from ranks import run_ranks

from fastdml import load
from fastdml.cli import main
from fastdml.exported_weights import read_safetensors
from fastdml.train.meters import Totals

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which is absent")

SETTINGS = [
    "digits", "--peers", "resnet8", "resnet8", "--subset", "128", "--batch-size", "32",
    "--epochs", "2", "--device", "cpu", "--amp", "off", "--threads", "1", "--no-tensorboard",
]  # fmt: skip


def stopped(run: Path) -> str:
    """A run on two rows that SIGTERM ends after its fourth step; what it says."""
    from fastdml.cli.train import train

    torch.set_num_threads(1)
    counted = Totals.count

    def count(totals: Totals, step: int) -> None:
        counted(totals, step)
        if step == 2:  # heeded two steps later
            os.kill(os.getpid(), signal.SIGTERM)

    Totals.count = count
    with pytest.raises(SystemExit) as ended:
        train([*SETTINGS, "--folder", str(run), "--mesh", "peer=2,data=1"])
    return str(ended.value)


def test_its_peers_are_evaluated_exported_and_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    (said, other) = run_ranks(2, stopped, run)
    checkpoint = run / "checkpoints" / "step-00000004"
    assert said == other
    assert said.endswith(f"saved to {checkpoint}: resume goes on there")
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert f"weights of {checkpoint}, from epoch 2, after 0 of 4 steps" in shown.err
    assert "resnet8-2" in shown.out
    Image.new("L", (8, 8), 128).save("digit.png")
    assert main(["predict", str(run), "digit.png", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert str(checkpoint) in shown.err
    assert "resnet8-2" in shown.out
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()
    assert main(["export", str(run), "--format", "safetensors", "--to", "out"]) == 0
    assert load("out/01-resnet8-2.safetensors").classes == load(run).classes
    saved = torch.load(checkpoint / "peer-01-resnet8-2.ckpt", weights_only=True)["weights"]
    _, exported = read_safetensors(Path("out/01-resnet8-2.safetensors"))
    assert exported.keys() == {f"peers.0.{name}" for name in saved}
    assert all(torch.equal(exported[f"peers.0.{name}"], t) for name, t in saved.items())
