"""Runs on re-identification sets other than Market-1501: by their names, or one's own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from reid_runs import SMALL

import fastdml
from fastdml import cli
from fastdml import train as training
from fastdml.data import ImageFolderReID
from fastdml.errors import InputError
from fastdml.train import ReidConfig
from fastdml.train.config.sources import preset


@pytest.fixture(scope="module")
def own_set(market_root, tmp_path_factory) -> Path:
    """The stand-in's pictures under names of another form, in a folder for each identity."""
    root = tmp_path_factory.mktemp("own")
    (market,) = [path.parent for path in market_root.rglob("query")]
    for split, name in {"bounding_box_train": "train", "query": "query",
                        "bounding_box_test": "gallery"}.items():  # fmt: skip
        for path in sorted((market / split).glob("0*_c*")):
            identity, camera = re.match(r"(\d+)_c(\d+)", path.name).groups()
            target = root / name / identity / f"cam{camera}-{path.name[-7:]}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return root


PATTERN = r"(?P<id>\d+)/cam(?P<camera>\d+)"


def test_a_set_of_ones_own_is_trained_on_and_evaluated(own_set, tmp_path, capfd):
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump({**SMALL, "peers": list(SMALL["peers"])}))
    options = ["--config", str(config), "--root", str(own_set), "--pattern", PATTERN]
    run = tmp_path / "run"
    assert cli.main(["train", "reid_folder", *options, "--folder", str(run)]) == 0
    capfd.readouterr()
    assert cli.main(["evaluate", str(run), "--json", "--no-rerank"]) == 0
    found = json.loads(capfd.readouterr().out)["scores"]
    assert found["single"] == json.loads((run / "summary.json").read_text())["mutual"]["scores"]
    assert found["multi"] is None
    assert cli.main(["evaluate", str(run), "--no-rerank"]) == 0
    assert "multiple queries" not in capfd.readouterr().out
    record = json.loads((run / "cohort.json").read_text())
    assert (record["resize"], record["stored"]) == ("stretch", [16, 8])
    predictor = fastdml.load(run, peer="resnet8-1")
    path = sorted(p for p in (own_set / "query").rglob("*") if p.is_file())[0]
    found = ImageFolderReID(own_set, "reid_folder", pattern=PATTERN, size=(16, 8))
    assert found.query.paths[0] == str(path)
    features = training.extract_features(fastdml.Cohort.load(run), found.query, (16, 8), amp="off")
    images = predictor.preprocess(path)[None]
    both = sum(predictor(x) for x in (images, images.flip(3)))  # as the flip test
    assert torch.allclose(F.normalize(both)[0], features[0][0], atol=1e-5)
    assert cli.main(["evaluate", str(run), "--distractors"]) == 2
    assert "--distractors: reid_folder has none, market1501 does" in capfd.readouterr().err


def test_recipes_of_other_sets():
    for data in ("dukemtmc", "msmt17", "veri", "reid_folder"):
        paper, strong = (preset(data, recipe=r) for r in ("paper", "strong"))
        market = preset("market1501", recipe="strong")
        assert (paper.data, paper.size, paper.iterations) == (data, (224, 224), 100_000)
        assert strong.size == ((256, 256) if data == "veri" else (256, 128))
        assert strong.replace(data="market1501", height=256, width=128) == market


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("veri", {"pattern": PATTERN}, "pattern is for files named your own way: veri has names"),
        ("reid_folder", {"pattern": "c"}, "pattern 'c' has no group camera and no group id"),
        ("msmt17", {"standin": True}, "standin is in Market-1501's layout, not msmt17's"),
        ("dukemtmc", {"download": True}, "dukemtmc cannot be downloaded: ask its authors"),
    ],
)
def test_settings_that_a_set_does_not_have(data, options, message):
    with pytest.raises(InputError, match=message):
        ReidConfig(data=data, **options)


def test_functions_by_the_names_of_sets(own_set, tmp_path):
    for name in ("dukemtmc", "msmt17", "veri"):
        with pytest.raises(InputError, match=f"{own_set}: "):
            getattr(training, name)(root=own_set, device="cpu", folder=str(tmp_path / "run"))
    options = {**SMALL, "epochs": 1, "folder": str(tmp_path / "run"), "dry_run": True}
    assert training.reid_folder(root=own_set, pattern=PATTERN, **options) is None


# --- validation ---


def test_held_out_identities_choose_the_best_weights(own_set, tmp_path, capfd):
    """An interrupted run goes on with the same ones, and is evaluated on the test images."""
    run = tmp_path / "run"
    options = {**SMALL, "root": str(own_set), "pattern": PATTERN, "validation": 2, "epochs": 3}
    straight = training.reid_folder(**options, folder=str(tmp_path / "straight"))

    class Interrupt(training.Callback):
        def on_epoch(self, event):
            if event.epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.reid_folder(**options, folder=str(run), callbacks=[Interrupt()])
    assert not (run / "cohort.json").exists()
    assert cli.main(["evaluate", str(run), "--weights", "last", "--json", "--no-rerank"]) == 0
    captured = capfd.readouterr()
    queries = json.loads(captured.out)["scores"]["single"]["queries"]
    resumed = training.reid_folder(resume=True, folder=str(run))
    for result in (straight, resumed):
        assert (result.chosen_on, result.scored_on) == ("validation", "test")
        summary = json.loads((result.folder / "summary.json").read_text())
        validation = summary["mutual"]["validation"]["scores"]
        assert validation["queries"] != queries == summary["mutual"]["scores"]["queries"]
        assert json.loads((result.folder / "cohort.json").read_text())["num_classes"] == 4  # of 6
    assert resumed.validation_scores == straight.validation_scores
    assert resumed.scores == straight.scores
    assert cli.main(["evaluate", str(run), "--json", "--no-rerank"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["weights"] == "best"
    best = json.loads((run / "summary.json").read_text())["mutual"]["best_scores"]
    assert found["scores"]["single"] == best


def test_too_few_identities_to_hold_out(own_set, tmp_path, capfd):
    options = ["--root", str(own_set), "--pattern", PATTERN, "--folder", str(tmp_path / "run")]
    assert cli.main(["train", "reid_folder", *options, "--validation", "5"]) == 2
    assert "validation=5 is 5 of 6 training identities" in capfd.readouterr().err
