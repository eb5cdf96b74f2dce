from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdml.data import ImageFolderReID, Market1501, make_loader
from fastdml.data.files import check_files as scanning
from fastdml.data.files.check_files import scan
from fastdml.data.files.decode import BadImage, decode
from fastdml.data.loaders.make import has_dali
from fastdml.data.sets import stand_in as standing
from fastdml.data.sets.stand_in import FOLDER, StandIn, build_standin
from fastdml.errors import InputError

Image = pytest.importorskip("PIL.Image", reason="decoding needs Pillow")
pytestmark = pytest.mark.filterwarnings("ignore:.*figures from a subset")
JPEGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "jpeg"
# what Pillow cannot decode, and with DALI also three whose headers it refuses
BAD = {"monkey12.jpg": "not an image", "truncated_jpeg.jpg": "truncated"}
BAD_FOR_DALI = ("jpeg_ff00_header.jpg", "junk_jpeg_header.jpg", "truncated_app14.jpg")


@pytest.fixture
def jpegs():
    if not JPEGS.is_dir():
        pytest.skip("the folder of odd JPEGs (shared/data/jpeg) is absent")
    return sorted(JPEGS.glob("*/*.jpg"))


def market_of(files, folder: Path) -> Path:
    """A folder in Market-1501's layout: every file once in training, one of them in each other."""
    for split in ("bounding_box_train", "query", "bounding_box_test"):
        (folder / split).mkdir(parents=True)
    for number, file in enumerate(files):
        name = f"{number // 4 + 1:04d}_c{number % 4 + 1}s1_{number:06d}_00.jpg"  # in this order
        shutil.copy(file, folder / "bounding_box_train" / name)
    shutil.copy(files[0], folder / "query" / "0001_c1s1_000000_00.jpg")
    shutil.copy(files[0], folder / "bounding_box_test" / "0001_c2s1_000000_00.jpg")
    return folder


def market_names(folder: Path) -> list[Path]:
    return sorted((folder / "bounding_box_train").iterdir())


def test_the_standin_is_read_by_the_rules(market, standin):
    assert (len(market.train), len(market.query), len(market.gallery)) == (128, 30, 61)
    assert market.num_ids == market.train.num_classes == 8
    assert market.train.labels.unique().tolist() == list(range(8))
    pairs = set(zip(market.train.ids.tolist(), market.train.labels.tolist(), strict=True))
    assert sorted(pairs) == list(zip(sorted(set(market.train.ids.tolist())), range(8), strict=True))
    assert not set(market.train.ids.tolist()) & set(market.query.ids.tolist())
    assert (market.gallery.ids == 0).sum() == 11, "distractors stay"
    assert -1 not in market.gallery.ids, "junk is dropped"
    assert any("/-1_" in str(p) for p in (standin / FOLDER / "bounding_box_test").iterdir())
    for split in (market.train, market.query, market.gallery):
        assert list(split.paths) == sorted(split.paths)
        for path, identity, camera in zip(split.paths, split.ids, split.cameras, strict=True):
            assert Path(path).name.startswith((f"{identity:04d}_c{camera}s",))
    query = set(zip(market.query.ids.tolist(), market.query.cameras.tolist(), strict=True))
    drawn = market.multi_query
    assert len(drawn) == 50
    assert set(zip(drawn.ids.tolist(), drawn.cameras.tolist(), strict=True)) <= query


def test_odd_files_decode_upright(market):
    """Greyscale, CMYK, progressive and turned files come out as pictures of the usual size."""
    modes = {Image.open(path).mode for path in market.train.paths}
    assert modes == {"RGB", "L", "CMYK"}
    turned = [path for path in market.train.paths if Image.open(path).size == (128, 64)]
    assert turned
    assert all(decode(path).shape == (128, 64, 3) for path in turned)
    images = market.train.decode()
    assert images.images.shape == (128, 3, 128, 64)
    assert images.pixels.is_contiguous()
    assert torch.equal(images.labels, market.train.labels)


