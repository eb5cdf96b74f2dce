"""Few labels: peers that imitate each other on images without labels too (section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

from fastdml.reproduce.cohorts import changes, network, training
from fastdml.reproduce.experiment import Experiment, Phase, Row, Training, Value
from fastdml.reproduce.readings import ensemble, mean_of
from fastdml.reproduce.scales import IMAGES, Scale
from fastdml.train.config.sources import preset


def training_images(scale: Scale) -> int:
    return scale.images or IMAGES[scale.data or "cifar100"][0]


def labels(scale: Scale) -> int:
    """A tenth of the training images; of few a fifth, to have some of each class."""
    images = training_images(scale)
    return images // 10 if images >= 1000 else images // 5


def trainings(scale: Scale) -> tuple[Training, Training]:
    """With labels alone, and with all other images beside them: of as many steps, but for what
    the last batch of an epoch leaves out."""
    pair, count = [scale.network] * 2, labels(scale)
    semi = training(scale, pair, kind="semi", labelled=count, independent=False)
    times = training_images(scale) // count
    epochs = scale.settings.get("epochs", 200) * times
    over = {
        "labelled": count,
        "unlabelled_share": 0.0,  # the same images keep their labels, and the others are not shown
        "epochs": epochs,
        "eval_every": scale.settings.get("eval_every", 1) * times,
    }
    if "schedule" not in scale.settings:
        over["lr_drop_every"] = 60 * times
    alone = training(scale, pair, kind="labelled", over=over, independent=True)
    return alone, semi


def rows(scale: Scale) -> Sequence[Row]:
    alone, semi = trainings(scale)
    text = f"2 {network(scale)}, {labels(scale):,} labels"

    def row(choice: str, what: str, baseline: tuple[str, Phase], ours: tuple[str, Training]) -> Row:
        number = ensemble() if what == "ensemble" else mean_of(2)
        return Row(
            choice,
            f"{text}: {what}",
            Value(baseline[0], alone, baseline[1], number),
            Value(ours[0], ours[1], "mutual", number),
        )

    independent: tuple[str, Phase] = ("labels alone, independent", "independent")
    mutual: tuple[str, Phase] = ("labels alone, mutual", "mutual")
    single = "mean of single networks"
    return [
        row("labelled", single, independent, ("labels alone, mutual", alone)),
        row("unlabelled", single, independent, ("all images, mutual", semi)),
        row("unlabelled", single, mutual, ("all images, mutual", semi)),
        row("ensemble", "ensemble", independent, ("all images, mutual", semi)),
    ]


def notes(scale: Scale) -> Sequence[str]:
    alone, semi = (_steps(training, scale) for training in trainings(scale))
    return (
        "Cross-entropy on the images with labels, half of each batch, the KL term on all. "
        f"Trainings with labels alone see the images that have one, in {alone:,} steps against "
        f"{semi:,}. The paper has no figures of CIFAR.",
    )


def _steps(training: Training, scale: Scale) -> int:
    """A last short batch of an epoch is left out."""
    config = preset(**training.settings)
    images = training_images(scale) if config.unlabelled_share else config.labelled
    return config.epochs * (images // config.batch_size)


EXPERIMENT = Experiment(
    "semi-supervised", "Few labels, and images without", "section 3.4", rows, notes, changes
)
