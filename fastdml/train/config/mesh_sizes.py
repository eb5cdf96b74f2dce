"""The setting `mesh` as numbers: how many rows of peers and columns of data."""

from __future__ import annotations

import re
from typing import NamedTuple

from fastdml.errors import InputError

AXES = ("peer", "data")


class MeshSizes(NamedTuple):
    peer: int = 1
    data: int = 1

    @property
    def processes(self) -> int:
        return self.peer * self.data

    def __str__(self) -> str:
        return f"peer={self.peer},data={self.data}"


def read_mesh(text: str) -> MeshSizes | None:
    """The sizes of "peer=2,data=2", of "peer=2" or of "data=2", whose other size is 1. None for ""
    and for "auto". Raises InputError for anything else."""
    if text in ("", "auto"):
        return None
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9]{1,6})\s*", part)
        if not match or match[1] not in AXES or match[1] in found or int(match[2]) < 1:
            raise InputError(
                f"mesh must be auto or two sizes of 1 or more such as peer=2,data=2, not {text!r}"
            )
        found[match[1]] = int(match[2])
    return MeshSizes(**found)