def test_with_or_without_the_official_folder(standin, scans):
    outside, inside = Market1501(standin), Market1501(standin / FOLDER)
    assert outside.train.paths == inside.train.paths


def test_labels_do_not_depend_on_directory_order(standin, scans, monkeypatch):
    expected = Market1501(standin).train
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: sorted(listed(self), reverse=True))
    found = Market1501(standin).train
    assert found.paths == expected.paths
    assert torch.equal(found.labels, expected.labels)


def test_the_name_of_a_file_counts_not_those_of_its_folders(market, standin_copy):
    found = Market1501(standin_copy.rename(standin_copy.with_name("0099_c5s1_000001_00")))
    for split in ("train", "query", "gallery"):
        assert torch.equal(getattr(found, split).ids, getattr(market, split).ids)
        assert torch.equal(getattr(found, split).cameras, getattr(market, split).cameras)


def test_a_subset_is_warned_of(standin, scans):
    with pytest.warns(UserWarning, match=r"128/30/61/8 training.*has 12,936/3,368/15,913/751"):
        Market1501(standin)


def test_distractors(standin_copy):
    with pytest.raises(InputError, match="images: no such folder"):
        Market1501(standin_copy, distractors=True)
    (standin_copy / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 128)).save(standin_copy / "images" / f"{number:08d}.jpg")
    market = Market1501(standin_copy, distractors=True)
    assert len(market.gallery) == 64
    assert (market.gallery.ids == 0).sum() == 14


