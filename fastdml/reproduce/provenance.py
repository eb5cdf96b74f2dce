"""What made a result: command, versions, commit, device, date and time taken. Nothing of the
machine's or its owner's: no host, no user, no absolute path."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fastdml
from fastdml.errors import InputError
from fastdml.files import write_atomically
from fastdml.report.summary import versions

COMMITS = "commits.txt"  # in a run folder: the code that trained it, a line each
CHANGED = "with uncommitted changes"
CODE = Path(fastdml.__file__).resolve().parent
SECONDS = 20.0  # that git may take


def provenance_of(command: str | Sequence[str], *, device: str, seconds: float) -> dict[str, Any]:
    """As `Record.provenance` holds it. device: as `fastdml.devices.device_name` says. seconds: that
    the command took until now."""
    return {
        "command": public_command(command),
        "versions": versions(),
        "commit": commit(),
        "device": device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }


def public_command(command: str | Sequence[str]) -> str:
    """The command as another may call it: the program by its name, and in place of an absolute path
    the name of its option, in capitals: `--root ROOT`."""
    try:
        words = shlex.split(command) if isinstance(command, str) else list(command)
    except ValueError:  # quotes that do not close: it is no command line
        words = str(command).split()
    shown: list[str] = []
    for number, word in enumerate(words):
        option, mark, value = word.partition("=")
        before = shown[-1] if shown else ""
        if number == 0:
            shown.append(
                Path(word).parent.name if word.endswith("__main__.py") else Path(word).name
            )
        elif mark and option.startswith("--") and _of_this_machine(value):
            shown.append(f"{option}={_stand_in(option)}")
        elif _of_this_machine(word):
            shown.append(_stand_in(before))
        else:
            shown.append(word)
    return shlex.join(shown)


def _of_this_machine(word: str) -> bool:
    """Whether a word leads out of the folder it was typed in."""
    path = word.partition(":")[2] if word.startswith("file:") else word
    return path.startswith(("/", "~")) or ".." in Path(path).parts


def _stand_in(option: str) -> str:
    name = option.lstrip("-").replace("-", "_").upper()
    return name if option.startswith("--") and name else "PATH"


def commit(code: Path = CODE) -> str | None:
    """The commit of the checkout that the code runs from, "with uncommitted changes" where the code
    differs from it; None where it is installed, and the version says which it is."""
    if _git(code, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # no git, no checkout, or somebody else's that it is installed into
    head = _git(code, "rev-parse", "HEAD")
    top = _git(code, "rev-parse", "--show-toplevel")
    if not head or not top:
        return None
    changes = _git(Path(top), "status", "--porcelain", "--", code.name, "kernels")
    return f"{head} {CHANGED}" if changes or changes is None else head


def note_commit(folder: Path) -> None:
    """Adds the commit of this code to what a run's folder says it was trained by; nothing where the
    last line says it already, or there is no checkout. Raises InputError where it cannot."""
    now = commit()
    before = commits(folder)
    if now and before[-1:] != (now,):
        write_atomically(folder / COMMITS, "".join(f"{line}\n" for line in (*before, now)))


def commits(folder: Path) -> tuple[str, ...]:
    """The commits that trained a run, in their order; empty where none is noted."""
    try:
        return tuple((folder / COMMITS).read_text(encoding="ascii").split("\n")[:-1])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError):
        raise InputError(f"cannot read {folder / COMMITS}: delete it") from None


def _git(folder: Path, *words: str) -> str | None:
    """What git prints; None where it fails, or is not there."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=folder,
            env={**own, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
