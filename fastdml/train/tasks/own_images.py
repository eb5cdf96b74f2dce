"""Classification of images of one's own, which files hold and whose classes only the files tell."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastdml.cohort import Cohort
from fastdml.data import HINT
from fastdml.data.image_files import Splits
from fastdml.data.reid_split import MEAN, STD
from fastdml.data.sets.folder import load_folder, warn_of_copies
from fastdml.errors import InputError
from fastdml.paths import expanded
from fastdml.train.config.own_images import FolderConfig
from fastdml.train.same_data import check_same_data, data_mark, marks_of
from fastdml.train.tasks.classification import Classification, divided, evaluate, table
from fastdml.train.tasks.task import Evaluation, register_task

logger = logging.getLogger(__name__)

# A tenth of the paper's learning rate: a folder has hundreds of images more often than 50,000, and
# in so few steps peers do not recover from how far 0.1 throws them at the start.
PRESETS = {"folder": {"epochs": 30, "schedule": "cosine", "lr": 0.01}}
FOR_OWN_NETWORKS, FOR_IMAGENETS = 64, 224  # pixels a side


@register_task
class OwnImages(Classification):
    name, title = "own_images", "own images"
    settings = FolderConfig
    presets = PRESETS

    def splits(self, config: FolderConfig, hint: str = HINT) -> Splits:
        splits = load_folder(
            config.root,
            size=config.size or None,
            otherwise=_usual_size(config.peers),
            bad_files=config.bad_files,
            progress=config.progress or None,
        )
        _check_validation(splits, config)
        warn_of_copies(splits, divided=bool(config.validation))
        return splits

    def normalised(self, sets: Splits, config: FolderConfig) -> Splits:
        if config.normalise == "auto" and config.pretrained:
            return super().normalised(sets, config)
        usual = config.normalise == "imagenet"
        mean, std = (MEAN, STD) if usual else sets.train.statistics()
        return sets.each(lambda images: dataclasses.replace(images, mean=mean, std=std))

    def evaluate(
        self,
        cohort: Cohort,
        config: Any,
        device: torch.device,
        options: Mapping[str, Any],
        *,
        run: Path,
        hint: str = HINT,
    ) -> Evaluation:
        """On the test images, or where there are none on those for validation, which is logged."""
        known = cohort.record()
        if not expanded(config.root).exists():
            raise InputError(
                f"{config.root}: not found from here: name the place of the images of {run} with "
                "--data"
            )
        size = (*known["image_shape"][1:],) if known["image_shape"] else config.size or None
        splits = load_folder(config.root, size=size, bad_files=config.bad_files)
        if list(splits.train.class_names) != known["classes"]:
            raise InputError(
                f"{config.root} does not hold the classes that the peers of {run} were trained on: "
                f"{_difference(known['classes'] or [], splits.train.class_names)}"
            )
        _check_validation(splits, config)
        images: Any = splits.test
        which, carved = "test", False
        if images is None:
            which = "validation"
            images = splits.validation
            if carved := images is None:
                images = divided(splits, config)[0].validation
            logger.info("no test images: the scores are of those for validation")
        mean, std = (tuple(known[name] or getattr(images, name)) for name in ("mean", "std"))
        images = dataclasses.replace(images, mean=mean, std=std)
        batches = self.evaluation_batches(images, config, device)
        if carved:
            check_same_data(marks_of(run), {which: data_mark(batches)}, f"no scores of {run}")
        scores = dataclasses.asdict(evaluate(cohort, batches, config.amp))
        return Evaluation(scores, table(cohort.names, scores, which))

    def known_set(self, found: Mapping[str, Any]) -> str | None:
        return None


def _usual_size(peers: tuple[str, ...]) -> int:
    """Pixels a side of images that have no small size of their own."""
    return FOR_IMAGENETS if any(":" in name for name in peers) else FOR_OWN_NETWORKS


def _check_validation(splits: Splits, config: FolderConfig) -> None:
    """Raises InputError where there is nothing to evaluate on, or two things."""
    asked = config.validation
    if splits.validation is not None and asked:
        raise InputError(
            f"{config.root} holds validation images, and validation {asked:g} would take others "
            "from the training images: leave validation out, or remove the folder"
        )
    if splits.validation is None and splits.test is None and not asked:
        raise InputError(
            f"{config.root} holds training images alone: set validation to a share of them, such "
            "as 0.1, or add a folder val or test"
        )


def _difference(known: list[str], found: tuple[str, ...]) -> str:
    """How two lists of classes differ, in a few words."""
    lost = [name for name in known if name not in found]
    new = [name for name in found if name not in known]
    parts = [f"{word} {names[0]!r}" for word, names in (("not", lost), ("but", new)) if names]
    return " ".join(parts) or "their order is another"
