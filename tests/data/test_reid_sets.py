"""Re-identification sets by name, in their layouts: DukeMTMC-reID, MSMT17, VeRi-776, one's own."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from fastdml.data import ImageFolderReID, dataset
from fastdml.data.reid_layouts import LAYOUTS, OWN
from fastdml.errors import InputError

Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.filterwarnings("ignore:.*figures from a subset")


def write(folder: Path, names: list[str]) -> None:
    """Pictures of random size, as the sets have them."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw = random.Random(name)
        size = (draw.randint(20, 90), draw.randint(20, 90))
        Image.new("RGB", size, tuple(draw.randbytes(3))).save(path)


def duke(root: Path) -> Path:
    for split, names in {
        "bounding_box_train": ["0001_c1_f0046182.jpg", "0001_c2_f0046300.jpg",
                               "0010_c8_f0065023.jpg", "0010_c1_f0065023.jpg"],
        "query": ["0005_c2_f0046985.jpg"],
        "bounding_box_test": ["0005_c5_f0051341.jpg", "0005_c2_f0046990.jpg",
                              "7139_c4_f0001.jpg"],
    }.items():  # fmt: skip
        write(root / "DukeMTMC-reID" / split, names)
    return root


def msmt(root: Path, version: str = "MSMT17_V1") -> Path:
    train, test = ("train", "test") if version == "MSMT17_V1" else ("mask_train_v2", "mask_test_v2")
    lists = {
        "list_train.txt": (train, ["0000/0000_000_01_0303morning_0015_0.jpg",
                                   "0001/0001_001_14_0303noon_0033_1.jpg"]),
        "list_val.txt": (train, ["0000/0000_009_05_0303afternoon_0021_2.jpg"]),
        "list_query.txt": (test, ["0000/0000_003_02_0303morning_0044_0.jpg"]),
        "list_gallery.txt": (test, ["0000/0000_004_07_0303noon_0005_1.jpg",
                                    "0007/0007_000_02_0303morning_0001_0.jpg"]),
    }  # fmt: skip
    for listed, (folder, names) in lists.items():
        write(root / version / folder, names)
        lines = [f"{name} {int(name[:4])}\n" for name in names]
        (root / version / listed).write_text("".join(lines))
    write(root / version / train, ["0099/0099_000_01_unlisted.jpg"])
    return root


def veri(root: Path) -> Path:
    query = ["0002_c002_00030600_0.jpg", "0776_c007_00000600_0.jpg"]
    for split, names in {
        "image_train": ["0001_c001_00016450_0.jpg", "0001_c020_00016460_0.jpg",
                        "0003_c008_00015030_1.jpg"],
        "image_query": query,
        # every query is in the gallery, too
        "image_test": [*query, "0002_c004_00030700_0.jpg", "0776_c005_00000510_0.jpg"],
    }.items():  # fmt: skip
        write(root / "VeRi" / split, names)
    for listed in ("name_train.txt", "name_query.txt", "name_test.txt", "jk_index.txt"):
        (root / "VeRi" / listed).write_text("0002_c002_00030600_0.jpg\n")
    return root


def own(root: Path) -> Path:
    for split in ("train", "query", "gallery"):
        names = [f"person {who}/cam{cam}-{cam}.png" for who in (4, 11) for cam in (1, 3)]
        write(root / split, names)
    return root


PATTERN = r"person (?P<id>\d+)/cam(?P<camera>\d)"


