"""`fastdml.load`: peers and ensembles from runs, cohorts and exported files."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastdml
from fastdml import cli
from fastdml.cohort import Cohort
from fastdml.errors import InputError
from fastdml.metrics import ensemble_features
from fastdml.models import ReidHead

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

RECORD = {
    "image_shape": (3, 16, 16),
    "mean": (120.0, 110.0, 100.0),
    "std": (60.0, 61.0, 62.0),
    "classes": list("abcd"),
}


def small(peers=("resnet8", "wrn_10_1"), **options) -> Cohort:
    cohort = Cohort(peers, 4, seed=2, **options)
    for name, value in RECORD.items():
        setattr(cohort, name, value)
    with torch.no_grad():
        cohort(torch.randn(8, 3, 16, 16))
    return cohort.eval()


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return small()


@pytest.fixture
def folder(cohort, tmp_path) -> Path:
    cohort.save(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_cohort_gives_peers_and_the_ensemble(cohort, folder):
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        each = [z.softmax(1) for z in cohort(x)]
    model = fastdml.load(folder)
    assert isinstance(model, fastdml.Predictor)
    assert not model.training
    assert model.classes == list("abcd")
    assert torch.equal(model(x), cohort.ensemble(x))
    assert torch.equal(model.of_each(x), torch.stack(each))
    for k, name in enumerate(["resnet8", "wrn_10_1"]):
        for peer in (k, str(k), name):
            one = fastdml.load(folder, peer=peer)
            assert one.names == [name]
            assert torch.equal(one(x), each[k])
            assert not one(x).requires_grad
    alone = [sum(w.numel() for w in fastdml.load(folder, peer=k).parameters()) for k in (0, 1)]
    assert sum(alone) == sum(w.numel() for w in model.parameters())


def test_predict_names_classes_in_order(folder):
    model = fastdml.load(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), dtype=np.uint8)
    found = model.predict(list(pixels), top=9)
    assert len(found) == 70  # more than a batch
    for image, likely in zip(pixels, found, strict=True):
        assert sorted(name for name, _ in likely) == list("abcd")
        values = [p for _, p in likely]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)
        p = model(model.preprocess(image)[None])[0]
        assert p["abcd".index(likely[0][0])] == pytest.approx(values[0], abs=1e-6)
    assert model.predict([]) == []
    with pytest.raises(InputError, match=r"predict\(\[image\]\)"):
        model.predict("a.png")
    with pytest.raises(InputError, match=r"top must be .* at least 1"):
        model.predict(list(pixels[:1]), top=0)


def test_mistakes_are_one_line(folder, tmp_path):
    for wrong, message in (
        ({"peer": "resnet9"}, "no peer 'resnet9'; did you mean resnet8"),
        ({"peer": "zebra"}, "there is resnet8, wrn_10_1, ensemble"),
        ({"peer": 2}, "numbers run from 0 to 1, for resnet8, wrn_10_1"),
        ({"peer": -1}, "there is no peer -1"),
        ({"peer": True}, "there is no peer True"),
        ({"peer": "best"}, "no recorded scores to tell the best peer by: name one, resnet8 or wrn"),
        ({"weights": "best"}, "is no run and has one set of weights"),
        ({"weights": "first"}, "weights must be 'last' or 'best', not 'first'"),
        ({"device": "cuda:99"}, "no run on device 'cuda:99'"),
        ({"peers": ["resnet8"]}, "holds 2 peers, and peers= has 1"),
    ):
        with pytest.raises(InputError, match=message) as error:
            fastdml.load(folder, **wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"there is no .*nowhere"):
        fastdml.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="neither the folder of a run, nor of a cohort"):
        fastdml.load(tmp_path)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "00-a.safetensors").touch()
    with pytest.raises(
        InputError, match=r"; give one of its files, such as \S+/00-a\.safetensors$"
    ):
        fastdml.load(tmp_path / "exported")


def test_reidentification_gives_features(tmp_path):
    cohort = small(head=ReidHead())
    cohort.save(tmp_path)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        features = cohort.embed(x)
    assert torch.equal(fastdml.load(tmp_path, peer=1)(x), features[1])
    torch.testing.assert_close(fastdml.load(tmp_path)(x), ensemble_features(features))
    (path,) = cohort.export(tmp_path / "out", format="safetensors", peer="ensemble")
    assert torch.equal(fastdml.load(path)(x), fastdml.load(tmp_path)(x))
    for call in (lambda m: m.of_each(x), lambda m: m.predict([np.zeros((8, 8, 3), np.uint8)])):
        with pytest.raises(InputError, match="trained for re-identification"):
            call(fastdml.load(tmp_path))


def test_without_a_record_peers_load_and_preprocess_is_refused(tmp_path):
    Cohort([nn.Linear(6, 4), nn.Linear(6, 4)]).save(tmp_path)
    with pytest.raises(InputError, match="your own code"):
        fastdml.load(tmp_path)
    model = fastdml.load(tmp_path, peers=[nn.Linear(6, 4), nn.Linear(6, 4)])
    assert model(torch.randn(5, 6)).shape == (5, 4)
    assert model.classes is None
    with pytest.raises(InputError, match=r"image_shape and mean and std .* not recorded") as error:
        model.preprocess(np.zeros((8, 8, 3), np.uint8))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions(tmp_path, dtype):
    """Half precision computes in float32 here, from the weights as they are."""
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).to(dtype) for _ in range(2)]
    Cohort(nets).save(tmp_path)
    fresh = [nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).to(dtype) for _ in range(2)]
    (path,) = Cohort.load(tmp_path, peers=fresh).export(
        tmp_path / "out", torch.zeros(1, 3, 4, 4), format="safetensors", peer=0
    )
    with safetensors.safe_open(path, "pt") as file:
        assert file.get_tensor("1.weight").dtype == dtype
    x = torch.randn(3, 3, 4, 4)
    if dtype == torch.float64:
        x = x.double()
    model = fastdml.load(path, peers=[copy.deepcopy(nets[0])])
    expected = copy.deepcopy(nets[0]).to(x.dtype)(x).softmax(1)
    torch.testing.assert_close(model(x), expected.float(), rtol=1e-5, atol=1e-6)


# --- exported files ---


def test_exported_files_are_loaded(cohort, tmp_path):
    x = torch.randn(3, 3, 16, 16)
    one, two = cohort.export(tmp_path, format="safetensors")
    (both,) = cohort.export(tmp_path, format="safetensors", peer="ensemble")
    with torch.no_grad():
        each = [z.softmax(1) for z in cohort(x)]
    for path, expected in ((one, each[0]), (two, each[1]), (both, cohort.ensemble(x))):
        model = fastdml.load(str(path))
        assert torch.equal(model(x), expected)
        assert model.classes == list("abcd")
        assert model.preprocess(np.zeros((30, 20, 3), np.uint8)).shape == (3, 16, 16)
    assert torch.equal(fastdml.load(both, peer="wrn_10_1")(x), each[1])
    assert fastdml.load(one).names == ["resnet8"]
    plain = safetensors.load_file(one)
    assert plain.keys() == cohort[0].state_dict().keys()


def test_one_peer_is_an_ensemble_too(tmp_path):
    cohort = small(["resnet8"])
    x = torch.randn(2, 3, 16, 16)
    (path,) = cohort.export(tmp_path, format="safetensors", peer="ensemble")
    assert path.name == "ensemble.safetensors"
    assert "peers.0.conv1.weight" in safetensors.load_file(path)
    with torch.no_grad():
        torch.testing.assert_close(fastdml.load(path)(x), cohort(x)[0].softmax(1))


@pytest.mark.parametrize("name", ["a/b\\c", "né☃", "../up", "x" * 300, "ensemble ", "a\nb"])
def test_names_of_any_kind(tmp_path, name):
    cohort = small(["resnet8", "resnet8"])
    cohort.names[0] = name
    paths = cohort.export(tmp_path / "out", format="safetensors")
    assert [p.parent for p in paths] == [tmp_path / "out"] * 2
    assert fastdml.load(paths[0]).names == [name]
    cohort.save(tmp_path / "saved")
    assert fastdml.load(tmp_path / "saved", peer=name).names == [name]


def rewritten(path: Path, change) -> Path:
    """A copy of an exported file whose metadata `change` has changed; the tensors are the same."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    copied = path.with_name("copied.safetensors")
    copied.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return copied


