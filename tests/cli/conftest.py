"""A run from the command line, and a check that a command fails as it should."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fastdml import cli


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path under a folder with its size and time of change, to show that nothing was
    written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Runs a command that must fail: exit 2, one line that matches, nothing written."""
    monkeypatch.chdir(tmp_path)  # so that a default folder `runs` would show

    def check(argv: list[str], *patterns: str) -> None:
        before = tree(tmp_path)
        code = cli.main(argv)
        out, err = capfd.readouterr()
        assert code == 2, err
        assert out == ""
        assert err.startswith("fastdml: error: ")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        for pattern in patterns:
            assert re.search(pattern, err), err
        assert tree(tmp_path) == before

    return check


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """Two peers trained on digits from the command line, mutually and independently; not to be
    changed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    options = "--independent --peers resnet8 resnet8 --epochs 2 --subset 320 --folder"
    assert cli.main(["train", "digits", *options.split(), str(folder)]) == 0
    return folder


@pytest.fixture
def unfinished(run, tmp_path) -> Path:
    """A run that was killed just before its last weights were written."""
    folder = tmp_path / "unfinished"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "peers")
    (folder / "cohort.json").unlink()
    return folder
