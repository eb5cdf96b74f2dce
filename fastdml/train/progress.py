"""How far a training has come, for its checkpoint and for the lines that the user sees."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastdml.errors import InputError
from fastdml.report.scoring import ensembles
from fastdml.train.tasks.task import scoring_of
from fastdml.units import duration, percent, rate

WORTH_SAYING = 0.05  # share of the time that steps wait for data
Images = Literal["validation", "test"]


@dataclass
class Progress:
    """Steps done, their records and scores, and the time they took. Plain values, on the host."""

    steps: int  # an epoch
    total: int  # steps of the training
    images: Images = "test"  # that evaluations read
    after: int = 0  # steps of the run that follow this training
    position: int = 0  # steps done
    seconds: float = 0.0  # that it took before this process
    history: list[dict[str, Any]] = field(default_factory=list)  # the records of its epochs
    scores: Any = None  # of the last evaluation
    best_epoch: float = 0
    best_scores: Any = None
    tested: dict[str, Any] | None = None  # test scores at the end, by weights: "last" and "best"
    started: float = 0.0  # when this process began with it
    stopped: str | None = None  # why training ended early
    first: int | None = None  # the position at this process's first step, which was at `begun`
    begun: float = 0.0

    @property
    def epochs(self) -> int:
        """The number of epochs, the last of which may be cut short."""
        return -(-self.total // self.steps)

    @property
    def epoch(self) -> int:
        """The number of the epoch that the last step belonged to, from 1 on."""
        return -(-self.position // self.steps)

    @property
    def trained(self) -> float:
        """Epochs trained; of a last one cut short, the part that there was."""
        whole = self.position == self.epoch * self.steps
        return self.epoch if whole else self.position / self.steps

    @property
    def done(self) -> bool:
        return self.position >= self.total or self.stopped is not None

    @property
    def left(self) -> int:
        """Steps left of the whole run."""
        return self.after if self.done else self.total - self.position + self.after

    @property
    def seconds_left(self) -> float | None:
        """Of the whole run, by this process's steps so far, evaluations and checkpoints included;
        None before the first of them."""
        if self.first is None or self.position == self.first:
            return None
        return (time.monotonic() - self.begun) / (self.position - self.first) * self.left

    def start(self) -> None:
        self.started = time.monotonic()

    def begin(self) -> None:
        """The first step of this process is about to run."""
        self.first, self.begun = self.position, time.monotonic()

    def elapsed(self) -> float:
        """Seconds of training and evaluation, over all processes that took part."""
        return self.seconds + time.monotonic() - self.started

    def evaluated(self, scores: Any) -> bool:
        """Notes the scores of the last epoch; whether they are the best so far."""
        self.scores = scores
        self.history[-1][self.images] = dataclasses.asdict(scores)
        mean = scoring_of(scores).mean
        best = self.best_scores is None or mean(scores) > mean(self.best_scores)
        if best:
            self.best_epoch, self.best_scores = self.trained, scores
        return best

    @property
    def best_step(self) -> int | None:
        """The step after which the best weights were found; None before an evaluation."""
        return None if self.best_scores is None else round(self.best_epoch * self.steps)

    @property
    def evaluated_now(self) -> bool:
        """Whether the last epoch was evaluated."""
        return self.images in self.history[-1]

    @property
    def stale(self) -> int:
        """Evaluations since the best one."""
        later = (r for r in self.history if r["epoch"] > self.best_epoch)
        return sum(self.images in record for record in later)

    # --- for the user ---

    def where(self, saved: Path) -> str:
        epoch, step = divmod(self.position, self.steps)
        return (
            f"in epoch {epoch + 1}, after {step} of {self.steps} steps; saved to {saved}: resume "
            "goes on there"
        )

    def epoch_line(self) -> str:
        """The epoch that has just ended: losses, scores in %, images a second, time left. With two
        peers it fits into 100 columns unless steps wait for data."""
        record = self.history[-1]
        parts = [
            f"epoch {self.epoch}/{self.epochs}",
            "loss " + " ".join(f"{x:.3f}" for x in record["loss"]),
        ]
        if scores := record.get(self.images):
            lead = scoring_of(scores).headlines[0]
            values = " ".join(map(percent, scores[lead.name]))
            values += " ens " + " ".join(percent(own[lead.name]) for _, own in ensembles(scores))
            parts.append(f"{'test' if self.images == 'test' else 'val'} {lead.label} {values}")
        if record["images_per_second"]:
            parts.append(f"{rate(record['images_per_second'])}/s")
            if record["data_wait"] >= WORTH_SAYING:
                parts.append(f"data wait {100 * record['data_wait']:.0f} %")
        if not self.done and (seconds := self.seconds_left) is not None:
            parts.append(f"{duration(seconds)} left")
        return "  ".join(parts)

    # --- for the checkpoint ---

    def state(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "seconds": self.elapsed(),
            "history": self.history,
            "scores": self.scores and dataclasses.asdict(self.scores),
            "best_epoch": self.best_epoch,
            "best_scores": self.best_scores and dataclasses.asdict(self.best_scores),
            "stopped": self.stopped,
            "tested": self.tested and {k: dataclasses.asdict(v) for k, v in self.tested.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes over the saved progress. Raises ValueError, TypeError or KeyError for values that
        no training saves, InputError where the settings are of a shorter training."""
        position, history = state["position"], state["history"]
        if type(position) is not int or position < 0:
            raise ValueError(f"position {position!r}")
        if [r["step"] for r in history] != [
            min(round(r["epoch"] * self.steps), position) for r in history
        ]:
            raise ValueError("a history of other steps")
        if position > self.total:
            raise InputError(
                f"cannot resume: the run has done {position // self.steps} epochs, more "
                f"than epochs={self.epochs}"
            )
        self.position, self.seconds = position, float(state["seconds"])
        best = float(state["best_epoch"])  # whole, but for a last epoch that was cut short
        self.history, self.best_epoch = history, int(best) if best.is_integer() else best
        self.stopped = state.get("stopped")  # not in checkpoints of earlier versions
        if not isinstance(self.stopped, str | None):
            raise ValueError(f"stopped {self.stopped!r}")
        self.scores, self.best_scores = map(_read, (state["scores"], state["best_scores"]))
        if self.done and (tested := state.get("tested")):  # as `stopped`
            self.tested = {weights: _read(tested[weights]) for weights in ("last", "best")}


def _read(scores: dict[str, Any] | None) -> Any:
    """The scores that a checkpoint holds as a dict."""
    return scores and scoring_of(scores).read(scores)
