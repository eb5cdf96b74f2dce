"""Measurements in the step loop that do not wait for the device: loss statistics and time.

`Totals` adds each step's statistics to float64 sums on the device and notes the first step whose
loss is not finite; the host reads them when it wants to. On a mesh each rank sums its share, and
reading adds the shares of all. About seven small launches a step, which
become part of the step's graph where there is one: everything that `add` does is on the device.
`Clock` measures images a second and the wait for batches; on CUDA by events.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdml.engine import Schedule, StepOutput
from fastdml.engine.update import Update
from fastdml.report.metrics_log import TEACHER_KL
from fastdml.scalar_schedule import ScalarSchedule
from fastdml.train.ranks import OneProcess

NEVER = 2**62  # a step number that no run reaches


class Totals:
    """Sums over the steps of an epoch, for K peers, with or without losses on features, and for
    M teachers of these names."""

    def __init__(
        self,
        K: int,
        device: torch.device,
        metric: bool = False,
        teachers: Sequence[str] = (),
        ranks: OneProcess | None = None,
        exchange_every: int = 1,
    ) -> None:
        self.K, self.teachers = K, tuple(teachers)
        self.ranks, self.exchange_every = ranks or OneProcess(), exchange_every
        self.watched = ("ce", "kl", "metric") if metric else ("ce", "kl")
        self.per_peer = ("loss", *self.watched, "entropy", "top1")
        # each of per_peer (K), ensemble_correct (1), pairwise (K*K), teachers' (M*K), and the rows
        # with a label (1)
        P = len(self.per_peer) * K
        size = P + 2 + (K + len(teachers)) * K
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)
        self.first_bad = torch.full(
            (len(self.watched) * K,), NEVER, dtype=torch.int64, device=device
        )
        self.step = torch.zeros((), dtype=torch.int64, device=device)  # of the run, the last added
        self.steps = 0
        self.exchanges = 0  # steps in which peers learnt from each other
        self._mark()

    def tensors(self) -> list[Tensor]:
        """Those that `add` changes."""
        return [self.sums, self.first_bad, self.step]

    def count(self, step: int = 1) -> None:
        """Counts a step on the host. step: its number in the run, from 1 on."""
        self.steps += 1
        self.exchanges += (step - 1) % self.exchange_every == 0

    def add(self, output: StepOutput) -> None:
        """Adds a step's statistics on the device."""
        packed, at = output.stats.packed, output.stats.layout
        values = torch.cat(
            [
                output.losses,
                packed[at.span("ce", "kl")],
                *([output.metric] if output.metric is not None else []),
                packed[at.span("entropy", "pairwise_kl")],
                *([output.teacher_kl.flatten()] if output.teacher_kl is not None else []),
                packed[at.span("labelled")],
            ]
        )
        self.sums += values
        watched = values[self.K : (1 + len(self.watched)) * self.K]
        fine = (watched - watched) == 0  # inf - inf and NaN - NaN are NaN
        self.step += 1
        self.first_bad.copy_(
            torch.where(fine, self.first_bad, torch.minimum(self.first_bad, self.step))
        )

    def read(self) -> dict[str, Any]:
        """Means since the last read. Waits for the device, and on a mesh for all ranks."""
        sums = self._share()
        unread = self.ranks.sum(sums - self.marked_sums)
        steps = self.steps - self.marked_steps
        means = self._means(unread, steps, self.exchanges - self.marked_exchanges)
        self._mark(sums)
        return means

    def _share(self) -> Tensor:
        """The sums on the host, on a mesh this rank's share."""
        return self._own(self.sums.to("cpu", copy=True))

    def _own(self, sums: Tensor) -> Tensor:
        """On a mesh the share of a rank: of the peers that it holds, and on its first row of what
        belongs to no peer."""
        own = torch.tensor([self.ranks.holds(k) for k in range(self.K)])
        P = len(self.per_peer)
        first = torch.tensor([self.ranks.first_row])
        columns = torch.cat([own.repeat(P), first, own.repeat(self.K + len(self.teachers)), first])
        return torch.where(columns, sums, 0.0)  # not a product: others' may be NaN

    def _first_bad(self) -> Tensor:
        """On the host; as `_share`."""
        own = torch.tensor([self.ranks.holds(k) for k in range(self.K)])
        return torch.where(own.repeat(len(self.watched)), self.first_bad.cpu(), NEVER)

    def bad(self) -> tuple[int, str, int] | None:
        """(step, loss, peer) of the first loss that was not finite, on any rank. Waits as `read`.

        Within a step the cross-entropy is reported before the KL: a peer whose cross-entropy is not
        finite makes the KL of all others so.
        """
        steps = self.ranks.min(self._first_bad()).tolist()
        i = min(range(len(steps)), key=steps.__getitem__)
        return None if steps[i] == NEVER else (steps[i], self.watched[i // self.K], i % self.K)

    def epoch(self) -> dict[str, Any]:
        """Means over the whole epoch so far. Waits as `read`."""
        return self._means(self.ranks.sum(self._share()), self.steps, self.exchanges)

    @property
    def unread(self) -> int:
        """Steps since the last read."""
        return self.steps - self.marked_steps

    def reset(self) -> None:
        self.sums.zero_()
        self.steps = self.exchanges = 0
        self._mark()

    def state(self) -> dict[str, Any]:
        """For a checkpoint: on a mesh this rank's share."""
        return {
            "sums": self._share(),
            "first_bad": self._first_bad(),
            "step": self.step,
            "counts": [self.steps, self.marked_steps],
            "exchanges": [self.exchanges, self.marked_exchanges],
            "marked_sums": self.marked_sums,
        }

    def load(self, state: dict[str, Any]) -> None:
        sums, marked, counts = state["sums"], state["marked_sums"], state["counts"]
        if len(counts) == 4:  # an earlier version's, which counted rows on the host
            sums, marked = (
                torch.cat([old, old.new_tensor([rows])])
                for old, rows in zip((sums, marked), counts[1::2], strict=True)
            )
            counts = counts[::2]
        self.sums.copy_(sums)
        self.first_bad.copy_(state["first_bad"])
        self.step.copy_(state["step"])
        self.steps, self.marked_steps = counts
        self.exchanges, self.marked_exchanges = state.get("exchanges", counts)
        self.marked_sums = self._own(marked)

    def _mark(self, sums: Tensor | None = None) -> None:
        self.marked_sums = torch.zeros_like(self.sums, device="cpu") if sums is None else sums
        self.marked_steps, self.marked_exchanges = self.steps, self.exchanges

    def _means(self, sums: Tensor, steps: int, exchanges: int) -> dict[str, Any]:
        """What peers say of each other is of the steps with an exchange, NaN where there were
        none."""
        K, P = self.K, len(self.per_peer) * self.K
        count = torch.full_like(sums, max(steps, 1))
        # of the rows with a label those that are right; the others are means over rows
        rows = sums[-1].clamp(min=1)
        count[P - K : P + 1] = rows
        if exchanges < steps:
            k = self.per_peer.index("kl") * K
            count[k : k + K] = count[P + 1 : -1] = exchanges or math.nan
            count[P] = rows * (exchanges / steps or math.nan)
        means = (sums / count).tolist()
        record = {name: means[i * K : (i + 1) * K] for i, name in enumerate(self.per_peer)}
        record["ensemble_top1"] = means[P]
        pairs = [means[start : start + K] for start in range(P + 1, len(means) - 1, K)]
        record["pairwise_kl"] = pairs[:K]
        for name, row in zip(self.teachers, pairs[K:], strict=True):
            record[TEACHER_KL + name] = row
        return record


class Record:
    """What runs at the end of every step, on the device alone: advances the schedules of learning
    rate and loss, adds the statistics, counts the updates that fp16 skipped."""

    def __init__(
        self, schedule: Schedule, totals: Totals, of_loss: Sequence[ScalarSchedule] = ()
    ) -> None:
        self.schedule, self.totals, self.of_loss = schedule, totals, of_loss
        self.overflows = torch.zeros(totals.K, dtype=torch.int64, device=totals.sums.device)

    def __call__(self, output: StepOutput, update: Update) -> None:
        self.schedule.advance(update.skipped)
        for scheduled in self.of_loss:
            scheduled.advance(update.skipped)
        self.totals.add(output)
        if update.overflow is not None:
            self.overflows += update.overflow.long()

    def tensors(self) -> list[Tensor]:
        of_loss = [t for scheduled in self.of_loss for t in scheduled.tensors()]
        return [*self.schedule.tensors(), *of_loss, *self.totals.tensors(), self.overflows]


class Clock:
    """Time spent in training steps alone, the first `skip` of a process left out (they compile,
    allocate and choose algorithms)."""

    def __init__(self, device: torch.device, skip: int = 10) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.skip = skip
        self.images = 0
        self.seconds = 0.0
        self.waited = 0.0
        self._waits: list[tuple[Any, Any]] = []
        self._begin: Any = None
        self._asked: Any = None

    def start(self) -> None:
        """Starts the clock. To be called while the device is idle, before the first of some
        steps."""
        self._begin = None if self.skip else self._now()

    def ask(self) -> None:
        """To be called before the loop asks for a batch."""
        self._asked = self._now()

    def got(self) -> None:
        """To be called when the loop has got the batch."""
        if not self.skip:
            self._waits.append((self._asked, self._now()))

    def step(self, images: int) -> None:
        """To be called after each step is issued."""
        if self.skip:
            self.skip -= 1
            self.start()
        else:
            self.images += images

    def stop(self) -> None:
        """Stops the clock until the next `start`. Waits for the device."""
        if self._begin is not None:
            end = self._now()
            if self.cuda:
                end.synchronize()
            self.seconds += self._between(self._begin, end)
            self.waited += sum(self._between(a, b) for a, b in self._waits)
        self._begin = None
        self._waits.clear()

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def data_wait(self) -> float:
        return self.waited / self.seconds if self.seconds else 0.0

    def state(self) -> list[float]:
        return [self.images, self.seconds, self.waited]

    def load(self, state: list[Any]) -> None:
        self.images, self.seconds, self.waited = state

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1000 if self.cuda else b - a
