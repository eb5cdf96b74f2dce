"""CSV files of path,label as spreadsheets and scripts write them."""

from __future__ import annotations

import os

import pytest
from photos import write

from fastdml.data import load_folder
from fastdml.errors import InputError

pytest.importorskip("PIL.Image", reason="images are decoded by Pillow, which is absent")

IMAGES = ("1.png", "sub/2.png", "sub/3, at night.png", "4.png")
ROWS = 'path,label\n1.png,cat\nsub/2.png,dog\n"sub/3, at night.png",cat\n4.png,dog\n'


@pytest.fixture(autouse=True)
def _own_scans(scans):
    """The scans of these files are not kept in the user's own cache."""


@pytest.fixture
def listed(tmp_path):
    """Writes a list beside four images; returns its path."""
    for name in IMAGES:
        write(tmp_path / name)

    def make(text: str | bytes, name: str = "all.csv"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    return make


def read(file) -> list[tuple[str, str]]:
    """(path below the list, class) of each image."""
    files = load_folder(file).train
    folder = str(file.parent) + os.sep
    return [
        (path.removeprefix(folder), files.class_names[label])
        for path, label in zip(files.paths, files.labels.tolist(), strict=True)
    ]


EXPECTED = list(zip(IMAGES, ("cat", "dog", "cat", "dog"), strict=True))


@pytest.mark.parametrize(
    "text",
    [
        ROWS,
        ROWS.removeprefix("path,label\n"),
        ROWS.replace("\n", "\r\n"),
        "\ufeff" + ROWS,
        ROWS.replace("path,label", "Filename, Class"),
        ROWS.replace(",cat", ", cat ").replace(",dog", ", dog"),
        ROWS.replace("sub/", "sub\\"),
        ROWS.replace("sub/", ".\\sub\\"),
        ROWS + "\n\n,\n",
        ROWS.removesuffix("\n"),
        'path;label\n1.png;cat\nsub/2.png;dog\n"sub/3, at night.png";cat\n4.png;dog\n',
        '"sub/2.png"\tdog\n1.png\tcat\n"sub/3, at night.png"\tcat\n4.png\tdog\n',
        'id,label,path\n7,cat,1.png\n8,dog,sub/2.png\n9,cat,"sub/3, at night.png"\n2,dog,4.png,0',
    ],
)
def test_forms_of_a_list(listed, text):
    assert sorted(read(listed(text))) == sorted(EXPECTED)


def test_names_that_need_quotes(listed, tmp_path):
    """With line breaks, quotes, backslashes, spaces at the ends."""
    names = ["a\nb.png", 'say "hi".png', "back\\slash.png", " front.png"]
    for name in names:
        write(tmp_path / name)
    rows = "".join('"{}",{}\n'.format(n.replace('"', '""'), i % 2) for i, n in enumerate(names))
    assert [path for path, _ in read(listed("path,label\n" + rows))] == names


def test_paths_may_be_absolute_or_lead_elsewhere(listed, tmp_path):
    write(tmp_path / "elsewhere" / "5.png")
    file = tmp_path / "lists" / "all.csv"
    file.parent.mkdir()
    file.write_text(f"{tmp_path}/1.png,cat\n../elsewhere/5.png,dog\n")
    assert load_folder(file).train.paths == (f"{tmp_path}/1.png", f"{tmp_path}/elsewhere/5.png")


def test_numbers_are_names_in_the_order_of_numbers(listed):
    file = listed("1.png,10\nsub/2.png,9\n4.png,0\n")
    train = load_folder(file).train
    assert train.class_names == ("0", "9", "10")
    assert train.labels.tolist() == [2, 1, 0]
    assert load_folder(listed("1.png,10\n4.png,9\nsub/2.png,x\n")).train.class_names == (
        "10", "9", "x",
    )  # fmt: skip


def test_a_list_for_each_part(listed, tmp_path):
    listed("1.png,cat\nsub/2.png,dog\n", "train.csv")
    listed("path,label\n4.png,dog\n", "Val.CSV")
    train, validation, test = load_folder(tmp_path)
    assert (len(train), len(validation), test) == (2, 1, None)
    assert validation.labels.tolist() == [1]
    listed("4.png,cow\n", "test.csv")
    with pytest.raises(InputError, match=r"test\.csv: the class 'cow' has no training images in"):
        load_folder(tmp_path)
    listed("4.png,dog\n", "validation.csv")
    with pytest.raises(InputError, match=r"holds both Val.CSV and validation.csv, which mean"):
        load_folder(tmp_path)


def test_lists_of_images_in_folders_of_their_own(listed, tmp_path):
    """train.csv beside train/, which has no classes, as competitions give them."""
    for i in range(4):
        write(tmp_path / "train" / f"{i}.png")
    listed("".join(f"train/{i}.png,{'ab'[i % 2]}\n" for i in range(4)), "train.csv")
    assert len(load_folder(tmp_path).train) == 4


def test_lines_that_repeat(listed, caplog):
    assert read(listed(ROWS + "./1.png,cat\nsub/../4.png,dog\n")) == EXPECTED
    assert "all.csv: 2 lines left out: another says the same" in caplog.text
    with pytest.raises(InputError, match=r"'./1.png' is 'cat' in line 2 and 'dog' in line 6: k"):
        load_folder(listed(ROWS + "./1.png,dog\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no images: write two columns, path,label"),
        ("path,label\n", "names no images: write two columns, path,label"),
        ("1.png\n4.png\n", "line 1 has 1 column: write two columns"),
        ("1.png,cat,3\n", "line 1 has 3 columns: write two columns, path,label, or name them s"),
        ("name,kind\n1.png,cat\n", "line 1 names neither an image nor columns that are known, but "
         "'name' and 'kind': write two columns"),
        ("path,label\n1.png,cat\n4.png\n", "line 3 has 1 column, too few"),
        ("path,label\n1.png,\n", "line 2 has no label: give one"),
        ("path,label\n ,cat\n", "line 2 has no path: give one"),
        ("path,label\n1.png,cat\n4.png,cat\n", "all.csv: holds one class, 'cat'"),
        ('path,label\n"1.png,cat\n4.png,dog\n', "line 3 has 1 column, too few"),
        ("path,label\n1.png,cat\x1b[31m\n", "line 2.: the name of the class has characters"),
        (ROWS.encode("utf-16"), "is not written in UTF-8: save it as CSV UTF-8"),
        ("path,label\né.png,cat\n".encode("latin-1"), "is not written in UTF-8"),
        ("path,label\n1.png\0,cat\n", "is no text file: save it as CSV UTF-8"),
        ("path,label\n" + "x" * 200_000 + ",cat\n", "line 2: field larger than field limit"),
        ("x" * 200_000 + ",cat\n", "line 1: field larger than field limit"),
    ],
)  # fmt: skip
def test_lists_that_are_wrong(listed, text, message):
    with pytest.raises(InputError, match=message) as caught:
        load_folder(listed(text))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(listed):
    file = listed(ROWS + "5.png,cat\n../6.png,dog\n")
    why = r"2 of 6 files are bad: .*5\.png: the file is not there, but line 6 of .*all\.csv names"
    with pytest.raises(InputError, match=why):
        load_folder(file)
    assert len(load_folder(file, bad_files="skip").train) == 4
