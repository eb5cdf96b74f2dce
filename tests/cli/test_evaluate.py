"""`fastdml evaluate` and `fastdml export` on runs that have ended, and on those that have not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import cifar10_files, forget_the_record, saved

from fastdml import cli
from fastdml.cohort import Cohort


@pytest.mark.parametrize("weights", ["last", "best"])
def test_evaluate_repeats_the_scores_of_the_run(run, capfd, weights):
    assert cli.main(["evaluate", str(run), "--weights", weights, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    mutual = json.loads((run / "summary.json").read_text())["mutual"]
    assert found["scores"] == mutual["scores" if weights == "last" else "best_scores"]
    assert found["peers"] == ["resnet8-1", "resnet8-2"]
    assert found["weights"] == weights


def test_evaluate_prints_a_table(run, capfd):
    assert cli.main(["evaluate", str(run)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "peer"
    assert [line.split()[0] for line in lines[2:5]] == ["resnet8-1", "resnet8-2", "ensemble"]
    assert "355 test images" in lines[5]


def test_evaluate_refuses_damaged_weights(run, capfd):
    path = next((run / "best" / "peers").glob("*.safetensors"))
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) // 2])
        assert cli.main(["evaluate", str(run), "--weights", "best"]) == 2
    finally:
        path.write_bytes(whole)
    err = capfd.readouterr().err
    assert path.name in err
    assert err.count("\n") == 1


def test_evaluate_before_there_are_weights(refused, tmp_path, run):
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    refused(["evaluate", "young"], "young holds no last weights")


def test_what_has_not_ended_is_evaluated_and_exported_from_its_checkpoint(run, unfinished, capfd):
    assert cli.main(["evaluate", str(unfinished), "--json"]) == 0
    out, err = capfd.readouterr()
    mutual = json.loads((run / "summary.json").read_text())["mutual"]
    assert json.loads(out)["scores"] == mutual["scores"]
    assert err == (
        f"the run has not ended: weights of {unfinished / 'last.ckpt'}, from epoch 3, after 0 of 5 "
        "steps\n"
    )
    assert cli.main(["evaluate", str(unfinished), "--weights", "best", "--json"]) == 0
    assert capfd.readouterr().err == ""
    assert cli.main(["export", str(unfinished), "--format", "torch-export"]) == 0
    out, err = capfd.readouterr()
    assert "the run has not ended" in err
    assert all(Path(line).stat().st_size > 0 for line in out.splitlines())


def test_what_is_trained_on_after_its_end_has_not_ended(run, tmp_path, capfd):
    folder = tmp_path / "prolonged"
    shutil.copytree(run, folder)
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("epochs: 2\n", "epochs: 3\n"))
    assert cli.main(["evaluate", str(folder), "--json"]) == 0
    assert "the run has not ended" in capfd.readouterr().err
    (folder / "last.ckpt").unlink()
    assert cli.main(["evaluate", str(folder), "--json"]) == 0
    assert capfd.readouterr().err == ""


def test_averages_are_what_an_unfinished_run_is_evaluated_by(tmp_path, capfd):
    folder = tmp_path / "run"
    options = "--peers resnet8 --epochs 1 --subset 128 --ema 0.5 --no-tensorboard --folder"
    assert cli.main(["train", "digits", *options.split(), str(folder)]) == 0
    capfd.readouterr()
    found = []
    for _ in range(2):
        assert cli.main(["evaluate", str(folder), "--json"]) == 0
        found.append(json.loads(capfd.readouterr().out))
        (folder / "cohort.json").unlink(missing_ok=True)
    assert found[0] == found[1]


def test_checkpoints_that_cannot_be_evaluated(refused, unfinished):
    import torch

    path = unfinished / "last.ckpt"
    whole = path.read_bytes()
    state = torch.load(path, weights_only=True)

    def check(pattern: str, **changes) -> None:
        torch.save({**state, **changes}, path)
        refused(["evaluate", str(unfinished)], pattern)

    check("no position", position="six")
    check("no ema", ema=3)
    check("no cohort", cohort=None)
    check("does not describe a cohort", description={"format": 1})
    check("has format 2", description={**state["description"], "format": 2})
    check("does not fit peer resnet8-1", cohort={})
    del state["description"]  # as of earlier versions
    check("holds no last weights")
    path.write_bytes(whole[:-100])
    refused(["export", str(unfinished)], r"last\.ckpt is not a checkpoint that can be read")


def test_evaluate_where_the_data_or_the_device_is_missing(refused, tmp_path, run):
    shutil.copytree(run, tmp_path / "run")
    refused(["evaluate", "run", "--device", "meta"], "no run on device 'meta'")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("data: digits", "data: cifar10"))
    wrong = r"peers of run were not trained on cifar10: the image_shape of .* \[1, 8, 8\], and of"
    refused(["evaluate", "run"], wrong)
    forget_the_record(tmp_path / "run")
    refused(
        ["evaluate", "run"], "peers of run take images of 1 channels, and those of cifar10 have"
    )
    saved(Cohort(["resnet8"], 10), tmp_path / "ten", data="cifar10")
    refused(["evaluate", "ten", "--data", "nowhere"], "nowhere: no such folder: .* --download$")
    cifar10_files(tmp_path)
    refused(["evaluate", "ten"], "0 bytes.*delete its folder and use --download$")
    saved(Cohort(["resnet8"], 4), tmp_path / "four", data="cifar10")
    refused(["evaluate", "four"], "tell 4 classes apart, and cifar10 has 10")


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100"])
def test_a_data_set_is_known_by_what_fit_records_of_it(name, tmp_path, refused, capfd):
    """Its shape, normalisation and classes, all of them: less might be another set."""
    from fastdml import data

    facts = data.record(name)
    cohort = Cohort(["resnet8"], len(facts["classes"]), in_channels=facts["image_shape"][0])
    for key, value in facts.items():
        setattr(cohort, key, value)
    label = "own data: 5 batches of 8, images 3x32x32"
    saved(cohort, tmp_path / "run", data=label)
    if name == "digits":
        assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
        assert "355 test images" in capfd.readouterr().out
    else:
        refused(["evaluate", "run", "--data", "nowhere"], "nowhere: no such folder")
    how = r"in Python, with cohort = fastdml.Cohort.load\('run'\), fastdml.train.evaluate\(cohort, "
    for key, value in (("mean", None), ("std", [9.0] * cohort.in_channels), ("classes", None)):
        setattr(cohort, key, value)
        saved(cohort, tmp_path / "run", data=label)
        refused(["evaluate", "run"], f"run was trained by fit on {label}, which .*: {how}")
        setattr(cohort, key, facts[key])


def test_export(run, tmp_path, capfd):
    assert cli.main(["export", str(run), "--format", "torch-export", "--to", str(tmp_path)]) == 0
    import torch

    paths = [Path(line) for line in capfd.readouterr().out.splitlines()]
    assert [p.parent for p in paths] == [tmp_path, tmp_path]
    for path in paths:
        files = {"images.json": ""}
        program = torch.export.load(path, extra_files=files).module()
        assert program(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
        facts = json.loads(files["images.json"])
        assert (facts["image_shape"], facts["classes"]) == ([1, 8, 8], [str(c) for c in range(10)])
        assert (facts["mean"], facts["std"]) == ([4.8822], [6.0185])


def test_export_of_earlier_weights_asks_for_the_size(run, refused, tmp_path, capfd):
    import torch

    shutil.copytree(run, tmp_path / "old")
    forget_the_record(tmp_path / "old")
    refused(["export", "old"], "old are of an earlier version .* give --size HEIGHT WIDTH$")
    refused(["export", "old", "--size", "0", "8"], "--size 0 8: give 1 or more")
    options = ["--format", "torch-export", "--size", "16", "8", "--to", "there"]
    assert cli.main(["export", "old", *options]) == 0
    program = torch.export.load(capfd.readouterr().out.split()[0]).module()
    assert program(torch.zeros(3, 1, 16, 8)).shape == (3, 10)


def test_evaluate_of_earlier_weights_says_what_it_takes_them_for(run, tmp_path, capfd):
    shutil.copytree(run, tmp_path / "old")
    forget_the_record(tmp_path / "old")
    assert cli.main(["evaluate", str(tmp_path / "old"), "--json"]) == 0
    out, err = capfd.readouterr()
    mutual = json.loads((run / "summary.json").read_text())["mutual"]
    assert json.loads(out)["scores"] == mutual["scores"]
    assert "of an earlier version" in err
    assert err.count("\n") == 1
