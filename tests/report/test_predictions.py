"""predictions.npz: what is written is read again, and damage is one line."""

from __future__ import annotations

import dataclasses
import io
import os

import numpy as np
import pytest
from report_runs import predictions

from fastdml.errors import InputError
from fastdml.report.predictions import PREDICTIONS, read_predictions, write_predictions


def same(a, b) -> bool:
    return all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"K": 1, "C": 1, "pictures": 0},
        {"classes": []},
        {"weights": "best", "peers": ["<b>", "ßع\u202e"], "classes": ["a\n", "", "日本"]},
    ],
)
def test_read_as_written(tmp_path, options):
    found = predictions(**options)
    write_predictions(tmp_path, found)
    assert same(read_predictions(tmp_path), found)
    assert [p.name for p in tmp_path.iterdir()] == [PREDICTIONS]


def test_names_of_files(tmp_path):
    files = ("a b/é.png", "\udcff.png", "日本/2.png", "<i>.png")
    found = dataclasses.replace(predictions(), files=files)
    path = write_predictions(tmp_path, found)
    assert read_predictions(tmp_path).files == files
    with np.load(path) as file:
        values = {name: file[name] for name in file.files if name != "files"}
    np.savez(path, **values)  # as an earlier version wrote it
    assert read_predictions(tmp_path).files == ()
    np.savez(path, **values, files=np.array(["only one"]))
    with pytest.raises(InputError, match="another number of files"):
        read_predictions(tmp_path)


def test_none_where_there_is_none(tmp_path):
    assert read_predictions(tmp_path) is None


def test_ten_thousand_images_are_small(tmp_path):
    path = write_predictions(tmp_path, predictions(K=2, N=10_000, C=100))
    assert path.stat().st_size < 400_000


def changed(**values) -> bytes:
    found = predictions()
    arrays = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    arrays = {"version": 1, **arrays, **values}
    file = io.BytesIO()
    np.savez(file, **{name: v for name, v in arrays.items() if v is not None})
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not hold"),
        (b"PK\x03\x04", "does not hold"),
        (changed()[:400], "does not hold"),
        (changed(version=2), "later version of fastdml .2.: update"),
        (changed(label=None), "does not hold .*label"),
        (changed(label=np.full(40, 3, np.int32)), "label is out of range"),
        (changed(top=np.full((3, 40), -2, np.int32)), "top is out of range"),
        (changed(top=np.zeros((2, 40), np.int32)), "top is of another shape"),
        (changed(confidence=np.zeros((3, 40), np.int32)), "confidence is not of numbers"),
        (changed(pictures=np.zeros((4, 8, 8, 2), np.uint8)), "pictures that are none"),
        (changed(pictures=np.zeros((4, 8), np.uint8)), "another shape"),
        (changed(classes=["a"]), "another number of classes"),
        (changed(weights="first"), "neither the last nor the best"),
    ],
)
def test_damage_is_one_line(tmp_path, content, message):
    (tmp_path / PREDICTIONS).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_predictions(tmp_path)
    assert PREDICTIONS in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_of_any_byte_is_one_line(tmp_path):
    """zlib, zipfile and numpy each have errors of their own."""
    whole = write_predictions(tmp_path, predictions(N=5)).read_bytes()
    errors = []
    for at in range(0, len(whole), 9):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        (tmp_path / PREDICTIONS).write_bytes(damaged)
        try:
            read_predictions(tmp_path)
        except InputError as error:
            errors.append(error)
    assert {"BadZipFile", "error"} <= {type(error.__context__).__name__ for error in errors}
    assert not any("\n" in str(error) for error in errors)


def test_objects_are_not_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made"),))

    (tmp_path / PREDICTIONS).write_bytes(changed(label=np.array([Evil()], dtype=object)))
    with pytest.raises(InputError, match="does not hold"):
        read_predictions(tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / PREDICTIONS)
    with pytest.raises(InputError, match="is not a file"):
        read_predictions(tmp_path)
