"""A cohort on disk: what is saved is loaded, and what is damaged is refused."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import sys

import pytest
import torch
from small_peers import linear_net, same
from torch import nn

from fastdml.cohort import Cohort
from fastdml.cohort_files import read_record
from fastdml.errors import InputError, MissingExtra
from fastdml.image_record import FIELDS
from fastdml.models import ReidHead

needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed"
)


@needs_safetensors
def test_save_and_load(trained, tmp_path):
    trained = trained.to(memory_format=torch.channels_last)
    trained.save(tmp_path / "run")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "run/cohort.json",
        "run/peers/00-resnet8-1.safetensors",
        "run/peers/01-wrn_10_1.safetensors",
        "run/peers/02-resnet8-2.safetensors",
    ]
    before = torch.get_rng_state()
    loaded = Cohort.load(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.names == trained.names
    assert loaded.models == trained.models
    assert (loaded.num_classes, loaded.in_channels) == (5, 1)
    assert loaded.state_dict().keys() == trained.state_dict().keys()
    assert same(loaded, trained)


@needs_safetensors
def test_saving_twice_gives_the_same_bytes_and_replaces_the_first(trained, tmp_path):
    def files() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    trained.save(tmp_path)
    first = files()
    trained.save(tmp_path)
    assert files() == first
    with torch.no_grad():
        trained.peers[0].head.bias.add_(1)
    trained.save(tmp_path)
    assert same(Cohort.load(tmp_path), trained)


@needs_safetensors
def test_tied_weights_survive(tmp_path):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    net = nn.Sequential(first, second)
    Cohort([net]).save(tmp_path)
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert same(Cohort.load(tmp_path, peers=[fresh]).peers[0], net)


@needs_safetensors
def test_own_modules_are_loaded_into_what_is_given(tmp_path):
    cohort = Cohort([linear_net(), "resnet8"], 4)
    cohort.save(tmp_path)
    with pytest.raises(InputError, match=r"peer Sequential .* your own code .*peers="):
        Cohort.load(tmp_path)
    assert same(Cohort.load(tmp_path, peers=[linear_net(), "resnet8"]), cohort)
    with pytest.raises(InputError, match="holds 2 peers, and peers= has 1"):
        Cohort.load(tmp_path, peers=[linear_net()])
    with pytest.raises(InputError, match=r"peers must be a list, .* not 'resnet8'"):
        Cohort.load(tmp_path, peers="resnet8")
    with pytest.raises(InputError, match="peer 1 is a int, neither"):
        Cohort.load(tmp_path, peers=[linear_net(), 5])
    with pytest.raises(InputError, match=r"does not fit peer Sequential: [^\n]*Missing key[^\n]*$"):
        Cohort.load(tmp_path, peers=["resnet8", "resnet8"])


@needs_safetensors
def test_a_file_cannot_have_code_imported(trained, tmp_path, monkeypatch):
    trained.save(tmp_path)
    description = json.loads((tmp_path / "cohort.json").read_text())
    (tmp_path / "evil_module_of_a_test.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    description["peers"][0]["model"] = "evil_module_of_a_test:net"
    (tmp_path / "cohort.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="your own code"):
        Cohort.load(tmp_path)
    # nor have a file outside the folder read
    description["peers"][0].update(model="resnet8", name="../../../etc/passwd")
    (tmp_path / "cohort.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"peers/00-.._.._.._etc_passwd\.safetensors"):
        Cohort.load(tmp_path)


@needs_safetensors
@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_a_truncated_or_changed_file_is_named(trained, tmp_path, size):
    trained.save(tmp_path)
    path = tmp_path / "peers" / "01-wrn_10_1.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:size] if size >= 0 else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=r"01-wrn_10_1\.safetensors is not the file"):
        Cohort.load(tmp_path)


def header(text: str, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode()


@needs_safetensors
@pytest.mark.parametrize(
    "data",
    [
        b"",
        header("{", 2**60),
        header("no json"),
        header('{"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
        header('{"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}') + bytes(4),
        header('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
    ],
    ids=["empty", "length", "text", "dtype", "shape", "other tensors"],
)
def test_weights_that_are_broken_although_the_digest_agrees(trained, tmp_path, data):
    trained.save(tmp_path)
    (tmp_path / "peers" / "01-wrn_10_1.safetensors").write_bytes(data)
    path = tmp_path / "cohort.json"
    description = json.loads(path.read_text())
    description["peers"][1]["sha256"] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(description))
    with pytest.raises(
        InputError, match=r"01-wrn_10_1\.safetensors (holds no safetensors|does not fit peer)"
    ) as error:
        Cohort.load(tmp_path)
    assert "\n" not in str(error.value)


@needs_safetensors
@pytest.mark.parametrize("length", [231, 232, 1000])
def test_names_longer_than_a_file_may_have(tmp_path, length):
    cohort = Cohort([nn.Linear(4, 3), nn.Linear(4, 3)])
    cohort.names = ["x" * length + "a", "x" * length + "b"]
    cohort.save(tmp_path)
    loaded = Cohort.load(tmp_path, peers=[nn.Linear(4, 3), nn.Linear(4, 3)])
    assert loaded.names == cohort.names
    assert same(loaded, cohort)


@needs_safetensors
def test_a_save_that_fails_leaves_the_old_one(trained, tmp_path, monkeypatch):
    trained.save(tmp_path)
    old = copy.deepcopy(trained)
    with torch.no_grad():
        trained.peers[0].head.bias.add_(1)
    synced, fsync = [], os.fsync

    def full_disk(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match=r"cannot write .*01-wrn_10_1.*No space left"):
        trained.save(tmp_path)
    assert same(Cohort.load(tmp_path), old)
    assert not [*tmp_path.rglob("*.partial")]


@needs_safetensors
@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"format": 1}', '{"format": 1, "peers": 3}', "\x00", '"x"',
     '{"format": 1, "num_classes": "5", "in_channels": 1, '
     '"peers": [{"name": "a", "model": "resnet8", "sha256": ""}]}',
     '{"format": 1, "num_classes": 5, "in_channels": 1, '
     '"peers": [{"name": "a", "model": 0, "sha256": ""}]}'],
)  # fmt: skip
def test_a_file_that_describes_no_cohort(tmp_path, text):
    (tmp_path / "cohort.json").write_text(text)
    with pytest.raises(InputError, match=r"cohort\.json does not describe a cohort"):
        Cohort.load(tmp_path)


@needs_safetensors
def test_wrong_folders_and_versions(trained, tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*cohort\.json"):
        Cohort.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        trained.save(tmp_path / "file")
    trained.save(tmp_path)
    path = tmp_path / "cohort.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match="has format 2"):
        Cohort.load(tmp_path)


def test_without_safetensors_the_message_is_the_command(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fastdml\[train\]'"):
        trained.save(tmp_path)
    assert not any(tmp_path.iterdir())


@needs_safetensors
@pytest.mark.parametrize("head", [ReidHead("gem"), ReidHead(neck=False, last_stride=2)], ids=str)
def test_a_head_is_kept_on_disk(head, tmp_path):
    cohort = Cohort(["resnet8", "wrn_10_2"], 5, seed=1, head=head)
    x = torch.randn(4, 3, 16, 8)
    cohort(x)
    cohort.eval().save(tmp_path)
    loaded = Cohort.load(tmp_path).eval()
    assert loaded.head == head
    assert same(loaded, cohort)
    with torch.no_grad():
        features = loaded.embed(x)
        assert [f.shape for f in features] == [(4, 64), (4, 128)]
        for mine, theirs in zip(features, cohort.embed(x), strict=True):
            assert torch.equal(mine, theirs)
        assert [z.shape for z in loaded(x)] == [(4, 5)] * 2


@needs_safetensors
def test_what_the_images_were_is_kept_on_disk(tmp_path):
    cohort = Cohort(["resnet8"], 3)
    cohort.image_shape = torch.zeros(3, 48, 64).shape
    cohort.resize, cohort.stored = "crop", (128, 64)
    cohort.mean, cohort.std = torch.tensor([1.5, 2, 3]), (0.1, 2, 3)
    cohort.classes = ["cat", "dog", "ant"]  # not in any order but their own
    cohort.save(tmp_path)
    loaded = Cohort.load(tmp_path)
    assert loaded.record() == {
        "image_shape": [3, 48, 64],
        "mean": [1.5, 2.0, 3.0],
        "std": [0.1, 2, 3],
        "classes": ["cat", "dog", "ant"],
        "resize": "crop",
        "stored": [128, 64],
    }
    assert read_record(tmp_path) == loaded.record() == cohort.record()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "image_shape",
            (64, 64),
            r"image_shape must be \(channels, height, width\), not \[64, 64\]",
        ),
        ("image_shape", 64, "image_shape must be"),
        ("mean", (1.0, 2.0), r"mean must be one finite number a channel for 3 channels"),
        ("mean", 0.5, "mean must be one finite number a channel for 3 channels"),
        ("mean", (1.0, 2.0, float("nan")), "mean must be one finite number"),
        ("std", (1.0, 0.0, 1.0), "std must be one finite number above 0 a channel"),
        ("classes", ["a", "b"], "classes must be 3 names, one for each logit, not"),
        ("classes", "abc", "classes must be 3 names"),
        ("classes", [1, 2, 3], "classes must be 3 names"),
        ("resize", "squash", "resize must be one of crop, stretch, not 'squash'"),
        ("resize", ["crop"], "resize must be one of crop, stretch, not"),
        ("stored", (128,), r"stored must be \(height, width\), not \[128\]"),
        ("stored", (128, 0), r"stored must be \(height, width\), not \[128, 0\]"),
    ],
)
@needs_safetensors
def test_a_record_that_does_not_fit_is_neither_saved_nor_loaded(tmp_path, name, value, message):
    cohort = Cohort(["resnet8"], 3)
    cohort.image_shape = (3, 8, 8)
    cohort.save(tmp_path)
    setattr(cohort, name, value)
    with pytest.raises(InputError, match=message):
        cohort.save(tmp_path)
    path = tmp_path / "cohort.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {name: value}))
    with pytest.raises(InputError, match=f"cohort.json does not describe a cohort: {message}"):
        Cohort.load(tmp_path)


@needs_safetensors
def test_cohorts_of_earlier_versions_know_nothing_of_images(trained, tmp_path):
    trained.save(tmp_path)
    path = tmp_path / "cohort.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in FIELDS}
    path.write_text(json.dumps(old))
    loaded = Cohort.load(tmp_path)
    assert same(loaded, trained)
    assert set(loaded.record().values()) == {None}


@needs_safetensors
@pytest.mark.parametrize("peers", [None, ["resnet8", "wrn_10_1", "resnet8"]])
def test_what_is_loaded_is_in_evaluation_mode(trained, tmp_path, peers):
    trained.save(tmp_path)
    loaded = Cohort.load(tmp_path, peers=peers)
    assert not any(module.training for module in loaded.modules())
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        for a, b in zip(loaded(x), trained.eval()(x), strict=True):
            assert torch.equal(a, b)


@needs_safetensors
def test_cohorts_of_earlier_versions_have_no_head(trained, tmp_path):
    trained.save(tmp_path)
    path = tmp_path / "cohort.json"
    description = json.loads(path.read_text())
    assert description.pop("head") is None
    path.write_text(json.dumps(description))
    loaded = Cohort.load(tmp_path)
    assert same(loaded, trained)
    assert loaded.head is None
    with pytest.raises(InputError, match=r"resnet8-1 has no re-ident.* head=ReidHead\(\)"):
        loaded.embed(torch.zeros(1, 1, 8, 8))
    for head in ({"pooling": "max"}, {"colour": 3}, 3):
        path.write_text(json.dumps(description | {"head": head}))
        with pytest.raises(InputError):
            Cohort.load(tmp_path)


def test_the_image_size_is_kept(tmp_path):
    """timm's networks of one size are built for it, also when they are loaded."""
    pytest.importorskip("timm")
    name = "timm:vit_tiny_patch16_224"
    cohort = Cohort([name, name], 4, seed=1, image_size=[32, 48])
    cohort.save(tmp_path)
    loaded = Cohort.load(tmp_path)
    assert loaded.image_size == cohort.image_size == (32, 48)
    x = torch.randn(2, 3, 32, 48)
    for a, b in zip(cohort.eval()(x), loaded.eval()(x), strict=True):
        assert torch.equal(a, b)
    for size in ((32,), (32, 0), (32, 32.0)):
        with pytest.raises(InputError, match="image_size must be"):
            Cohort([name], 4, image_size=size)
    description = json.loads((tmp_path / "cohort.json").read_text())
    for size in ([32], 32, ["a", "b"]):
        (tmp_path / "cohort.json").write_text(json.dumps({**description, "image_size": size}))
        with pytest.raises(InputError):
            Cohort.load(tmp_path)


def test_files_without_an_image_size_are_read(tmp_path):
    Cohort(["resnet8"], 4).save(tmp_path)
    description = json.loads((tmp_path / "cohort.json").read_text())
    del description["image_size"]
    (tmp_path / "cohort.json").write_text(json.dumps(description))
    assert Cohort.load(tmp_path).image_size is None
