"""Mistakes on the command line are one line and exit code 2, and leave nothing behind."""

from __future__ import annotations

import sys

import pytest
from command_line import cifar10_files

from fastdml import cli


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
    names = "digits, cifar10, cifar100, folder, veri, dukemtmc, market1501"
    refused(["train", "imagenet"], "imagenet", names)
    refused(["evaluate"], "RUN")
    refused(["evaluate", "run", "--weigths", "best"], "did you mean --weights")
    refused(["evaluate", "run", "--norerank"], "did you mean --no-rerank")
    refused(["evaluate", "run", "--learning-rate", "1"], "fastdml evaluate --help lists")
    refused(["help", "trian"], "did you mean train")
    refused(["hepl"], "did you mean help")
    refused(["evaluate", "nowhere"], "nowhere", "not the folder of a run")


def test_a_folder_where_the_name_of_data_is_due(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos").mkdir()
    refused(["train", "my photos"], r"fastdml train folder --root 'my photos'$")


def test_kernels_that_are_interpreted_cannot_be_reported(refused, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused(["kernels", "--shapes", "2x100"], "TRITON_INTERPRET is set", "unset it")


def test_kernels_without_their_tiles_cannot_be_reported(refused, monkeypatch, tmp_path):
    from fastdml_kernels import tiles
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(tiles, "table", lambda: tiles.read_table(tmp_path / "tiles.json"))
    refused(["kernels", "--shapes", "2x100"], "tiles.json cannot be used", "Restore the file")


def test_missing_extra(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    refused(["train", "digits"], r"tyro is not installed: pip install 'fastdml\[train\]'")