def test_files_that_are_damaged_or_of_others(cohort, tmp_path):
    (path,) = cohort.export(tmp_path, format="safetensors", peer=0)

    def facts(**changes):
        def change(header):
            told = json.loads(header["__metadata__"]["fastdml"]) | changes
            header["__metadata__"]["fastdml"] = json.dumps(told)

        return change

    def without(header):
        del header["__metadata__"]["fastdml"]

    def garbled(header):
        header["__metadata__"]["fastdml"] = "{"

    whole = json.loads(safetensors.safe_open(path, "pt").metadata()["fastdml"])
    other = [whole["peers"][0] | {"model": "wrn_10_1"}]
    own = [whole["peers"][0] | {"model": "os:system"}]
    for change, message in (
        (without, "does not say which peer its weights are of"),
        (lambda header: header.pop("__metadata__"), "does not say which peer"),
        (garbled, "does not describe its peers"),
        (facts(format=2), "has format 2; this version of fastdml reads 1"),
        (facts(num_classes=5, classes=None), "does not fit peer resnet8"),
        (facts(num_classes="four"), "a name or a number is of wrong type"),
        (facts(classes=["a"]), "classes must be 4 names"),
        (facts(in_channels=1), "does not fit peer resnet8"),
        (facts(peers=other), "does not fit peer resnet8"),
        (facts(peers=own), "your own code"),
        (facts(peers=[]), "is damaged"),
        (facts(peers=3), "does not describe its peers"),
    ):
        with pytest.raises(InputError, match=message) as error:
            fastdml.load(rewritten(path, change))
        assert "\n" not in str(error.value)

    data = path.read_bytes()
    flipped = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    long_header = b"\xff" * 7 + b"\x7f" + data[8:]
    for broken in (b"", data[:4], data[:100], data[:-1], data + b"0", flipped, long_header):
        path.write_bytes(broken)
        with pytest.raises(
            InputError, match=r"is damaged|no safetensors that can be read"
        ) as error:
            fastdml.load(path)
        assert "\n" not in str(error.value)


