"""Model names: what is refused and with which advice, a user's own function, timm."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastdml.errors import InputError, MissingExtra
from fastdml.models import ReidHead, create_model, model_names

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)

OWN = """
from torch import nn

def full(num_classes, in_channels=3): return nn.Linear(in_channels, num_classes)
def classes_only(num_classes): return nn.Linear(3, num_classes)
def anything(in_channels, **kwargs): return nn.Linear(in_channels, kwargs["num_classes"])
def none(width): return nn.Linear(3, width)
def wrong(num_classes): return num_classes
def broken(num_classes): raise ZeroDivisionError
class Net(nn.Linear):
    def __init__(self, num_classes): super().__init__(3, num_classes)
def more(num_classes, width): return nn.Linear(width, num_classes)
def by_place(num_classes, /): return nn.Linear(3, num_classes)
constant = 3
built = nn.Linear(3, 3)
builtin = dict
"""

BUILDERS = """
import functools
from torch import nn

def library(width=3, **kwargs): return Passed(width, **kwargs)
class Passed(nn.Linear):
    def __init__(self, width=3, num_classes=1000): super().__init__(width, num_classes)
bound = functools.partial(library, width=3)
fixed = functools.partial(nn.Linear, 3, 5)
short = lambda num_classes: nn.Linear(3, num_classes)
stubborn = lambda: nn.Linear(3, 5)
class Maker:
    def __call__(self, *, num_classes): return nn.Linear(3, num_classes)
    def method(self, num_classes): return nn.Linear(3, num_classes)
made, method = Maker(), Maker().method
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    """The name of an importable module with models of a user's."""
    package = tmp_path / "fastdml_test_own"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(OWN)
    (package / "builders.py").write_text(BUILDERS)
    (package / "broken.py").write_text("import not_installed_anywhere")
    (package / "wrong.py").write_text("def net(:")
    (package / "failing.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    yield "fastdml_test_own.nets"
    for name in [m for m in sys.modules if m.startswith("fastdml_test_own")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("resnet33", ["resnet32", "resnet38"]),
        ("resnet7", ["resnet8"]),
        ("resnet18", ["resnet14", "resnet20", "timm:resnet18"]),
        ("resnet50", ["resnet44", "resnet56", "timm:resnet50"]),  # not silently the CIFAR form
        ("resnet152", ["resnet146", "resnet158", "timm:resnet152"]),
        ("wrn_28", ["wrn_28_10"]),
        ("wrn_27_10", ["wrn_22_10", "wrn_28_10"]),
        ("wrn_4_2", ["wrn_10_2"]),
        ("wrn-28-10", ["wrn_28_10"]),
        ("ResNet32", ["resnet32"]),
        ("mobilnet", ["mobilenet"]),
        ("inception", ["googlenet", "mobilenet"]),
        ("", ["resnet20", "googlenet"]),
        ("zzzz", ["resnet20", "googlenet", "package.module:function", "timm:NAME"]),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, advice):
    with pytest.raises(InputError) as caught:
        create_model(name, 100)
    message = str(caught.value)
    assert repr(name) in message
    assert "\n" not in message
    assert all(word in message for word in advice), message


@given(st.text(max_size=20).filter(lambda s: not s.startswith("timm:")))
def test_no_text_gives_anything_but_a_model_or_advice(name):
    with pytest.raises(InputError, match=r"no model|cannot read|no module|no function"):
        create_model(f"{name}?", 100)


@given(st.integers(1, 9999))
def test_advice_on_a_depth_can_be_followed(depth):
    if depth % 6 == 2 and depth >= 8 and depth not in (50, 152):
        return
    with pytest.raises(InputError) as caught:
        create_model(f"resnet{depth}", 10)
    nearest = str(caught.value).split("nearest: ")[1].split(" (")[0].split(" or ")
    depths = [int(word.removeprefix("resnet")) for word in nearest]
    assert all(d % 6 == 2 and d >= 8 and d not in (50, 152) for d in depths)
    assert min(abs(d - depth) for d in depths) <= 7
    assert depth not in depths


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "10", 2**63])
def test_class_and_channel_counts_are_checked(value):
    with pytest.raises(InputError, match=r"num_classes must be .* not "):
        create_model("resnet20", value)
    with pytest.raises(InputError, match=r"in_channels must be .* not "):
        create_model("resnet20", 10, in_channels=value)


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1", "mobilenet", "googlenet"])
@pytest.mark.parametrize("sizes", [(2**40, 3), (10, 2**40), (2**63 - 1, 1)])
def test_a_model_that_no_memory_holds(name, sizes):
    """As a damaged file may ask for."""
    with pytest.raises(InputError, match="cannot be built here") as raised:
        create_model(name, sizes[0], in_channels=sizes[1])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [5, None, ["resnet8"]])
