"""Fuzz targets: almost valid files of data sets. See `fuzzing`."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzz_registry import Code, rewrite, target
from fuzzing import Check
from mutations import TEXTS, junk, mutated, name, nearly_json
from PIL import Image

from fastdml.data import load_folder
from fastdml.data.files import archive, check_files, decode
from fastdml.data.sets import cifar, market1501

# ---- data


SMALL = replace(cifar.CIFAR100, train_records=3, test_records=2)


@target()
def cifar_binary(folder: Path) -> Check:
    random = Random(0)

    def records(number: int) -> bytes:
        return b"".join(
            bytes([random.randrange(20), random.randrange(100)]) + random.randbytes(3072)
            for _ in range(number)
        )

    where = folder / SMALL.binary_folder
    where.mkdir()
    (where / "test.bin").write_bytes(records(2))
    whole = records(3)

    def check(random: Random) -> None:
        wrong = mutated(random, whole)
        if random.random() < 0.5:
            wrong = (wrong + whole)[: len(whole)]
        (where / "train.bin").write_bytes(wrong)
        train, _ = cifar.load_source(SMALL, folder, False)
        assert train.images.shape == (3, 3, 32, 32)

    return check


@target()
def cifar_pickle(folder: Path) -> Check:
    where = folder / SMALL.python_folder
    where.mkdir()

    def content(number: int) -> dict[bytes, Any]:
        pixels = np.arange(number * 3072, dtype=np.uint32).astype(np.uint8).reshape(number, 3072)
        labels = [7] * number
        return {b"data": pixels, b"fine_labels": labels, b"coarse_labels": labels, b"filenames": []}

    (where / "test").write_bytes(pickle.dumps(content(2), protocol=2))
    wholes = [pickle.dumps(content(3), protocol=p) for p in (2, 3, 4, 5)]
    heads = [len(w) - 3 * 3072 for w in wholes]
    evil = folder.parent / "ran"

    def fitting(data: bytes) -> bytes:  # of a size that is looked into
        return data.ljust(3 * 3072 + 300, b".")

    def check(random: Random) -> None:
        kind = random.randrange(4)
        if kind == 0:
            wrong = mutated(random, random.choice(wholes))
        elif kind == 1:  # the structure, not the pixels
            at = random.randrange(len(wholes))
            cut = max(heads[at] - 120, 60)
            wrong = mutated(random, wholes[at][:cut]) + mutated(random, wholes[at][cut:])
        elif kind == 2:
            wrong = content(3)
            key = random.choice(list(wrong))
            wrong[key] = junk(random)
            wrong = pickle.dumps(wrong, protocol=random.choice((2, 4)))
        else:
            wrong = pickle.dumps([Code(evil), content(1)], protocol=2)
        (where / "train").write_bytes(fitting(wrong))
        train, _ = cifar.load_source(SMALL, folder, False)
        assert train.images.shape == (3, 3, 32, 32)

    return check


@target()
def archives(folder: Path) -> Check:
    """Names that climb out, links, devices, files where folders are due, damaged streams."""
    root, packed = folder / "root", folder / "set.tar.gz"
    parts = ("set", "set/", "/", "..", "../", "a", "b.bin", "./", "\\", "é", "x" * 120, "\n", " ")
    kinds = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
             tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE,
             tarfile.GNUTYPE_SPARSE, b"Z")  # fmt: skip

    def entry(random: Random) -> tuple[tarfile.TarInfo, bytes]:
        made = "".join(random.choice(parts) for _ in range(random.randint(1, 4)))
        info = tarfile.TarInfo(made if random.random() < 0.3 else f"set/{made}")
        info.type = random.choice(kinds) if random.random() < 0.3 else tarfile.REGTYPE
        info.linkname = random.choice(("set/a", "../outside", "/etc/passwd", "."))
        info.mode = random.choice((0o644, 0, 0o7777))
        content = random.randbytes(random.randrange(2000))
        info.size = len(content) if info.isreg() else 0
        return info, content

    def check(random: Random) -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        raw = io.BytesIO()
        form = random.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        with tarfile.open(fileobj=raw, mode="w", format=form) as tar:
            for _ in range(random.randint(0, 4)):
                info, content = entry(random)
                with contextlib.suppress(ValueError):  # a name that the format cannot hold
                    tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
        content = raw.getvalue()
        if random.random() < 0.4:
            content = mutated(random, content)
        squeezed = io.BytesIO()
        with gzip.GzipFile(fileobj=squeezed, mode="wb", mtime=0) as file:
            file.write(content)
        content = squeezed.getvalue()
        packed.write_bytes(mutated(random, content, 2) if random.random() < 0.2 else content)
        try:
            archive.extract(packed, root, "set")
        finally:
            assert {p.name for p in root.iterdir()} <= {"set"}
            for path in root.rglob("*"):
                assert not path.is_symlink()
                assert path.is_file() or path.is_dir()
                assert path.stat().st_nlink == 1 or path.is_dir()
            assert {p.name for p in folder.iterdir()} == {"root", "set.tar.gz"}
        assert (root / "set").is_dir()

    return check


def pictures() -> list[bytes]:
    found = []
    image = Image.fromarray(
        np.arange(20 * 12 * 3, dtype=np.uint32).astype(np.uint8).reshape(20, 12, 3)
    )
    for form, options in (
        ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("BMP", {}),
        ("WEBP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("ICO", {}),
        ("TGA", {}), ("PCX", {}), ("EPS", {}), ("JPEG2000", {}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        more = {"exif": exif} if form in ("JPEG", "PNG", "WEBP") else {}
        with contextlib.suppress(OSError):  # a codec that this Pillow has not
            image.save(buffer, form, **options, **more)
            found.append(buffer.getvalue())
    for mode in ("L", "CMYK", "1"):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, "TIFF")
        found.append(buffer.getvalue())
    return found


@target()
def images(folder: Path) -> Check:
    wholes = pictures()

    def check(random: Random) -> None:
        wrong = mutated(random, random.choice(wholes))
        if random.random() < 0.1:
            wrong = wrong[:200] + random.choice(wholes)
        path = rewrite(folder / "image.jpg", wrong)
        size = random.choice((None, (16, 8), (1, 1)))
        pixels = decode.decode(path, size)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert size is None or pixels.shape[:2] == size

    return check


NAME_PARTS = (
    "0001", "0002", "-1", "0000", "_", "c", "c1", "c2", "s1", "_000151", "_01", ".jpg", ".jpeg",
    ".png", ".JPG", ".", "99999999999999999999", "x", "٣", "²", "-", "+1", " ", "_1_2_", "._",
)  # fmt: skip


@target()
def reid_names(folder: Path) -> Check:
    """Names of files in the layouts that have an identity and a camera in them."""
    picture = pictures()[2]

    def check(random: Random) -> None:
        for old in folder.iterdir():
            shutil.rmtree(old)
        layout = random.choice(("market1501", "dukemtmc"))
        for split in ("bounding_box_train", "query", "bounding_box_test"):
            (folder / split).mkdir()
            for made in (
                *(name(random, NAME_PARTS) for _ in range(random.randrange(2))),
                *(f"000{k}_c{random.randint(1, 6)}s1_{k}.jpg" for k in (1, 2)),
            ):
                with contextlib.suppress(OSError):  # too long, or there already as a folder
                    if random.random() < 0.05:
                        (folder / split / made).mkdir()
                    else:
                        (folder / split / made).write_bytes(picture)
        bad_files = random.choice(("error", "skip"))
        with contextlib.redirect_stderr(io.StringIO()):
            found = market1501.ImageFolderReID(folder, layout, bad_files=bad_files, progress=False)
        assert len(found.train) >= 1
        assert 0 <= int(found.train.labels.max()) < found.train.num_classes

    return check


@target()
def reid_lists(folder: Path) -> Check:
    picture = pictures()[2]
    files = ("0000/0000_000_01_0303morning_0008_0.jpg", "0001/0001_000_02_x.jpg")
    for split in ("train", "test"):
        for file in files:
            (folder / split / file).parent.mkdir(parents=True)
            (folder / split / file).write_bytes(picture)
    lists = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
    whole = "".join(f"{file} {k}\n" for k, file in enumerate(files)).encode()
    words = (*files, " ", "\n", "\t", "0", "../", "/etc/passwd", "a/", "x" * 300, *TEXTS)

    def check(random: Random) -> None:
        for listed in lists:
            (folder / listed).write_bytes(whole)
        wrong = (
            mutated(random, whole)
            if random.random() < 0.5
            else whole + "".join(random.choice(words) for _ in range(6)).encode(errors="ignore")
        )
        (folder / random.choice(lists)).write_bytes(wrong)
        with contextlib.redirect_stderr(io.StringIO()):
            found = market1501.ImageFolderReID(folder, "msmt17", progress=False)
        assert len(found.train) >= 1

    return check


@target()
def own_images(folder: Path) -> Check:
    """Class folders with odd names and contents, beside lists of them."""
    picture = pictures()[2]
    words = (
        "train", "val", "test", "cat", "Cat", "dog", ".png", ".JPG", ".csv", "train.csv", "/", "._",
        "Thumbs.db", " ", "\n", "\\", "é", "e\u0301", "..", "a" * 300,
    )  # fmt: skip

    def check(random: Random) -> None:
        root = folder / "photos"
        shutil.rmtree(root, ignore_errors=True)
        for split in random.sample(("train", "val", "test", ""), random.randint(1, 3)):
            for of_class in random.sample(("cat", "dog", "cow"), random.randint(1, 3)):
                (root / split / of_class).mkdir(parents=True, exist_ok=True)
                (root / split / of_class / f"{random.randrange(3)}.png").write_bytes(picture)
        for _ in range(random.randrange(4)):
            place = random.choice([root, *root.rglob("*")])
            made = place / name(random, words).strip("/.")
            with contextlib.suppress(OSError, ValueError):
                kind = random.random()
                if kind < 0.3:
                    made.mkdir(parents=True)
                elif kind < 0.5:
                    made.symlink_to(random.choice(("..", ".", "nowhere", made.name)))
                else:
                    made.write_bytes(random.choice((picture, picture[:40], b"", b"path,label\n")))
        with contextlib.redirect_stderr(io.StringIO()):
            sets = load_folder(root, bad_files=random.choice(("error", "skip")), progress=False)
        assert sets.train.labels.unique().tolist() == [*range(sets.train.num_classes)]
        for part in sets:
            assert part is None or len(part.paths) == len(part.labels) > 0

    return check


@target()
def label_lists(folder: Path) -> Check:
    for k in range(3):
        (folder / f"{k}, é.png").write_bytes(pictures()[2])
    whole = 'path,label\n"0, é.png",cat\n"1, é.png",dog\n"2, é.png",cat\n'.encode()
    words = ("0, é.png", '"', ",", ";", "\t", "\n", "\r", "cat", "path", "label", "\\", "", *TEXTS)

    def check(random: Random) -> None:
        wrong = (
            mutated(random, whole)
            if random.random() < 0.5
            else whole + "".join(random.choice(words) for _ in range(8)).encode(errors="ignore")
        )
        file = rewrite(folder / "all.csv", wrong)
        with contextlib.redirect_stderr(io.StringIO()):
            train = load_folder(file, bad_files="skip", progress=False).train
        assert train.labels.unique().tolist() == [*range(train.num_classes)]
        assert len(train.paths) == len(set(train.paths)) == len(train.labels)

    return check


@target()
def scan_memory(folder: Path) -> Check:
    """What an earlier scan of the images left in the cache: a wrong one costs time alone."""
    paths = [str(rewrite(folder / f"{k}.png", pictures()[2])) for k in range(2)]
    cache = folder / "cache"
    check_files.scan(paths, cache=cache)
    (file,) = cache.iterdir()
    whole = json.loads(file.read_bytes())

    def check(random: Random) -> None:
        file.write_bytes(nearly_json(random, whole))
        found = check_files.scan(paths, cache=cache)
        assert found.files == 2
        assert all(isinstance(why, str) for why in found.bad.values())

    return check
