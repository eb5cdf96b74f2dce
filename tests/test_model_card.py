"""Model cards: what they say is what the run recorded, and their code runs where fastdml is not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdml
from fastdml import cli
from fastdml.cohort import Cohort
from fastdml.image_record import FIELDS
from fastdml.model_card import write_card
from fastdml.models import ReidHead
from fastdml.train import TrainConfig
from fastdml.train.config.sources import preset

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
for extra in ("torchvision", "timm", "onnxruntime", "onnxscript"):
    pytest.importorskip(extra, reason=f"{extra} is not installed")

# Runs every block of a card that does not import fastdml, which cannot be imported.
OUTSIDE = """
import json, re, sys, warnings
from pathlib import Path
sys.modules["fastdml"] = sys.modules["fastdml_kernels"] = None
sys.path.insert(0, ".")
warnings.simplefilter("ignore")
found = {}
for card in sorted(Path().glob("*.md")):
    found[card.stem] = outputs = []
    for code in re.findall("```python\\n(.*?)```", card.read_text(), re.DOTALL):
        if "import fastdml" not in code:
            assert len([line for line in code.splitlines() if line]) <= 16, code
            names = {"print": lambda shown: outputs.append(
                [t.tolist() for t in (shown if isinstance(shown, tuple) else [shown])])}
            exec(code, names)
print(json.dumps(found))
"""


def outside(folder: Path) -> dict[str, list]:
    """By card, what each of its blocks prints in a process without fastdml."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE], cwd=folder, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def a_run(folder: Path, cohort: Cohort, **record) -> Path:
    for name, value in record.items():
        setattr(cohort, name, value)
    for peer in cohort.peers:  # statistics of batches, as after training
        with torch.no_grad():
            peer.train()(torch.randn(8, *cohort.image_shape))
    cohort.save(folder)
    TrainConfig(data="own images").save(folder / "config.yaml")
    return folder


def photo(path: Path, height: int, width: int) -> None:
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    image.getexif()[274] = 6  # lies on its side
    image.save(path, exif=image.getexif())


def test_code_of_the_cards_runs_without_fastdml(tmp_path):
    """Of every kind of named peer and every format, preprocessing included."""
    torch.manual_seed(0)
    kinds = [
        "resnet8", "resnet8", "wrn_10_1", "resnet8@16", "timm:test_resnet",
        "torchvision.models:squeezenet1_1",
    ]  # fmt: skip
    record = {
        "image_shape": (3, 32, 32),
        "mean": (120.0, 110.0, 100.0),
        "std": (60.0, 61.0, 62.0),
        "classes": list("abcdefg"),
        "resize": "crop",
    }
    run = a_run(tmp_path / "run", Cohort(kinds, 7, image_size=(32, 32)), **record)
    to = tmp_path / "out"
    cohort = Cohort.load(run, peers=kinds)
    for path in cohort.export(to, format="safetensors"):
        write_card(path, cohort, int(path.name[:2]), run, "last")
    for k, format in ((3, "onnx"), (0, "torch-export")):
        (path,) = cohort.export(to, format=format, peer=k)
        write_card(path, cohort, k, run, "last")
    (path,) = cohort.export(to, format="safetensors", peer="ensemble")
    write_card(path, cohort, "ensemble", run, "last")
    photo(to / "image.png", 50, 70)

    found = outside(to)
    assert {name: len(outputs) for name, outputs in found.items()} == {
        "00-resnet8-1": 2, "01-resnet8-2": 1, "02-wrn_10_1": 1, "03-resnet8_16": 2,
        "04-timm_test_resnet": 1, "05-torchvision.models_squeezenet1_1": 1, "ensemble": 1,
    }  # fmt: skip
    for name, outputs in found.items():
        peer = name if name == "ensemble" else int(name[:2])
        model = fastdml.load(run, peer=peer, peers=kinds)
        expected = model(model.preprocess(to / "image.png")[None]).topk(5)
        for values, places in outputs:
            torch.testing.assert_close(torch.tensor(values), expected.values, rtol=1e-4, atol=1e-6)
            assert places == expected.indices.tolist()