def test_weights_of_a_folder_are_no_exported_file(folder):
    path = next((folder / "peers").iterdir())
    with pytest.raises(InputError, match="or the folder that the weights lie in"):
        fastdml.load(path)


# --- runs ---


def test_a_run_and_what_has_not_ended(tmp_path, caplog):
    run = tmp_path / "run"
    options = "--peers resnet8 resnet8 --epochs 2 --subset 160 --amp off --no-tensorboard --folder"
    assert cli.main(["train", "digits", *options.split(), str(run)]) == 0
    model = fastdml.load(run)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(x), Cohort.load(run).ensemble(x))
    assert torch.equal(fastdml.load(run, weights="best")(x), Cohort.load(run / "best").ensemble(x))
    scores = json.loads((run / "summary.json").read_text())["mutual"]["scores"]["top1"]
    best = fastdml.load(run, peer="best")
    assert scores[["resnet8-1", "resnet8-2"].index(*best.names)] == max(scores)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    for name in ("cohort.json", "summary.json"):
        (unfinished / name).unlink()
    caplog.clear()
    assert torch.equal(fastdml.load(unfinished)(x), model(x))
    assert "the run has not ended: weights of" in caplog.text
    assert fastdml.load(unfinished, peer="best").names == best.names
    assert fastdml.load(str(run)).predict([np.zeros((8, 8), np.uint8)])[0][0][0] in "0123456789"


def test_export_where_nothing_can_be_written(cohort, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file"):
        cohort.export(tmp_path / "file", format="safetensors")
    if os.path.exists("/dev/full"):
        (tmp_path / "out").mkdir()
        os.symlink("/dev/full", tmp_path / "out" / "00-resnet8.safetensors")
        cohort.export(tmp_path / "out", format="safetensors")  # replaces the link
        assert not (tmp_path / "out" / "00-resnet8.safetensors").is_symlink()


def test_features_are_those_that_retrieval_compares(tmp_path):
    """Of files, at the size and by the interpolation of the loaders."""
    from PIL import Image

    from fastdml.data import ReidSplit
    from fastdml.metrics import normalize_features
    from fastdml.train import extract_features

    cohort = small(head=ReidHead())
    cohort.image_shape, cohort.resize = (3, 64, 32), "stretch"
    random = np.random.default_rng(0)
    paths = []
    for k, shape in enumerate([(128, 64), (90, 70), (30, 20)]):
        paths.append(str(tmp_path / f"{k}.jpg"))
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(paths[-1])
    split = ReidSplit(
        tuple(paths),
        torch.tensor([1, 2, 3]),
        torch.tensor([1, 1, 2]),
        RECORD["mean"],
        RECORD["std"],
    )
    known = extract_features(cohort, split, (64, 32), flip_test=False, amp="off")
    cohort.save(tmp_path / "saved")
    for k in (0, 1):
        model = fastdml.load(tmp_path / "saved", peer=k)
        found = model(torch.stack([model.preprocess(path) for path in paths]))
        torch.testing.assert_close(normalize_features(found), known[k], rtol=1e-4, atol=1e-5)
