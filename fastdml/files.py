"""Files that are whole or not there.

A file is written under another name, forced to disk and renamed, and its folder is forced to disk,
so that a process or a machine that dies leaves the old file or the new one. The other name is
always the same, `.NAME.partial`: a file that a killed process left there is replaced by the next
writing, and a link put there is removed, not followed. Where several processes may write at once,
each writing has a name of its own, `.NAME.NUMBER.partial` with a random number, since processes in
two containers may have the same, and a lock on it: what has none, of a process that was killed, is
removed by the next writing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastdml.errors import InputError

NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of file systems that cannot force a folder to disk


class Staged:
    """Files that get their names together at the end of the block, in the order they were written;
    or, where it ends by an error, none does. Raises OSError."""

    def __init__(self) -> None:
        self.paths: list[Path] = []

    def __enter__(self) -> Staged:
        return self

    @contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        self.paths.append(path)
        with _naming(path), create(partial(path)) as file:
            yield file
            sync(file)

    def write(self, path: Path, data: bytes) -> None:
        with self.open(path) as file:
            file.write(data)

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(kind is None)

    def close(self, fine: bool) -> None:
        """Gives the files their names, or where something was not fine removes them."""
        try:
            if fine:
                for path in self.paths:
                    with _naming(path):
                        os.replace(partial(path), path)
                for folder in {path.parent: None for path in self.paths}:
                    sync_folder(folder)
        finally:
            for path in self.paths:
                with contextlib.suppress(OSError):
                    partial(path).unlink()


def partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def safe_name(name: str, longest: int = 100) -> str:
    """`name` as part of a file's name on any system: ASCII letters, digits and `_.-`, every other
    character as `_`, at most `longest` of them."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:longest]


def create(path: Path) -> BinaryIO:
    """Opens a new file for writing; whatever had that name is removed first, not followed."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.fdopen(os.open(path, NEW, 0o666), "wb")


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replaces a file in one step: a reader sees the old content or the new. Raises InputError
    where it cannot be written."""
    with writing(path), Staged() as staged:
        staged.write(path, data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that gets the name `path` at the end of the block, unless the block raises. Several
    processes and threads may write `path` at once; the last one wins. Not forced to disk. Raises
    OSError."""
    part = _own_partial(path)
    _remove_abandoned(path)
    try:
        with _locked(part, lambda: create(part).close()):
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "wb") as file:
                yield file
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, of this block alone, to be filled and given that name; it is
    removed at the end of the block if it is still there. Raises OSError."""
    part = _own_partial(path)
    _remove_abandoned(path)
    try:
        with _locked(part, lambda: part.mkdir(exist_ok=True)):
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _own_partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.randbits(32)}.partial")


@contextmanager
def _locked(part: Path, make: Callable[[], None]) -> Iterator[None]:
    """A lock on what `make` makes, which is made again where another process has taken it for
    abandoned before it was locked. Without one where the file system has none."""
    lock = None
    while lock is None:
        make()
        lock = _lock(part)
    try:
        yield
    finally:
        os.close(lock)


def _lock(part: Path) -> int | None:
    """Of a file or folder, opened and locked; None where it is gone by then."""
    try:
        lock = os.open(part, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(lock), os.lstat(part)):
            return lock
    os.close(lock)
    return None


def _remove_abandoned(path: Path) -> None:
    """Removes the partial files and folders of `path` that no process holds a lock on."""
    name = re.compile(re.escape(f".{path.name}.") + r"\d+\.partial")
    for part in path.parent.glob(".*.partial"):
        if name.fullmatch(part.name):
            with contextlib.suppress(OSError):
                _remove_unlocked(part)


def _remove_unlocked(part: Path) -> None:
    """Raises OSError where it is locked."""
    lock = os.open(part, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()
    finally:
        os.close(lock)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError within it into an InputError about the file that it names, or `path`."""
    try:
        yield
    except OSError as error:
        name = error.filename or path
        remedy = ": make room" if error.errno in NO_ROOM else ""
        if error.errno in (errno.EROFS, errno.EACCES):
            remedy = ": choose another place"
        raise InputError(f"cannot write {name}: {error.strerror or error}{remedy}") from error


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = str(path)  # not the temporary name, or none
        raise


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Forces the folder's list of names to disk, without which a rename may be lost."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(opened)