@pytest.mark.parametrize("stored", [pytest.param(None, marks=pytest.mark.slow), (64, 32)])
def test_code_of_reidentification_runs_without_fastdml(tmp_path, stored):
    torch.manual_seed(0)
    record = {
        "image_shape": (3, 64, 32),
        "mean": (120.0, 110.0, 100.0),
        "std": (60.0, 61.0, 62.0),
        "resize": "stretch",
        "stored": stored,
    }
    cohort = Cohort(["resnet8", "wrn_10_1"], 7, head=ReidHead())
    run = a_run(tmp_path / "run", cohort, **record)
    to, cohort = tmp_path / "out", Cohort.load(run)
    for peer in (0, 1, "ensemble"):
        (path,) = cohort.export(to, format="safetensors", peer=peer)
        write_card(path, cohort, peer, run, "last")
    photo(to / "image.png", 90, 200)
    for name, (output,) in outside(to).items():
        model = fastdml.load(run, peer=name if name == "ensemble" else int(name[:2]))
        expected = model(model.preprocess(to / "image.png")[None])
        torch.testing.assert_close(torch.tensor(output[0]), expected, rtol=1e-3, atol=1e-3)


def test_a_card_says_what_the_run_recorded(tmp_path, capfd):
    folder = tmp_path / "run"
    options = "--peers resnet8 resnet8 --epochs 1 --subset 320 --lr 0.05 --seed 3 --no-tensorboard"
    assert cli.main(["train", "digits", *options.split(), "--folder", str(folder)]) == 0
    capfd.readouterr()
    argv = ["export", str(folder), "--format", "safetensors", "--peer", "best"]
    assert cli.main(argv) == 0
    out, err = capfd.readouterr()
    path = Path(out.strip())
    summary = json.loads((folder / "summary.json").read_text())
    scores = summary["mutual"]["scores"]
    best = max(range(2), key=lambda k: scores["top1"][k])
    assert path.name == f"0{best}-resnet8-{best + 1}.safetensors"
    assert "outputs differ by at most" in err
    text = path.with_suffix(".md").read_text()
    assert text.startswith(f"# resnet8-{best + 1}\n")
    assert f"| resnet8-{best + 1} | {100 * scores['top1'][best]:.2f} |" in text
    assert f"| ensemble of 2 | {100 * scores['ensemble_top1']:.2f} |" in text
    assert "On the test images. These are the last weights." in text
    assert "- seed 3\n" in text
    (changed,) = re.findall(r"settings other than .* for digits: (.*)", text)
    assert changed == "`subset` 320, `lr` 0.05, `epochs` 1, `tensorboard` False"
    assert "resnet8, 75,002 parameters" in text
    assert "The licence of the data is not recorded" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert cli.main([*argv, "--weights", "best"]) == 0
    best_text = Path(capfd.readouterr().out.strip()).with_suffix(".md").read_text()
    assert "chosen on the test images, which flatters the score" in best_text


def test_a_card_of_modules_says_no_more_than_is_known(tmp_path):
    cohort = Cohort([torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))])
    cohort.save(tmp_path)
    assert all(value is None for name, value in cohort.record().items() if name in FIELDS)
    TrainConfig(data="own data: tables").save(tmp_path / "config.yaml")
    (path,) = cohort.export(tmp_path / "out", format="safetensors")
    text = write_card(path, cohort, 0, tmp_path, "last").read_text()
    assert "Not evaluated." in text
    assert "peers=[...]" in text
    assert "print(model(batch))" in text
    assert "settings other than fastdml's defaults: none" in text
    assert "plain torch" not in text


def test_a_card_names_the_images_of_ones_own_and_what_was_chosen(tmp_path):
    record = {
        "image_shape": (3, 16, 16),
        "mean": (1, 1, 1),
        "std": (1, 1, 1),
        "classes": ["a", "b"],
    }
    run = a_run(tmp_path / "run", Cohort(["resnet8"], 2), **record)
    preset("folder", root="pictures/birds", size=16, epochs=2).save(run / "config.yaml")
    (path,) = Cohort.load(run).export(tmp_path / "out", format="safetensors")
    card = write_card(path, Cohort.load(run), 0, run, "last").read_text()
    assert "A network trained on the images of birds." in card
    assert "the images of birds, 2 classes: a, b." in card
    assert "prepare images of 8 bits a channel" in card
    assert "- settings other than fastdml's defaults for folder: `epochs` 2, `size` 16\n" in card