@pytest.mark.parametrize("split", ["bounding_box_train", "query", "bounding_box_test"])
def test_a_missing_split(standin_copy, split):
    shutil.rmtree(standin_copy / split)
    with pytest.raises(InputError, match=f"{split} missing from Market-1501") as error:
        Market1501(standin_copy.parent)
    assert "\n" not in str(error.value)
    (standin_copy / split).mkdir()
    with pytest.raises(InputError, match=rf"{split}: holds no images \(.jpg .*\)$"):
        Market1501(standin_copy.parent)
    for name in ("b.gif", "a.tiff", "._c.jpg", ".DS_Store"):
        (standin_copy / split / name).touch()
    with pytest.raises(
        InputError, match=rf"{split}: holds .*, but 2 other files, such as 'a.tiff'"
    ):
        Market1501(standin_copy.parent)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(InputError, match="holds no Market-1501"):
        Market1501(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        Market1501(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name",
    [
        f"{2**63}_c1s1_000000_00.jpg",
        f"-{2**63}_c1s1_000000_00.jpg",
        f"{10**200}_c1.jpg",
        f"0001_c{2**63}s1_000000_00.jpg",
    ],
)
@pytest.mark.filterwarnings("ignore:.*have no image in the gallery")
def test_numbers_beyond_64_bits(standin_copy, name):
    stray = standin_copy / "query" / name
    shutil.copy(next((standin_copy / "query").iterdir()), stray)
    with pytest.raises(InputError, match=r"is beyond \d+, what 64 bits hold: rename it") as error:
        Market1501(standin_copy.parent)
    assert str(stray) in str(error.value)
    largest = f"{2**63 - 1}_c{2**63 - 1}.jpg"
    stray.rename(stray.with_name(largest))
    assert 2**63 - 1 in Market1501(standin_copy.parent).query.ids.tolist()


def test_a_name_of_another_form(standin_copy):
    stray = standin_copy / "query" / "c1_0001.jpg"
    shutil.copy(next((standin_copy / "query").iterdir()), stray)
    with pytest.raises(
        InputError, match=r"c1_0001\.jpg: its name is not of the form 0002_c1\.\.\., which"
    ) as error:
        Market1501(standin_copy)
    assert "\\" not in str(error.value)


def test_names_of_other_forms_are_skipped_with_other_bad_files(market, standin_copy, capsys):
    strange = []
    for split, name in (("query", "Copy of 0001.jpg"), ("bounding_box_train", "a.jpg"),
                        ("gt_bbox", "b.png"), ("bounding_box_test", "c.jpg")):  # fmt: skip
        strange.append(standin_copy / split / name)
        shutil.copy(market.query.paths[0], strange[-1])
    (standin_copy / "query" / "._a.jpg").touch()
    broken = sorted((standin_copy / "query").glob("0*"))[0]
    broken.write_bytes(b"")
    with pytest.raises(InputError, match=r"Market-1501: 5 of \d+ files are bad: ") as error:
        Market1501(standin_copy)
    found = Market1501(standin_copy, bad_files="skip")
    assert set(found.bad) == {str(p) for p in (*strange, broken)}
    told = capsys.readouterr().err
    for path in found.bad:
        assert path in str(error.value)
        assert path in told
    assert (len(found.train), len(found.query)) == (len(market.train), len(market.query) - 1)
    assert len(found.multi_query) <= len(market.multi_query)


def test_a_split_of_strange_names_alone(standin_copy):
    for file in (standin_copy / "query").iterdir():
        file.rename(file.with_name(f"x{file.name}"))
    with pytest.raises(InputError, match="no image of the query split is left"):
        Market1501(standin_copy, bad_files="skip")


def test_what_operating_systems_leave_between_images(market, standin_copy):
    """Beside each image, in every split; not looked at, so that nothing is bad about it."""
    for split in ("bounding_box_train", "query", "bounding_box_test", "gt_bbox"):
        for file in sorted((standin_copy / split).iterdir())[:9]:
            for name in (f"._{file.name}", f".{file.name}", ".DS_Store", "Thumbs.db"):
                (standin_copy / split / name).write_bytes(b"Mac OS X")
        (standin_copy / split / "__MACOSX").mkdir()
    found = Market1501(standin_copy)
    assert found.bad == {}
    for split in ("train", "query", "gallery", "multi_query"):
        names = [[Path(p).name for p in getattr(m, split).paths] for m in (found, market)]
        assert names[0] == names[1]
    (standin_copy / "images").mkdir()
    (standin_copy / "images" / "._00000000.jpg").touch()
    with pytest.raises(InputError, match="images: holds no images"):
        Market1501(standin_copy, distractors=True)


@pytest.mark.parametrize("suffix", [".bmp", ".BMP", ".ppm", ".webp"])
def test_other_formats(market, standin_copy, suffix):
    for file in sorted((standin_copy / "query").iterdir()):
        decoded = Image.fromarray(decode(file))
        decoded.save(file.with_suffix(suffix), **({"lossless": True} if suffix == ".webp" else {}))
        file.unlink()
    found = Market1501(standin_copy)
    assert torch.equal(found.query.ids, market.query.ids)
    assert torch.equal(found.query.decode().images, market.query.decode().images)


def test_bad_files_are_named_or_skipped(standin_copy, capsys):
    files = sorted((standin_copy / "bounding_box_train").iterdir())
    files[3].write_bytes(files[3].read_bytes()[:900])
    files[5].write_bytes(b"")
    files[7].write_bytes(b"GIF89a nothing")
    with pytest.raises(InputError, match=r"3 of .* files are bad") as error:
        Market1501(standin_copy)
    message = str(error.value)
    assert "\n" not in message
    for file, why in ((files[3], "truncated"), (files[5], "empty"), (files[7], "not an image")):
        assert f"{file}: " in message
        assert why in message.split(f"{file}: ")[1].split(";")[0]
    market = Market1501(standin_copy, bad_files="skip")
    assert len(market.train) == 125
    assert list(market.bad) == [str(files[i]) for i in (3, 5, 7)]
    assert str(files[5]) in capsys.readouterr().err
    with pytest.raises(InputError, match="bad files 'ignore'"):
        Market1501(standin_copy, bad_files="ignore")


def test_the_scan_is_remembered_by_size_and_time(market, tmp_path):
    paths = []
    for number, path in enumerate(market.train.paths[:6]):
        paths.append(str(shutil.copy(path, tmp_path / f"{number}.jpg")))
    cache = tmp_path / "cache"
    assert (scan(paths, cache=cache).decoded, scan(paths, cache=cache).decoded) == (6, 0)
    content = Path(paths[2]).read_bytes()
    Path(paths[2]).write_bytes(content[:700])
    found = scan(paths, cache=cache)
    assert (found.decoded, list(found.bad)) == (1, [paths[2]])
    assert list(scan(paths, cache=cache).bad) == [paths[2]], "bad ones are remembered too"
    Path(paths[2]).write_bytes(content)
    assert scan(paths[2:3], cache=cache).decoded == 1
    assert scan(paths, cache=cache).decoded == 0, "a scan of some forgets nothing of the others"
    status = os.stat(paths[4])
    os.utime(paths[4], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert scan(paths, cache=cache).decoded == 1
    for file in cache.iterdir():
        file.write_text("{ not JSON")
    assert scan(paths, cache=cache).decoded == 6
    os.unlink(paths[0])
    assert scan(paths, cache=cache).bad == {paths[0]: "the file is not there"}


@pytest.mark.parametrize("why", ["no home", "a file", "no right", "nonsense"])
def test_without_a_folder_for_what_a_scan_found(market, tmp_path, monkeypatch, capsys, why):
    """The cache is a courtesy: nothing but time depends on it."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    if why == "no home":

        def unknown(uid: int) -> None:
            raise KeyError(uid)

        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", unknown)
    else:
        monkeypatch.setenv("HOME", str(tmp_path))
    if why == "a file":
        (tmp_path / ".cache").touch()
    if why == "no right":

        def refused(*_, **__) -> None:
            raise PermissionError(13, "Permission denied", str(tmp_path))

        monkeypatch.setattr(Path, "mkdir", refused)
    if why == "nonsense":
        scan(market.query.paths)
        (file,) = (tmp_path / ".cache").rglob("*.json")
        file.write_text(json.dumps(dict.fromkeys(market.query.paths, 5)))
    for _ in range(1 if why == "nonsense" else 2):
        assert scan(market.query.paths).decoded == len(market.query)
        told = capsys.readouterr().err
        assert told.count("\n") == (why != "nonsense")
        assert ("is not remembered" in told) == (why != "nonsense")


def test_all_bad_files_are_named(tmp_path):
    paths = [str(tmp_path / f"{number}.jpg") for number in range(50)]
    told = scan(paths, cache=tmp_path).describe()
    assert told.startswith("50 of 50 files are bad: ")
    assert all(f"{path}: the file is not there" in told for path in paths)


def test_what_is_no_file_is_bad(tmp_path):
    """Reading a pipe that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg"):
        with pytest.raises(
            BadImage, match=rf"{name}: not a file: restore it, or set bad_files to skip"
        ):
            decode(tmp_path / name)


def test_decoding_processes_need_no_torch():
    code = "import sys, fastdml.data.files.check_worker; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_processes_find_the_same(market, monkeypatch, tmp_path):
    monkeypatch.setattr(scanning, "IN_PROCESS", 3)
    paths = [*market.query.paths[:4], str(tmp_path / "gone.jpg")]
    assert scan(paths, cache=tmp_path, workers=1).bad == {paths[4]: "the file is not there"}


def test_a_decoder_that_crashes_or_hangs(market, monkeypatch, tmp_path):
    """The process of the scan dies at one file and hangs at another; both are named."""
    monkeypatch.setattr(scanning, "IN_PROCESS", 1)
    monkeypatch.setattr(scanning, "PATIENCE", 2.0)
    script = tmp_path / "python"
    script.write_text(
        "#!/usr/bin/env python3\n"
        "import json, os, sys, time\n"
        "print('ready', flush=True)\n"
        "for path in json.load(sys.stdin):\n"
        "    if path.endswith('crash.jpg'): os.abort()\n"
        "    if path.endswith('hang.jpg'): time.sleep(60)\n"
        "    print('null', flush=True)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(scanning.sys, "executable", str(script))
    paths = [str(tmp_path / f"{name}.jpg") for name in ("a", "crash", "b", "hang", "c")]
    for path in paths:
        Path(path).touch()
    assert scan(paths, cache=tmp_path, workers=1).bad == {
        paths[1]: "crashes the decoder",
        paths[3]: "not decoded within 2 seconds",
    }
    # the process may have been ended by want of memory or time: that is not held against a file
    monkeypatch.undo()
    found = scan(paths, cache=tmp_path)
    assert (found.decoded, found.bad[paths[1]]) == (2, "the file is empty")


@pytest.mark.parametrize("script", [None, "#!/bin/sh\nexit 3\n"])
def test_a_decoder_that_does_not_start(monkeypatch, tmp_path, script):
    """An error at once, rather than a scan that waits for ever, or a set of bad files."""
    monkeypatch.setattr(scanning, "IN_PROCESS", 1)
    python = tmp_path / "python"
    if script:
        python.write_text(script)
        python.chmod(0o755)
    monkeypatch.setattr(scanning.sys, "executable", str(python))
    with pytest.raises((OSError, RuntimeError), match=r"No such file|does not start here"):
        scan(["a.jpg", "b.jpg"], cache=tmp_path, workers=1)
    assert not list(tmp_path.glob("*.json"))


def test_every_odd_jpeg_through_the_reader(jpegs, tmp_path, scans):
    folder = market_of(jpegs, tmp_path)
    with pytest.raises(InputError, match=f"{len(BAD)} of {len(jpegs) + 2} files are bad") as error:
        Market1501(folder)
    names = market_names(folder)
    market = Market1501(folder, bad_files="skip")
    for file, name in zip(jpegs, names, strict=True):
        if file.name in BAD:
            assert BAD[file.name] in market.bad[str(name)]
            assert str(name) in str(error.value)
        else:
            assert str(name) in market.train.paths
    assert market.train.decode().images.shape == (len(jpegs) - len(BAD), 3, 128, 64)


def test_every_odd_jpeg_through_the_loaders(jpegs, tmp_path, scans, capsys):
    """The same shapes and labels; of pictures up to six times the size kept, which two libraries
    shrink, the same pixels but for a grey level in the mean and twelve at most."""
    market = Market1501(market_of(jpegs, tmp_path), bad_files="skip")
    refused = [name for name, file in zip(market_names(tmp_path), jpegs, strict=True)
               if file.name in BAD_FOR_DALI]  # fmt: skip
    found = {}
    for kind in ("resident", "torch", "dali")[: 3 if has_dali() else 2]:
        if kind == "dali":
            with pytest.raises(InputError, match=r"set loader to resident$") as error:
                make_loader(kind, market.train, 16, train=False, size=(64, 32))
            assert all(str(name) in str(error.value) for name in refused)
        kept = market.train.without({str(name): "" for name in refused})
        assert len(kept) == len(market.train) - len(BAD_FOR_DALI)
        split = market.train if kind == "dali" else kept
        loader = make_loader(kind, split, 16, bad_files="skip", train=False, size=(64, 32))
        batches = list(loader.epoch(0))
        found[kind] = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    images, labels = found.pop("resident")
    assert images.shape == (len(kept), 3, 64, 32)
    for kind, (others, other_labels) in found.items():
        assert torch.equal(other_labels, labels), kind
        assert others.shape == images.shape
        gap = (others - images).abs() * 58  # grey levels
        assert gap.max() <= (12 if kind == "dali" else 0), kind
        assert gap.mean((1, 2, 3)).max() <= 1, kind


def test_orientation_is_applied(jpegs):
    """All eight orientations of one picture look alike; a broken EXIF block counts as none."""
    by_name = {file.name: file for file in jpegs}
    upright = decode(by_name["padlock-406986_640_no_exif.jpg"])
    for name, file in by_name.items():
        if name.startswith("padlock-") and "orient" not in name:
            turned = decode(file)
            assert turned.shape in (upright.shape, (*upright.shape[1::-1], 3))
    hopper = decode(by_name["hopper_orientation_2.jpg"]).astype(int)
    for number in range(3, 9):
        other = decode(by_name[f"hopper_orientation_{number}.jpg"]).astype(int)
        assert np.abs(other - hopper).mean() < 8, number
    assert decode(by_name["orientation_rectangle.jpg"]).shape == (2, 1, 3)
    assert decode(by_name["invalid-exif.jpg"]).shape == (200, 200, 3)


def test_dali_sees_what_pillow_sees(jpegs, tmp_path):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from fastdml.data.files.check_worker import Probe

    paths = [str(file) for file in jpegs]
    found = scan(paths, decoder="dali", cache=tmp_path)
    assert sorted(Path(path).name for path in found.bad) == sorted([*BAD, *BAD_FOR_DALI])
    for path, why in found.bad.items():
        assert Path(path).name in BAD or "DALI cannot decode it" in why
    probe = Probe()
    for path in paths:
        if path not in found.bad:
            pixels, expected = probe.pixels(path).astype(int), decode(path).astype(int)
            assert pixels.shape == expected.shape, path
            # the same libjpeg-turbo; CMYK is converted by a rounding of its own
            assert np.abs(pixels - expected).max() <= ("cmyk" in path), path


def test_huge_claims_are_refused(tmp_path):
    file = tmp_path / "huge.png"
    Image.new("1", (9_000, 9_000)).save(file)
    with pytest.raises(BadImage, match="9000x9000 pixels"):
        decode(file)


def test_duke(standin_copy, tmp_path):
    """The same folders, other names."""
    root = tmp_path / "DukeMTMC-reID"
    for split in ("bounding_box_train", "query", "bounding_box_test"):
        (root / split).mkdir(parents=True)
        for file in sorted((standin_copy / split).iterdir()):
            if not file.name.startswith("-1"):
                identity, camera, frame, _ = file.name.split("_")
                shutil.copy(file, root / split / f"{identity}_{camera[:2]}_f{frame}0.jpg")
    duke = ImageFolderReID(tmp_path, "dukemtmc")
    assert (len(duke.train), duke.num_ids) == (128, 8)
    assert duke.train.cameras.unique().tolist() == list(range(1, 7))


def msmt_of(files: list[Path], root: Path, train: str, test: str) -> Path:
    """24 files in MSMT17's layout: folders by identity, and lists."""
    for number, name in enumerate(("train", "val", "query", "gallery")):
        folder = root / (train if number < 2 else test)
        lines = []
        for place, file in enumerate(files[number * 6 : number * 6 + 6]):
            below = f"{place % 3:04d}/{place % 3:04d}_{place:03d}_{place % 4 + 1:02d}_0303m_1_0.jpg"
            target = folder / below.replace("_0.jpg", f"_{number}.jpg")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
            lines.append(f"{target.relative_to(folder)} {place % 3}")
        (root / f"list_{name}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def files(standin_copy):
    return sorted((standin_copy / "bounding_box_train").iterdir())[:24]


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("MSMT17_V1", "train", "test"),
        ("MSMT17_V2", "mask_train_v2", "mask_test_v2"),
        ("MSMT17", "mask_train_v2", "mask_test_v2"),
        (".", "mask_train_v2", "mask_test_v2"),
    ],
)
def test_msmt(files, tmp_path, name, train, test):
    """Lists of files, in folders by identity; identity 0 is a person like the others."""
    root = msmt_of(files, tmp_path / name, train, test)
    msmt = ImageFolderReID(tmp_path, "msmt17")
    assert (len(msmt.train), len(msmt.query), len(msmt.gallery)) == (12, 6, 6)
    assert msmt.train.ids.unique().tolist() == [0, 1, 2]
    assert msmt.train.cameras.unique().tolist() == [1, 2, 3, 4]
    with (root / "list_val.txt").open("a") as file:
        file.write("0001/._0001_001_02_0303m_1_1.jpg 1\n../../etc/passwd 3\n")
    with pytest.raises(InputError, match=r"line 8 names '\.\./\.\./etc/passwd', which is outside"):
        ImageFolderReID(tmp_path, "msmt17")
    with pytest.raises(InputError, match="unknown layout 'msmt'"):
        ImageFolderReID(tmp_path, "msmt")


def test_what_is_missing_from_msmt(files, tmp_path):
    """Folders by their names, lists by theirs."""
    root = msmt_of(files, tmp_path / "MSMT17_V2", "mask_train_v2", "mask_test_v2")
    shutil.rmtree(root / "mask_test_v2")
    with pytest.raises(InputError, match="MSMT17_V2: mask_test_v2 missing from MSMT17: unpack"):
        ImageFolderReID(tmp_path, "msmt17")
    (root / "list_val.txt").unlink()
    with pytest.raises(InputError, match=r"mask_test_v2, list_val\.txt missing from MSMT17"):
        ImageFolderReID(tmp_path, "msmt17")
    (root / "mask_test_v2").mkdir()
    with pytest.raises(InputError, match=r"MSMT17_V2: list_val\.txt missing from MSMT17"):
        ImageFolderReID(tmp_path, "msmt17")
    shutil.rmtree(root)
    with pytest.raises(InputError, match=r"holds no MSMT17 \(no train, no test, no list_train"):
        ImageFolderReID(tmp_path, "msmt17")
    msmt_of(files, root, "train", "test")
    (root / "list_val.txt").write_text("0001/0001_x_02_0303m_1_1.jpg 1\n")
    (root / "train" / "0001" / "0001_x_02_0303m_1_1.jpg").touch()
    with pytest.raises(InputError, match=r"is not of the form 0002_015_01_\.\.\., which is"):
        ImageFolderReID(tmp_path, "msmt17")


def test_building_the_standin_twice(standin, cifar100_root, tmp_path):
    what = StandIn(train_ids=8, test_ids=5, images=16, junk=7, distractors=11, odd_every=4)
    before = (standin / FOLDER).stat().st_mtime_ns
    assert build_standin(standin, cifar100_root, what) == standin
    assert (standin / FOLDER).stat().st_mtime_ns == before
    with pytest.raises(InputError, match="is not this stand-in"):
        build_standin(standin, cifar100_root, StandIn(seed=1))
    with pytest.raises(InputError, match="60 training and 40 test identities"):
        build_standin(tmp_path, cifar100_root, StandIn(train_ids=60))
    with pytest.raises(InputError, match="5 images an identity"):
        build_standin(tmp_path, cifar100_root, StandIn(images=5))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write the stand-in to .*file/x: Not a directory"):
        build_standin(tmp_path / "file" / "x", cifar100_root)


def test_two_that_build_the_standin_at_once(cifar100_root, tmp_path, monkeypatch):
    what = StandIn(train_ids=2, test_ids=2, images=12, junk=2, distractors=2)
    write = standing._write

    def while_another_does(folder, images, what):
        monkeypatch.setattr(standing, "_write", write)
        build_standin(tmp_path, images, what)
        write(folder, images, what)

    monkeypatch.setattr(standing, "_write", while_another_does)
    assert build_standin(tmp_path, cifar100_root, what) == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == [FOLDER]


def test_warnings_name_strangers(standin_copy):
    for file in (standin_copy / "bounding_box_test").glob("0001_*"):
        file.unlink()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Market1501(standin_copy)
    assert any("1 query identities have no image in the gallery" in str(w.message) for w in told)
