"""Data sets by name: one file adds one, and asking for names and facts costs no import of torch."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from fastdml import data
from fastdml.cli import main
from fastdml.data import registry
from fastdml.errors import InputError

BUILT_IN = (
    "digits", "cifar10", "cifar100", "folder", "veri", "dukemtmc", "market1501", "msmt17",
    "reid_folder",
)  # fmt: skip
ADDED = """
from fastdml.data.registry import register_dataset


@register_dataset(
    "stripes",
    task="classification",
    image_shape=(1, 8, 8),
    classes=("across", "along"),
    mean=(0.5,),
    std=(0.5,),
    purpose="a test",
    files="none",
)
def load_stripes():
    import torch

    from fastdml.data.image_set import ImageSet

    across = (torch.arange(8) % 2).to(torch.uint8).expand(8, 8)
    images = torch.stack([across, across.T] * 8).unsqueeze(1)
    whole = ImageSet(images, torch.arange(16) % 2, 2, ("across", "along"), (0.5,), (0.5,))
    return whole, whole
"""


@pytest.fixture
def added(tmp_path, monkeypatch):
    """A file in `sets/`, and nothing else."""
    (tmp_path / "stripes.py").write_text(ADDED)
    sets = importlib.import_module("fastdml.data.sets")
    monkeypatch.setattr(sets, "__path__", [*sets.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_KNOWN", dict(registry._KNOWN))
    registry._import_sets.cache_clear()
    yield
    registry._import_sets.cache_clear()
    sys.modules.pop("fastdml.data.sets.stripes", None)


def test_a_data_set_is_one_file(added):
    assert set(data.dataset_names()) == {"stripes", *BUILT_IN}
    assert data.dataset_names("classification")[0] == "stripes"  # no files, and fewest classes
    train, _ = data.load("stripes")
    assert len(train) == 16
    assert data.record("stripes") == {
        "image_shape": [1, 8, 8],
        "mean": [0.5],
        "std": [0.5],
        "classes": ["across", "along"],
        "resize": None,
        "stored": None,
    }
    with pytest.raises(InputError, match="did you mean stripes"):
        data.load("stripe")


def test_the_command_trains_on_a_data_set_of_one_file(added, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    options = "--epochs 1 --batch-size 8 --pad 1 --peers resnet8 resnet8 --folder run"
    assert main(["train", "stripes", *options.split()]) == 0
    assert main(["evaluate", "run"]) == 0
    assert "resnet8-2" in capfd.readouterr().out
    assert main(["data"]) == 0
    assert "stripes" in capfd.readouterr().out
    assert main(["--help"]) == 0
    *names, last = ["stripes", *BUILT_IN]
    listed = f"train peers together on {', '.join(names)} or {last}\n"
    assert listed in capfd.readouterr().out
    assert main(["train", "stripe"]) == 2
    assert "did you mean stripes" in capfd.readouterr().err


def test_a_name_is_registered_once(added):
    data.dataset_names()
    again = data.register_dataset(
        "stripes", task="reid", image_shape=(3, 1, 1), mean=(0,), std=(1,), purpose=""
    )
    with pytest.raises(ValueError, match=r"'stripes' is registered by fastdml.data.sets.stripes"):
        again(print)


def test_names_come_by_task():
    assert data.dataset_names() == BUILT_IN
    assert data.dataset_names("classification")[:3] == ("digits", "cifar10", "cifar100")
    assert data.dataset_names("reid") == (
        "veri", "dukemtmc", "market1501", "msmt17", "reid_folder",
    )  # fmt: skip
    assert data.dataset_names("own_images") == ("folder",)
    assert data.dataset("market1501").load is data.Market1501
    with pytest.raises(InputError, match="unknown data set 'market1501': give one of digits"):
        data.load("market1501")


@pytest.mark.parametrize("known", data.catalogue(), ids=lambda known: known.name)
def test_the_facts_of_a_data_set(known):
    assert known.purpose
    if known.image_shape is None:  # only the files tell
        assert (known.input, known.classes) == ("any", ())
        assert (known.num_classes == 0) == (known.name in ("folder", "reid_folder"))
        return
    channels, height, width = known.image_shape
    assert known.input == f"{channels}x{height}x{width}"
    assert len(known.mean) == len(known.std) == channels
    assert min(known.std) > 0
    assert known.num_classes == len(known.classes) or not known.classes


def test_the_facts_of_digits_are_those_of_its_images():
    known, (train, _) = data.dataset("digits"), data.load("digits")
    assert (*train.images.shape[1:],) == known.image_shape
    assert (train.class_names, train.mean, train.std) == (known.classes, known.mean, known.std)
    pixels = train.images.float()
    assert torch.allclose(pixels.mean(), torch.tensor(known.mean[0]), atol=1e-3)


def test_names_and_facts_need_neither_torch_nor_numpy():
    code = (
        "import sys, fastdml.data as data\n"
        "data.catalogue(), data.record('cifar100')\n"
        "sys.exit(', '.join({'torch', 'numpy', 'PIL'} & {*sys.modules}) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
