"""The command as a user types it: mistakes are one line and exit code 2, runs leave their scores.

Most cases call `main(argv)` in this process; a few start the real command, where the process itself
matters (start-up, signals, pipes, what is imported).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdml import cli
from fastdml.cli.evaluate import evaluate
from fastdml.cli.main import COMMANDS
from fastdml.cli.parsing import Parser
from fastdml.cli.runs import add_run_options
from fastdml.cohort import Cohort
from fastdml.image_record import FIELDS
from fastdml.train import TrainConfig
from fastdml.train.tasks import classification

ROOT = Path(__file__).resolve().parents[1]
FASTDML = [sys.executable, "-m", "fastdml"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything under a folder, with what changes when something is written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Runs a command that must fail: exit 2, one line that matches, nothing written."""
    monkeypatch.chdir(tmp_path)  # so that a default folder `runs` would show

    def check(argv: list[str], *patterns: str) -> None:
        before = tree(tmp_path)
        code = cli.main(argv)
        out, err = capfd.readouterr()
        assert code == 2, err
        assert out == ""
        assert err.startswith("fastdml: error: ")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        for pattern in patterns:
            assert re.search(pattern, err), err
        assert tree(tmp_path) == before

    return check


def saved(cohort: Cohort, run: Path, **settings) -> None:
    """What `evaluate` and `export` need of a run."""
    run.mkdir(exist_ok=True)
    cohort.save(run)
    TrainConfig(**settings).save(run / "config.yaml")


def forget_the_record(run: Path) -> None:
    """Makes the weights of a run those of an earlier version."""
    for path in run.rglob("cohort.json"):
        old = {k: v for k, v in json.loads(path.read_text()).items() if k not in FIELDS}
        path.write_text(json.dumps(old))


# --- the data ---


def cifar10_files(root: Path, **contents: bytes) -> Path:
    folder = root / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        (folder / f"{name}.bin").write_bytes(contents.get(name, b""))
    return folder


def test_wrong_folder(refused, tmp_path):
    refused(["train", "cifar100", "--root", "nowhere"], "nowhere", "--download")
    (tmp_path / "empty").mkdir()
    refused(["train", "cifar10", "--root", "empty"], "empty", "CIFAR-10", "cifar-10-batches-bin")


def test_truncated_file(refused, tmp_path):
    cifar10_files(tmp_path, data_batch_1=bytes(1000))
    refused(["train", "cifar10"], r"data_batch_1\.bin", "1,000 bytes", "30,730,000")


def test_labels_out_of_range(refused, tmp_path):
    records = bytearray(10_000 * 3073)
    records[7 * 3073] = 10
    cifar10_files(tmp_path, data_batch_1=records)
    refused(["train", "cifar10"], r"data_batch_1\.bin", "record 7 has label 10", "0 to 9")