def test_a_name_is_text(name):
    with pytest.raises(InputError, match="a model's name is text"):
        create_model(name, 10)


def test_listed_names_are_all_models():
    with torch.device("meta"):
        for name in model_names():
            assert isinstance(create_model(name, 10), nn.Module)


@pytest.mark.parametrize("function", ["full", "anything"])
def test_own_function_is_given_channels_where_it_takes_them(own, function):
    model = create_model(f"{own}:{function}", 5, in_channels=2)
    assert (model.in_features, model.out_features) == (2, 5)


@pytest.mark.parametrize("function", ["classes_only", "Net"])
def test_own_function_without_channels(own, function):
    model = create_model(f"{own}:{function}", 5, in_channels=2)
    assert (model.in_features, model.out_features) == (3, 5)


@pytest.mark.parametrize(
    "builder", ["library", "Passed", "bound", "fixed", "short", "stubborn", "made", "method"]
)
def test_builders_of_every_kind(own, builder):
    """Channels go to a signature that names them alone; who hears of no classes has its own."""
    model = create_model(f"{own.replace('nets', 'builders')}:{builder}", 5, in_channels=2)
    assert (model.in_features, model.out_features) == (3, 5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("clases_only", "nearest: classes_only"),
        ("constant", "constant is of type int: name a function"),
        ("built", "built is of type Linear: name a function"),
        ("none", "gets nothing alone .*: missing a required argument: 'width'"),
        ("by_place", "gets nothing alone .*: missing a required .*'num_classes'"),
        ("builtin", "returned dict, not a torch nn.Module"),
        ("more", "gets num_classes alone .*: missing a required argument: 'width'"),
        ("broken", r"broken\(num_classes=5\) fails: ZeroDivisionError \(nets.py, line \d+\)$"),
        ("wrong", "returned int, not a torch nn.Module"),
        ("", "write package.module:function"),
        ("a:b", "write package.module:function"),
    ],
)
def test_own_function_that_cannot_be_used(own, function, message):
    with pytest.raises(InputError, match=message):
        create_model(f"{own}:{function}", 5)


def test_missing_module_is_named_and_faults_of_its_own_are_shown(own):
    with pytest.raises(InputError, match="no module 'not_there_at_all'"):
        create_model("not_there_at_all.nets:net", 5)
    with pytest.raises(InputError, match="give the module's name, not_there:net"):
        create_model("not_there.py:net", 5)
    with pytest.raises(InputError, match=r"no module 'fastdml_test_own.nest'"):
        create_model("fastdml_test_own.nest:net", 5)
    for name, cause in (
        ("broken", r"ModuleNotFoundError: No module named 'not_installed_anywhere' \(broken.py, "),
        ("wrong", r"SyntaxError: .* \(wrong.py, line 1\)"),
        ("failing", r"ZeroDivisionError: division by zero \(failing.py, line 1\)$"),
    ):
        pattern = f"importing fastdml_test_own.{name} fails: {cause}"
        with pytest.raises(InputError, match=pattern) as caught:
            create_model(f"fastdml_test_own.{name}:net", 5)
        assert type(caught.value.__cause__).__name__ in cause


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("torchvision.models:resnet18", "torchvision"),
        ("torchvision.models:mobilenet_v2", "torchvision"),
        ("torchvision.models.resnet:ResNet", "torchvision"),
        ("timm.models.resnet:resnet18", "timm"),
        ("timm.models:mobilenetv3_small_050", "timm"),
    ],
)
def test_models_of_libraries_by_their_builders(name, module):
    """They pass **kwargs on to a model that knows no in_channels."""
    pytest.importorskip(module)
    if name.endswith("ResNet"):  # a class that needs more
        with pytest.raises(InputError, match="missing a required argument: 'block'"):
            create_model(name, 7)
        return
    with torch.device("meta"):
        model = create_model(name, 7).eval()
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_without_timm_the_message_is_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fastdml\[reid\]'"):
        create_model("timm:resnet18", 10)