def facts(found: ImageFolderReID) -> dict[str, list[tuple[int, int]]]:
    return {
        name: list(zip(split.ids.tolist(), split.cameras.tolist(), strict=True))
        for name in ("train", "query", "gallery")
        for split in [getattr(found, name)]
    }


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("dukemtmc", duke, {"train": [(1, 1), (1, 2), (10, 1), (10, 8)], "query": [(5, 2)],
                            "gallery": [(5, 2), (5, 5), (7139, 4)]}),
        ("msmt17", msmt, {"train": [(0, 1), (0, 5), (1, 14)], "query": [(0, 2)],
                          "gallery": [(0, 7), (7, 2)]}),
        ("veri", veri, {"train": [(1, 1), (1, 20), (3, 8)], "query": [(2, 2), (776, 7)],
                        "gallery": [(2, 2), (2, 4), (776, 5), (776, 7)]}),
    ],
)  # fmt: skip
def test_sets_by_name(tmp_path, scans, name, make, expected):
    make(tmp_path)
    known = dataset(name, "reid")
    assert known.load(tmp_path, progress=False, cache=scans).root.parent == tmp_path
    (folder,) = tmp_path.iterdir()
    found = known.load(folder, progress=False, cache=scans, size=(24, 12))  # the set's own folder
    assert facts(found) == expected
    assert found.train.labels.tolist() == [sorted({i for i, _ in expected["train"]}).index(i)
                                           for i, _ in expected["train"]]  # fmt: skip
    assert found.train.decode().pixels.shape[1:3] == (24, 12)
    assert found.num_ids == len({i for i, _ in expected["train"]})
    assert found.multi_query is None


def test_counts_are_the_published_ones():
    counts = {name: (*layouts[0].counts, layouts[0].identities)
              for name, layouts in LAYOUTS.items() if layouts[0].counts}  # fmt: skip
    assert counts == {
        "market1501": (12_936, 3_368, 15_913, 751),
        "dukemtmc": (16_522, 2_228, 17_661, 702),
        "msmt17": (32_621, 11_659, 82_161, 1_041),
        "veri": (37_778, 1_678, 11_579, 576),
    }
    for name in counts:
        assert dataset(name, "reid").num_classes == counts[name][-1]


def test_a_subset_is_warned_of(tmp_path, scans):
    with pytest.warns(UserWarning, match=r"3/2/4/2 training.*VeRi-776 has 37,778/1,678/11,579/576"):
        ImageFolderReID(veri(tmp_path), "veri", progress=False, cache=scans)


def test_the_blurred_version_of_msmt17(tmp_path, scans):
    first = ImageFolderReID(msmt(tmp_path / "a"), "msmt17", progress=False, cache=scans)
    blurred = msmt(tmp_path / "b", "MSMT17_V2")
    second = ImageFolderReID(blurred, "msmt17", progress=False, cache=scans)
    assert facts(first) == facts(second)
    assert all("mask_train_v2" in path for path in second.train.paths)


def test_a_set_of_ones_own(tmp_path, scans):
    options = {"progress": False, "cache": scans}
    four = [(4, 1), (4, 3), (11, 1), (11, 3)]
    expected = {"train": four, "query": four, "gallery": four}
    found = ImageFolderReID(own(tmp_path), "reid_folder", pattern=PATTERN, **options)
    assert {k: sorted(v) for k, v in facts(found).items()} == expected

    def read(path: str) -> tuple[int, int] | None:
        who, file = path.split("/")
        return int(who.removeprefix("person ")), int(file[3])

    found = ImageFolderReID(tmp_path, "reid_folder", pattern=read, **options)
    assert {k: sorted(v) for k, v in facts(found).items()} == expected
    for name, other in zip(("train", "query", "gallery"), OWN.synonyms, strict=True):
        (tmp_path / name).rename(tmp_path / other[-1])
    found = ImageFolderReID(tmp_path, "reid_folder", pattern=PATTERN, **options)
    assert {k: sorted(v) for k, v in facts(found).items()} == expected
    with pytest.raises(InputError, match=r"none of its 4 images has a name of the form 0002_c1"):
        ImageFolderReID(tmp_path, "reid_folder", **options)  # Market-1501's names, unless told


