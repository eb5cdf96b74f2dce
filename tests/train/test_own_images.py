"""Runs on folders of images: trained, scored, resumed, from the command and from Python."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import logged, same_weights

import fastdml
from fastdml import cli, train
from fastdml.cohort import Cohort
from fastdml.data import TorchLoader, load_folder
from fastdml.data.reid_split import MEAN, STD
from fastdml.errors import InputError
from fastdml.report.predictions import read_predictions
from fastdml.train import FolderConfig
from fastdml.train.config.sources import preset
from fastdml.train.tasks import own_images
from fastdml.train.tasks.task import task_of

Image = pytest.importorskip("PIL.Image", reason="images are decoded by Pillow, which is absent")
pytestmark = pytest.mark.usefixtures("_no_pictures")

CLASSES = ("cat", "dog", "red panda")
SPLITS = {"train": 8, "val": 4, "test": 4}  # images of each class


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """Images of several sizes; a class has a colour of its own. Not to be changed."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in SPLITS.items():
        for k, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 100, (*random.integers(10, 20, 2), 3))
                pixels[..., k] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def photos(whole, tmp_path):
    """A copy to change, of the splits that are named."""

    def make(*splits: str, name: str = "photos") -> Path:
        for split in splits:
            shutil.copytree(whole / split, tmp_path / name / split)
        return tmp_path / name

    return make


SETTINGS = {
    "peers": ("resnet8", "resnet8"),
    "batch_size": 8,
    "epochs": 1,
    "size": 12,
    "pad": 1,
    "lr": 0.05,
    "amp": "off",
    "device": "cpu",
    "execution": "eager",
    "threads": 1,
    "tensorboard": False,
}


@pytest.fixture
def on(tmp_path):
    """Trains on a folder of images in the test's own folder."""

    def run(root, name: str = "run", **changes):
        settings = {**SETTINGS, "folder": str(tmp_path / name), **changes}
        return train.folder(root=root, **settings)

    return run


def refused(on, root, match: str, **changes) -> None:
    with pytest.raises(InputError, match=match) as caught:
        on(root, name="refused", **changes)
    assert "\n" not in str(caught.value)
    assert not Path(root).parent.joinpath("refused").exists()


# --- trained and scored ---


def test_the_command_trains_and_evaluates(photos, tmp_path, capfd):
    root = photos("train", "val", "test")
    options = (
        f"--root {root} --peers resnet8 resnet8 --batch-size 8 --epochs 3 --size 12 --pad 1 "
        f"--execution eager --threads 1 --no-tensorboard --amp off --folder {tmp_path / 'run'}"
    )
    assert cli.main(["train", "folder", *options.split()]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["chosen_on"], summary["scored_on"]) == ("validation", "test")
    assert summary["mutual"]["best_scores"]["rows"] == 12
    assert max(summary["mutual"]["best_scores"]["top1"]) > 0.5  # 1 in 3 by chance
    record = Cohort.load(tmp_path / "run").record()
    assert record["classes"] == list(CLASSES)
    assert (record["image_shape"], record["resize"]) == ([3, 12, 12], "crop")
    assert 60 < min(record["mean"]) < max(record["mean"]) < 140  # the set's own
    capfd.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "run"), "--json", "--weights", "last"]) == 0
    scores = json.loads(capfd.readouterr().out)["scores"]
    assert scores == summary["mutual"]["scores"]
    found = read_predictions(tmp_path / "run")
    assert len(found.files) == len(found.pictured) == 12
    for name, place in zip(found.files, found.pictured, strict=True):
        assert (Path(root) / "test" / name).is_file()
        assert Path(name).parent.name == CLASSES[found.label[place]]


