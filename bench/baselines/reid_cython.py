"""Scores by torchreid's Cython evaluator: numpy's argsort of the whole matrix, then compiled loops.

None of its code is here. It is taken from an installed package that has it compiled: torchreid
itself, fast-reid, which copied it and adds mINP, or another build of torchreid:

pip install --no-deps pyppbox-torchreid             # has it compiled
pip download --no-deps --no-binary :all: fastreid   # to compile fastreid/evaluation/rank_cylib
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np

PACKAGES = ("torchreid", "fastreid", "pyppbox_torchreid")


@cache
def evaluator() -> Callable | None:
    """The compiled function `evaluate_cy`, loaded alone: its package would import much else."""
    for package in PACKAGES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for suffix in EXTENSION_SUFFIXES:
                for file in sorted(Path(folder).rglob(f"rank_cy{suffix}")):
                    found = spec_from_file_location("rank_cy", file)
                    module = module_from_spec(found)
                    found.loader.exec_module(module)
                    return module.evaluate_cy
    return None


def scores(
    distances: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    query_cameras: np.ndarray,
    gallery_cameras: np.ndarray,
    max_rank: int = 50,
) -> tuple[float, float]:
    """(mAP, rank-1)."""
    if (gallery_ids == -1).any():  # junk, which it takes for wrong images
        keep = gallery_ids != -1
        distances, gallery_ids = distances[:, keep], gallery_ids[keep]
        gallery_cameras = gallery_cameras[keep]
    cmc, precision, *_ = evaluator()(
        distances, query_ids, gallery_ids, query_cameras, gallery_cameras, max_rank
    )
    precision = np.asarray(precision)  # fast-reid's: of each query, 0 where it has no match
    return float(precision[precision > 0].mean()), float(cmc[0])
