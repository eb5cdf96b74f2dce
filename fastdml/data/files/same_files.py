"""Images that are there twice, found by their bytes: a test image that was also trained on makes a
score better than it is. Only files of one length are read."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence


def same_files(splits: Mapping[str, Sequence[str]]) -> list[list[tuple[str, int]]]:
    """Groups of files with the same bytes, each file as its split and its place there, in the order
    of the splits. Files that cannot be read are in none."""
    by_length: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for split, paths in splits.items():
        for place, path in enumerate(paths):
            with contextlib.suppress(OSError):
                by_length[os.stat(path).st_size].append((split, place))
    groups: list[list[tuple[str, int]]] = []
    for alike in by_length.values():
        if len(alike) > 1:
            by_bytes: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
            for split, place in alike:
                with contextlib.suppress(OSError), open(splits[split][place], "rb") as file:
                    by_bytes[hashlib.blake2b(file.read()).digest()].append((split, place))
            groups += [group for group in by_bytes.values() if len(group) > 1]
    return groups
