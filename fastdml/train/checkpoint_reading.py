"""Checkpoints read again: which are there, the newest first, and what is in one.

A run may hold checkpoints of both forms, last.ckpt of one process and folders of a mesh. The one
taken after most steps counts, of equals the one written last.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdml.errors import InputError
from fastdml.parallel.shard_files import joined
from fastdml.train import checkpoint
from fastdml.train.checkpoint_folder import (
    MANIFEST,
    RUN,
    Manifest,
    check_files,
    is_whole,
    peer_name,
    place,
    rank_name,
    read_manifest,
    whole_folders,
)
from fastdml.train.run_folder import LAST_CHECKPOINT

if TYPE_CHECKING:
    from fastdml.parallel import Mesh

logger = logging.getLogger(__name__)

SUMS = ("sums", "marked_sums")  # of the statistics, each rank's share


class Reader(NamedTuple):
    """Who reads a checkpoint: which rank of which mesh, with which peers. Without a mesh all."""

    peer: int = 1
    data: int = 1
    rank: int = 0
    local: tuple[int, ...] | None = None

    @classmethod
    def on(cls, mesh: Mesh | None) -> Reader:
        return cls() if mesh is None else cls(mesh.peer, mesh.data, mesh.rank, mesh.local)

    @property
    def column(self) -> int:
        return self.rank % self.data

    def of(self, K: int) -> tuple[int, ...]:
        """Its peers of K."""
        return tuple(range(K)) if self.local is None else self.local


EVERYTHING = Reader()


def checkpoints(run: Path) -> list[Path]:
    """All of a run that look whole, the newest first."""
    folders, last = whole_folders(run), run / LAST_CHECKPOINT
    if not folders or not last.is_file():
        return [last] if last.is_file() else folders[::-1]
    newest, written = _written(folders[-1] / MANIFEST), _written(last)
    at: float | None = _position(last)
    if at is None:  # it cannot be read, which is said where it is the newest
        at = math.inf if written >= newest else -1
    keyed = [((place(folder) or (0, 0))[0], _written(folder / MANIFEST), folder)
             for folder in folders]  # fmt: skip
    return [path for *_, path in sorted([*keyed, (at, written, last)], reverse=True)]


class Found(NamedTuple):
    state: dict[str, Any]
    path: Path
    damaged: list[Path]  # newer ones, which could not be read


def read_newest(run: Path, reader: Reader = EVERYTHING) -> Found | None:
    """The newest checkpoint that is whole; None where there is none. Says so where it is not the
    newest. Looks again where a running training removes one that is being read. Raises InputError
    where none of them can be read."""
    reasons: list[str] = []
    damaged: list[Path] = []
    paths = checkpoints(run)
    while paths:
        path = paths.pop(0)
        try:
            state = read(path, reader)
        except InputError as error:
            if not (path.is_file() or is_whole(path)):
                paths = [found for found in checkpoints(run) if found not in damaged]
                continue
            reasons.append(str(error))
            damaged.append(path)
            continue
        if damaged:
            logger.warning(fallen_back(reasons, path))
        return Found(state, path, damaged)
    if reasons:
        raise InputError(reasons[0])
    return None


def fallen_back(damage: Sequence[str], path: Path) -> str:
    """The line that says so."""
    more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
    return f"{damage[0]}{more}: going on from the checkpoint before, {path}"


def read(
    path: Path, reader: Reader = EVERYTHING, peers: Mapping[int, nn.Module] | None = None
) -> dict[str, Any]:
    """What a checkpoint of either form holds, as `trainer_state.restore` takes it. Of a folder each
    file that is read is compared with the manifest first. peers: to load into, which tell what is
    read as shards; all is whole where they are not known. Raises InputError."""
    if path.name == LAST_CHECKPOINT:
        state = checkpoint.load(path)
        _in_column_0(state.get("totals"), reader)
        return state
    manifest = read_manifest(path)
    state = _file(manifest, RUN)
    names, rows = state["peers"], state["rows"]
    local = reader.of(len(names))
    weights: dict[str, Tensor] = {}
    averages: dict[str, Tensor] = {}
    centers: dict[str, Tensor] = {}
    state["optimizer"] = {}
    for k in local:
        found = _peer(manifest, k, names[k], peers[k] if peers else None)
        weights |= {f"peers.{k}.{name}": t for name, t in found["weights"].items()}
        averages |= {f"peers.{k}.{name}": t for name, t in (found["ema"] or {}).items()}
        centers |= {f"centers.{k}.{name}": t for name, t in (found["metric"] or {}).items()}
        state["optimizer"][k] = found["optimizer"]
    if reader.data == manifest.data > 1:
        for row in sorted({rows[k] for k in local}):
            own = _file(manifest, rank_name(row * manifest.data + reader.column))
            mine = tuple(f"peers.{k}." for k in local)
            weights.update({n: t for n, t in own["buffers"].items() if n.startswith(mine)})
            averages.update({n: t for n, t in own["ema"].items() if n.startswith(mine)})
    with_ema = state.pop("with_ema")
    state |= {"cohort": weights, "ema": averages if with_ema else None, "metric": centers}
    return state | _rank(manifest, state, reader)


def _rank(manifest: Manifest, state: dict[str, Any], reader: Reader) -> dict[str, Any]:
    """What was the ranks' own. On the mesh that saved it each goes on with its own bits; on another
    the sums are added, and column 0 goes on with them."""
    rows = state["rows"]
    held = tuple(k for k, row in enumerate(rows) if row == reader.rank // reader.data)
    mesh = (reader.peer, reader.data) == (manifest.peer, manifest.data)
    if mesh and held == reader.of(len(rows)):
        own = _file(manifest, rank_name(reader.rank))
        return {"totals": own["totals"], "rng": own["rng"], "step": own["step"]}
    ranks = [_file(manifest, rank_name(r)) for r in range(manifest.peer * manifest.data)]
    totals = dict(ranks[0]["totals"])
    for name in SUMS:
        totals[name] = torch.stack([rank["totals"][name] for rank in ranks]).sum(0)
    totals["first_bad"] = torch.stack([r["totals"]["first_bad"] for r in ranks]).amin(0)
    _in_column_0(totals, reader)
    return {"totals": totals, "rng": ranks[0]["rng"], "step": {}}


def _in_column_0(totals: Any, reader: Reader) -> None:
    """Leaves sums of the whole batch to one column: each adds its own share."""
    if reader.column and isinstance(totals, dict):
        totals.update({name: torch.zeros_like(totals[name]) for name in SUMS})


def run_part(run: Path) -> dict[str, Any] | None:
    """What the newest checkpoint of a run says of more than a peer, without the weights; None where
    there is none that can be read."""
    for path in checkpoints(run):
        found = _mapped(path if path.name == LAST_CHECKPOINT else path / RUN)
        if found is not None:
            return found
    return None


def written_with(run: Path) -> tuple[int, int] | None:
    """`accumulate` and the columns of the mesh when the newest checkpoint that can be read was
    written; None without one. A process is one column."""
    for path in checkpoints(run):
        if path.name == LAST_CHECKPOINT:
            settings = (_mapped(path) or {}).get("config")
            found = settings.get("accumulate") if isinstance(settings, dict) else None
            if isinstance(found, int):
                return int(found), 1
            continue
        try:
            manifest = read_manifest(path)
        except InputError:  # said where it is restored
            continue
        return manifest.accumulate, manifest.data
    return None


def _file(manifest: Manifest, name: str) -> dict[str, Any]:
    try:
        mark = manifest.files[name]
    except KeyError:
        raise InputError(f"{manifest.folder / MANIFEST} is damaged: it has no {name}") from None
    return checkpoint.load(manifest.folder / name, mark)


def _peer(manifest: Manifest, k: int, name: str, peer: nn.Module | None) -> dict[str, Any]:
    """What belongs to a peer. Its shards are read when their digests have been compared: their
    index is a pickle."""
    called = peer_name(k, name)
    found = _file(manifest, f"{called}.ckpt")
    shards = manifest.below(called)
    check_files(manifest.folder, shards)
    return joined(found, manifest.folder / called if shards else None, peer)


def _written(path: Path) -> float:
    """When, by its file system; before all others where a running training has removed it."""
    try:
        return path.stat().st_mtime
    except OSError:
        return -math.inf


def _position(last: Path) -> int | None:
    """How many steps last.ckpt was taken after; None where it cannot be read."""
    found = (_mapped(last) or {}).get("position")
    return found if isinstance(found, int) else None


def _mapped(path: Path) -> dict[str, Any] | None:
    """A file of a checkpoint without reading its tensors; None where it cannot be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a damaged file can raise nearly anything
        return None
    return state if isinstance(state, dict) else None
