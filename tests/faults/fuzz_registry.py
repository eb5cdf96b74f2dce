"""Where fuzz targets are registered, and how they write their files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing import Check, Target

from fastdml.errors import InputError

TARGETS: dict[str, Target] = {}


def target(*refuses: type[Exception]) -> Callable[[Callable[[Path], Check]], Callable]:
    def register(prepare: Callable[[Path], Check]) -> Callable[[Path], Check]:
        TARGETS[prepare.__name__] = Target(prepare, refuses or (InputError,))
        return prepare

    return register


def rewrite(path: Path, content: bytes | str) -> Path:
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
    )
    return path


class Code:
    """What a pickle must not get to run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)
