"""Which package `apex` is installed: NVIDIA's, or the one of that name on PyPI, for web logins."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def other_apex() -> str | None:
    """Where an installed package `apex` is that is not NVIDIA's; None where there is none."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    if any(Path(folder, "multi_tensor_apply").is_dir() for folder in folders):
        return None
    return ", ".join(folders) or str(spec.origin)
