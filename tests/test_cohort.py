"""The cohort: peers that differ, reproducibly; one class count; disk; export."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdml.cohort import Cohort
from fastdml.cohort_files import read_record
from fastdml.errors import InputError, MissingExtra
from fastdml.image_record import FIELDS
from fastdml.models import ReidHead

needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed"
)
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("onnx", "onnxscript")),
    reason="onnx and onnxscript are not installed",
)


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(weights(one), weights(two), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def linear_net(num_classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))


# ---- building ----


def test_peers_of_one_architecture_start_different_and_a_seed_repeats_them():
    one, two = (Cohort(["resnet8"] * 3, 10, seed=3) for _ in range(2))
    for k in range(3):
        assert same(one.peers[k], two.peers[k])
        assert not same(one.peers[k], one.peers[(k + 1) % 3])
    other = Cohort(["resnet8"] * 3, 10, seed=4)
    assert not any(same(a, b) for a in one.peers for b in other.peers)


def test_a_peer_does_not_depend_on_its_neighbours():
    mixed, alike = Cohort(["wrn_10_1", "resnet8"], 10), Cohort(["resnet8", "resnet8"], 10)
    assert same(mixed.peers[1], alike.peers[1])


@given(seed=st.integers(0, 2**64), state=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_building_leaves_the_global_generator_alone(seed, state):
    torch.manual_seed(state)
    before = torch.get_rng_state()
    first = Cohort(["resnet8", "resnet8"], 10, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert same(first.peers[1], Cohort(["resnet8", "resnet8"], 10, seed=seed).peers[1])


def test_default_device_does_not_change_the_weights():
    with torch.device("meta"):
        cohort = Cohort(["resnet8"], 10)
    assert same(cohort.peers[0], Cohort(["resnet8"], 10).peers[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_building_leaves_the_cuda_generator_alone():
    before = torch.cuda.get_rng_state()
    Cohort(["resnet8"], 10)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_names_and_modules_mix():
    cohort = Cohort(["resnet8", linear_net(), "resnet8", nn.Sequential(linear_net())], 4)
    assert cohort.names == ["resnet8-1", "Sequential-1", "resnet8-2", "Sequential-2"]
    assert cohort.models == ["resnet8", None, "resnet8", None]
    assert Cohort(["resnet8", "wrn_10_1"], 4).names == ["resnet8", "wrn_10_1"]
    assert len(cohort) == len(cohort.peers) == 4
    logits = cohort(torch.randn(5, 3, 8, 8))
    assert [z.shape for z in logits] == [(5, 4)] * 4


@given(st.lists(st.sampled_from(["resnet8", "wrn_10_1", "resnet14"]), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_names_are_unique_and_in_order(peers):
    names = Cohort(peers, 3).names
    assert len({*names}) == len(peers)
    assert [name.split("-")[0] for name in names] == peers


def test_class_count_is_found_in_modules():
    assert Cohort([linear_net(6), linear_net(6)]).num_classes == 6
    assert Cohort([Cohort(["resnet8"], 6).peers[0], "resnet8"]).num_classes == 6


@pytest.mark.parametrize(
    ("peers", "num_classes", "message"),
    [
        ([], 10, "at least one peer"),
        ("resnet8", 10, "must be a list, .* not 'resnet8'"),
        (nn.Flatten(), 10, "must be a list, .* not Flatten"),
        (None, 10, "must be a list, .* not None"),
        ([3], 10, "peer 0 is a int, neither"),
        (["resnet8"], None, "num_classes is needed"),
        ([nn.Flatten()], None, "num_classes is needed"),
        (["resnet8"], 0, "num_classes must be .* not 0"),
        (["resnet8"], 5.5, "num_classes must be .* not 5.5"),
        ([linear_net(4)], "4", "num_classes must be .* not '4'"),
        ([nn.Flatten()], -1, "num_classes must be .* not -1"),
        (["resnet8", "resnet9"], 10, "no model 'resnet9'"),
        ([linear_net(4), linear_net(5)], None, "Sequential-1 has 4, Sequential-2 has 5"),
    ],
)
def test_peers_that_cannot_be_used(peers, num_classes, message):
    with pytest.raises(InputError, match=message):
        Cohort(peers, num_classes)


def test_a_class_count_that_contradicts_a_module():
    peer = Cohort(["resnet8"], 6).peers[0]
    with pytest.raises(InputError, match="num_classes is 7, ResNetCifar has 6"):
        Cohort([peer], 7)


@pytest.mark.parametrize("seed", [-1, 1.5, None, "1"])
def test_seed_is_checked(seed):
    with pytest.raises(InputError, match="seed must be a whole number"):
        Cohort(["resnet8"], 10, seed=seed)


def test_twins_are_refused():
    net = linear_net()
    with pytest.raises(InputError, match="peers 0 and 1 are the same module"):
        Cohort([net, net])
    with pytest.raises(InputError, match=r"peers 1 and 2 start with identical .*deepcopy"):
        Cohort([linear_net(), net, copy.deepcopy(net)])
    with pytest.raises(InputError, match="peers 0 and 1 share 2 parameters"):
        Cohort([net, nn.Sequential(net)])
    nudged = copy.deepcopy(net)
    with torch.no_grad():
        nudged[1].bias[0] += 1
    assert len(Cohort([net, nudged])) == 2


# ---- forward ----


def test_ensemble_is_the_mean_of_probabilities():
    cohort = Cohort(["resnet8", "wrn_10_1"], 5).eval()
    x = torch.randn(7, 3, 16, 16)
    with torch.no_grad():
        expected = sum(peer(x).double().softmax(1) for peer in cohort.peers) / 2
        mean = cohort.ensemble(x)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = cohort.ensemble(x)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.sum(1), torch.ones(7))


def test_one_loss_reaches_its_own_peer_only():
    cohort = Cohort(["resnet8", "resnet8"], 5)
    cohort(torch.randn(4, 3, 8, 8))[0].sum().backward()
    assert all(p.grad is not None for p in cohort.peers[0].parameters())
    assert all(p.grad is None for p in cohort.peers[1].parameters())


class TwoHeads(nn.Module):
    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.net = linear_net()

    def forward(self, x):
        return self.net(x), self.net(x)


def test_a_peer_with_other_outputs_is_named():
    x = torch.randn(5, 3, 8, 8)
    with pytest.raises(InputError, match=r"peer TwoHeads must return logits \(N, 4\).* tuple"):
        Cohort([TwoHeads()])(x)
    with pytest.raises(InputError, match=r"peer Sequential must .*\(N, 9\).*returned \(5, 4\)"):
        Cohort([linear_net()], 9)(x)


def test_training_mode_reaches_every_peer():
    cohort = Cohort(["resnet8", "wrn_10_1"], 5)
    assert all(not m.training for m in cohort.eval().modules())
    assert all(m.training for m in cohort.train().modules())


def test_compiles_without_graph_breaks():
    cohort = Cohort(["resnet8", "mobilenet"], 5).eval()
    compiled = torch.compile(cohort, backend="eager", fullgraph=True)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        for z, expected in zip(compiled(x), cohort(x), strict=True):
            assert torch.equal(z, expected)


# ---- on disk ----


@pytest.fixture
def trained() -> Cohort:
    cohort = Cohort(["resnet8", "wrn_10_1", "resnet8"], 5, in_channels=1, seed=1)
    cohort(torch.randn(4, 1, 8, 8))  # BatchNorm statistics are part of what is saved
    return cohort


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


# ---- re-identification ----


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
    cohort.mean, cohort.std = torch.tensor([1.5, 2, 3]), (0.1, 2, 3)
    cohort.classes = ["cat", "dog", "ant"]  # not in any order but their own
    cohort.save(tmp_path)
    loaded = Cohort.load(tmp_path)
    assert loaded.record() == {
        "image_shape": [3, 48, 64],
        "mean": [1.5, 2.0, 3.0],
        "std": [0.1, 2, 3],
        "classes": ["cat", "dog", "ant"],
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


def test_a_head_comes_with_names_and_not_with_modules():
    net = linear_net(4)
    cohort = Cohort(["resnet8", net], 4, head=ReidHead())
    assert cohort.peers[1] is net
    with pytest.raises(InputError, match="peer Sequential has no re-identification head"):
        cohort.embed(torch.zeros(1, 3, 8, 8))


def test_exported_heads_give_the_features(tmp_path):
    cohort = Cohort(["resnet8"], 5, head=ReidHead("gem")).eval()
    (path,) = cohort.export(tmp_path, torch.zeros(1, 3, 16, 8), format="torch")
    x = torch.randn(3, 3, 16, 8)
    torch.testing.assert_close(torch.export.load(path).module()(x), cohort.embed(x)[0])


# ---- export ----


def test_torch_export_reproduces_each_peer_at_any_batch_size(trained, tmp_path):
    paths = trained.export(tmp_path, torch.randn(1, 1, 8, 8), format="torch")
    assert [p.name for p in paths] == ["00-resnet8-1.pt2", "01-wrn_10_1.pt2", "02-resnet8-2.pt2"]
    assert trained.training, "exporting must not change the mode"
    trained.eval()
    for path, peer in zip(paths, trained.peers, strict=True):
        program = torch.export.load(path).module()
        for n in (1, 2, 5):
            x = torch.randn(n, 1, 8, 8)
            torch.testing.assert_close(program(x), peer(x), rtol=1e-4, atol=1e-5)


def axes(values) -> dict[str, list]:
    """Of ONNX inputs or outputs: by name, the sizes and the names of the dimensions."""
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }


@needs_onnx
def test_onnx_of_a_head_gives_features_and_says_what_images_it_takes(tmp_path):
    import onnx
    from onnx.reference import ReferenceEvaluator

    cohort = Cohort(["resnet8"], 5, head=ReidHead())
    cohort.image_shape, cohort.mean, cohort.classes = (3, 16, 8), (1.0, 2.0, 3.0), list("edcba")
    (path,) = cohort.export(tmp_path)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert axes(model.graph.input) == {"images": ["batch", 3, 16, 8]}
    assert axes(model.graph.output) == {"features": ["batch", 64]}
    facts = {p.key: json.loads(p.value) for p in model.metadata_props if p.key in FIELDS}
    assert facts == {"image_shape": [3, 16, 8], "mean": [1, 2, 3], "classes": list("edcba")}
    x = torch.randn(3, 3, 16, 8)
    (features,) = ReferenceEvaluator(model).run(None, {"images": x.numpy()})
    with torch.no_grad():
        expected = cohort.eval().embed(x)[0]
    torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-3, atol=1e-4)


@needs_onnx
def test_onnx_export_computes_what_the_peer_computes(tmp_path):
    import onnx
    from onnx.reference import ReferenceEvaluator

    cohort = Cohort(["resnet8"], 5, in_channels=1)
    cohort(torch.randn(4, 1, 8, 8))
    (path,) = cohort.export(tmp_path, torch.randn(3, 1, 8, 8))
    assert path.name == "00-resnet8.onnx"
    assert [*tmp_path.iterdir()] == [path]
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert axes(model.graph.input) == {"images": ["batch", 1, 8, 8]}
    assert axes(model.graph.output) == {"logits": ["batch", 5]}
    x = torch.randn(2, 1, 8, 8)
    (logits,) = ReferenceEvaluator(model).run(None, {"images": x.numpy()})
    with torch.no_grad():
        expected = cohort.eval()(x)[0]
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-4)


def test_a_module_is_exported_for_the_channels_it_takes(tmp_path):
    cohort = Cohort([nn.Sequential(nn.Flatten(), nn.Linear(2 * 64, 4))])
    (path,) = cohort.export(tmp_path, torch.zeros(1, 2, 8, 8), format="torch")
    assert path.stat().st_size > 0


class EmbedsPatches(nn.Module):
    """A classifier whose `embed` is a layer, as vision transformers have one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 4, 4)
        self.head = nn.Linear(4, 6)

    def forward(self, x):
        return self.head(self.embed(x).mean((2, 3)))


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 8, 24)])
def test_export_takes_the_size_that_was_trained_on(tmp_path, shape):
    """Of a network of one size another would fail; of others it would be wrong without a word."""
    torch.manual_seed(0)
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 6))
    cohort = Cohort(["resnet8", fixed, EmbedsPatches()], 6)
    cohort.image_shape = shape
    paths = cohort.export(tmp_path, format="torch")
    x = torch.randn(3, *shape)
    for path, peer in zip(paths, cohort.eval().peers, strict=True):
        files = {"images.json": ""}
        program = torch.export.load(path, extra_files=files).module()
        torch.testing.assert_close(program(x), peer(x), rtol=1e-4, atol=1e-5)
        with pytest.raises((RuntimeError, AssertionError)):
            program(torch.randn(3, 3, 32, 32))
        assert json.loads(files["images.json"]) == {"output": "logits", "image_shape": [*shape]}


