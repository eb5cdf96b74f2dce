"""On the path, Python does not find packages that a machine lent for an hour lacks, installed here
or not: `import` fails, `find_spec` gives None, and no version is told."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder

ABSENT = (
    "apex", "liger_kernel", "nvidia.dali", "pytorch_dml", "pytorch_metric_learning", "tyro",
)  # fmt: skip


class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname in ABSENT:
            return None
        return super().find_spec(fullname, path, target)


sys.meta_path = [WithoutExtras if finder is PathFinder else finder for finder in sys.meta_path]
