"""Pictures of ranked lists: their order by the rules of the scores, what tells right from wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdml.errors import InputError
from fastdml.metrics import ranked_list, ranked_lists, reid_scores, save_ranked_lists
from fastdml.metrics.ranked_lists import (
    BLACK,
    FRAME,
    GAP,
    LINE,
    LINES,
    RIGHT,
    SIZE,
    WHITE,
    WRONG,
)

Image = pytest.importorskip("PIL.Image")


def cell(picture: np.ndarray, row: int, place: int) -> np.ndarray:
    """The framed image at a place (0: the query)."""
    height, width = SIZE[0] + 2 * FRAME, SIZE[1] + 2 * FRAME
    top = GAP + row * (height + LINES * LINE + GAP)
    left = GAP + place * (width + GAP) + (2 * GAP if place else 0)
    return picture[top : top + height, left : left + width]


def frame_of(framed: np.ndarray) -> tuple[tuple[int, int, int] | None, bool]:
    """Its one colour, or None, and whether it is dashed."""
    edge = np.ones(framed.shape[:2], bool)
    edge[FRAME:-FRAME, FRAME:-FRAME] = False
    pixels = framed[edge]
    gaps = (pixels == WHITE).all(1)
    colors = np.unique(pixels[~gaps], axis=0)
    return tuple(colors[0].tolist()) if len(colors) == 1 else None, 0.3 < gaps.mean() < 0.6


OF = {True: (RIGHT, False), False: (WRONG, True), None: (BLACK, False)}  # None: the query


@pytest.fixture
def pictures(tmp_path):
    """Six files of one grey each, 10 apart; the fourth lies on its side, as its EXIF block says."""
    paths = []
    for i in range(6):
        image = Image.new("L", (64, 32) if i == 3 else (32, 64), 40 + 10 * i)
        path = tmp_path / f"{i}.png"
        if i == 3:
            image.paste(250, (0, 0, 32, 32))
            exif = Image.Exif()
            exif[0x0112] = 6  # to be turned by 90 degrees clockwise
            image.save(path, exif=exif)
        else:
            image.save(path)
        paths.append(str(path))
    return paths


GALLERY_IDS = torch.tensor([7, 8, 7, 0, -1])
GALLERY_CAMERAS = torch.tensor([1, 2, 2, 3, 2])


def test_frames_and_order(pictures, tmp_path):
    target = tmp_path / "new" / "lists.png"
    save_ranked_lists(
        target,
        [pictures[5], pictures[0]],
        pictures[:5],
        torch.tensor([7, 8]),
        GALLERY_IDS,
        torch.tensor([1, 1]),
        GALLERY_CAMERAS,
        torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0], [0.4, 0.3, 0.2, 0.1, 0.0]]),
        top=3,
    )
    picture = np.asarray(Image.open(target))
    # row 0: image 0 is of the query's own camera, image 4 is junk; row 1: best is image 3
    expected = [
        [(None, 90), (False, 50), (True, 60), (False, 70)],
        [(None, 40), (False, 70), (False, 60), (True, 50)],
    ]
    for row, places in enumerate(expected):
        for place, (right, grey) in enumerate(places):
            framed = cell(picture, row, place)
            assert frame_of(framed) == OF[right], (row, place)
            inside = framed[FRAME:-FRAME, FRAME:-FRAME]
            assert inside.shape == (*SIZE, 3)
            assert (inside[-20:] == grey).all(), (row, place)
            if grey == 70:  # the one on its side: its left, which is bright, has become its top
                assert (inside[:20] == 250).all()
    height = 2 * (128 + 8 + LINES * LINE + GAP) + 2 * LINE
    assert picture.shape == (GAP + height + GAP, GAP + 4 * (64 + 8 + GAP) + 2 * GAP, 3)


def test_what_stands_below_each_image(pictures, tmp_path, monkeypatch):
    """Rank, identity, camera and distance, and a mark that tells right from wrong by its shape."""
    draw = pytest.importorskip("PIL.ImageDraw").ImageDraw
    texts, marks = [], []
    write, mark = draw.text, ranked_lists._mark
    monkeypatch.setattr(draw, "text", lambda d, at, s, *a: texts.append(s) or write(d, at, s, *a))
    monkeypatch.setattr(ranked_lists, "_mark", lambda d, at, r: marks.append(r) or mark(d, at, r))
    save_ranked_lists(
        tmp_path / "lists.png",
        pictures[:1],
        pictures[:5],
        torch.tensor([7]),
        GALLERY_IDS,
        torch.tensor([1]),
        GALLERY_CAMERAS,
        torch.tensor([[0.1, 0.25, 0.3125, torch.inf, 0.0]]),
    )
    assert texts == [
        *("query", "id 7", "cam 1"),
        *("1", "id 8", "cam 2", "0.250"),
        *("2", "id 7", "cam 2", "0.312"),
        *("3", "id 0", "cam 3", "inf"),
        *("same identity", "another"),
    ]
    assert marks == [False, True, False, True, False]
    shapes = {}
    for right in (True, False):
        image = Image.new("RGB", (LINE, LINE))
        mark(pytest.importorskip("PIL.ImageDraw").Draw(image), (0, 0), right)
        shapes[right] = np.asarray(image).any(2)
        assert shapes[right].sum() > LINE
    assert (shapes[True] != shapes[False]).sum() > LINE, "told apart without colours"
    picture = np.asarray(Image.open(tmp_path / "lists.png"))
    below = picture[GAP + 128 + 8 : -2 * LINE - GAP]
    assert (below.reshape(-1, 3) == BLACK).all(1).mean() > 0.01, "there are letters"


def test_letters_fit_between_images(tmp_path, pictures):
    """Of an identity of five digits and a camera of two; so they can be read in a column: 18 of the
    picture's 876 pixels are 5 points in 3.3 inches."""
    font = pytest.importorskip("PIL.ImageFont").load_default(LINE - 1)
    for text in ("id 12345", "cam 15", "0.123", "100.000"):
        assert font.getlength(text) <= SIZE[1] + 2 * FRAME + GAP