class Unexportable(nn.Module):
    num_classes = 4

    def forward(self, x):
        if x.sum() > 0:  # depends on values
            return x.mean((1, 2, 3))[:, None].expand(-1, 4)
        return x.amax((1, 2, 3))[:, None].expand(-1, 4)


def test_peers_that_cannot_be_exported_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing says what images .* \(N, 3, H, W\)$"):
        Cohort(["resnet8"], 4).export(tmp_path)
    cohort = Cohort(["resnet8", linear_net()], 4)
    cohort.image_shape = (3, 16, 16)  # and linear_net takes 8x8
    with pytest.raises(InputError, match=r"peer Sequential cannot .* images \(N, 3, 16, 16\)") as e:
        cohort.export(tmp_path, format="torch")
    assert isinstance(e.value.__cause__, RuntimeError)
    with pytest.raises(InputError, match="peer Unexportable cannot be exported") as e:
        Cohort([Unexportable()]).export(tmp_path, torch.ones(1, 3, 8, 8), format="torch")
    assert "\n" not in str(e.value)


def test_export_without_onnx_or_with_another_format(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fastdml\[onnx\]'"):
        trained.export(tmp_path, torch.zeros(1, 1, 8, 8))
    with pytest.raises(InputError, match="format must be 'onnx' or 'torch', not 'tflite'"):
        trained.export(tmp_path, torch.zeros(1, 1, 8, 8), format="tflite")
    for example in (torch.zeros(1, 8, 8), torch.zeros(1, 3, 8, 8), torch.zeros(0, 1, 8, 8), "x"):
        with pytest.raises(InputError, match=r"example must be images \(N, 1, H, W\), not "):
            trained.export(tmp_path, example, format="torch")
    assert not any(tmp_path.iterdir())


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
