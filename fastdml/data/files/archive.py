"""Downloads an archive and unpacks it, trusting neither the server nor the archive.

A file or folder appears under its final name only when it is whole: a download is written to a
temporary name and renamed once its MD5 is right, an archive is unpacked into a temporary folder
that is renamed at the end. Nothing that exists is overwritten; an interrupted run is just repeated.

Entries are written here one by one rather than by `tarfile`'s filters, which differ between the
Python versions supported: only plain files and folders below the expected folder are accepted.
What operating systems leave in archives is left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import shutil
import tarfile
import urllib.request
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from fastdml.data.registry import HINT
from fastdml.errors import InputError
from fastdml.files import draft_folder, replacing, sync

CHUNK = 1 << 20
TIMEOUT = 30  # seconds without a byte
LEFTOVERS = (".DS_Store", "__MACOSX", "Thumbs.db", "desktop.ini")


def fetch(url: str, target: Path, md5: str, hint: str = HINT) -> None:
    """Downloads `url` to `target`, or keeps the `target` that is there, if its MD5 is `md5`.
    hint: what messages say that a download is asked for by. Raises InputError for another MD5 and
    for a download that fails; nothing is left at `target` then."""
    if target.exists():
        with target.open("rb") as file:
            digest = hashlib.md5(usedforsecurity=False)
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        _check_md5(digest.hexdigest(), md5, target, f"delete it and use {hint} again")
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file:
            found = _download(url, file)
            _check_md5(found, md5, url, f"run again, or put the official file at {target}")
            sync(file)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{url}: the download failed ({error}): run again, or put the file at {target} "
            f"and use {hint}"
        ) from error


def _download(url: str, file: BinaryIO) -> str:
    """Copies `url` into the open `file`; returns the MD5 of what arrived."""
    digest = hashlib.md5(usedforsecurity=False)
    arrived = 0
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        with _progress(total, url.rsplit("/", 1)[-1]) as bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                arrived += len(chunk)
                if bar is not None:
                    bar.update(len(chunk))
    if total is not None and arrived != total:
        raise OSError(f"the connection ended after {arrived:,} of {total:,} bytes")
    return digest.hexdigest()


def _check_md5(found: str, expected: str, what: Path | str, remedy: str) -> None:
    if found != expected:
        raise InputError(f"{what}: MD5 is {found}, the official one is {expected}: {remedy}")


def _progress(total: int | None, name: str) -> contextlib.AbstractContextManager[Any]:
    """tqdm's bar, or None where it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:  # a bar is a courtesy, not a reason to fail
        return contextlib.nullcontext()
    return tqdm(total=total, desc=name, unit="B", unit_scale=True)


def extract(archive: Path, root: Path, folder: str, hint: str = HINT) -> None:
    """Unpacks the .tar.gz `archive`, whose entries must all lie in `folder`, to `root/folder`.
    Raises InputError for a folder that exists, a damaged archive, and an entry that is a link or
    lies elsewhere; nothing is left at `root/folder` then."""
    if (root / folder).exists():
        raise InputError(
            f"{root / folder}: is there but incomplete: move it away and use {hint} again"
        )
    try:
        with draft_folder(root / folder) as temporary:
            with tarfile.open(archive, "r:gz") as tar:
                for entry in tar:
                    _unpack(tar, entry, temporary, archive, folder)
            if not (temporary / folder).is_dir():
                raise InputError(f"{archive}: holds no folder {folder}: fetch the official archive")
            (temporary / folder).rename(root / folder)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise InputError(
            f"{archive}: cannot be unpacked ({error}): delete it and use {hint} again"
        ) from error


def is_leftover(name: str) -> bool:
    """Whether it is the name of a file or folder that an operating system put there: macOS leaves a
    ._NAME beside each NAME where a file system or an archive holds no attributes."""
    return name in LEFTOVERS or name.startswith("._")


def _unpack(
    tar: tarfile.TarFile, entry: tarfile.TarInfo, into: Path, archive: Path, folder: str
) -> None:
    path = PurePosixPath(entry.name)
    if path.is_absolute() or ".." in path.parts or "\\" in entry.name or "\0" in entry.name:
        reason = "climbs out of the folder"
    elif any(map(is_leftover, path.parts)):
        return
    elif path.parts[:1] != (folder,):
        reason = f"lies outside {folder}"
    elif entry.issym() or entry.islnk():
        reason = f"is a link to {entry.linkname!r}"
    elif not (entry.isdir() or entry.isreg()):
        reason = "is neither a file nor a folder"
    else:
        target = into / path
        if entry.isdir():
            target.mkdir(parents=True, exist_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        source = tar.extractfile(entry)
        assert source is not None  # None is for links and folders
        with source, target.open("xb") as file:
            shutil.copyfileobj(source, file, CHUNK)
        return
    raise InputError(
        f"{archive}: entry {entry.name!r} {reason}: nothing was unpacked, use the official archive"
    )
