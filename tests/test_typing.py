"""What a type checker makes of programs that use fastdml, and that the types say what runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from fastdml.train import ReidConfig, TrainConfig
from fastdml.train.config.fields import field_types
from fastdml.train.config.types import ReidSettings, TrainSettings

CASES = Path(__file__).parent / "typing_cases"
ROOT = CASES.parents[1]
# torch is not read, in the interest of time: what it gives is of any type.
SETTINGS = """
[mypy]
ignore_missing_imports = True
no_implicit_reexport = True
[mypy-torch.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[str]]:
    """mypy's complaints about each of the cases, with their line numbers in front."""
    pytest.importorskip("mypy")
    settings = tmp_path_factory.mktemp("mypy") / "mypy.ini"
    settings.write_text(SETTINGS)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", settings, "--no-error-summary",
         "--no-incremental", "--cache-dir", os.devnull, "right.py", "wrong.py"],
        cwd=CASES, capture_output=True, text=True, timeout=300,
        env={**os.environ, "MYPYPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    complaints: dict[str, list[str]] = {"right.py": [], "wrong.py": []}
    for line in done.stdout.splitlines():
        file, _, rest = line.partition(":")
        if file in complaints and ": error: " in rest:
            complaints[file].append(rest)
    return complaints


def test_right_uses_pass(found):
    assert found["right.py"] == []


def test_each_mistake_is_an_error_in_its_line(found):
    lines = (CASES / "wrong.py").read_text().splitlines()
    expected = {k for k, line in enumerate(lines, 1) if line.endswith("# error")}
    assert {int(c.partition(":")[0]) for c in found["wrong.py"]} == expected


def given(hint: Any, name: str) -> Any:
    """What people may give for a field of this type."""
    if get_origin(hint) is tuple:
        return Sequence[get_args(hint)[0]]
    return hint | os.PathLike if name in ("folder", "unlabelled") else hint


@pytest.mark.parametrize(
    ("types", "config"), [(TrainSettings, TrainConfig), (ReidSettings, ReidConfig)]
)
def test_types_of_settings_are_those_of_the_fields(types, config):
    fields = {n: given(hint, n) for n, hint in field_types(config).items()}
    for name in ("data", "peers", "root"):
        del fields[name]
    assert get_type_hints(types) == fields
    assert types.__required_keys__ == frozenset()