def test_wrong_md5(refused, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-100-binary.tar.gz").write_bytes(b"not the official archive")
    refused(["train", "cifar100", "--download"], r"cifar-100-binary\.tar\.gz", "MD5", "delete it")


def test_batch_larger_than_the_data(refused):
    refused(["train", "digits", "--batch-size", "5000"], "5,?000", "1,?442")
    refused(["train", "digits", "--subset", "50"], "batch", "64", "50")


# --- the peers ---


def test_no_peers(refused):
    refused(["train", "digits", "--peers"], "peers", "at least one", "resnet32")


def test_unknown_model_names_the_nearest(refused):
    refused(["train", "digits", "--peers", "mobilnet", "resnet20"], "mobilnet", "mobilenet")
    refused(["train", "digits", "--peers", "resnet21"], "resnet21", "resnet20", "resnet26")


def test_peers_of_timm_that_do_not_fit(refused):
    pytest.importorskip("timm")
    for name, pattern in (
        ("timm:vit_tiny_patch16_224", "cannot take images of 8x8 .*made for 224x224"),
        ("timm:inception_v3", "cannot take images of 8x8 .*made for 299x299"),
        ("timm:resnet18.nope", "no weights 'nope' of resnet18: there are a1_in1k"),
    ):
        refused(["train", "digits", "--peers", "resnet8", name], pattern)


def test_peers_with_different_class_counts(refused, tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "def small(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes + 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    refused(
        ["train", "digits", "--peers", "resnet8", "own_models:small"],
        "own_models:small",
        "10",
        "12",
    )


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    """A module in the current folder, which is not on the path: as the installed command has it."""
    (tmp_path / "test.py").write_text(  # there is a module `test` in Python's library
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
        "def wrong(num_classes):\n"
        "    return 3\n"
        "def deaf(): return net(7)\n"
        "class Late(nn.Linear):\n"
        "    def forward(self, x): return super().forward(x.flatten(1)[:, :3])\n"
        "def late(num_classes): return Late(64, num_classes)\n"
        "constant = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "test", raising=False)
    yield
    sys.modules.pop("test", None)


def test_own_models_are_found_in_the_current_folder(own_models, capfd):
    assert cli.main(["train", "digits", "--peers", "test:net", "--dry-run"]) == 0
    assert "test:net, 650 parameters" in capfd.readouterr().out


def test_own_code_that_is_no_model(own_models, refused):
    for name, reason in [
        ("test:wrong", "returned int, not a torch nn.Module"),
        ("test:constant", "constant is of type int"),
        ("test:deaf", r"peer test:deaf must return logits \(N, 10\), .* returned \(64, 7\)"),
        ("test:late", r"peer test:late fails on images .* RuntimeError: .* \(test.py, line 8\)"),
        ("test:nat", "no function 'nat'; nearest: net"),
        ("tast:net", "no module 'tast'"),
    ]:
        found = reason if "peer" in reason else f"model '{name}': .*{reason}"
        refused(["train", "digits", "--peers", "resnet8", name], found)


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


# --- the settings ---


@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        (["--epoch", "3"], ["--epoch", "did you mean --epochs"]),
        (["--learning-rate", "1"], [r"--learning-rate; did you mean --lr\?"]),
        (["--lerning-rate=1"], [r"--lerning-rate; did you mean --lr\?"]),
        (["--max_epochs", "1"], [r"did you mean --epochs\?"]),
        (["--output-dir", "x"], [r"did you mean --folder\?"]),
        (["--workers", "2"], ["--workers; fastdml train digits --help lists"]),
        (["--no-nonsense"], ["--no-nonsense; fastdml train digits --help lists"]),
        (["--triplet"], ["--triplet; fastdml train digits --help lists"]),
        (["--no-flop"], ["did you mean --no-flip"]),
        (["--epochs", "0"], ["epochs must be 1 or more, not 0"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--config", "absent.yaml"], [r"absent\.yaml"]),
        (["--config", "wrong.yaml"], [r"wrong\.yaml", "epochz", "did you mean epochs"]),
        (["--resume"], ["nothing to resume"]),
        (["--folder", "taken"], ["taken", "not overwritten"]),
    ],
)
def test_wrong_settings(refused, tmp_path, options, patterns):
    (tmp_path / "wrong.yaml").write_text("epochz: 3\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    refused(["train", "digits", *options], *patterns)


@pytest.mark.parametrize("terminal", ["wide", "narrow", "coloured", "ascii"])
@pytest.mark.parametrize(
    ("options", "patterns"),
    [
        (["--epochs", "many"], ["--epochs must be a whole number, not 'many'"]),
        (["--seed=1.5"], [r"--seed must be a whole number, not '1\.5'"]),
        (["--lr", "0,1"], ["--lr must be a number, not '0,1'"]),
        (["--epochs"], ["Missing value", "--epochs"]),
        (["--loader", "fast"], ["'fast'", "--loader", "'auto', 'resident', 'dali', 'torch'"]),
        (["more"], ["more"]),
    ],
)
def test_usage_errors_of_the_parser_too(refused, monkeypatch, options, patterns, terminal):
    monkeypatch.setenv("COLUMNS", "30" if terminal == "narrow" else "80")
    monkeypatch.setenv("TERM", "xterm")
    if terminal == "coloured":
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    if terminal == "ascii":
        sys.stdout.reconfigure(encoding="ascii")
    refused(["train", "digits", *options], *patterns, "fastdml train digits --help")


def test_a_file_of_a_run_where_its_folder_is_due(refused, tmp_path):
    (tmp_path / "config.yaml").write_text("data: digits\n")
    (tmp_path / "last.ckpt").write_bytes(b"")
    for name in ("config.yaml", "last.ckpt", "no such file"):
        refused(["evaluate", str(tmp_path / name)], f"give the run's folder, {tmp_path}$")
    refused(["export", str(tmp_path / "none" / "config.yaml")], "holds no config.yaml$")


def test_wrong_commands(refused):
    refused(["trian"], "trian", "did you mean train")
    refused(["train", "cifar1000"], "cifar1000", "did you mean cifar100")
    refused(["train", "imagenet"], "imagenet", "digits, cifar10, cifar100, market1501")
    refused(["evaluate"], "RUN")
    refused(["evaluate", "run", "--weigths", "best"], "did you mean --weights")
    refused(["evaluate", "run", "--norerank"], "did you mean --no-rerank")
    refused(["evaluate", "run", "--learning-rate", "1"], "fastdml evaluate --help lists")
    refused(["help", "trian"], "did you mean train")
    refused(["hepl"], "did you mean help")
    refused(["evaluate", "nowhere"], "nowhere", "not the folder of a run")


def test_kernels_that_are_interpreted_cannot_be_reported(refused, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused(["kernels", "--shapes", "2x100"], "TRITON_INTERPRET is set", "unset it")


def test_missing_extra(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    refused(["train", "digits"], r"tyro is not installed: pip install 'fastdml\[train\]'")


def test_help(capfd):
    assert cli.main(["--help"]) == 0
    out = capfd.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in out
    assert cli.main([]) == 2
    assert cli.main(["train"]) == 0
    assert "{digits,cifar10,cifar100,market1501}" in capfd.readouterr().out


def test_help_as_a_command(capfd):
    for asked, same in (
        ("help", "--help"),
        ("help help", "--help"),
        ("help train", "train --help"),
        ("help train digits", "train digits --help"),
        ("help evaluate", "evaluate --help"),
    ):
        outputs = []
        for arguments in (asked, same):
            assert cli.main(arguments.split()) == 0
            outputs.append(capfd.readouterr().out)
        assert outputs[0] == outputs[1]
        assert "usage: fastdml" in outputs[0]


def test_help_of_training_states_the_papers_settings(capfd):
    assert cli.main(["train", "cifar100", "--help"]) == 0
    out = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capfd.readouterr().out).split())
    for text in ("--config", "Paper: 200. (default: 200)", "Paper: 64. (default: 64)"):
        assert text in out
    assert "(default: resnet32 resnet32)" in out
    for unit in ("Images a step", "Pixels", "Epochs", "Minutes"):
        assert unit in out


def test_evaluate_help(capfd):
    assert cli.main(["evaluate", "--help"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("usage: fastdml evaluate RUN [OPTIONS]\n")
    assert "--weights {last,best}" in out
    assert "--json" in out


# --- a whole run ---


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two peers trained on digits from the command line, mutually and independently."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    options = "--independent --peers resnet8 resnet8 --epochs 2 --subset 320 --folder"
    assert cli.main(["train", "digits", *options.split(), str(folder)]) == 0
    return folder


def test_training_prints_the_table_and_the_folder(tmp_path, capfd):
    folder = tmp_path / "run"
    options = "--peers resnet8 --epochs 1 --subset 128 --no-tensorboard --figures pdf,svg --folder"
    assert cli.main(["train", "digits", *options.split(), str(folder)]) == 0
    assert sorted(p.name for p in folder.glob("curves.*")) == ["curves.pdf", "curves.svg"]
    out = capfd.readouterr().out
    assert re.search(
        r"^peer +parameters +independent % +mutual % +ensemble % +images/s$", out, re.M
    )
    assert re.search(r"^resnet8 +[\d,]+ +- +\d+\.\d\d +\d+\.\d\d +-$", out, re.M)
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


@pytest.fixture
def unfinished(run, tmp_path) -> Path:
    """A run that was killed when its last weights were to be written."""
    folder = tmp_path / "unfinished"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "peers")
    (folder / "cohort.json").unlink()
    return folder


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
    assert cli.main(["export", str(unfinished), "--format", "torch"]) == 0
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
    assert cli.main(["export", str(run), "--format", "torch", "--to", str(tmp_path)]) == 0
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
    options = ["--format", "torch", "--size", "16", "8", "--to", "there"]
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


# --- the process ---


@pytest.mark.parametrize("module", ["fastdml", "fastdml.cli"])
def test_the_real_command_refuses_in_one_line(tmp_path, module):
    done = subprocess.run(
        [sys.executable, "-m", module, "train", "cifar100", "--root", "nowhere"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("fastdml: error: nowhere")
    assert list(tmp_path.iterdir()) == []


def test_top_level_help_and_typing_errors_need_no_torch(tmp_path):
    code = (
        "import sys; from fastdml.cli import main\n"
        "codes = [main(a.split()) for a in ('--help', '--version', 'train', 'trian')]\n"
        "assert codes == [0, 0, 0, 2], codes\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [*FASTDML, "--help"],
            cwd=tmp_path, env=ENVIRONMENT, stdout=closed, stderr=subprocess.PIPE, timeout=60,
        )  # fmt: skip
    assert done.returncode == 141
    assert done.stderr == b""


def test_interrupting_before_training_promises_nothing(monkeypatch, capfd):
    def interrupted(name: str, root: str, **options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(classification, "load", interrupted)
    assert cli.main(["train", "digits"]) == 130
    assert capfd.readouterr().err == "fastdml: interrupted\n"


def test_interrupting_says_how_to_go_on(tmp_path):
    options = "--peers resnet8 --epochs 500 --folder run"
    process = subprocess.Popen(
        [*FASTDML, "train", "digits", *options.split()],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "last.ckpt").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("fastdml: ")
    assert "resume" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0  # from the checkpoint


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


@pytest.mark.parametrize("columns", [1, 4, 7])
@pytest.mark.parametrize("command", ["train digits", "evaluate", "export", "kernels"])
def test_help_in_narrow_terminals(monkeypatch, capfd, columns, command):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main([*command.split(), "--help"]) == 0
    assert len(capfd.readouterr().out) < 60_000


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"\\xe9"),
        (C_LOCALE | {"PYTHONIOENCODING": "ascii"}, "é".encode()),
    ],
)
def test_what_a_terminal_cannot_show(tmp_path, environment, shown):
    """A whole run in a folder called é, said as the terminal can; and then a refusal."""
    code = (
        "import sys; from fastdml.cli import main\n"
        "options = 'train digits --peers resnet8 --epochs 1 --subset 128 --no-tensorboard'\n"
        "args = [*options.split(), '--folder', sys.argv[1]]\n"
        "sys.exit([main(args), main(args)] != [0, 2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "é"],
        cwd=tmp_path, env=ENVIRONMENT | environment, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"run folder: " + shown + b"\n")
    assert b"error: " + shown + b" is there already" in done.stderr
    assert (tmp_path / "é" / "cohort.json").exists()


def test_names_that_are_no_text(tmp_path, capfdbinary):
    """Bytes that are not UTF-8 reach the terminal as they are."""
    folder = os.fsencode(tmp_path) + b"/\xff"
    assert cli.main(["evaluate", os.fsdecode(folder)]) == 2
    assert folder in capfdbinary.readouterr().err


def test_a_file_of_settings_in_a_locale_without_its_letters(tmp_path):
    (tmp_path / "c.yaml").write_text("folder: é\n", encoding="utf-8")
    done = subprocess.run(
        [*FASTDML, "train", "digits", "--config", "c.yaml"],
        cwd=tmp_path, capture_output=True, timeout=60, text=True,
        env=ENVIRONMENT | C_LOCALE,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot be the name of a file here" in done.stderr