def test_hidden_files_and_what_a_pattern_does_not_read(tmp_path, scans):
    own(tmp_path)
    shutil.copytree(tmp_path / "train", tmp_path / "train" / ".thumbnails")
    write(tmp_path / "query", ["person x/cam1.png"])
    told = r"1 of 13 .*cam1\.png: its name is not .* pattern 'person"
    with pytest.raises(InputError, match=told):
        ImageFolderReID(tmp_path, "reid_folder", pattern=PATTERN, cache=scans)
    lenient = r"person (?P<id>\w+)/cam(?P<camera>\d)"  # reads "x", which is no number
    with pytest.raises(InputError, match=r"1 of 13 .*cam1\.png: its name"):
        ImageFolderReID(tmp_path, "reid_folder", pattern=lenient, cache=scans)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(?P<id>\d+", "is no regular expression: missing"),
        (r"(\d+)_c(\d+)", "has no group camera and no group id: it needs both by name"),
        (r"(?P<id>\d+)", "has no group camera: it needs"),
    ],
)
def test_patterns_that_say_nothing(tmp_path, pattern, message):
    with pytest.raises(InputError, match=message):
        ImageFolderReID(own(tmp_path), "reid_folder", pattern=pattern)


def test_a_group_that_takes_no_part_finds_nothing(tmp_path, scans):
    own(tmp_path)
    for pattern in (
        r"person (?P<id>\d+)/(cam(?P<camera>\d)x)?",
        r"person (?P<id>\d+)|(?P<camera>x)",
    ):
        with pytest.raises(InputError, match=r"train: none of its 4 images has a name of the"):
            ImageFolderReID(tmp_path, "reid_folder", pattern=pattern, cache=scans)


@pytest.mark.parametrize("bad_files", ["error", "skip"])
def test_a_pattern_that_no_file_fits(tmp_path, scans, bad_files):
    told = (
        r"train: none of its 4 images has a name of the form that the pattern '\(\?P<id>x.*finds"
        r": 'person 11/cam1-1\.png' for one$"
    )
    with pytest.raises(InputError, match=told):
        ImageFolderReID(
            own(tmp_path),
            "reid_folder",
            pattern=r"(?P<id>x\d+)y(?P<camera>\d)",
            bad_files=bad_files,
            cache=scans,
        )


@pytest.mark.parametrize("found", [("1", "2"), (1.5, 2), (1, None), (1,), (1, 2, 3), 7])
def test_what_a_function_gives_is_two_whole_numbers(tmp_path, found):
    with pytest.raises(InputError, match=r"the pattern's function gives .*: it must give"):
        ImageFolderReID(own(tmp_path), "reid_folder", pattern=lambda path: found)


@pytest.mark.parametrize("split", ["train", "query", "gallery"])
def test_identities_below_junk_are_refused_before_training(tmp_path, split):
    own(tmp_path)
    write(tmp_path / split, ["person -2/cam1.png"])
    pattern = r"person (?P<id>-?\d+)/cam(?P<camera>\d)"
    with pytest.raises(InputError, match=r"cam1\.png: the identity in its name is -2: the least"):
        ImageFolderReID(tmp_path, "reid_folder", pattern=pattern)


def test_lists_without_names_and_with_a_byte_order_mark(tmp_path, scans):
    listed = msmt(tmp_path) / "MSMT17_V1" / "list_train.txt"
    expected = facts(ImageFolderReID(tmp_path, "msmt17", cache=scans))
    listed.write_bytes(b"\xef\xbb\xbf" + listed.read_bytes().replace(b"\n", b"\r\n"))
    assert facts(ImageFolderReID(tmp_path, "msmt17", cache=scans)) == expected
    listed.write_text("\n")
    with pytest.raises(InputError, match=r"list_train\.txt: names no files: unpack"):
        ImageFolderReID(tmp_path, "msmt17", cache=scans)


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"holds no VeRi-776 \(no image_train"):
        ImageFolderReID(tmp_path, "veri")
    (tmp_path / "train").mkdir()
    with pytest.raises(
        InputError,
        match=r"query, gallery missing from re-identification set: it needs train or .*image_train,"
        r" query or image_query, gallery or bounding_box_test or image_test or test$",
    ):
        ImageFolderReID(tmp_path, "reid_folder")
    msmt(tmp_path / "msmt")
    (tmp_path / "msmt/MSMT17_V1/list_val.txt").unlink()
    with pytest.raises(InputError, match=r"list_val\.txt missing from MSMT17"):
        ImageFolderReID(tmp_path / "msmt", "msmt17")
