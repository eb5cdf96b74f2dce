"""A picture of ranked lists: each row a query and its nearest gallery images. An image of the
query's identity has a solid blue frame and a tick, any other a dashed orange frame and a cross, so
that they can be told apart without colours too. Below each image stand rank, identity, camera and
distance, in letters that can be read at the width of a paper's column. About 2 ms an image.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from fastdml.errors import InputError, require
from fastdml.files import write_atomically, writing
from fastdml.metrics.reid import JUNK, check_ties
from fastdml.paths import expanded

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SIZE = (128, 64)  # height and width of an image in the picture
FRAME, GAP, DASH = 4, 6, 10  # pixels
LINE = 19  # pixels from one line of text to the next; the letters are as high, less a pixel
LINES = 4  # below an image
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
KEY = 180  # pixels that the key to the marks takes
RIGHT, WRONG = (0, 114, 178), (213, 94, 0)  # Okabe and Ito's blue and vermilion


class _Labelled(NamedTuple):
    path: str | Path
    identity: int
    camera: int


def ranked_list(
    distances: Tensor,
    query_id: int,
    gallery_ids: Tensor,
    query_camera: int,
    gallery_cameras: Tensor,
    top: int = 10,
    ties: str = "worst",
) -> list[int]:
    """The nearest gallery images of one query, best first, by its distances (G,) and the rules of
    `reid_scores`: without junk and its own camera's images of it, equal distances as `ties` says.
    Raises InputError for an unknown rule of ties."""
    check_ties(ties)
    d = distances.detach().double().cpu().numpy()
    d = np.where(np.isnan(d), np.inf, d)
    ids, cameras = gallery_ids.cpu().numpy(), gallery_cameras.cpu().numpy()
    right = ids == query_id
    order = np.lexsort((right, d)) if ties == "worst" else np.argsort(d, kind="stable")
    left_out = (ids == JUNK) | (right & (cameras == query_camera))
    return order[~left_out[order]][:top].tolist()


def save_ranked_lists(
    path: str | Path,
    query_paths: Sequence[str | Path],
    gallery_paths: Sequence[str | Path],
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cameras: Tensor,
    gallery_cameras: Tensor,
    distances: Tensor,
    *,
    top: int = 10,
    ties: str = "worst",
) -> None:
    """Writes a PNG of Q rows: a query, then its `top` nearest gallery images, best from the left.

    distances (Q, G), of the queries to draw only; identities and cameras are (Q,) and (G,). Images
    are drawn 128 x 64. Needs Pillow. Raises InputError on counts that do not fit together, a file
    that is no image, a name that does not end in .png, or a path that cannot be written.
    """
    Q, G = len(query_paths), len(gallery_paths)
    counts = [len(x) for x in (query_ids, query_cameras, gallery_ids, gallery_cameras)]
    if counts != [Q, Q, G, G] or tuple(distances.shape) != (Q, G) or Q < 1 or top < 1:
        raise InputError(
            f"{Q} query and {G} gallery images, top {top}, with {counts[0]} and {counts[2]} "
            f"identities, {counts[1]} and {counts[3]} cameras, distances {tuple(distances.shape)}"
        )
    path = expanded(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: a picture of ranked lists is a PNG: give a name ending in .png")
    rows = []
    for q in range(Q):
        query = _Labelled(query_paths[q], int(query_ids[q]), int(query_cameras[q]))
        found = ranked_list(
            distances[q], query.identity, gallery_ids, query.camera, gallery_cameras, top, ties
        )
        images = [
            _Labelled(gallery_paths[g], int(gallery_ids[g]), int(gallery_cameras[g])) for g in found
        ]
        rows.append((query, images, [float(distances[q, g]) for g in found]))
    content = io.BytesIO()
    _picture(rows).save(content, "PNG")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def _picture(rows: Sequence[tuple[_Labelled, Sequence[_Labelled], Sequence[float]]]) -> Image:
    """The picture: of each row the query, the gallery images, and their distances."""
    pillow = require("PIL.Image", "train")
    height, width = SIZE[0] + 2 * FRAME + LINES * LINE + GAP, SIZE[1] + 2 * FRAME + GAP
    columns = 1 + max(len(images) for _, images, _ in rows)
    # the query stands apart from its list, and the key to the marks below them all
    size = (GAP + width * columns + 2 * GAP, GAP + height * len(rows) + 2 * LINE + GAP)
    picture = pillow.new("RGB", (max(size[0], KEY), size[1]), WHITE)
    draw = require("PIL.ImageDraw", "train").Draw(picture)
    draw.font = require("PIL.ImageFont", "train").load_default(LINE - 1)
    for number, (query, images, distances) in enumerate(rows):
        top_edge = GAP + height * number
        picture.paste(_framed(query.path, BLACK), (GAP, top_edge))
        _write(draw, (GAP, top_edge), f"query\nid {query.identity}\ncam {query.camera}")
        for place, (image, distance) in enumerate(zip(images, distances, strict=True), 1):
            right = image.identity == query.identity
            left = GAP + width * place + 2 * GAP
            framed = _framed(image.path, RIGHT if right else WRONG, dashed=not right)
            picture.paste(framed, (left, top_edge))
            told = f"{place}\nid {image.identity}\ncam {image.camera}\n{distance:.3f}"
            _write(draw, (left, top_edge), told)
            mark_left = left + SIZE[1] + 2 * FRAME - LINE
            _mark(draw, (mark_left, top_edge + SIZE[0] + 2 * FRAME), right)
    for number, (right, told) in enumerate(((True, "same identity"), (False, "another"))):
        at = (GAP, GAP + height * len(rows) + LINE * number)
        _mark(draw, at, right)
        draw.text((at[0] + LINE + GAP, at[1]), told, BLACK)
    return picture


def _write(draw: ImageDraw, corner: tuple[int, int], text: str) -> None:
    """Lines of text below the framed image whose upper left corner is given."""
    for number, line in enumerate(text.splitlines()):
        top = corner[1] + SIZE[0] + 2 * FRAME + number * LINE
        draw.text((corner[0], top), line, BLACK)


def _mark(draw: ImageDraw, corner: tuple[int, int], right: bool) -> None:
    """A tick or a cross in a square of a line's height."""
    left, top = corner
    low, high = LINE // 4, LINE - LINE // 4
    tick = [[(low, LINE // 2), (LINE // 2 - 1, high), (high + 1, low - 1)]]
    cross = [[(low, low), (high, high)], [(low, high), (high, low)]]
    for stroke in tick if right else cross:
        points = [(left + x, top + y) for x, y in stroke]
        draw.line(points, RIGHT if right else WRONG, width=3, joint="curve")


def _framed(path: str | Path, color: tuple[int, int, int], dashed: bool = False) -> Image:
    """The image, upright and in RGB, in a frame."""
    pillow, operations = require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    try:
        with pillow.open(path) as image:
            upright = operations.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, pillow.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be drawn ({error})") from None
    resized = upright.resize(SIZE[::-1], pillow.Resampling.BILINEAR)
    framed = pillow.new("RGB", (SIZE[1] + 2 * FRAME, SIZE[0] + 2 * FRAME), color)
    if dashed:
        draw = require("PIL.ImageDraw", "train").Draw(framed)
        for start in range(DASH, framed.height, 2 * DASH):
            draw.rectangle((0, start, framed.width, start + DASH - 1), WHITE)
        for start in range(DASH, framed.width - FRAME, 2 * DASH):
            for edge in (0, framed.height - FRAME):
                draw.rectangle((start, edge, start + DASH - 1, edge + FRAME - 1), WHITE)
    framed.paste(resized, (FRAME, FRAME))
    return framed