def test_without_test_images_the_validation_images_score(photos, on, capfd):
    root = photos("train", "val")
    result = on(root)
    assert (result.chosen_on, result.scored_on) == ("validation", "validation")
    assert cli.main(["evaluate", str(result.folder), "--json", "--weights", "last"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["scores"]["nll"] == result.scores.nll
    assert "no test images: the scores are of those for validation" in err
    assert cli.main(["evaluate", str(result.folder)]) == 0
    assert "12 validation images" in capfd.readouterr().out


def test_what_predicts_sees_what_was_evaluated(photos, on):
    """To the last bit, from the record that is saved with the weights."""
    root = photos("train", "test")
    predictor = fastdml.load(on(root).folder)
    files = load_folder(root, size=12)
    mean, std = files.train.statistics()
    files = files.each(lambda images: dataclasses.replace(images, mean=mean, std=std))
    ((images, _),) = TorchLoader(files.test, 12, train=False, workers=0).epoch(0)
    for image, path in zip(images, files.test.paths, strict=True):
        assert torch.equal(predictor.preprocess(path), image)


@pytest.mark.parametrize("listed", [False, True])
def test_validation_images_from_one_folder_or_list(photos, on, listed, capfd):
    root = photos("train") / "train"
    if listed:
        rows = [f'"{p.relative_to(root)}",{p.parent.name}\n' for p in sorted(root.glob("*/*"))]
        (root / "all.csv").write_text("path,label\n" + "".join(rows))
        root /= "all.csv"
    result = on(root, validation=0.25)
    assert result.chosen_on == result.scored_on == "validation"
    assert result.scores.rows == 6
    assert cli.main(["evaluate", str(result.folder), "--json", "--weights", "last"]) == 0
    assert json.loads(capfd.readouterr().out)["scores"]["nll"] == result.scores.nll  # the same six


def test_streamed_or_in_memory_the_weights_are_the_same(photos, on):
    root = photos("train", "test")
    results = [on(root, name=loader, loader=loader) for loader in ("resident", "torch")]
    cohorts = [Cohort.load(result.folder) for result in results]
    assert same_weights(*cohorts)
    assert results[0].scores == results[1].scores


@pytest.mark.parametrize(
    ("normalise", "expected"), [("imagenet", (MEAN, STD)), ("auto", None), ("set", None)]
)
def test_normalisation(photos, on, normalise, expected):
    root = photos("train", "test")
    record = Cohort.load(on(root, normalise=normalise).folder).record()
    if expected is None:
        expected = load_folder(root, size=12).train.statistics()
    assert (record["mean"], record["std"]) == tuple(map(list, expected))


def test_pretrained_peers_get_what_they_were_trained_with(photos, monkeypatch):
    sets, task = load_folder(photos("train", "test"), size=12), task_of(FolderConfig())
    config = FolderConfig(pretrained=True, peers=("timm:a", "timm:a"))
    usual = (0.5,) * 3, (0.25,) * 3
    monkeypatch.setattr(
        "fastdml.train.tasks.classification.pretrained_normalisation", lambda *_: usual
    )
    for part in task.normalised(sets, config):
        if part is not None:
            assert (part.mean, part.std) == ((127.5,) * 3, (63.75,) * 3)
    asked = task.normalised(sets, config.replace(normalise="imagenet"))
    assert (asked.train.mean, asked.test.std) == (MEAN, STD)


def test_images_of_one_small_size_stay_as_they_are(photos, on):
    root = photos("train", "test")
    for i, path in enumerate(sorted(root.glob("*/*/*"))):
        Image.new("L", (14, 10), i).save(path)  # not square, and grey
    record = Cohort.load(on(root, size=0).folder).record()
    assert record["image_shape"] == [3, 10, 14]


def test_usual_sizes():
    """The built-in networks are made for small images, timm's for ImageNet's."""
    assert own_images._usual_size(("resnet32", "mobilenet@32")) == 64
    assert own_images._usual_size(("resnet32", "timm:resnet18")) == 224
    assert own_images._usual_size(("torchvision.models:resnet18",)) == 224


def test_the_learning_rate_suits_few_images():
    assert FolderConfig().lr == 0.1  # of the class alone, which is the paper's
    assert preset("folder").lr == 0.01


# --- refused ---


def test_nothing_to_score_on(photos, on):
    refused(on, photos("train"), "holds training images alone: set validation to a share of them")
    refused(on, photos("test", name="one") / "test", "holds training images alone")


def test_two_sets_for_validation(photos, on):
    why = "holds validation images, and validation 0.1 would take others from the training images"
    refused(on, photos("train", "val"), why, validation=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 32}, "batch size 32 is larger than the 24 training images"),
        ({"loader": "dali"}, "DALI would make other pictures of these files than Pillow does"),
        ({"size": 2000}, "size must be within 0..1024, not 2000"),
        ({"normalise": "own"}, "normalise must be one of auto, set, imagenet, not 'own'"),
        ({"bad_files": "keep"}, "bad_files must be one of error, skip"),
        (
            {"download": True},
            "images of your own cannot be downloaded: name their folder with root",
        ),
        ({"pad": 12}, "pad 12: reflection needs 0 to 11 for 12x12 images"),
    ],
)
def test_settings_that_do_not_fit(photos, on, changes, message):
    if changes.get("loader") == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    refused(on, photos("train", "test"), message, **changes)


def test_a_file_that_breaks_later_is_named(photos, on):
    """After the check of all files, by something else that writes there."""
    root = photos("train", "test")
    on(root)
    broken = root / "train" / "dog" / "3.png"
    status = broken.stat()
    broken.write_bytes(b"x" * status.st_size)
    os.utime(broken, ns=(status.st_atime_ns, status.st_mtime_ns))  # so that the check passes it
    refused(on, root, r"dog/3\.png: not an image that can be decoded")


