"""One training of a cohort into one folder: steps, readings, evaluations, checkpoints, signals.

Inside the step loop nothing waits for the device. It is waited for every `log_every` steps to read
the losses, at checkpoints, and at the end of an epoch. A loss that is not finite is noted on the
device at its step and noticed at the next reading; a checkpoint is written only after such a
reading, so the last one is always good.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdml.cohort import Cohort
from fastdml.devices import device_name
from fastdml.engine import (
    Ema,
    Schedule,
    make_optimizer,
    make_step,
)
from fastdml.engine.amp import Amp
from fastdml.engine.auto import Choice
from fastdml.engine.execution import ExecutionName
from fastdml.engine.profile import Profile
from fastdml.errors import InputError
from fastdml.eval_mode import evaluating
from fastdml.notebook import progress_bar
from fastdml.report.metrics_log import METRICS, MetricsLog
from fastdml.train import learning_rate
from fastdml.train.batches import Batches, assembler
from fastdml.train.callbacks import Calls
from fastdml.train.config.base import TrainConfig
from fastdml.train.evaluations import Evaluations, read_test_set
from fastdml.train.loss_schedules import loss_schedules
from fastdml.train.meters import Clock, Record, Totals
from fastdml.train.peer_costs import peer_seconds
from fastdml.train.progress import Progress
from fastdml.train.random_state import seed_generators
from fastdml.train.result import TrainResult
from fastdml.train.run_folder import BEST
from fastdml.train.same_data import data_mark
from fastdml.train.saving import checkpoints_of
from fastdml.train.stopping import Stop
from fastdml.train.tasks.task import Task, scoring_of
from fastdml.train.teacher_cache import TeacherCache
from fastdml.train.unlabelled import image_counts, learns_without_labels
from fastdml.units import duration, milliseconds
from fastdml.yaml_file import CONFIG

if TYPE_CHECKING:
    from fastdml.parallel import Mesh

logger = logging.getLogger(__name__)

LOSS_NAMES = {"ce": "cross-entropy", "kl": "KL divergence", "metric": "metric loss"}


class TrainingDiverged(InputError):
    """A loss is no longer finite; the message names the peer, the step and the loss."""


class Trainer:
    """One training of a cohort into one folder, from its checkpoint if there is one."""

    def __init__(
        self,
        cohort: Cohort,
        train: Batches,
        evaluations: Evaluations,
        task: Task,
        config: TrainConfig,
        folder: Path,
        amp: Amp,
        *,
        label: str,  # "mutual" or "independent", for the user
        choice: Choice | None = None,  # what the steps run as; made at the first one by default
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.cohort, self.peers = cohort, list(cohort.peers)
        self.train, self.evaluations = train, evaluations
        self.task, self.config, self.folder, self.amp = task, config, folder, amp
        self.label = label
        self.device = amp.device
        self.steps = len(train)  # an epoch
        total = learning_rate.total_steps(config, self.steps)
        after = total * config.independent
        self.progress = Progress(self.steps, total, evaluations.images, after)
        self.optimizer = make_optimizer(
            cohort,
            config.optimizer,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        rates = learning_rate.rates(config, self.steps)
        self.rates = rates.tolist()
        self.schedule = Schedule(self.optimizer, rates)
        partly = {"mimic_ignored": True} if learns_without_labels(train) else {}
        networks = len(cohort) + len(cohort.teachers)
        self.loss = task.mutual_loss(config, networks, **partly).to(self.device)
        self.loss_schedules = loss_schedules(config, self.steps, total, self.device)
        for name, scheduled in self.loss_schedules.items():
            setattr(self.loss, name, scheduled.value)
        self.metric = task.metric_loss(config, cohort)
        if self.metric is not None:
            self.metric.to(self.device)
        self.totals = Totals(
            len(cohort),
            self.device,
            metric=self.metric is not None,
            teachers=[teacher.name for teacher in cohort.teachers],
        )
        self.record = Record(self.schedule, self.totals, [*self.loss_schedules.values()])
        self.ema = Ema(cohort, config.ema) if config.ema else None
        self.assemble = assembler(train, self.device)
        self.cache = TeacherCache(cohort, train, amp) if config.cache_teachers else None
        self.choice = choice
        self.step = self._make_step()
        self.clock = Clock(self.device)
        self.calls = Calls(self, callbacks)
        self.shares = ""  # of the peers in the time of a step, for the bar
        self.data_marks = {"training": data_mark(train), **evaluations.marks}
        self.mesh: Mesh | None = None
        self.checkpoints = checkpoints_of(self)

    def _make_step(self) -> Any:
        config = self.config
        execution: Any = config.execution  # or another that is registered
        threads: int | None = config.threads
        if self.choice is not None:
            execution, threads, _ = self.choice
        return make_step(
            self.cohort,
            self.loss,
            self.optimizer,
            execution=execution,
            amp=self.amp,
            compile=config.compile,
            update=config.update,
            grad_clip=config.grad_clip,
            accumulate=config.accumulate,
            ema=self.ema,
            assemble=self.assemble,
            after=self.record,
            metric=self.metric,
            taught=self.cache,
            threads=threads if self.device.type == "cpu" else None,
        )

    def use(self, choice: Choice) -> None:
        """Runs the steps as `choice` says."""
        self.choice = choice
        self.step = self._make_step()

    def choose(self, batch: tuple[Tensor, ...]) -> Choice:
        """Fixes execution and number of threads for the steps, and the number of threads for
        everything else."""
        if self.choice is None:
            choose = getattr(self.step, "choose", None)
            self.choice = choose(*batch) if choose else Choice(self.step.name)
        if self.choice.elsewhere:
            torch.set_num_threads(self.choice.elsewhere)
        return self.choice

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The step's arguments for each batch of an epoch: the batch, or the index that the step
        assembles it from."""
        if self.assemble is None:
            found: Iterator[tuple[Tensor, ...]] = self.train.epoch(epoch, start)
        else:
            index = self.train.index  # type: ignore[attr-defined]  # there where `assemble` is
            found = (index(epoch, step) for step in range(start, self.steps))
        if self.cache is None:
            yield from found
            return
        for step, batch in enumerate(found, start):
            yield *batch, self.cache.train.samples(epoch, step)

    def run(self, stop: Stop) -> TrainResult:
        """Trains to the end, or until a signal: then saves and raises TrainingStopped."""
        progress = self.progress
        seed_generators(self.config.seed, self.device)
        progress.start()
        self.saved = time.monotonic()
        metrics = self.folder / METRICS
        ended = False
        if self.checkpoints.found():
            self.checkpoints.restore()
            ended = progress.done and (self.folder / "cohort.json").is_file()
            self.config.save(self.folder / CONFIG)
            if progress.stopped is not None:
                self._say_stopped()
        else:  # so that a folder with results always has a checkpoint too
            self.config.save(self.folder / CONFIG)
            self.checkpoints.save()
        if self.cache is not None and not progress.done:
            self.cache.open(self.folder)
        with (
            MetricsLog(
                self.folder,
                self.cohort.names,
                resume_step=progress.position if metrics.exists() else None,
                tensorboard=self.config.tensorboard,
                csv=self.config.csv,
                wandb=self.config.to_dict() if self.config.wandb else None,
            ) as self.log,
            self._bar() as self.bar,
            Profile(self.folder, self.device, self.config.profile, self.steps) as self.profile,
        ):
            self.cohort.train()
            while not progress.done:
                self._epoch(stop)
                self._end_epoch()
                if not progress.done:
                    stop.leave_if_asked(self._where)
            read_test_set(self)
        result = self._finish()
        if not ended:
            self._call_end(result)
        return result

    def _epoch(self, stop: Stop) -> None:
        """The steps of an epoch, from wherever the run stands."""
        progress, totals, clock = self.progress, self.totals, self.clock
        log_every = self.config.log_every
        epoch, start = divmod(progress.position, self.steps)
        end = min(self.steps, progress.total - epoch * self.steps)
        batches = self.batches(epoch, start)
        if start == 0:
            self.calls.epoch_start()
        clock.start()
        for done in range(start + 1, end + 1):
            clock.ask()
            batch = next(batches)
            if progress.first is None:
                self._begin(batch)
            clock.got()
            self.step(*batch)
            rows = len(batch[-1])
            progress.position += 1
            totals.count()
            clock.step(rows)
            self.bar.update(rows)
            self.profile.step()
            if done == end:
                break  # the end of the epoch reads, saves and heeds signals anyway
            if log_every and progress.position % log_every == 0:
                self._read()
            if stop.signal or self._save_due():
                clock.stop()
                self.save()
                stop.leave_if_asked(self._where)
                clock.start()
        clock.stop()

    @property
    def execution(self) -> ExecutionName | None:
        """The steps' execution, None before the first step. Eager where the chosen one failed."""
        return self.choice and self.step.name

    def _begin(self, batch: tuple[Tensor, ...]) -> None:
        choice, progress = self.choose(batch), self.progress
        parts = [
            f"{self.label}: {device_name(self.device, choice.threads)}, {self.amp.name}",
            f"execution {choice.execution}",
            f"{progress.total - progress.position:,} steps",
            f"folder {self.folder}",
        ]
        if teachers := [teacher.name for teacher in self.cohort.teachers]:
            parts.insert(3, f"taught by {', '.join(teachers)}")
        if seconds := getattr(self.step, "seconds", None):
            parts.append(f"about {duration(seconds * progress.left)}")
        logger.info(", ".join(parts) + self._costs(batch, choice))
        progress.begin()

    def _costs(self, batch: tuple[Tensor, ...], choice: Choice) -> str:
        """What a step's passes of each peer by itself cost, with the threads that the steps have;
        measured once, and only where there is something to compare. The bar shows the shares."""
        if self.label != "mutual" or len(self.peers) == 1:
            return ""
        if self.cache is not None:
            batch = batch[:-1]
        inputs = (self.assemble(*batch) if self.assemble else batch)[0]
        before = torch.get_num_threads()
        torch.set_num_threads(choice.threads or before)
        try:
            seconds = peer_seconds(self.peers, inputs, self.amp)
        finally:
            torch.set_num_threads(before)
        if seconds is None:
            return ""
        shares = [f"{100 * s / sum(seconds):.0f}" for s in seconds]
        self.shares = f", cost {' '.join(shares)} %"
        each = ", ".join(
            f"{name} {milliseconds(s)} ms ({share} %)"
            for name, s, share in zip(self.cohort.names, seconds, shares, strict=True)
        )
        return f"; each peer alone: {each}"

    def _end_epoch(self) -> None:
        """Reads, logs, evaluates where that is due, saves, and tells the user."""
        self._read()
        progress = self.progress
        updates = int(self.schedule.updates)
        record = {
            **self.totals.epoch(),
            "lr": self.rates[max(updates - 1, 0)],  # of the epoch's last update, as these are:
            **{name: scheduled.last() for name, scheduled in self.loss_schedules.items()},
            "skipped_steps": progress.position - updates,
            "skipped_updates": self.record.overflows.tolist(),
            "images_per_second": self.clock.images_per_second,
            "data_wait": self.clock.data_wait,
        }
        self.log.log("epoch", progress.position, progress.trained, **record)
        progress.history.append({"epoch": progress.trained, "step": progress.position, **record})
        self.totals.reset()
        due = progress.done or progress.epoch % self.config.eval_every == 0
        if due:
            self._evaluate()
            self._stop_if_stale()
        self.save()
        logger.info(f"{self.label} {progress.epoch_line()}")
        if progress.stopped is not None:
            self._say_stopped()
        self._call_back(record)

    def _stop_if_stale(self) -> None:
        """Ends the training where `patience` evaluations have not been better."""
        progress, patience = self.progress, self.config.patience
        if patience and progress.stale >= patience and not progress.done:
            lead = scoring_of(progress.scores).headlines[0].label
            progress.stopped = (
                f"no better {progress.images} {lead} in {patience} "
                f"evaluation{'s' * (patience > 1)} after epoch {progress.best_epoch:g}"
            )

    def _say_stopped(self) -> None:
        progress = self.progress
        logger.info(
            f"{self.label} training stops after epoch {progress.trained:g} of {progress.epochs}: "
            f"{progress.stopped}"
        )

    def _call_back(self, record: dict[str, Any]) -> None:
        """Calls the callbacks for an epoch, which is saved. Where one stops the training there, it
        is evaluated and saved as at its end."""
        progress = self.progress
        evaluated = progress.evaluated_now
        reasons = [self.calls.evaluation(progress.scores)] if evaluated else []
        reasons.append(self.calls.epoch(record))
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is None or progress.done:
            return
        progress.stopped = reason
        self._say_stopped()
        if not evaluated and self.evaluations.during is not None:
            self._evaluate()
            self.calls.evaluation(progress.scores)
        self.save()

    def _evaluate(self) -> None:
        progress, evaluate = self.progress, self.evaluations.during
        if evaluate is None:
            return
        with self.ema.applied() if self.ema else nullcontext():
            with evaluating(self.cohort):
                scores = evaluate(self.cohort)
            best = progress.evaluated(scores)
            values = dataclasses.asdict(scores)
            self.log.log(progress.images, progress.position, progress.trained, **values)
            if best:
                self.cohort.save(self.folder / BEST)

    def _read(self) -> None:
        """Logs the losses since the last reading and stops a run that has diverged."""
        if self.totals.unread:
            means = self.totals.read()
            step = self.progress.position
            self.log.log("train", step, step / self.steps, **means)
            losses = " ".join(f"{x:.3f}" for x in means["loss"])
            self.bar.set_postfix_str(f"loss {losses}{self.shares}")
        self._check_losses()

    def _check_losses(self) -> None:
        if bad := self.totals.bad():
            step, loss, k = bad
            name = self.cohort.names[k]
            raise self._diverged(f"the {LOSS_NAMES[loss]} of peer {k} ({name})", step)

    def _diverged(self, what: str, step: int) -> TrainingDiverged:
        epoch, path = (step - 1) // self.steps + 1, self.checkpoints.path
        return TrainingDiverged(
            f"training diverged: at step {step} (epoch {epoch}) {what} is not finite; {path}, from "
            "before it, is kept; try a lower lr, warmup_epochs or grad_clip"
        )

    def _save_due(self) -> bool:
        every, minutes = self.config.save_every_steps, self.config.save_every_minutes
        return bool(
            (every and self.progress.position % every == 0)
            or (minutes and time.monotonic() - self.saved >= 60 * minutes)
        )

    def _where(self) -> str:
        return self.progress.where(self.checkpoints.path)

    def save(self) -> None:
        """Replaces the checkpoint, unless a loss or a weight has gone bad."""
        self._check_losses()
        fine = [torch.stack([w.isfinite().all() for w in p.parameters()]).all() for p in self.peers]
        for k, good in enumerate(torch.stack(fine).tolist()):
            if not good:  # the update of the last step; its loss was still finite
                name = self.cohort.names[k]
                raise self._diverged(f"a weight of peer {k} ({name})", self.progress.position)
        self.log.sync()  # a run resumed from this checkpoint does not log these points again
        self.checkpoints.save()
        self.saved = time.monotonic()

    def parameters(self) -> tuple[int, ...]:
        return tuple(sum(w.numel() for w in peer.parameters()) for peer in self.peers)

    def _bar(self) -> Any:
        size = self.train.batch_size
        return progress_bar(
            total=self.progress.total * size,
            initial=self.progress.position * size,
            unit=" images",
            unit_scale=True,
            desc=self.label,
            show=self.config.progress or sys.stderr.isatty(),
        )

    def _finish(self) -> TrainResult:
        """Writes the last weights, where Cohort.load finds them; with `ema` their averages."""
        progress = self.progress
        tested, validated = progress.tested or {}, progress.images == "validation"
        if self.ema:
            self.ema.copy_to_cohort()
        self.cohort.save(self.folder)
        weights = {"last": self.folder}
        if progress.best_scores:
            weights["best"] = self.folder / BEST
        return TrainResult(
            folder=self.folder,
            config=self.config,
            peers=tuple(self.cohort.names),
            parameters=self.parameters(),
            history=progress.history,
            scores=tested.get("last", progress.scores),
            best_epoch=progress.best_epoch,
            best_scores=tested.get("best", progress.best_scores),
            chosen_on=progress.images if progress.best_scores else None,
            validation_scores=progress.scores if validated else None,
            best_validation_scores=progress.best_scores if validated else None,
            weights=weights,
            images_per_second=self.clock.images_per_second,
            data_wait=self.clock.data_wait,
            seconds=progress.elapsed(),
            skipped_steps=progress.position - int(self.schedule.updates),
            device=device_name(self.device, self.choice and self.choice.threads),
            precision=self.amp.name,
            execution=self.execution,
            threads=self.choice and self.choice.threads,
            images=image_counts(self.train),
            stopped=progress.stopped,
            teachers=tuple(self.cohort.taught_by),
        )

    def _call_end(self, result: TrainResult) -> None:
        scores, best = (s and dataclasses.asdict(s) for s in (result.scores, result.best_scores))
        self.calls.end(
            stopped=result.stopped,
            chosen_on=result.chosen_on,
            scores=scores,
            best_scores=best,
            best_epoch=result.best_epoch,
            weights=result.weights,
        )