def test_a_query_with_a_shorter_list_leaves_the_rest_white(pictures, tmp_path):
    save_ranked_lists(
        tmp_path / "lists.png",
        pictures[:2],
        pictures[2:4],
        torch.tensor([1, 2]),
        torch.tensor([1, 2]),
        torch.tensor([1, 1]),
        torch.tensor([1, 2]),
        torch.rand(2, 2),
    )
    picture = np.asarray(Image.open(tmp_path / "lists.png"))
    assert frame_of(cell(picture, 0, 1)) == OF[False]
    assert (cell(picture, 0, 2) == WHITE).all()
    found = {frame_of(cell(picture, 1, 1)), frame_of(cell(picture, 1, 2))}
    assert found == {OF[True], OF[False]}


@pytest.mark.parametrize("ties", ["worst", "given"])
def test_lists_follow_the_rules_of_the_scores(ties):
    rng = np.random.default_rng(0)
    for _ in range(30):
        ids, cameras = (torch.from_numpy(rng.integers(*r, 40)) for r in ((-1, 4), (1, 3)))
        d = torch.from_numpy(rng.integers(0, 6, 40) / 6)
        d[torch.from_numpy(rng.random(40) < 0.1)] = torch.nan
        found = ranked_list(d, 1, ids, 1, cameras, top=40, ties=ties)
        right = [bool(ids[g] == 1) for g in found]
        one = torch.tensor([1])
        scores = reid_scores(None, None, one, ids, one, cameras, distances=d[None], ties=ties)
        assert scores.cmc.index(1.0) == right.index(True)
        assert scores.mINP == pytest.approx(sum(right) / (max(np.flatnonzero(right)) + 1))
        assert ranked_list(d, 1, ids, 1, cameras, top=3, ties=ties) == found[:3]


def test_wrong_arguments_are_named(pictures, tmp_path):
    labels = (torch.tensor([7]), GALLERY_IDS, torch.tensor([1]), GALLERY_CAMERAS)
    target, d = tmp_path / "lists.png", torch.rand(1, 5)
    with pytest.raises(InputError, match=r"distances \(1, 4\)"):
        save_ranked_lists(target, pictures[:1], pictures[:5], *labels, d[:, :4])
    with pytest.raises(InputError, match="2 query and 5 gallery images"):
        save_ranked_lists(target, pictures[:2], pictures[:5], *labels, d)
    with pytest.raises(InputError, match=r"a name ending in \.png"):
        save_ranked_lists(tmp_path / "lists.gif", pictures[:1], pictures[:5], *labels, d)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(InputError, match=r"broken\.jpg: cannot be drawn"):
        save_ranked_lists(target, [broken], pictures[:5], *labels, d)
    with pytest.raises(InputError, match=r"gone\.jpg: cannot be drawn"):
        save_ranked_lists(target, [tmp_path / "gone.jpg"], pictures[:5], *labels, d)
    assert not target.exists()


def test_a_picture_that_cannot_be_written_is_one_line(pictures, tmp_path):
    labels = (torch.tensor([7]), GALLERY_IDS, torch.tensor([1]), GALLERY_CAMERAS)
    (tmp_path / "file").write_bytes(b"")
    target = tmp_path / "file" / "lists.png"
    with pytest.raises(InputError, match=r"cannot write .*file: (Not a directory|File exists)"):
        save_ranked_lists(target, pictures[:1], pictures[:5], *labels, torch.rand(1, 5))


def test_without_pillow_the_install_command_is_named(pictures, tmp_path, monkeypatch):
    def missing(module: str, extra: str):
        raise InputError(f"{module}: pip install 'fastdml[{extra}]'")

    monkeypatch.setattr(ranked_lists, "require", missing)
    labels = (torch.tensor([7]), GALLERY_IDS, torch.tensor([1]), GALLERY_CAMERAS)
    with pytest.raises(InputError, match=r"PIL\.Image: pip install 'fastdml\[train\]'"):
        save_ranked_lists(tmp_path / "a.png", pictures[:1], pictures[:5], *labels, torch.rand(1, 5))