# --- evaluated on other images, and resumed ---


def test_evaluation_of_other_classes_is_refused(photos, on, capfd):
    result, other = on(photos("train", "test")), photos("train", "test", name="other")
    for split in ("train", "test"):
        (other / split / "dog").rename(other / split / "wolf")
    assert cli.main(["evaluate", str(result.folder), "--data", str(other)]) == 2
    err = capfd.readouterr().err
    assert "does not hold the classes that the peers of" in err
    assert "not 'dog' but 'wolf'" in err


def test_evaluation_without_the_images_names_the_option(photos, on, capfd):
    result = on(photos("train", "test"), epochs=1)
    shutil.move(photos(), photos(name="moved"))
    assert cli.main(["evaluate", str(result.folder)]) == 2
    assert (
        f"photos: not found from here: name the place of the images of {result.folder} with"
        in capfd.readouterr().err
    )
    assert cli.main(["evaluate", str(result.folder), "--data", str(photos(name="moved"))]) == 0


def test_resumed_runs_end_as_they_would_have(photos, on, tmp_path):
    """With files that have moved meanwhile, too."""
    root = photos("train", "test")
    through = on(root, epochs=2, schedule="step")
    on(root, name="half", schedule="step")
    root = root.rename(tmp_path / "moved")
    resumed = on(root, name="half", epochs=2, schedule="step", resume=True)
    assert same_weights(Cohort.load(through.folder), Cohort.load(resumed.folder))
    assert [r["loss"] for r in logged(through.folder) if r["kind"] == "epoch"] == [
        r["loss"] for r in logged(resumed.folder) if r["kind"] == "epoch"
    ]


def rename_class(root):
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "wolf")
    return r"the classes of the images was .* \(class 1: 'dog', now 'red panda'\); restore the data"


def add_class(root):
    for split in ("train", "test"):
        shutil.copytree(root / split / "dog", root / split / "zebra")
    return r"\(class 3: None, now 'zebra'\); restore the data, or start a new run"


def change_images(root):
    for path in (root / "train" / "dog").iterdir():
        Image.new("RGB", (16, 16)).save(path)
    return "the mean of the images was .* and is now .*; restore the data, or start a new run"


@pytest.mark.parametrize("change", [rename_class, add_class, change_images])
def test_resuming_with_other_files_is_refused(photos, on, change):
    root = photos("train", "test")
    folder = on(root, schedule="step").folder
    before = torch.load(folder / "last.ckpt", weights_only=True)["position"]
    message = change(root)
    with pytest.raises(InputError, match=message) as caught:
        on(root, epochs=2, schedule="step", resume=True)
    assert "\n" not in str(caught.value)
    assert torch.load(folder / "last.ckpt", weights_only=True)["position"] == before


def add_image(root):
    shutil.copy(root / "train" / "cat" / "0.png", root / "train" / "cat" / "00.png")
    return "the training data are others than before"


def rename_image(root):
    (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / "z.png")
    return "the training data are others than before"


def move_image(root):
    (root / "train" / "cat" / "0.png").rename(root / "train" / "dog" / "z.png")
    return "the training data are others than before"


def replace_image(root):
    Image.new("RGB", (16, 16)).save(root / "train" / "red panda" / "1.png")
    return "the (training|validation) data are others than before"


def remove_test_image(root):
    (root / "test" / "cat" / "0.png").unlink()
    return "the test data are others than before"


@pytest.mark.parametrize(
    "change", [add_image, rename_image, move_image, replace_image, remove_test_image]
)
def test_resuming_with_other_files_of_the_same_classes_is_refused(photos, on, change):
    """Or an image that was validated on is trained on from then on."""
    root, settings = photos("train", "test"), {"validation": 0.2, "normalise": "imagenet"}
    on(root, schedule="step", **settings)
    message = f"cannot resume .*: {change(root)} .*: restore them, or start a new run"
    with pytest.raises(InputError, match=message) as caught:
        on(root, epochs=2, schedule="step", resume=True, **settings)
    assert "\n" not in str(caught.value)


def test_validation_images_of_a_changed_folder_are_not_scored(photos, on, capfd):
    """Some of them were trained on."""
    root = photos("train")
    folder = on(root, validation=0.2).folder
    assert cli.main(["evaluate", str(folder)]) == 0
    add_image(root)
    assert cli.main(["evaluate", str(folder)]) == 2
    assert "the validation data are others than before" in capfd.readouterr().err
