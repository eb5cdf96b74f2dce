"""Numbers of finished trainings, as rows name them: percent and nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from fastdml.reproduce.experiment import Number, Phase
from fastdml.reproduce.trainings import Finished

Better = Literal["higher", "lower", ""]


def peer(k: int, score: str = "top1") -> Number:
    """A score of peer `k`, from 0, in percent."""
    return Number(lambda run, phase: 100 * _number(run.scores(phase)[score][k]))


def _number(value: float | None) -> float:
    """NaN, which JSON has as null."""
    return math.nan if value is None else value


def _mean(values: Sequence[float | None]) -> float:
    """NaN where one is."""
    return sum(map(_number, values)) / len(values)


def mean_of(
    count: int, score: str = "top1", *, unit: str = "%", better: Better = "higher"
) -> Number:
    """A score's mean over the first `count` peers; of fractions in percent."""
    factor = 100 if unit == "%" else 1

    def read(run: Finished, phase: Phase) -> float:
        return factor * _mean(run.scores(phase)[score][:count])

    return Number(read, unit, better)


def ensemble(score: str = "top1", *, unit: str = "%", better: Better = "higher") -> Number:
    """A score of the ensemble of all peers."""
    factor = 100 if unit == "%" else 1

    def read(run: Finished, phase: Phase) -> float:
        return factor * _number(run.scores(phase)[f"ensemble_{score}"])

    return Number(read, unit, better)


def ensemble_of(count: int) -> Number:
    """Top-1 of the ensemble of the first `count` peers, which needs their weights."""

    def read(run: Finished, phase: Phase) -> float:
        folder = run.phase_folder(phase)
        measure: Callable[[], Any] = lambda: ensembles(folder, run)  # noqa: E731
        return run.measured("ensembles", phase, measure, lambda shares: 100 * shares[count - 1])

    return Number(read)


def ensembles(folder: Path, run: Finished) -> list[float]:
    """Top-1, as fractions, of the mean of the probabilities of a run's first 1, 2, ..., K peers on
    the test images."""
    import torch

    from fastdml.devices import choose_device
    from fastdml.engine.amp import resolve_amp
    from fastdml.eval_mode import evaluating
    from fastdml.metrics import Classification
    from fastdml.train.run_weights import load_cohort, run_config
    from fastdml.train.tasks.task import prepared, task_of

    chosen = choose_device(run.device)
    config = run_config(folder).replace(root=run.root, teachers=())
    trained, _ = load_cohort(folder, None, chosen)
    amp = resolve_amp(config.amp, chosen)
    with prepared(task_of(config), config, chosen, "download") as ready:
        test: Any = ready.test
        sizes = range(1, len(trained) + 1)
        counts = [Classification(K, trained.num_classes, chosen) for K in sizes]
        with torch.inference_mode(), evaluating(trained):
            for images, labels in test.epoch(0):
                with amp.autocast():
                    logits = [peer(images) for peer in trained.peers]
                for K, count in zip(sizes, counts, strict=True):
                    count.update(logits[:K], labels)
    return [count.compute().ensemble_top1 for count in counts]


def posterior(what: Literal["entropy", "top1"], count: int) -> Number:
    """The mean entropy in nats, or largest probability in percent, of what the first `count` peers
    say of the training images."""

    def read(run: Finished, phase: Phase) -> float:
        from fastdml.analysis import posterior_of_run

        measure: Callable[[], Any] = lambda: posterior_of_run(  # noqa: E731
            run.folder, phase, root=run.root, device=run.device
        ).to_dict()
        factor = 100 if what == "top1" else 1
        return run.measured(
            "training-posterior", phase, measure, lambda found: factor * _mean(found[what][:count])
        )

    return Number(read, *(("%", "") if what == "top1" else ("nats", "")))


NOISE = (0.05, 0.1, 0.2)  # standard deviations, as shares of the norm of each filter
NOISY_IMAGES, DRAWS = 1000, 5  # training images that the loss is of, and draws of the noise


def noise_increase(scale: float, count: int) -> Number:
    """By how many nats the training loss of the first `count` peers rises where noise of this scale
    is added to their weights."""

    def read(run: Finished, phase: Phase) -> float:
        from fastdml.analysis import flat_minima_of_run

        measure: Callable[[], Any] = lambda: flat_minima_of_run(  # noqa: E731
            *(run.folder, phase),
            images=NOISY_IMAGES,
            scales=NOISE,
            draws=DRAWS,
            root=run.root,
            device=run.device,
        ).to_dict()

        def number(found: Any) -> float:
            at, losses = found["scales"].index(scale), found["loss"][:count]
            return _mean([own[at] for own in losses]) - _mean([own[0] for own in losses])

        return run.measured("weight-noise", phase, measure, number)

    return Number(read, "nats", "lower")
