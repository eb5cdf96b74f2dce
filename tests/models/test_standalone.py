"""Networks as one file of Python: it makes the same network and needs no fastdml."""

from __future__ import annotations

import ast
import sys
from types import ModuleType

import pytest
import torch

from fastdml.models import ReidHead, create_model, register_model
from fastdml.models.standalone import Spec, module_source

SIZE = (32, 32)


def imported(text: str) -> set[str]:
    """The packages that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def built(text: str, monkeypatch) -> torch.nn.Module:
    module = ModuleType("standalone_model")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(text, module.__name__, "exec"), module.__dict__)
    return module.build()


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet8", None),
        ("resnet8", ReidHead()),
        ("resnet8", ReidHead("gem", neck=False, last_stride=2)),
        ("wrn_10_2", None),
        ("wrn_10_2", ReidHead()),
        ("mobilenet", None),
        ("mobilenet", ReidHead()),
        ("googlenet", None),
        ("googlenet", ReidHead()),
        ("resnet8@16", None),
        ("mobilenet@40", None),
        ("torchvision.models:squeezenet1_1", None),
        ("timm:test_resnet", None),
        ("timm:test_resnet", ReidHead()),
        ("timm:test_vit", None),
        ("timm:test_vit@48", None),
        ("timm:test_vit", ReidHead()),
    ],
)
def test_the_file_makes_the_same_network(name, head, monkeypatch):
    if ":" in name:
        pytest.importorskip(name.split(":")[0].split(".")[0], reason="it is not installed")
    model = create_model(name, 7, in_channels=3, head=head, image_size=SIZE).eval()
    text = module_source(Spec(name, 7, 3, head, SIZE), model)
    assert "fastdml" not in imported(text)
    made = built(text, monkeypatch)
    made.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(made.eval()(x), model(x))
        if head is not None:
            assert torch.equal(made.embed(x), model.embed(x))


def test_every_registered_model_has_one(monkeypatch):
    from fastdml.models import model_names

    for name in model_names():
        for head in (None, ReidHead()):
            with torch.device("meta"):
                model = create_model(name, 5, in_channels=1, head=head)
                text = module_source(Spec(name, 5, 1, head, None), model)
                made = built(text, monkeypatch)
            shapes = {key: value.shape for key, value in model.state_dict().items()}
            assert {key: value.shape for key, value in made.state_dict().items()} == shapes


def test_a_users_registered_model_is_imported_from_where_it_is(monkeypatch):
    from fastdml.models import registry

    monkeypatch.setattr(registry, "_KNOWN", dict(registry._KNOWN))

    @register_model("usersnet{width}")
    def usersnet(width: int, num_classes: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(width, num_classes))

    model = create_model("usersnet12", 4)
    text = module_source(Spec("usersnet12", 4, 3, None, None), model)
    assert "return usersnet(width=12, num_classes=4)" in text
    assert f"from {usersnet.__module__} import usersnet" in text
