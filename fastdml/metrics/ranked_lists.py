"""A picture of ranked lists: each row a query and its nearest gallery images, framed green where
the identity is right and red where it is not. About 2 ms an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fastdml.errors import InputError, require
from fastdml.metrics.reid import JUNK
from fastdml.paths import expanded

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = (128, 64)  # height and width of an image in the picture
FRAME, GAP = 4, 6  # pixels
BLACK, GREEN, RED, WHITE = (0, 0, 0), (0, 160, 60), (210, 30, 30), (255, 255, 255)


def ranked_list(
    distances: Tensor,
    query_id: int,
    gallery_ids: Tensor,
    query_camera: int,
    gallery_cameras: Tensor,
    top: int = 10,
) -> list[int]:
    """The nearest gallery images of one query, best first, by its distances (G,) and the rules of
    `reid_scores`: without junk and its own camera's images of it, ties against the query."""
    d = distances.detach().double().cpu().numpy()
    d = np.where(np.isnan(d), np.inf, d)
    ids, cameras = gallery_ids.cpu().numpy(), gallery_cameras.cpu().numpy()
    right = ids == query_id
    order = np.lexsort((right, d))
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
) -> None:
    """Writes a PNG of Q rows: a query, then its `top` nearest gallery images, best from the left.

    distances (Q, G), of the queries to draw only; identities and cameras are (Q,) and (G,). Images
    are drawn 128 x 64. Needs Pillow. Raises InputError on counts that do not fit together, a file
    that is no image, or a name that does not end in .png.
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
    pillow = require("PIL.Image", "train")
    lists = [
        ranked_list(
            distances[q],
            int(query_ids[q]),
            gallery_ids,
            int(query_cameras[q]),
            gallery_cameras,
            top,
        )
        for q in range(Q)
    ]
    height, width = SIZE[0] + 2 * FRAME + GAP, SIZE[1] + 2 * FRAME + GAP
    columns = 1 + max(map(len, lists))
    # the query stands apart from its list
    picture = pillow.new("RGB", (GAP + width * columns + 2 * GAP, GAP + height * Q), WHITE)
    for q, found in enumerate(lists):
        top_edge = GAP + height * q
        picture.paste(_framed(query_paths[q], BLACK), (GAP, top_edge))
        for place, g in enumerate(found, 1):
            color = GREEN if gallery_ids[g] == query_ids[q] else RED
            left = GAP + width * place + 2 * GAP
            picture.paste(_framed(gallery_paths[g], color), (left, top_edge))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _framed(path: str | Path, color: tuple[int, int, int]) -> Image:
    """The image, upright and in RGB, in a frame."""
    pillow, operations = require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    try:
        with pillow.open(path) as image:
            upright = operations.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, pillow.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be drawn ({error})") from None
    resized = upright.resize(SIZE[::-1], pillow.Resampling.BILINEAR)
    return operations.expand(resized, border=FRAME, fill=color)
