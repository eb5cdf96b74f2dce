"""Classification: images of one label each, judged by the accuracy on the test images."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdml.cohort import Cohort
from fastdml.data import (
    HINT,
    ImageSet,
    MixedSampler,
    ResidentLoader,
    load,
    make_loader,
    record,
    split_validation,
)
from fastdml.data.image_files import Splits
from fastdml.data.semi_supervised import joined, load_unlabelled, split_labelled
from fastdml.engine.amp import Amp, AmpName, resolve_amp
from fastdml.errors import InputError
from fastdml.eval_mode import evaluating
from fastdml.metrics import ClassificationScores
from fastdml.metrics.classification import GroupedScores
from fastdml.models import pretrained_normalisation
from fastdml.report.scoring import Headline, Scoring, ensembles
from fastdml.report.tables import fixed_columns
from fastdml.train import checks
from fastdml.train.batches import Batches, as_batches
from fastdml.train.config.base import TrainConfig
from fastdml.train.predictions import Scorer
from fastdml.train.run_folder import needs_pretrained
from fastdml.train.tasks.task import (
    Evaluate,
    Evaluation,
    Prepared,
    Task,
    register_task,
)
from fastdml.units import percent

logger = logging.getLogger(__name__)

EVALUATION_BATCH = 500  # images; divides CIFAR's test sets
SCORING = Scoring(
    ClassificationScores,
    (Headline("top1", label="top-1", entry="accuracy", title="accuracy", cases="rows"),),
    ensemble="mean of the mutual peers' probabilities",
    keeps_predictions=True,
    grouped=GroupedScores,
)
# What a data set changes in the defaults. Data sets that are not in the paper get settings that
# suit a demonstration.
PRESETS: dict[str, dict[str, Any]] = {
    "cifar100": {},
    "cifar10": {},
    "digits": {
        "peers": ("resnet8", "resnet8"),
        "pad": 1,  # of 8 pixels
        "flip": False,  # a mirrored digit is another sign
        "epochs": 20,
        "schedule": "cosine",
    },
}


@register_task
class Classification(Task):
    name = title = "classification"
    settings = TrainConfig
    scoring = SCORING
    presets = PRESETS
    in_python = "fastdml.train.evaluate(cohort, batches) scores it on batches (images, labels)"

    @contextmanager
    def prepare(
        self,
        config: TrainConfig,
        device: torch.device,
        hint: str = HINT,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Prepared]:
        sets, rest = divided(self.splits(config, hint), config)
        channels, *size = sets.train.image_shape
        cohort = Cohort(
            config.peers,
            sets.train.num_classes,
            in_channels=channels,
            seed=config.seed,
            pretrained=needs_pretrained(config),
            image_size=size,
            groups=config.groups,
        )
        sets = self.normalised(sets, config)
        images, sampler = self.with_unlabelled(sets, rest, config)
        train = make_loader(
            config.loader,
            images,
            config.batch_size,
            seed=config.seed,
            train=True,
            pad=config.pad,
            flip=config.flip,
            sampler=sampler,
            policy=config.policy,
            rank=rank,
            world=world,
            device=device,
        )
        validation, test = (
            None if images is None else self.evaluation_batches(images, config, device)
            for images in (sets.validation, sets.test)
        )
        yield Prepared(cohort, train, test, validation)

    def splits(self, config: Any, hint: str = HINT) -> Splits:
        """The images of the set that `config` names."""
        download = config.download and not config.dry_run
        train, test = load(config.data, config.root, download=download, hint=hint)
        return Splits(train, None, test)

    def normalised(self, sets: Splits, config: Any) -> Splits:
        """The same images, by the mean and std that peers with these settings get."""
        if not config.pretrained:
            return sets
        usual = pretrained_normalisation(config.peers, sets.train.image_shape[0])
        return sets.each(lambda images: images.normalised_by(*usual))

    def with_unlabelled(
        self, sets: Splits, rest: Any | None, config: Any
    ) -> tuple[Any, MixedSampler | None]:
        """The training images with those that have no label, and what makes batches of both; the
        labelled images alone where the settings want no others."""
        labelled, validation, test = sets
        parts = [labelled]
        if rest is not None:
            parts.append(dataclasses.replace(rest, mean=labelled.mean, std=labelled.std))
        if config.unlabelled and config.unlabelled_share:
            others = load_unlabelled(
                config.unlabelled,
                labelled,
                apart={"validation": validation, "test": test},
                bad_files=getattr(config, "bad_files", None),
                progress=config.progress or None,
            )
            parts.append(others)
        if len(parts) == 1:
            return labelled, None
        images = joined(*parts)
        without = len(images) - len(labelled)
        logger.info(f"{len(labelled):,} labelled images and {without:,} without a label")
        return images, MixedSampler(images.labels, config.batch_size, config.unlabelled_rows)

    def evaluation_batches(self, images: Any, config: Any, device: torch.device) -> Batches:
        """Batches of an `ImageSet` or `ImageFiles` to be scored on, in their order."""
        if isinstance(images, ImageSet):
            return ResidentLoader(images, EVALUATION_BATCH, train=False, device=device)
        # of any size: batches that peers can be trained on fit into memory
        return make_loader(config.loader, images, config.batch_size, train=False, device=device)

    def score(self, cohort: Cohort, test: Batches, amp: Amp) -> ClassificationScores:
        return score(cohort, test, amp)

    def scorer(self, test: Batches, amp: Amp) -> Evaluate:
        if type(self).score is not Classification.score:  # a subclass scores in its own way
            return super().scorer(test, amp)
        return Scorer(test, amp)

    def evaluate(
        self,
        cohort: Cohort,
        config: TrainConfig,
        device: torch.device,
        options: Mapping[str, Any],
        *,
        run: Path,
        hint: str = HINT,
    ) -> Evaluation:
        _check_trained_on(cohort, config, run)
        _, test = load(config.data, config.root, download=config.download, hint=hint)
        scores = dataclasses.asdict(evaluate(cohort, test, config.amp))
        if cohort.image_shape is None:
            logger.warning(
                f"the weights of {run} are of an earlier version and do not say what images "
                f"they were trained on: taken for those of {config.data}, as config.yaml says"
            )
        return Evaluation(scores, table(cohort.names, scores))

    def known_set(self, found: Mapping[str, Any]) -> str | None:
        return next((name for name in self.data if record(name) == found), None)


def divided(sets: Splits, config: TrainConfig) -> tuple[Splits, Any | None]:
    """The sets of a run, the training images labelled and as many as `config` says, with validation
    images where it wants some; and the training images that lose their labels, None where none does
    or they are not used."""
    train, validation, rest = sets.train, sets.validation, None
    if config.labelled:
        if config.subset:
            train = train.subset(config.subset, config.seed)
        train, rest = split_labelled(train, config.labelled, config.seed)
    if config.validation:
        train, validation = split_validation(train, config.validation, config.seed)
    if config.subset and not config.labelled:
        train = train.subset(config.subset, config.seed)
    return Splits(train, validation, sets.test), rest if config.unlabelled_share else None


def score(cohort: Cohort, test: Batches, amp: Amp) -> ClassificationScores:
    """Of peers in evaluation mode, on batches (images, labels)."""
    return Scorer(test, amp, keep=False)(cohort)


def evaluate(
    cohort: Cohort,
    test: ImageSet | Any,
    amp: AmpName = "auto",
) -> ClassificationScores:
    """Scores of a cohort on the device it is on, which it leaves in the mode it was in.

    test: batches as `fit` takes them, or an `ImageSet`, such as `data.load` gives. What the cohort
    has recorded of the images that it was trained on decides the size and the normalisation of a
    set's images and the order of its classes.

    Raises InputError for batches of other classes or of another form than peers train on, and for a
    precision that the device lacks.
    """
    device = next(cohort.parameters()).device
    if isinstance(test, ImageSet):
        test = _as_trained(cohort, test, device)
    test = as_batches(test, device, cohort.num_classes, "test")
    checks.same_images(cohort, test)
    cohort.to(memory_format=torch.channels_last)
    with evaluating(cohort):
        return score(cohort, test, resolve_amp(amp, device))


def _as_trained(cohort: Cohort, test: ImageSet, device: torch.device) -> ResidentLoader:
    """A set's images with the size, normalisation and order of classes of the cohort's training."""
    known = cohort.record()
    mean, std = tuple(known["mean"] or test.mean), tuple(known["std"] or test.std)
    labels, classes = test.labels, tuple(known["classes"] or test.class_names)
    names = test.class_names
    if classes != tuple(names) and sorted(classes) == sorted(names) and len({*names}) == len(names):
        order = torch.tensor([classes.index(name) for name in names], device=labels.device)
        labels, names = order[labels], classes
    test = dataclasses.replace(test, labels=labels, class_names=names, mean=mean, std=std)
    shape = known["image_shape"]
    size = (shape[1], shape[2]) if shape else None
    return ResidentLoader(test, EVALUATION_BATCH, train=False, size=size, device=device)


def _check_trained_on(cohort: Cohort, config: TrainConfig, run: Path) -> None:
    """Refuses to score peers on images that are not of the kind that they were trained on."""
    data, found = config.data, cohort.record()
    known = record(data)
    if config.pretrained:  # then the normalisation is the networks'
        known |= {name: found[name] for name in ("mean", "std")}
    wrong = [name for name, value in found.items() if value not in (None, known[name])]
    if len(known["classes"]) != cohort.num_classes:
        raise InputError(
            f"the peers of {run} tell {cohort.num_classes} classes apart, and {data} has "
            f"{len(known['classes'])}: they were not trained on it"
        )
    if wrong:
        raise InputError(
            f"the peers of {run} were not trained on {data}: the {wrong[0]} of their images was "
            f"{str(found[wrong[0]])[:60]}, and of {data} it is {str(known[wrong[0]])[:60]}"
        )
    channels = known["image_shape"][0]
    if all(cohort.models) and cohort.in_channels != channels:
        raise InputError(
            f"the peers of {run} take images of {cohort.in_channels} channels, and those of {data} "
            f"have {channels}: they were not trained on it"
        )


def table(names: Sequence[str], scores: Mapping[str, Any], images: str = "test") -> str:
    """Every score of each peer and of the ensemble, from a ClassificationScores as a dict, on
    `images`, "test" or "validation"."""
    columns = ("top1", "top5", "ece", "nll", "entropy")
    rows: list[tuple[str, ...]] = [
        ("peer", "top-1 %", "top-5 %", "ECE %", "NLL nats", "entropy nats")
    ]
    found = [(name, [scores[c][k] for c in columns]) for k, name in enumerate(names)]
    found += [(name, [ens[c] for c in columns]) for name, ens in ensembles(scores)]
    for name, (top1, top5, ece, nll, entropy) in found:
        shares = (percent(share) for share in (top1, top5, ece))
        rows.append((name, *shares, f"{nll:.4f}", f"{entropy:.4f}"))
    text = f"{fixed_columns(rows)}\n{scores['rows']:,} {images} images"
    broken = [f"{n}: {bad}" for n, bad in zip(names, scores["nonfinite"], strict=True) if bad]
    return text + (f"; outputs that are not finite: {', '.join(broken)}" if broken else "")
