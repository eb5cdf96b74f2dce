"""One training of a cohort into one folder: steps, readings, evaluations, checkpoints, signals.

Inside the step loop nothing waits for the device. It is waited for every `log_every` steps to read
the losses, at checkpoints, and at the end of an epoch. A loss that is not finite is noted on the
device at its step and noticed at the next reading; a checkpoint is written only after such a
reading, so the last one is always good.

On a mesh all ranks run this loop, and what they must do together they do at the same step: see
`fastdml.train.ranks`.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdml.absent_tensors import local_part
from fastdml.cohort import Cohort
from fastdml.devices import device_name
from fastdml.engine import (
    Ema,
    Schedule,
    make_step,
)
from fastdml.engine.amp import Amp
from fastdml.engine.auto import Choice
from fastdml.engine.execution import ExecutionName
from fastdml.engine.profile import Profile
from fastdml.errors import InputError
from fastdml.notebook import progress_bar
from fastdml.parallel import RemotePeer
from fastdml.report.metrics_log import METRICS
from fastdml.train import checks, learning_rate
from fastdml.train.batches import Batches, assembler
from fastdml.train.callbacks import Calls
from fastdml.train.config.base import TrainConfig
from fastdml.train.evaluations import Evaluations, read_test_set, scored, scoring_weights
from fastdml.train.loss_schedules import loss_schedules
from fastdml.train.meters import Clock, Record, Totals
from fastdml.train.optimizer import optimizer_of
from fastdml.train.peer_costs import peer_seconds
from fastdml.train.progress import Progress
from fastdml.train.random_state import seed_generators
from fastdml.train.ranks import OneProcess
from fastdml.train.result import TrainResult
from fastdml.train.run_folder import BEST
from fastdml.train.same_data import data_mark
from fastdml.train.saving import checkpoints_of, save_cohort
from fastdml.train.sharding import SeenBatches
from fastdml.train.stopping import FAILED, SAVE, Stop
from fastdml.train.tasks.task import Task, scoring_of
from fastdml.train.teacher_cache import TeacherCache
from fastdml.train.trainer_result import result_of
from fastdml.train.unlabelled import learns_without_labels
from fastdml.units import duration, milliseconds
from fastdml.yaml_file import CONFIG

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
        ranks: OneProcess | None = None,
    ) -> None:
        self.cohort, self.peers = cohort, list(cohort.peers)
        self.ranks = ranks or OneProcess()
        self.mesh = self.ranks.mesh
        self.train, self.evaluations = train, evaluations
        self.task, self.config, self.folder, self.amp = task, config, folder, amp
        self.label = label
        self.device = amp.device
        self.steps = len(train)  # an epoch
        total = learning_rate.total_steps(config, self.steps)
        after = total * config.independent
        self.progress = Progress(self.steps, total, evaluations.images, after)
        self.optimizer = optimizer_of(config, cohort)
        rates = learning_rate.rates(config, self.steps)
        self.rates = rates.tolist()
        self.schedule = Schedule(self.optimizer, rates)
        partly = {"mimic_ignored": True} if learns_without_labels(train) else {}
        networks = len(cohort) + len(cohort.teachers)
        self.loss = task.mutual_loss(config, networks, **partly).to(self.device)
        checks.keeps_groups_apart(self.loss, cohort.groups)
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
            ranks=self.ranks,
            exchange_every=config.exchange_every if config.exchange == "logits" else 1,
        )
        self.record = Record(self.schedule, self.totals, [*self.loss_schedules.values()])
        self.ema = Ema(cohort, config.ema) if config.ema else None
        self.assemble = assembler(train, self.device)
        self.cache = TeacherCache(cohort, train, amp) if config.cache_teachers else None
        self.choice = choice
        self.step = self._make_step()
        self.clock = Clock(self.device)
        self.calls = Calls(self, callbacks)
        self.seen = SeenBatches(self.mesh, train)
        self.shares = ""  # of the peers in the time of a step, for the bar
        self.data_marks = {"training": data_mark(train), **evaluations.marks}
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
            **self.ranks.step_options(config, threads if self.device.type == "cpu" else None),
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
            self.choice = choose(*batch) if choose else self.ranks.choice(self.step)
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
            self._save_config()
            if progress.stopped is not None:
                self._say_stopped()
        else:  # so that a folder with results always has a checkpoint too
            self._save_config()
            self.checkpoints.save()
        if self.cache is not None and not progress.done:
            self.cache.open(self.folder)
        with (
            self.checkpoints.finished(),
            self.ranks.metrics_log(
                self.folder,
                self.cohort.names,
                resume_step=progress.position if metrics.exists() else None,
                tensorboard=self.config.tensorboard,
                csv=self.config.csv,
                wandb=self.config.to_dict() if self.config.wandb else None,
            ) as self.log,
            self._bar() as self.bar,
            self._profile() as self.profile,
        ):
            self.cohort.train()
            while not progress.done:
                self._epoch(stop)
                self._end_epoch()
                stop.heed(self.ranks.settle(stop.flags))
                if not progress.done:
                    self._leave_if_asked(stop)
            read_test_set(self)
            self.checkpoints.wait()
        result = result_of(self)
        if not ended:
            self.calls.end(result)
        return result

    def _save_config(self) -> None:
        if self.ranks.lead:
            self.config.save(self.folder / CONFIG)

    def _profile(self) -> Profile:
        wanted = self.config.profile and self.ranks.lead
        return Profile(self.folder, self.device, wanted, self.steps)

    def _epoch(self, stop: Stop) -> None:
        """The steps of an epoch, from wherever the run stands."""
        progress, totals, clock = self.progress, self.totals, self.clock
        log_every = self.config.log_every
        epoch, start = divmod(progress.position, self.steps)
        end = min(self.steps, progress.total - epoch * self.steps)
        batches = self.batches(epoch, start)
        self.ranks.stands_at(self.step, progress.position)
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
            self.seen.add(*batch)
            rows = self.ranks.rows(len(batch[-1]), self.train)
            progress.position += 1
            totals.count(progress.position)
            clock.step(rows)
            self.bar.update(rows)
            self.profile.step()
            if done == end:
                break  # the end of the epoch reads, saves and heeds signals anyway
            asked = self.ranks.ask(stop.flags | self._wishes())
            if log_every and progress.position % log_every == 0:
                self._read()
            if asked & FAILED:
                self.checkpoints.wait()  # raises what the writing thread met
            if stop.heed(asked) or self._save_due():
                clock.stop()
                self.save()
                stop.save = False
                self.ranks.done(SAVE)
                self._leave_if_asked(stop)
                clock.start()
        clock.stop()

    def _leave_if_asked(self, stop: Stop) -> None:
        if stop.signal is not None:
            self.checkpoints.wait()
        stop.leave_if_asked(self._where)

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
        if self.label != "mutual" or len(self.peers) == 1 or self.mesh is not None:
            return ""  # on a mesh peers do not take turns
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
        with scoring_weights(self):
            scores = scored(evaluate, self.cohort)
            best = progress.evaluated(scores)
            values = dataclasses.asdict(scores)
            self.log.log(progress.images, progress.position, progress.trained, **values)
            if best:
                save_cohort(self.cohort, self.mesh, self.folder / BEST)

    def _read(self) -> None:
        """Logs the losses since the last reading and stops a run that has diverged, or whose ranks
        see other batches."""
        self.seen.check()
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
        """By the number of steps, which all ranks know."""
        every = self.config.save_every_steps
        return bool(every and self.progress.position % every == 0)

    def _wishes(self) -> int:
        """Flags of what this process finds due by itself: to save, by the lead's clock."""
        minutes = self.config.save_every_minutes
        late = minutes and time.monotonic() - self.saved >= 60 * minutes
        return SAVE * bool(late and self.ranks.lead) | FAILED * self.checkpoints.failed

    def _where(self) -> str:
        return self.progress.where(self.checkpoints.path)

    def save(self) -> None:
        """Replaces the checkpoint, unless a loss or a weight has gone bad."""
        self._check_losses()
        for k, good in enumerate(self.ranks.min(self._finite()).tolist()):
            if not good:  # the update of the last step; its loss was still finite
                name = self.cohort.names[k]
                raise self._diverged(f"a weight of peer {k} ({name})", self.progress.position)
        self.log.sync()  # a run resumed from this checkpoint does not log these points again
        self.checkpoints.save()
        self.saved = time.monotonic()

    def _finite(self) -> Tensor:
        """(K,) on the host: 1 where this process holds no weight of the peer that is not finite."""
        fine = [
            torch.stack([local_part(w).isfinite().all() for w in peer.parameters()]).all()
            for k, peer in enumerate(self.peers)
            if self.ranks.holds(k)
        ]
        found = iter(torch.stack(fine).tolist())
        return torch.tensor(
            [next(found) if self.ranks.holds(k) else 1 for k in range(len(self.peers))]
        )

    def parameters(self) -> tuple[int, ...]:
        return tuple(
            peer.num_parameters
            if isinstance(peer, RemotePeer)
            else sum(w.numel() for w in peer.parameters())
            for peer in self.peers
        )

    def _bar(self) -> Any:
        size = self.train.batch_size
        return progress_bar(
            total=self.progress.total * size,
            initial=self.progress.position * size,
            unit=" images",
            unit_scale=True,
            desc=self.label,
            show=self.ranks.lead and (self.config.progress or sys.stderr.isatty()),
        )
