"""What a checkpoint holds of a training, and how a training goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdml.engine import executions
from fastdml.engine.auto import Choice
from fastdml.engine.optimizer_state import by_name, load_by_name, state_by_name
from fastdml.errors import InputError
from fastdml.parallel.shard_files import joined
from fastdml.train import checkpoint
from fastdml.train.random_state import rng_state, set_rng_state
from fastdml.train.same_data import check_same_data
from fastdml.train.teachers import check_same_teachers

if TYPE_CHECKING:
    from fastdml.train.trainer import Trainer

PEERS, CENTERS = "peers", "centers"  # before a peer's number, in names of weights and of centres
# Raised where a value in a checkpoint is of the wrong kind.
DAMAGE = (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that a resumed run goes on from, as tensors and plain values."""
    return {
        **run_state(trainer),
        "cohort": trainer.cohort.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "ema": trainer.ema.state_dict() if trainer.ema else None,
        "metric": trainer.metric.state_dict() if trainer.metric else None,
        "rng": rng_state(trainer.device),
        "totals": trainer.totals.state(),
    }


def run_state(trainer: Trainer) -> dict[str, Any]:
    """What belongs to no peer, and is the same on all ranks of a mesh."""
    threads = trainer.choice and {
        "step": trainer.choice.threads,
        "elsewhere": trainer.choice.elsewhere,
    }
    return {
        "config": trainer.config.to_dict(),
        "precision": trainer.amp.name,
        "peers": list(trainer.cohort.names),
        "steps_per_epoch": trainer.steps,
        "description": trainer.cohort.description(),
        "data": trainer.data_marks,
        "scaler": trainer.amp.scaler.state_dict() if trainer.amp.scaler else None,
        "execution": trainer.execution,
        "threads": threads,
        "updates": trainer.schedule.updates,
        "peer_weights": getattr(trainer.loss, "peer_weights", None),
        "loss_schedules": {n: s.state_dict() for n, s in trainer.loss_schedules.items()},
        "overflows": trainer.record.overflows,
        "clock": trainer.clock.state(),
        **trainer.progress.state(),
    }


def peer_state(trainer: Trainer, k: int) -> dict[str, Any]:
    """What belongs to peer k, under names that do not depend on the other peers."""
    peer, metric = trainer.cohort.peers[k], trainer.metric
    return {
        "name": trainer.cohort.names[k],
        "weights": peer.state_dict(),
        "optimizer": state_by_name(trainer.optimizer, peer),
        "ema": below(PEERS, k, trainer.ema.state_dict()) if trainer.ema else None,
        "metric": below(CENTERS, k, metric.state_dict()) if metric else None,
    }


def rank_state(trainer: Trainer) -> dict[str, Any]:
    """What one rank of a mesh alone has: its share of the statistics' sums, its generators, copies
    that its step keeps of other peers, and the buffers of its peers, since each column has running
    statistics of its own."""
    saved = trainer.cohort.state_dict().keys()
    buffers = {n: t for n, t in trainer.cohort.named_buffers() if n in saved}
    averages = trainer.ema.state_dict() if trainer.ema else {}
    kept = getattr(trainer.step, "state_dict", None)
    return {
        "totals": trainer.totals.state(),
        "rng": rng_state(trainer.device),
        "step": kept() if kept else {},
        "buffers": buffers,
        "ema": {name: t for name, t in averages.items() if name in buffers},
    }


