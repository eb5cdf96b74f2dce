"""Class folders as people have them: what is read, in which order, and what is said of the rest."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from photos import write, write_folders

from fastdml.data import ImageFiles, load_folder
from fastdml.data.files import check_files
from fastdml.data.files.decode import decode
from fastdml.data.sets.folder import warn_of_copies
from fastdml.errors import InputError

pytest.importorskip("PIL.Image", reason="images are decoded by Pillow, which is absent")


@pytest.fixture(autouse=True)
def _own_scans(scans):
    """The scans of these files are not kept in the user's own cache."""


@pytest.fixture
def root(tmp_path):
    return write_folders(tmp_path / "photos")


def refused(root, match: str, **options) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load_folder(root, **options)
    assert "\n" not in str(caught.value)


def names(files: ImageFiles) -> list[str]:
    return ["/".join(path.split(os.sep)[-2:]) for path in files.paths]


# --- what is read ---


def test_train_and_test(root):
    train, validation, test = load_folder(root)
    assert validation is None
    assert train.class_names == test.class_names == ("cat", "dog")
    assert (len(train), len(test)) == (8, 8)
    assert names(train)[:2] == ["cat/train0.png", "cat/train1.png"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert train.size == (8, 8)  # their own


@pytest.mark.parametrize(
    ("given", "meant"),
    [("val", 1), ("valid", 1), ("validation", 1), ("Val", 1), ("testing", 2), ("Test", 2)],
)
def test_other_names_of_the_parts(tmp_path, given, meant):
    splits = load_folder(write_folders(tmp_path, ("training", given)))
    assert [part is not None for part in splits] == [True, meant == 1, meant == 2]


def test_one_folder_of_class_folders(tmp_path):
    train, validation, test = load_folder(write_folders(tmp_path, ("",)))
    assert (len(train), validation, test) == (8, None, None)


def test_a_class_may_be_called_train(tmp_path):
    """As one of CIFAR-100 is."""
    root = write_folders(tmp_path, ("",), ("bus", "car", "train"))
    assert load_folder(root).train.class_names == ("bus", "car", "train")


def test_images_and_labels_are_those_of_torchvision(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
    root = write_folders(tmp_path, ("train",), ("b", "a10", "a2", "B c", "é"))
    for name in ("deep/z.png", "deep/er/1.png", "deep.png", "UPPER.JPG", "a b\nc.png"):
        write(root / "train" / "b" / name)
    ours, theirs = load_folder(root).train, datasets.ImageFolder(str(root / "train"))
    assert list(ours.class_names) == theirs.classes
    assert list(zip(ours.paths, ours.labels.tolist(), strict=True)) == theirs.imgs


def test_every_form_of_image(tmp_path):
    root = write_folders(tmp_path, ("train",))
    endings = {"jpg": "L", "png": "RGBA", "PNG": "P", "tif": "CMYK", "webp": "RGB", "gif": "P",
               "bmp": "1", "ppm": "RGB"}  # fmt: skip
    for i, (ending, mode) in enumerate(endings.items()):
        write(root / "train" / "cat" / f"{i}.{ending}", mode=mode)
    write(root / "train" / "cat" / "deep.png", mode="I;16")
    train = load_folder(root, size=8).train
    assert len(train) == 8 + len(endings) + 1
    assert train.decode().images.shape == (17, 3, 8, 8)


@pytest.mark.parametrize("name", ["spa ce", "ünï", "日本", "with,comma", "quote'\"", "-dash", "#1"])
def test_names_of_people(tmp_path, name):
    root = write_folders(tmp_path / name, ("train",), ("a", name))
    write(root / "train" / name / f"{name}\n.png")
    train = load_folder(root).train
    assert name in train.class_names
    assert len(train) == 9
    assert train.decode().images.shape == (9, 3, 8, 8)


def test_names_that_are_no_text(root):
    """Bytes that are no UTF-8: of files they are taken as they are; of classes they cannot be
    shown."""
    folder = os.fsencode(root / "train" / "cat")
    os.rename(os.path.join(folder, b"train0.png"), os.path.join(folder, b"caf\xe9.png"))
    assert len(load_folder(root).train.decode()) == 8
    os.rename(folder, os.path.join(os.path.dirname(folder), b"caf\xe9"))
    refused(root, r"'.*caf\\udce9': the name of the class has characters that cannot be shown")
    os.rename(os.path.join(os.path.dirname(folder), b"caf\xe9"), folder + b"\n2")
    refused(root, r"cat\\n2': the name of the class has characters that cannot be shown: rename it")


def test_composed_and_decomposed_characters_are_the_same(tmp_path):
    """macOS writes an é as two characters."""
    write_folders(tmp_path, ("train",), ("caf\u00e9", "dog"))
    write_folders(tmp_path, ("test",), ("cafe\u0301", "dog"))
    train, _, test = load_folder(tmp_path)
    assert train.class_names == test.class_names == ("caf\u00e9", "dog")
    write_folders(tmp_path, ("train",), ("cafe\u0301",))
    refused(tmp_path, "its name looks the same as that of another class folder")


def test_what_systems_leave_is_not_looked_at(root, caplog):
    for folder in (root, root / "train", root / "train" / "cat"):
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._train0.png", ".hidden.png"):
            (folder / name).write_bytes(b"x")
        for name in ("__MACOSX", ".git", ".ipynb_checkpoints"):
            write(folder / name / "x.png")
    splits = load_folder(root)
    assert (len(splits.train), splits.train.num_classes) == (8, 2)
    assert not caplog.records


def test_what_is_left_out_is_told(root, caplog):
    (root / "train" / "cat" / "notes.txt").write_text("")
    (root / "train" / "dog" / "more.heic").write_text("")
    write(root / "train" / "beside.png")
    write(root / "extra" / "x.png")
    (root / "train.csv").write_text("path,label\n")
    splits = load_folder(root)
    assert len(splits.train) == 8
    told = [record.getMessage() for record in caplog.records]
    assert any("1 image beside the class folders, without a class" in line for line in told)
    assert any("left out: 2 files not called .bmp .gif" in line for line in told)
    assert any("read are test, train, and not extra, train.csv" in line for line in told)


def test_links_are_followed(root, tmp_path, caplog):
    real = write_folders(tmp_path / "elsewhere", ("",), ("cow",)) / "cow"
    (root / "train" / "cow").symlink_to(real, target_is_directory=True)
    (root / "train" / "cat" / "link.png").symlink_to(real / "0.png")
    train = load_folder(root).train
    assert train.class_names == ("cat", "cow", "dog")
    assert len(train) == 8 + 4 + 1


def test_links_in_a_circle(root, caplog):
    (root / "train" / "cat" / "again").symlink_to(root / "train" / "cat", target_is_directory=True)
    (root / "train" / "dog" / "above").symlink_to(root, target_is_directory=True)
    write(root / "train" / "cat" / "deep" / "x.png")
    (root / "train" / "cat" / "deep" / "up").symlink_to("..", target_is_directory=True)
    (root / "train" / "cat" / "self.png").symlink_to("self.png")
    refused(root, r"self\.png: cannot be read \(Too many levels of symbolic links\)")
    load_folder(root, bad_files="skip")
    assert "cat/again: links to a folder that it is in, and is left out" in caplog.text


# --- what is refused ---


def test_no_such_folder(tmp_path, root):
    refused(tmp_path / "nowhere", "nowhere: no such folder: set root to the one that holds your")
    (tmp_path / "file.zip").write_bytes(b"")
    refused(tmp_path / "file.zip", r"file\.zip: is neither a folder nor a \.csv file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty: holds neither folders of images nor images")


def test_images_without_class_folders(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.jpg")
    refused(tmp_path, r"holds 3 images, such as '0.jpg', and no class folders, so that their c")
    flat = write_folders(tmp_path / "flat", ("train",))
    write(flat / "test" / "1.jpg")
    refused(flat, "flat/test: holds 1 image, such as '1.jpg', and no class folders")
    for split in ("train", "test"):
        write(tmp_path / "both" / split / "1.jpg")
    refused(tmp_path / "both", "both/train: holds 1 image")


def test_a_level_too_deep(tmp_path):
    write_folders(tmp_path / "a" / "photos")
    refused(tmp_path / "a", r"holds one folder, 'photos', with the folders test, train in it: set")
    write_folders(tmp_path / "b" / "photos", ("",))
    refused(tmp_path / "b", r"one folder, 'photos', with the folders cat, dog in it: set root to")
    write_folders(tmp_path / "c", ("train/images", "test/images"))
    refused(tmp_path / "c", "train: holds one class, 'images': and in it are the folders cat, dog:")


def test_the_wrong_way_round(tmp_path):
    write_folders(tmp_path, ("cat", "dog"), ("train", "test"))
    refused(tmp_path, r"each class folder, such as 'cat', holds train and others: make them train")


def test_one_class(tmp_path):
    refused(write_folders(tmp_path, classes=("cat",)), "holds one class, 'cat': two or more are n")


def test_a_class_without_images(root):
    (root / "train" / "cow").mkdir()
    refused(root, r"train/cow: holds no images \(\.bmp .*\): remove the folder")


def test_classes_that_do_not_fit(root, caplog):
    write(root / "train" / "cow" / "1.png")
    load_folder(root)
    assert "test: holds no images of 1 of 3 classes: cow" in caplog.text
    write(root / "test" / "Cow" / "1.png")
    refused(root, r"test: the class 'Cow' has no training images in .*train; did you mean cow\?")
    (root / "test" / "Cow").rename(root / "test" / "zebra")
    refused(root, r"the class 'zebra' has no training images .*; the classes are cat, cow, dog")


def test_parts_that_are_missing_or_twice(root):
    (root / "val").mkdir()
    (root / "validation").mkdir()
    refused(root, "holds both val and validation, which mean the same: keep one")
    (root / "val").rmdir()
    (root / "validation").rmdir()
    (root / "train").rename(root.parent / "train")
    refused(root, "photos: holds test and no train folder: put the training images there")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read(root):
    (root / "train" / "cat").chmod(0)
    refused(root, r"train/cat: cannot be read \(Permission denied\)")
    (root / "train" / "cat").chmod(0o755)


def damage(root) -> list[str]:
    """Files of other kinds that are no images; their names in order."""
    cat = root / "train" / "cat"
    whole = write(cat / "whole.jpg", (64, 64)).read_bytes()
    (cat / "whole.jpg").unlink()
    (cat / "bad1.jpg").write_bytes(whole[: len(whole) // 2])
    (cat / "bad2.jpg").write_bytes(b"")
    (cat / "bad3.png").write_bytes(b"<html>not found</html>")
    (cat / "bad4.png").symlink_to("nowhere.png")
    os.mkfifo(cat / "bad5.png")
    return [str(cat / f"bad{i}") for i in range(1, 6)]


def test_bad_files_are_named(root, caplog):
    bad = damage(root)
    refused(root, "5 of 21 files are bad: .*; .*; .*; .*; .*: restore or remove them, or set bad")
    with pytest.raises(InputError) as caught:
        load_folder(root)
    assert all(path in str(caught.value) for path in bad)
    for why in ("truncated", "empty", "not an image", "not there", "not a file"):
        assert why in str(caught.value)
    splits = load_folder(root, bad_files="skip")
    assert len(splits.train) == 8
    assert "left out: 5 of 21 files are bad" in caplog.text
    refused(root, "bad files 'ignore': give 'error' or 'skip'", bad_files="ignore")


def test_many_bad_files_make_a_short_line(root):
    for i in range(40):
        (root / "train" / "cat" / f"bad{i:02}.png").write_bytes(b"")
    refused(root, r"40 of 56 files are bad: .*bad04\.png: the file is empty; and 35 more: restore")


def test_nothing_is_left(root):
    for file in (root / "train" / "cat").iterdir():
        file.write_bytes(b"")
    refused(root, "train: no image of class 'cat' is left that can be decoded", bad_files="skip")
    for file in (root / "test").rglob("*.png"):
        file.write_bytes(b"")
    for i in range(4):
        write(root / "train" / "cat" / f"new{i}.png")
    refused(root, "test: no image that can be decoded is left", bad_files="skip")


# --- sizes, large files, many files ---


def test_sizes(root, tmp_path):
    assert load_folder(root, size=5).train.size == (5, 5)
    assert load_folder(root, size=(5, 7)).test.size == (5, 7)
    write(root / "train" / "cat" / "large.png", (9, 8))
    assert load_folder(root).train.size == (224, 224)
    assert load_folder(root, otherwise=64).train.size == (64, 64)
    for size in (0, -3, (5, 0)):
        with pytest.raises(InputError, match=r"size .*: give the pixels of a side, 1 or more"):
            load_folder(root, size=size)


def test_an_image_of_fifty_megabytes(root):
    file = write(root / "train" / "cat" / "large.bmp", (4096, 4096))
    assert file.stat().st_size > 50e6
    train = load_folder(root, size=16).train
    assert len(train) == 9
    assert decode(str(file), (16, 16), "crop").shape == (16, 16, 3)


def test_an_image_of_too_many_pixels(root):
    from PIL import Image

    Image.new("1", (9_000, 9_000)).save(root / "train" / "cat" / "huge.png")
    refused(root, r"huge\.png: claims 9000x9000 pixels, more than 67,108,864: restore or remove")


def test_a_second_look_decodes_nothing(root, monkeypatch):
    load_folder(root, size=8)
    monkeypatch.setattr(check_files, "reason", lambda path: pytest.fail("decoded again"))
    load_folder(root, size=8)


def test_naming_the_set_needs_no_torch():
    code = (
        "import sys, fastdml.data.sets.folder\n"
        "sys.exit(', '.join({'torch', 'numpy', 'PIL'} & {*sys.modules}) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_hundred_thousand_files(tmp_path):
    """Listed, checked by other processes, and not decoded again; a bad one among them is named."""
    content = write(tmp_path / "one.png").read_bytes()
    for c in range(20):
        folder = tmp_path / "photos" / "train" / f"class{c:02}"
        folder.mkdir(parents=True)
        for i in range(5_000):
            (folder / f"{i:05}.png").write_bytes(content)
    bad = tmp_path / "photos" / "train" / "class07" / "01234.png"
    bad.write_bytes(content[: len(content) // 2])
    refused(tmp_path / "photos", "1 of 100000 files are bad: .*class07/01234.png: ")
    bad.write_bytes(content)
    train = load_folder(tmp_path / "photos").train
    assert train.labels.bincount().tolist() == [5_000] * 20


# --- the same image twice ---


def copy(source, to) -> None:
    to.write_bytes(source.read_bytes())


def test_images_that_are_there_twice_are_told(root, caplog):
    warn_of_copies(load_folder(root))
    assert not caplog.records
    copy(root / "train" / "cat" / "train0.png", root / "train" / "cat" / "copy.png")
    warn_of_copies(load_folder(root))  # harmless: it counts twice
    assert not caplog.records
    warn_of_copies(load_folder(root), divided=True)
    assert "1 of 9 training images repeat another, byte for byte, so that some may" in caplog.text
    caplog.clear()
    copy(root / "train" / "cat" / "train1.png", root / "test" / "cat" / "copy.png")
    copy(root / "train" / "dog" / "train1.png", root / "train" / "cat" / "odd.png")
    warn_of_copies(load_folder(root))
    flattering, contradictory = [record.getMessage() for record in caplog.records]
    assert "1 of 9 test images are training images too, byte for byte" in flattering
    assert "test/cat/copy.png for one" in flattering
    assert "the same image is there under two classes, byte for byte, 1 times: " in contradictory


def test_labels_are_int64(root):
    assert load_folder(root).train.labels.dtype == torch.int64
