"""Checkpoints of several files: a new folder each, whole once its manifest is there.

    checkpoints/
      step-00001234/
        peer-00-resnet32.ckpt   weights, optimizer state, averages and centres of a peer; a folder
                                of that name has the shards of one that is sharded
        rank-00.ckpt            what belongs to one process: sums of statistics, generators, and
                                its column's own running statistics
        run.ckpt                everything else: position, settings, schedules, loss scale
        manifest.json           written last: SHA-256 and size of all other files, and its own

A second save at the same step is step-00001234-2. A folder without a manifest is what a killed
process left. One whose files are not those of the manifest is set aside as NAME.damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from fastdml.errors import InputError
from fastdml.files import safe_name, sync_folder, write_atomically

FORMAT = 1
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
RUN = "run.ckpt"
NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
DAMAGED = ".damaged"
CHUNK = 1 << 20  # bytes
LONGEST_NAME = 200  # bytes of a peer's name in a file's


class Mark(NamedTuple):
    """What tells a file from any other."""

    sha256: str
    size: int  # bytes


class Manifest(NamedTuple):
    folder: Path
    step: int  # of the run, that the checkpoint was taken after
    peer: int  # sizes of the mesh that wrote it
    data: int
    accumulate: int
    files: dict[str, Mark]  # by name below the folder

    def below(self, name: str) -> dict[str, Mark]:
        """The files of a folder in it, or the file of that name."""
        return {f: m for f, m in self.files.items() if f == name or f.startswith(f"{name}/")}


def peer_name(k: int, name: str) -> str:
    """Of peer k; a file is called so with .ckpt, a folder of shards as it is."""
    return f"peer-{k:02d}-{safe_name(name, LONGEST_NAME)}"


def rank_name(rank: int) -> str:
    return f"rank-{rank:02d}.ckpt"


def folder_name(step: int, save: int = 1) -> str:
    """Of the `save`-th checkpoint that was taken after this step."""
    return f"step-{step:08d}" + (f"-{save}" if save > 1 else "")


def place(path: Path) -> tuple[int, int] | None:
    """The step of a checkpoint's folder and which save it was; None of any other name."""
    found = NAME.fullmatch(path.name)
    return (int(found[1]), int(found[2] or 1)) if found else None


def is_whole(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def checkpoint_folders(run: Path) -> list[Path]:
    """Those of a run, whole or not, the oldest first."""
    try:
        found = [p for p in (run / CHECKPOINTS).iterdir() if place(p) and p.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"cannot read {run / CHECKPOINTS}: {error.strerror}") from None
    return sorted(found, key=place)  # type: ignore[arg-type]


def whole_folders(run: Path) -> list[Path]:
    """Those that have a manifest, the oldest first."""
    return [path for path in checkpoint_folders(run) if is_whole(path)]


class Hashing:
    """A file that is written through a digest."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        written = self.file.write(data)
        self.size += written
        return written

    def flush(self) -> None:
        self.file.flush()

    def mark(self) -> Mark:
        return Mark(self.digest.hexdigest(), self.size)


def mark_of(file: BinaryIO) -> Mark:
    """Of an opened file, read from where it stands to its end."""
    digest, size = hashlib.sha256(), 0
    while data := file.read(CHUNK):
        digest.update(data)
        size += len(data)
    return Mark(digest.hexdigest(), size)


def marks_below(folder: Path, name: str) -> dict[str, Mark]:
    """The marks of all files below `folder / name`, by their names below `folder`, forced to
    disk."""
    found = {}
    for path in sorted((folder / name).rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = mark_of(file)
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder / name)
    return found


def write_manifest(manifest: Manifest) -> None:
    """Makes a checkpoint whole, when all its files are on disk. Raises InputError."""
    content = {
        "format": FORMAT,
        "step": manifest.step,
        "mesh": {"peer": manifest.peer, "data": manifest.data},
        "accumulate": manifest.accumulate,
        "files": {name: mark._asdict() for name, mark in sorted(manifest.files.items())},
    }
    content["sha256"] = _digest(content)
    write_atomically(manifest.folder / MANIFEST, json.dumps(content, indent=2) + "\n")
    with contextlib.suppress(OSError):
        for folder in (manifest.folder.parent, manifest.folder.parent.parent):
            sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, which says of every file that it is there, with its size.
    Raises InputError where it or a file is missing, or damaged as far as sizes tell."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{folder} is no whole checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is damaged: it is not JSON") from None
    if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"{path} has format {content['format']!r}; this version of fastdml reads {FORMAT}"
        )
    try:
        if content.pop("sha256") != _digest(content):
            raise ValueError
        files = {name: Mark(**mark) for name, mark in content["files"].items()}
        mesh = content["mesh"]
        manifest = Manifest(
            folder, content["step"], mesh["peer"], mesh["data"], content["accumulate"], files
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} is damaged: its checksum is wrong") from None
    found = place(folder)
    if found is not None and found[0] != manifest.step:
        raise InputError(f"{path} is of step {manifest.step}, not of {folder.name}")
    for name, mark in files.items():
        _check_there(folder, name, mark)
    return manifest


def check_files(folder: Path, files: Mapping[str, Mark]) -> None:
    """Reads files and compares them with the manifest's marks. Raises InputError."""
    for name, mark in files.items():
        try:
            with (folder / name).open("rb") as file:
                found = mark_of(file)
        except OSError as error:
            raise InputError(f"cannot read {folder / name}: {error.strerror}") from None
        if found != mark:
            raise InputError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")


def remove(folder: Path) -> None:
    """Removes a checkpoint, the manifest first, so that no part of it is ever taken for whole.
    Leaves what cannot be removed."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_partial(run: Path) -> None:
    """Removes what killed saves left."""
    for folder in checkpoint_folders(run):
        if not is_whole(folder):
            remove(folder)


def remove_old(run: Path, keep: int, best: int | None = None) -> None:
    """Removes all whole checkpoints but the last `keep`, and the last one of step `best`."""
    folders = whole_folders(run)
    of_best = [folder for folder in folders if (place(folder) or ())[:1] == (best,)]
    for folder in folders[:-keep]:
        if folder not in of_best[-1:]:
            remove(folder)


def set_aside(folder: Path) -> None:
    """Takes a damaged checkpoint out of the way of the next save at its step, and keeps it."""
    aside = folder.with_name(folder.name + DAMAGED)
    with contextlib.suppress(OSError):
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)


def _check_there(folder: Path, name: str, mark: Mark) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise InputError(f"{folder / MANIFEST} names a file outside of its folder: {name!r}")
    try:
        size = (folder / name).stat().st_size
    except OSError:
        raise InputError(f"{folder / name} is missing") from None
    if size != mark.size:
        raise InputError(f"{folder / name} is damaged: it has {size} bytes, not {mark.size}")


def _digest(content: Mapping[str, Any]) -> str:
    """Of a manifest without its own digest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
