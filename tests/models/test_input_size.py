"""NAME@SIZE: peers that see the batch at a size of their own."""

from __future__ import annotations

import importlib.util
import io

import pytest
import torch
import torch.nn.functional as F

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer, make_step
from fastdml.engine.stackable import Unstackable
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.models import ReidHead, create_model

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime")),
    reason="onnxscript and onnxruntime are not installed",
)


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("side", [8, 12, 40])
def test_it_is_the_model_on_resized_images(side):
    images = torch.randn(2, 3, 16, 20)
    torch.manual_seed(0)
    plain = create_model("resnet8", 5).eval()
    torch.manual_seed(0)
    sized = create_model(f"resnet8@{side}", 5).eval()
    small = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    assert torch.equal(sized(images), plain(small))
    assert sized.num_classes == 5


def test_at_the_size_of_the_batch_nothing_changes():
    images = torch.randn(2, 3, 16, 16)
    model = create_model("resnet8@16", 5).eval()
    assert torch.equal(model(images), model.model(images))


def test_a_resized_image_is_that_of_torchvision():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    images, seen = torch.rand(2, 3, 30, 20), []
    model = create_model("resnet8@12", 5)
    model.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(images)
    torch.testing.assert_close(seen[0], v2.functional.resize(images, [12, 12], antialias=True))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet32@", r"'resnet32@': behind the @ stands one number, .*as in resnet32@96"),
        ("@96", r"'@96': write a name before the @, as in resnet32@96"),
        ("resnet32@0", "behind the @ stands one number, .*1 to 9999"),
        ("resnet32@-8", "behind the @ stands one number"),
        ("resnet32@12x", "behind the @ stands one number"),
        ("resnet32@96x96", "behind the @ stands one number"),
        ("resnet32@96@32", "behind the @ stands one number"),
        ("resnet32@10000", "behind the @ stands one number"),
        ("resnet32@٣", "behind the @ stands one number"),
        ("resnet33@96", "resnet33.*resnet32 or resnet38"),
        ("resnett32@96", "'resnett32'; nearest: resnet32"),
        ("no.such_module:net@96", "no module 'no'"),
    ],
)
def test_wrong_names_are_one_line(name, says):
    with pytest.raises(InputError, match=says) as caught:
        create_model(name, 5)
    assert "\n" not in str(caught.value)


def test_re_identification_has_its_own_size():
    with pytest.raises(InputError, match=r"height and width: give mobilenet$"):
        create_model("mobilenet@96", 5, head=ReidHead())


@needs_timm
def test_a_network_of_one_size_is_built_for_it():
    cohort = Cohort(["timm:test_vit@96", "resnet8"], 5, image_size=(32, 32))
    assert [z.shape for z in cohort(torch.randn(2, 3, 32, 32))] == [(2, 5)] * 2
    assert cohort[0].model.patch_embed.img_size == (96, 96)


@needs_timm
def test_a_size_that_a_network_cannot_take_is_refused_by_name():
    with pytest.raises(InputError, match=r"timm:vgg11 cannot take images of 8x8") as caught:
        create_model("timm:vgg11@8", 5, in_channels=3)
    assert "\n" not in str(caught.value)


def test_saved_and_loaded_by_its_name(tmp_path):
    cohort = Cohort(["resnet8@12", "resnet8@24"], 5).eval()
    cohort.save(tmp_path)
    loaded = Cohort.load(tmp_path)
    assert loaded.models == ["resnet8@12", "resnet8@24"]
    images = torch.randn(2, 3, 16, 16)
    for ours, theirs in zip(cohort(images), loaded(images), strict=True):
        assert torch.equal(ours, theirs)


@needs_onnx
def test_exported_it_resizes_by_itself(tmp_path):
    import onnxruntime

    cohort = Cohort(["resnet8@12", "resnet8@24"], 5).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = cohort(images)
    for path, logits in zip(cohort.export(tmp_path, images), expected, strict=True):
        session = onnxruntime.InferenceSession(path)
        (found,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits, rtol=0, atol=1e-4)


def test_a_program_of_torch_export_resizes_by_itself(tmp_path):
    cohort = Cohort(["resnet8@12"], 5).eval()
    images = torch.randn(3, 3, 16, 16)
    (path,) = cohort.export(tmp_path, images, format="torch-export")
    program = torch.export.load(io.BytesIO(path.read_bytes())).module()
    with torch.no_grad():
        torch.testing.assert_close(program(images), cohort(images)[0])


def steps(names, execution):
    """The weights after two steps."""
    cohort = Cohort(names, 5).double()
    optimizer = make_optimizer(cohort, "sgd", lr=0.1, momentum=0.9)
    step = make_step(cohort, MutualLoss(), optimizer, execution=execution)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        images = torch.randn(6, 3, 16, 16, generator=generator, dtype=torch.float64)
        step(images, torch.randint(5, (6,), generator=generator))
    return cohort.state_dict()


def test_stacked_peers_of_one_size_take_the_same_steps():
    names = ["resnet8@12", "resnet8@12"]
    eager, stacked = steps(names, "eager"), steps(names, "stacked")
    for key, value in eager.items():
        torch.testing.assert_close(stacked[key], value, rtol=1e-9, atol=1e-9)


def test_peers_of_two_sizes_are_not_stacked():
    with pytest.raises(Unstackable):
        steps(["resnet8@12", "resnet8@24"], "stacked")
