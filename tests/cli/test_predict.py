"""`fastdml predict`: what it says of the test images' files is what the run's evaluation found."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fastdml import cli, data
from fastdml.cohort import Cohort
from fastdml.models import ReidHead

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Path:
    """A run on digits in float32, in which nothing but the batch size may differ from predict."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    options = "--peers resnet8 wrn_10_1 --epochs 1 --subset 320 --amp off --no-tensorboard --folder"
    assert cli.main(["train", "digits", *options.split(), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """The files of all test images, 0 to 16 as scikit-learn has them; in folders, oddly named."""
    folder = tmp_path_factory.mktemp("images")
    test = data.load("digits")[1]
    for k, pixels in enumerate(test.pixels[..., 0].numpy()):
        place = folder / f"{k // 100}" / f"{k:03d} é.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(place)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    (folder / "0" / "again").symlink_to(folder)
    return folder


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_folder_gives_the_probabilities_of_the_run(exact, images, capfd):
    from fastdml.report.predictions import read_predictions

    assert cli.main(["predict", str(exact), str(images)]) == 0
    found = rows(capfd.readouterr().out)
    assert len(found) == 355
    known = read_predictions(exact)
    names = ["resnet8", "wrn_10_1", "ensemble"]
    assert list(found[0]) == [
        "path", *(f"{n}_{what}" for n in names for what in ("class", "probability")), "error"
    ]  # fmt: skip
    assert [Path(row["path"]).name[:3] for row in found] == [f"{k:03d}" for k in range(355)]
    for place, name in enumerate(names):
        expected = torch.from_numpy(known.confidence[place])
        values = torch.tensor([float(row[f"{name}_probability"]) for row in found])
        torch.testing.assert_close(values, expected, rtol=2e-5, atol=1e-6)
        assert [row[f"{name}_class"] for row in found] == [str(c) for c in known.top[place]]


def test_a_terminal_sees_how_far_a_file_has_come(exact, images, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["predict", str(exact), str(images), "--to", str(tmp_path / "x.csv")]) == 0
    assert "predicting: " in capfd.readouterr().err
    assert cli.main(["predict", str(exact), str(images)]) == 0  # the lines themselves are seen
    assert "predicting" not in capfd.readouterr().err


def test_one_image_is_a_table(exact, images, capfd):
    path = images / "0" / "000 é.png"
    assert cli.main(["predict", str(exact), str(path), "--top", "3"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "resnet8", "%", "wrn_10_1", "%", "ensemble", "%"]
    assert len(lines) >= 5
    shares = [[float(cell) for cell in line.split()[1:]] for line in lines[2:5]]
    for one, two, both in shares:
        assert both == pytest.approx((one + two) / 2, abs=0.011)
    assert [s[2] for s in shares] == sorted((s[2] for s in shares), reverse=True)
    assert cli.main(["predict", str(exact), str(path), "--json", "--peer", "1"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["image"] == str(path)
    assert list(told["predictions"]) == ["wrn_10_1"]
    assert len(told["predictions"]["wrn_10_1"]) == 5
    assert {p["class"] for p in told["predictions"]["wrn_10_1"]} <= {str(c) for c in range(10)}


def test_images_that_cannot_be_read_are_told_and_the_others_done(exact, images, tmp_path, capfd):
    whole = (images / "0" / "000 é.png").read_bytes()
    folder = tmp_path / "in"
    folder.mkdir()
    names = [
        "a, b.png",
        'new\nline "q".png',
        "old\rMac.png",
        "é☃.png",
        os.fsdecode(b"byte\xff.png"),
        "z=1.png",
    ]
    for name in names:
        (folder / name).write_bytes(whole)
    (folder / "empty.png").touch()
    (folder / "half.png").write_bytes(whole[:50])
    to = tmp_path / "out.csv"
    argv = ["predict", str(exact), str(folder), "absent.png", "--to", str(to), "--top", "2"]
    assert cli.main(argv) == 2
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 5
    assert lines[:2] == [
        f"{folder / 'empty.png'}: the file is empty",
        f"{folder / 'half.png'}: cannot be decoded (image file is truncated)",
    ]
    assert lines[2:] == [
        "absent.png: the file is not there",
        f"9 images: {to}",
        "fastdml: error: 3 of 9 images could not be read; the others are done",
    ]
    found = rows(to.read_bytes().decode(errors="surrogateescape"))
    assert sorted(Path(r["path"]).name for r in found if not r["error"]) == sorted(names)
    assert len({tuple(v for k, v in r.items() if k != "path") for r in found}) == 4
    good = next(r for r in found if not r["error"])
    assert float(good["ensemble_probability_1"]) >= float(good["ensemble_probability_2"]) > 0


def test_json_lines_of_many(exact, images, capfd):
    argv = ["predict", str(exact), str(images / "3"), "nothing.png", "--json", "--top", "1"]
    assert cli.main(argv) == 2
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert len(found) == 56
    assert found[-1] == {"image": "nothing.png", "error": "the file is not there"}
    assert all(len(f["predictions"]["ensemble"]) == 1 for f in found[:-1])


def test_pictures_of_any_kind_and_units_that_differ(exact, tmp_path, capfd):
    grey = data.load("digits")[1].images[0, 0].numpy()
    argv = ["predict", str(exact)]
    plain = Image.fromarray(grey)
    for name, image in {
        "a-grey.png": plain,
        "b-rgb.png": plain.convert("RGB"),
        "c-rgba.png": plain.convert("RGBA"),
        "d-palette.gif": plain.convert("P"),
        "e-16.png": Image.fromarray(grey.astype("uint16") << 8),
        "f-float.tif": Image.fromarray(grey.astype("float32")),
    }.items():
        image.save(tmp_path / name)
    assert cli.main([*argv, str(tmp_path)]) == 2
    out, err = capfd.readouterr()
    assert "32-bit numbers" in err
    found = rows(out)
    assert [bool(r["error"]) for r in found] == [False] * 5 + [True]
    assert len({r["ensemble_probability"] for r in found[:5]}) == 1
    Image.fromarray(grey * 15).resize((40, 30)).save(tmp_path / "g.jpg")
    assert cli.main([*argv, str(tmp_path / "g.jpg")]) == 0
    assert "in the same units? (digits: 0 to 16)" in capfd.readouterr().err


def test_best_peer_and_other_peers(exact, images, refused, capfd):
    path = str(images / "0" / "000 é.png")
    scores = json.loads((exact / "summary.json").read_text())["mutual"]["scores"]["top1"]
    assert scores[0] != scores[1]
    best = ["resnet8", "wrn_10_1"][scores[1] > scores[0]]
    assert cli.main(["predict", str(exact), path, "--peer", "best"]) == 0
    out, err = capfd.readouterr()
    assert out.split()[1] == best
    assert err == f"best peer: {best}, top-1 {100 * max(scores):.2f} %\n"
    refused(["predict", str(exact), path, "--peer", "resnet9"], "did you mean resnet8")
    refused(["predict", str(exact), path, "--peer", "7"], "numbers run from 0 to 1, for resnet8, ")
    refused(["predict", str(exact), path, "--top", "0"], "--top 0: give 1 or more")
    refused(["predict", str(exact), path, "--to", "o.png"], r"--to o.png: give .* in \.csv$")
    refused(["predict", str(exact), path, "--device", "mps"], "no run on device 'mps'")
    refused(["predict", str(exact), str(exact / "best")], "holds no images")
    refused(["predict", str(exact), "absent.png"], "absent.png: the file is not there$")
    refused(["predict", "nowhere", path], "there is no nowhere: give the folder of a run")
    refused(["predict", str(images), path], "neither the folder of a run, nor of a cohort")
    refused(["predict", str(exact / "best"), path, "--weights", "last"], "leave weights out")
    refused(["predict", str(exact / "best"), path, "--peer", "best"], "no recorded scores .* name")


def test_what_has_not_ended_is_asked_from_its_checkpoint(exact, images, tmp_path, capfd):
    folder = tmp_path / "unfinished"
    shutil.copytree(exact, folder)
    (folder / "cohort.json").unlink()
    (folder / "summary.json").unlink()
    told = []
    for run in (exact, folder):
        argv = ["predict", str(run), str(images / "0" / "000 é.png"), "--peer", "best"]
        assert cli.main(argv) == 0
        told.append(capfd.readouterr())
    assert told[0].out == told[1].out
    assert "the run has not ended" in told[1].err


def test_reid_runs_and_runs_of_no_images_are_refused(tmp_path, refused):
    cohort = Cohort(["resnet8"], 4, head=ReidHead())
    cohort.image_shape, cohort.mean, cohort.std = (3, 16, 8), (0.0,) * 3, (1.0,) * 3
    cohort.save(tmp_path / "reid")
    refused(["predict", "reid", "x.png"], "features, not classes; fastdml export .*ranked-lists N")
    Cohort(["resnet8"], 4).save(tmp_path / "table")
    refused(
        ["predict", "table", "x.png"],
        "the image_shape and mean and std of the images .* call the predictor on batches",
    )


def test_images_of_ones_own_and_weights_that_validation_chose(tmp_path, capfd):
    """Photos of many sizes: predicted as the run's evaluation of the best weights found them."""
    import numpy as np

    from fastdml.report.predictions import read_predictions

    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3), ("test", 4)):
        for k, name in enumerate(["a", "b c"]):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 120, (*random.integers(30, 60, 2), 3))
                pixels[..., k] += 130
                image = Image.fromarray(pixels.astype(np.uint8))
                image.getexif()[274] = 1 + number
                image.save(folder / f"{number}.jpg", exif=image.getexif())
    run, photos = tmp_path / "run", tmp_path / "photos"
    options = "--peers resnet8 resnet8@24 --size 32 --epochs 2 --batch-size 6 --amp off"
    argv = ["train", "folder", "--root", str(photos), *options.split(), "--no-tensorboard"]
    assert cli.main([*argv, "--folder", str(run)]) == 0
    capfd.readouterr()
    known = read_predictions(run)
    assert known.weights == "best"
    assert cli.main(["predict", str(run), str(photos / "test")]) == 0
    found = rows(capfd.readouterr().out)
    for place, name in enumerate(["resnet8", "resnet8@24", "ensemble"]):
        expected = torch.from_numpy(known.confidence[place])
        values = torch.tensor([float(row[f"{name}_probability"]) for row in found])
        torch.testing.assert_close(values, expected, rtol=2e-5, atol=1e-6)
        assert [row[f"{name}_class"] for row in found] == [
            known.classes[c] for c in known.top[place]
        ]
    summary = json.loads((run / "summary.json").read_text())
    scores = summary["mutual"]["validation"]["best_scores"]["top1"]
    argv = ["predict", str(run), str(photos / "test" / "a" / "0.jpg"), "--peer", "best"]
    assert cli.main(argv) == 0
    out, err = capfd.readouterr()
    best = ["resnet8", "resnet8@24"][scores.index(max(scores))]
    assert out.split()[1] == best
    assert f"best peer: {best}, top-1 {100 * max(scores):.2f} %" in err


def test_images_are_not_read_far_ahead(exact, images):
    """Whatever the number of images: memory holds two batches of them."""
    from fastdml.cli.predict import Outputs
    from fastdml.predictor import load

    outputs = Outputs(load(exact), ensemble=True)
    assert outputs.at_once == 64
    taken = 0

    def paths():
        nonlocal taken
        for path in sorted(map(str, images.rglob("*é.png"))):
            taken += 1
            yield path

    for done, found in enumerate(outputs.read(paths(), 1)):
        assert not found.error
        assert taken <= done + 4 * outputs.at_once
    assert done + 1 == taken >= 355
