"""Exported peers compute what the peers compute, and say what images they take."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import sys

import pytest
import torch
from small_peers import linear_net
from torch import nn

from fastdml.cohort import Cohort
from fastdml.errors import InputError, MissingExtra
from fastdml.image_record import FIELDS
from fastdml.models import ReidHead

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("onnx", "onnxscript")),
    reason="onnx and onnxscript are not installed",
)


def test_exported_heads_give_the_features(tmp_path):
    cohort = Cohort(["resnet8"], 5, head=ReidHead("gem")).eval()
    (path,) = cohort.export(tmp_path, torch.zeros(1, 3, 16, 8), format="torch-export")
    x = torch.randn(3, 3, 16, 8)
    torch.testing.assert_close(torch.export.load(path).module()(x), cohort.embed(x)[0])


def test_torch_export_reproduces_each_peer_at_any_batch_size(trained, tmp_path):
    paths = trained.export(tmp_path, torch.randn(1, 1, 8, 8), format="torch-export")
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
    (path,) = cohort.export(tmp_path, torch.zeros(1, 2, 8, 8), format="torch-export")
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
    paths = cohort.export(tmp_path, format="torch-export")
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
        cohort.export(tmp_path, format="torch-export")
    assert isinstance(e.value.__cause__, RuntimeError)
    with pytest.raises(InputError, match="peer Unexportable cannot be exported") as e:
        Cohort([Unexportable()]).export(tmp_path, torch.ones(1, 3, 8, 8), format="torch-export")
    assert "\n" not in str(e.value)


def test_export_without_onnx_or_with_another_format(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fastdml\[onnx\]'"):
        trained.export(tmp_path, torch.zeros(1, 1, 8, 8))
    with pytest.raises(
        InputError, match="unknown format 'tflite'; there is safetensors, onnx, torch-export"
    ):
        trained.export(tmp_path, torch.zeros(1, 1, 8, 8), format="tflite")
    for example in (torch.zeros(1, 8, 8), torch.zeros(1, 3, 8, 8), torch.zeros(0, 1, 8, 8), "x"):
        with pytest.raises(InputError, match=r"example must be images \(N, 1, H, W\), not "):
            trained.export(tmp_path, example, format="torch-export")
    assert not any(tmp_path.iterdir())


# --- what is exported is run before it is kept ---


@needs_onnx
def test_the_ensemble_is_one_graph_of_probabilities(tmp_path, caplog):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    cohort = Cohort(["resnet8", "resnet8@12"], 5, in_channels=1)
    cohort.image_shape, cohort.resize = (1, 8, 8), "crop"
    cohort(torch.randn(4, 1, 8, 8))
    (path,) = cohort.export(tmp_path, peer="ensemble")
    assert path.name == "ensemble.onnx"
    session = runtime.InferenceSession(path)
    assert [out.name for out in session.get_outputs()] == ["probabilities"]
    assert session.get_modelmeta().custom_metadata_map["resize"] == '"crop"'
    for n in (1, 3):
        x = torch.randn(n, 1, 8, 8)
        (found,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            expected = cohort.eval().ensemble(x)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "fastdml.cohort_export"]
    found = "ensemble.onnx run by ONNX Runtime at batches of 1, 2 and 5: outputs differ by at most "
    assert float(line.removeprefix(found)) <= 1e-4


@needs_onnx
def test_without_onnxruntime_nothing_is_claimed(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    cohort = Cohort([linear_net()])
    (path,) = cohort.export(tmp_path, torch.zeros(1, 3, 8, 8))
    assert path.is_file()
    assert "00-Sequential.onnx is not verified: onnxruntime is not installed" in caplog.text
    assert "pip install 'fastdml[onnx]'" in caplog.text


class Unlike(nn.Module):
    """Computes something else when it is traced than when it is called."""

    num_classes = 4

    def __init__(self, by: float) -> None:
        super().__init__()
        self.linear, self.by = nn.Linear(3, 4), by

    def forward(self, x):
        z = self.linear(x.mean((2, 3)))
        return z + self.by if torch.compiler.is_compiling() else z


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_what_computes_something_else_is_not_kept(tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    x = torch.zeros(1, 3, 8, 8)
    suffix = {"torch-export": "pt2", "onnx": "onnx"}[format]
    path = tmp_path / f"00-Unlike.{suffix}"
    path.write_text("an older one")
    with pytest.raises(InputError, match=r"differs from peer Unlike by 0.001 .* is not kept") as e:
        Cohort([Unlike(1e-3)]).export(tmp_path, x, format=format)
    assert "\n" not in str(e.value)
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_text() == "an older one"
    Cohort([Unlike(1e-6)]).export(tmp_path, x, format=format)
    assert path.stat().st_size > 20


class Counts(nn.Module):
    """Has a class more for batches of five."""

    num_classes = 4

    def forward(self, x):
        return x.mean((1, 2, 3))[:, None].expand(-1, 4 + (x.shape[0] == 5))


def test_a_program_of_one_batch_size_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"peer Counts cannot be exported|it is not kept"):
        Cohort([Counts()]).export(tmp_path, torch.zeros(1, 3, 8, 8), format="torch-export")
    assert not any(tmp_path.iterdir())


def test_outputs_that_are_large_or_not_finite(tmp_path, caplog):
    """Rounding grows with the outputs; NaN where the peer has NaN is no difference."""
    nets = [linear_net(), linear_net()]
    with torch.no_grad():
        nets[0][1].weight.mul_(1e6)
        nets[1][1].bias.fill_(torch.nan)
    paths = Cohort(nets, 4).export(tmp_path, torch.zeros(1, 3, 8, 8), format="torch-export")
    assert len(paths) == 2


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_half_precision_is_exported_as_float32(tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    cohort = Cohort([linear_net().bfloat16()])
    (path,) = cohort.export(tmp_path, torch.zeros(1, 3, 8, 8), format=format)
    assert path.is_file()
    assert cohort[0][1].weight.dtype == torch.bfloat16, "exporting must not change the peer"


def test_a_full_disk_leaves_nothing(trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device: make room"):
        trained.export(tmp_path, format="safetensors")
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_held_by_safetensors_is_named(tmp_path):
    class WithExtra(nn.Linear):
        def get_extra_state(self):
            return {"more": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(InputError, match="peer WithExtra is a dict, and the files"):
        Cohort([WithExtra(4, 3)]).export(tmp_path, format="safetensors")
    assert not any(tmp_path.iterdir())


def test_names_of_formats(trained, tmp_path):
    with pytest.raises(InputError, match="the format torch is now called torch-export"):
        trained.export(tmp_path, format="torch")
    with pytest.raises(InputError, match="unknown format 'safetensor'; did you mean safetensors"):
        trained.export(tmp_path, format="safetensor")
    with pytest.raises(InputError, match="there is no peer 'resnet8'; did you mean resnet8-"):
        trained.export(tmp_path, format="safetensors", peer="resnet8")


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_modules_of_other_inputs_are_exported_by_example(tmp_path, format):
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    words = nn.Sequential(nn.EmbeddingBag(9, 5), nn.Linear(5, 3))
    (path,) = Cohort([words]).export(tmp_path, torch.tensor([[1, 2, 3]]), format=format)
    assert path.is_file()
    if format == "torch-export":
        x = torch.tensor([[4, 5, 6], [0, 0, 8], [1, 2, 3]])
        torch.testing.assert_close(torch.export.load(path).module()(x), words.eval()(x))
    (path,) = Cohort([nn.Linear(4, 3)]).export(tmp_path, torch.zeros(1, 4), format=format)
    assert path.name.startswith("00-Linear")