def below(prefix: str, k: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of peer k, without what their names begin with."""
    own = f"{prefix}.{k}."
    return {n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)}


def restore(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """Goes on from the checkpoint that was read from `path`. Raises InputError where it is of
    another run, or damaged in a way that its checksums do not show."""
    try:
        checkpoint.check_resumable(state["config"], trainer.config)
        _take_record(trainer, state, path)
        check_same_data(state.get("data"), trainer.data_marks, f"cannot resume {path}")
        _check_fits(trainer, state, path)
        teachers = state.get("description", {}).get("teachers", [])
        check_same_teachers(teachers, trainer.cohort.taught_by, f"cannot resume {path}")
        _take(trainer, state, path)
    except (InputError, torch.OutOfMemoryError):
        raise
    except KeyError as error:
        raise InputError(f"{path} is not a checkpoint that a run saved: no {error}") from error
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not a checkpoint that a run saved: {reason}") from error


def _check_fits(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    now = {
        "peers": ("peers", list(trainer.cohort.names)),
        "precision": ("the precision (set amp)", trainer.amp.name),
        "steps_per_epoch": ("steps an epoch", trainer.steps),
    }
    for key, (what, value) in now.items():
        if state[key] != value:
            raise InputError(f"cannot resume {path}: {what} was {state[key]} and is now {value}")


def _take_record(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """Restores what the cohort knew of its images, except what the data tell."""
    saved = state.get("description", {})  # not in checkpoints of earlier versions
    found = trainer.cohort.record()
    for key in ("classes", *found):  # which decide on mean and std
        was, now = saved.get(key), found[key]
        if now is None:
            setattr(trainer.cohort, key, was)
        elif was not in (None, now):
            raise InputError(
                f"cannot resume {path}: {_changed(key, was, now)}; restore the data, or start a "
                "new run in another folder"
            )


def _changed(key: str, was: Any, now: Any) -> str:
    """What differs between two values of a cohort's record, in a few words."""
    first = ""
    if key == "classes" and isinstance(was, list):
        pairs = enumerate(zip_longest(was, now))
        k, (before, after) = next((k, pair) for k, pair in pairs if pair[0] != pair[1])
        first = f" (class {k}: {before!r}, now {after!r})"
    return f"the {key} of the images was {str(was)[:60]} and is now {str(now)[:60]}{first}"


def _take(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    teachers = state.get("description", {}).get("teachers", [])
    names = [entry["name"] for entry in teachers]  # which stay in the log, wherever they are now
    for teacher, name in zip(trainer.cohort.teachers, names, strict=True):
        teacher.name = name
    trainer.totals.teachers = tuple(names)
    trainer.progress.load(state)
    checkpoint.load_weights(trainer.cohort, _own(trainer, PEERS, state["cohort"]), path)
    _load_optimizer(trainer, state["optimizer"])
    if trainer.amp.scaler:
        trainer.amp.scaler.load_state_dict(state["scaler"])
    if trainer.ema:
        trainer.ema.load_state_dict(joined(state["ema"], None, trainer.cohort))
    if trainer.metric:
        own = _own(trainer, CENTERS, state["metric"])
        trainer.metric.load_state_dict({**trainer.metric.state_dict(), **own})
    trainer.schedule.load(state["updates"])
    if (weights := state.get("peer_weights")) is not None:  # that a callback may have set
        trainer.loss.peer_weights = weights.to(trainer.device)
    for name, scheduled in trainer.loss_schedules.items():
        scheduled.load_state_dict(state["loss_schedules"][name])
    trainer.record.overflows.copy_(state["overflows"])
    trainer.totals.load(state["totals"])
    _restore_choice(trainer, state)
    trainer.clock.load(state["clock"])
    set_rng_state(state["rng"], trainer.device)
    if hasattr(trainer.step, "number"):  # of steps, by which peers that draw are seeded
        trainer.step.number = trainer.progress.position
    if state.get("step"):
        trainer.step.load_state_dict(state["step"])


def local_peers(trainer: Trainer) -> tuple[int, ...]:
    """The numbers of the peers that this process trains."""
    return trainer.mesh.local if trainer.mesh else tuple(range(len(trainer.cohort)))


def _own(trainer: Trainer, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without those of peers that other ranks train."""
    if trainer.mesh is None:
        return tensors
    own = tuple(f"{prefix}.{k}." for k in local_peers(trainer))
    return {name: t for name, t in tensors.items() if name.startswith(own)}


def _load_optimizer(trainer: Trainer, saved: dict[Any, Any]) -> None:
    """saved: as torch keeps the state, or by peer as `peer_state` has it."""
    if "param_groups" in saved and trainer.mesh is None:
        trainer.optimizer.load_state_dict(saved)
        return
    peers = {k: trainer.cohort.peers[k] for k in local_peers(trainer)}
    states = by_name(saved, peers) if "param_groups" in saved else {k: saved[k] for k in peers}
    states = {k: joined(of_peer, None, peers[k]) for k, of_peer in states.items()}
    load_by_name(trainer.optimizer, peers, states)


def _restore_choice(trainer: Trainer, state: dict[str, Any]) -> None:
    """Restores execution and threads where the settings leave them open, so that the run goes
    on with the same bits."""
    config, execution = trainer.config, state["execution"]
    if config.execution != "auto":
        execution = config.execution
    if execution not in executions(trainer.device):
        return  # no step yet, or another kind of device
    threads = elsewhere = None
    if trainer.device.type == "cpu":
        # Checkpoints of earlier versions name no threads: those runs used torch's own number.
        was = state.get("threads") or {}
        if was.get("step", 0) is None:
            return  # begun on CUDA
        threads = config.threads or was.get("step") or torch.get_num_threads()
        elsewhere = config.threads or was.get("elsewhere") or torch.get_num_threads()
    trainer.use(Choice(execution, threads, elsewhere))