@needs_timm
def test_timm_models():
    model = create_model("timm:resnet10t", 7, in_channels=1)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(InputError, match=r"timm has no model 'resnet10x'; nearest: .*resnet10t"):
        create_model("timm:resnet10x", 7)
    with pytest.raises(InputError, match="timm has no model"):  # would fetch over the network
        create_model("timm:hf-hub:someone/something", 7)


@needs_timm
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("resnet10x", "nearest: resnet10t, "),
        ("ViT-Tiny", "nearest: vit_tiny_patch16_224, "),
        ("efficientnet", "nearest: efficientnet_"),
        ("zzzz", "timm.list_models() lists them"),
        ("", "timm.list_models() lists them"),
        ("inception_v9_extra_large_of_mine", "timm.list_models() lists them"),
    ],
)
def test_names_of_timm_that_are_really_near(name, advice):
    with pytest.raises(InputError) as caught:
        create_model(f"timm:{name}", 7)
    message = str(caught.value)
    assert message.startswith(f"timm has no model {name!r}; {advice}")
    assert message.count(",") <= 2


@needs_timm
@pytest.mark.parametrize("name", ["resnet18.nope", "resnet18.", "vit_tiny_patch16_224.a.b"])
@pytest.mark.parametrize("head", [None, ReidHead()])
def test_unknown_tags_of_timm(name, head):
    architecture, _, tag = name.partition(".")
    with pytest.raises(InputError) as caught:
        create_model(f"timm:{name}", 7, head=head)
    message = str(caught.value)
    assert message.startswith(f"timm has no weights {tag!r} of {architecture}: there are a")
    assert "\n" not in message
    first = message.split("there are ")[1].split(",")[0]
    assert create_model(f"timm:{architecture}.{first}", 7) is not None


@needs_timm
@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s16_224", "levit_128s"],
)
def test_networks_of_timm_for_one_size_are_built_for_that_of_the_images(name):
    images = torch.zeros(2, 3, 32, 32)
    model = create_model(f"timm:{name}", 7, image_size=(32, 32))
    assert model.training
    assert model(images).shape == (2, 7)
    with pytest.raises((AssertionError, RuntimeError)):
        create_model(f"timm:{name}", 7)(images)


@needs_timm
@pytest.mark.parametrize(
    ("name", "head", "size", "own"),
    [
        ("efficientformer_l1", None, (32, 32), "224x224"),
        ("inception_v3", None, (32, 48), "299x299"),
        ("vit_tiny_patch16_224", None, (8, 8), "224x224"),
        ("maxvit_nano_rw_256", ReidHead(), (256, 128), "256x256"),
    ],
)
def test_networks_of_timm_that_cannot_take_the_images(name, head, size, own):
    with pytest.raises(InputError) as caught:
        create_model(f"timm:{name}", 7, head=head, image_size=size)
    message = str(caught.value)
    assert message.startswith(f"timm:{name} cannot take images of {size[0]}x{size[1]} (")
    assert f"made for {own}; choose" in message
    assert "\n" not in message


def test_few_names_are_all_listed_and_many_are_not(own):
    with pytest.raises(InputError, match=r"no function 'zzzz'; there is: "):
        create_model(f"{own}:zzzz", 7)
    with pytest.raises(InputError, match=r"'zzzzzz'; none of its \d+ names is like it$"):
        create_model("torch.nn:zzzzzz", 7)
