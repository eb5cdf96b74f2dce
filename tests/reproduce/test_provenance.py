"""What made a result: the command without the machine's paths, and the commit of the code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fastdml.errors import InputError
from fastdml.reproduce import provenance
from fastdml.reproduce.provenance import (
    CHANGED,
    COMMITS,
    commit,
    commits,
    note_commit,
    provenance_of,
    public_command,
)


@pytest.mark.parametrize(
    ("called", "shown"),
    [
        ("fastdml reproduce table2 --scale small", "fastdml reproduce table2 --scale small"),
        (["/srv/me/.venv/bin/fastdml", "reproduce", "table2"], "fastdml reproduce table2"),
        (["/srv/x/fastdml/__main__.py", "reproduce", "table2"], "fastdml reproduce table2"),
        (
            "fastdml train digits --root /srv/data --seed 1",
            "fastdml train digits --root ROOT --seed 1",
        ),
        ("fastdml train digits --root=/srv/data", "fastdml train digits --root=ROOT"),
        ("fastdml train folder --root ~/photos", "fastdml train folder --root ROOT"),
        ("fastdml train folder --cache-dir ../me/x", "fastdml train folder --cache-dir CACHE_DIR"),
        ("fastdml train folder --teachers /a/run:net", "fastdml train folder --teachers TEACHERS"),
        ("fastdml evaluate /a/run", "fastdml evaluate PATH"),
        ("fastdml train digits --root data/mine", "fastdml train digits --root data/mine"),
        (["fastdml", "train", "a b|c"], "fastdml train 'a b|c'"),
        ("fastdml.train.fit", "fastdml.train.fit"),
        ("fastdml 'train", "fastdml ''\"'\"'train'"),
    ],
)
def test_a_command_is_told_without_the_machines_paths(called, shown):
    assert public_command(called) == shown


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository with a package and kernels in it, as this one has; returns the package."""
    for name in ("fastdml/__init__.py", "kernels/k.py", "docs/page.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path / "fastdml"


def test_the_commit_of_a_checkout(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert commit(checkout) == head
    (checkout.parent / "docs" / "page.md").write_text("2")  # which decides no number
    assert commit(checkout) == head


@pytest.mark.parametrize("changed", ["fastdml/__init__.py", "kernels/k.py", "fastdml/new.py"])
def test_uncommitted_changes_of_the_code_are_told(checkout, changed):
    (checkout.parent / changed).write_text("2")
    assert commit(checkout) == f"{git(checkout, 'rev-parse', 'HEAD')} {CHANGED}"


def test_a_variable_of_gits_does_not_lead_to_another_repository(checkout, monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert commit(checkout)


def test_code_that_is_installed_into_somebodys_repository_has_no_commit(checkout):
    installed = checkout.parent / ".venv" / "fastdml"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("1")
    assert commit(installed) is None


def test_without_git_or_a_checkout_there_is_no_commit(checkout, monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(checkout) is None


def test_a_git_that_hangs_is_none(monkeypatch, checkout):
    def hang(*_, timeout, **__):
        raise subprocess.TimeoutExpired("git", timeout)

    monkeypatch.setattr(provenance.subprocess, "run", hang)
    assert commit(checkout) is None


def test_a_run_notes_each_code_that_trained_it_once(tmp_path, monkeypatch):
    said = iter(["a" * 40, "a" * 40, f"{'b' * 40} {CHANGED}", None])
    monkeypatch.setattr(provenance, "commit", lambda: next(said))
    assert commits(tmp_path) == ()
    for _ in range(4):
        note_commit(tmp_path)
    assert commits(tmp_path) == ("a" * 40, f"{'b' * 40} {CHANGED}")


def test_a_damaged_note_is_one_line(tmp_path):
    (tmp_path / COMMITS).write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match="delete it"):
        commits(tmp_path)


def test_what_is_recorded_is_this_and_no_path():
    found = provenance_of(["/srv/me/fastdml", "reproduce"], device="AMD EPYC", seconds=1.26)
    assert set(found) == {"command", "versions", "commit", "device", "date", "seconds"}
    assert found["command"] == "fastdml reproduce"
    assert found["seconds"] == 1.3
    assert set(found["versions"]) >= {"fastdml", "python", "torch", "triton", "numpy"}
    assert found["date"].endswith("+00:00")
    assert "/" not in str(found)
