"""Decodes every file once before training, in parallel, and names the bad ones with the reason.

Results are kept in the user's cache folder, for each file with its size and modification time, so
that a second scan decodes only files that changed. About 0.25 ms a file and process for
Market-1501.

Files are decoded by Pillow (`decoder="pillow"`) or also by DALI ("dali"), whose parser refuses a
few files that Pillow reads, and which cannot go on after a bad one. Beyond `IN_PROCESS` files, and
for DALI always, other processes decode, so that a decoder may crash or hang and its file is named.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import fastdml
from fastdml.data.files.check_worker import READY, reason
from fastdml.errors import InputError, require
from fastdml.files import replacing
from fastdml.paths import home

logger = logging.getLogger(__name__)

Decoder = Literal["pillow", "dali"]
IN_PROCESS = 1024  # files; starting a process costs as much as decoding so many
PATIENCE = 60.0  # seconds for a file, and for a process to start
CRASHES, LATE = "crashes the decoder", "not decoded within"


@dataclass(frozen=True)
class Scan:
    bad: dict[str, str] = field(default_factory=dict)  # path -> reason, in the order of the paths
    decoded: int = 0  # files that the cache did not know
    files: int = 0

    def describe(self, at_most: int | None = None) -> str:
        """One line that names all bad files, or the first `at_most`."""
        named = list(self.bad.items())[:at_most]
        listed = "; ".join(f"{path}: {why}" for path, why in named)
        more = len(self.bad) - len(named)
        rest = f"; and {more:,} more" if more else ""
        return f"{len(self.bad)} of {self.files} files are bad: {listed}{rest}"


def scan(
    paths: Sequence[str],
    *,
    decoder: Decoder = "pillow",
    workers: int | None = None,
    progress: bool | None = None,
    cache: Path | None = None,
) -> Scan:
    """The files that cannot be decoded, and why. Decodes only files that are not in the cache or
    have changed since.

    decoder: "dali" asks DALI as well as Pillow. workers: processes (default: one a core). progress:
    whether a bar is shown (default: where stderr is a terminal). cache: its folder (default: in the
    user's cache folder). Raises MissingExtra where Pillow, or the DALI asked for, is not installed.
    """
    file = _cache_file(paths, decoder, cache)
    known = _load(file) if file else {}
    marks = {path: _mark(path) for path in paths}
    new = [p for p in paths if marks[p] is None or known.get(p, [None])[0] != marks[p]]
    found: dict[str, str | None] = {}
    bar = progress_bar(len(new), "checking images", progress)
    for path, why in _decode_all(new, decoder, workers or os.cpu_count() or 1):
        found[path] = why
        bar.update(1)
    bar.close()
    reasons = {p: found[p] if p in found else known[p][1] for p in paths}
    if new:
        # A decoder may have died or hung because the machine was short of memory or time: that is
        # not remembered, so that the next scan tries the file again.
        surely = [p for p in new if marks[p] is not None and not _condemned(reasons[p])]
        _save(file, known | {p: [marks[p], reasons[p]] for p in surely})
    bad = {path: why for path, why in reasons.items() if why is not None}
    return Scan(bad, len(new), len(paths))


def check_bad_files(bad_files: str) -> None:
    """Raises InputError for a value that is neither "error" nor "skip"."""
    if bad_files not in ("error", "skip"):
        raise InputError(f"bad files {bad_files!r}: give 'error' or 'skip'")


def _condemned(why: str | None) -> bool:
    """Whether the reason is that the decoder's process died or hung, and so may be chance."""
    return why is not None and why.startswith((CRASHES, LATE))


def _decode_all(
    paths: list[str], decoder: Decoder, workers: int
) -> Iterator[tuple[str, str | None]]:
    if decoder == "pillow" and len(paths) <= IN_PROCESS:
        yield from ((path, reason(path)) for path in paths)
        return
    if decoder == "dali":
        require("nvidia.dali", "dali")
    workers = max(1, min(workers, -(-len(paths) // IN_PROCESS)))
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for share in (paths[k::workers] for k in range(workers)):
        threading.Thread(target=_mind, args=(share, decoder, results), daemon=True).start()
    for _ in paths:
        found = results.get()
        if isinstance(found, Exception):
            raise found
        yield found


def _mind(paths: list[str], decoder: Decoder, results: queue.SimpleQueue[Any]) -> None:
    """The body of a thread: puts the results of `_decode_elsewhere` into `results`. An exception is
    put there too: the scan would otherwise wait for ever for the rest."""
    try:
        for found in _decode_elsewhere(paths, decoder):
            results.put(found)
    except Exception as error:
        results.put(error)


def _decode_elsewhere(paths: list[str], decoder: Decoder) -> Iterator[tuple[str, str | None]]:
    """(path, reason or None) of each file, decoded by another process. Where that dies or hangs,
    the file it was at is bad, and a new process goes on with the next one."""
    # A plain command: the processes of `multiprocessing` may run the caller's script again.
    here = str(Path(fastdml.__file__).parents[1])
    before = [p for p in (os.environ.get("PYTHONPATH"),) if p]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *before])}
    while paths:
        command = [sys.executable, "-m", "fastdml.data.files.check_worker", decoder]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(OSError):
                process.stdin.write(json.dumps(paths))
                process.stdin.close()
            if _answer(process, process.stdout)[0] != READY:
                raise RuntimeError(f"`{shlex.join(command)}` does not start here")
            done, late = 0, False
            while done < len(paths):
                line, late = _answer(process, process.stdout)
                if not line.endswith("\n"):
                    break
                yield paths[done], json.loads(line)
                done += 1
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if done < len(paths):
            why = f"{LATE} {PATIENCE:.0f} seconds" if late else CRASHES
            yield paths[done], why
        paths = paths[done + 1 :]


def _answer(process: subprocess.Popen[str], output: IO[str]) -> tuple[str, bool]:
    """The next line of a process, and whether it was ended because it took too long."""
    timer = threading.Timer(PATIENCE, process.kill)
    timer.start()
    line = output.readline()
    late = not timer.is_alive()
    timer.cancel()
    return line, late


def _mark(path: str) -> list[int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _cache_file(paths: Sequence[str], decoder: Decoder, folder: Path | None) -> Path | None:
    """One for each set of folders, decoder and version of it; None where the user has no folder
    for it."""
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or ((own := home()) and own / ".cache")
        if not base:
            return None
        folder = Path(base) / "fastdml" / "scans"
    versions = [require("PIL", "train").__version__]
    if decoder == "dali":
        versions.append(require("nvidia.dali", "dali").__version__)
    folders = sorted({os.path.dirname(os.path.abspath(path)) for path in paths})
    key = hashlib.sha256(os.fsencode("\n".join([decoder, *versions, *folders]))).hexdigest()
    return folder / f"{key[:24]}.json"


def _load(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    kept = content.items() if isinstance(content, dict) else ()
    return {path: entry for path, entry in kept if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    """Whether `entry` has the form that a scan writes: the file's size and time, and the reason or
    None."""
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], list)
        and (entry[1] is None or isinstance(entry[1], str))
    )


def _save(file: Path | None, content: dict[str, list[Any]]) -> None:
    """Writes the cache. A failure is ignored: the next scan then decodes again."""
    if file is None:
        forgotten = "the account has no home folder (XDG_CACHE_HOME may name another)"
        logger.warning("the scan of the images is not remembered: %s", forgotten)
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            part.write(json.dumps(content).encode())
    except OSError as error:
        logger.warning("the scan of the images is not remembered: %s", error)


class Bar(Protocol):
    """As tqdm has it."""

    def update(self, n: int) -> object: ...

    def close(self) -> None: ...


class _NoBar:
    def update(self, n: int) -> None: ...

    def close(self) -> None: ...


def progress_bar(total: int | None, what: str, progress: bool | None = None) -> Bar:
    """A bar on stderr. total: None where nobody knows it. progress: whether it is shown (default:
    where stderr is a terminal)."""
    if progress is False or (progress is None and not sys.stderr.isatty()) or total == 0:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:  # a bar is a courtesy, not a reason to fail
        return _NoBar()
    return tqdm(total=total, desc=what, unit=" files", leave=False)
