"""What the experiments would train, at every scale, and what they set it beside."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from fastdml.cli import reproduce as command
from fastdml.cli.parsing import parser_of
from fastdml.data import load, make_loader
from fastdml.errors import InputError
from fastdml.reproduce import EXPERIMENTS, SCALES, semi_supervised
from fastdml.reproduce.experiment import Row, Training, trainings_of
from fastdml.reproduce.experiments import find_experiments
from fastdml.reproduce.readings import ensemble, mean_of, peer
from fastdml.reproduce.trainings import Place

# The paper's settings, where it states them, and beside them what its reproducers or its authors'
# code use.
CIFAR = {
    "peers": None,  # of the row
    "batch_size": 64,
    "pad": 4,
    "flip": True,
    "augment": "standard",
    "subset": 0,
    "validation": 0.0,
    "temperature": 1.0,
    "ce_weight": 1.0,
    "kl_weight": 1.0,
    "kl_schedule": "constant",
    "target": "peers",
    "gate": "none",
    "divergence": "forward",
    "label_smoothing": 0.0,
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "epochs": 200,
    "iterations": 0,
    "schedule": "step",
    "lr_drop_every": 60,
    "lr_drops": [],
    "lr_drop_factor": 0.1,
    "warmup_epochs": 0.0,
    "grad_clip": 0.0,
    "ema": 0.0,
    "accumulate": 1,
    "pretrained": False,
}
MARKET = {
    **CIFAR,
    "batch_size": 16,
    "pad": 0,
    "optimizer": "adam",
    "lr": 2e-4,
    "momentum": 0.5,
    "weight_decay": 4e-5,
    "epochs": 0,
    "iterations": 100_000,
    "lr_drop_every": 0,
    "recipe": "paper",
    "standin": False,
    "height": 224,
    "width": 224,
    "images_per_id": 0,
    "erasing": 0.0,
    "triplet_weight": 0.0,
    "kl_sum": False,
}
# What a training changes of these, by its name.
CHANGED = {
    "market1501-timm_mobilenetv1_100-x2-pretrained": {"pretrained": True},
    "cifar100-resnet32-x5-ensemble-target": {"target": "ensemble"},
    "cifar100-resnet32-x2-labelled": {
        "labelled": 5000,
        "unlabelled_share": 0.0,
        "epochs": 2000,
        "lr_drop_every": 600,
    },
}
ALL = [
    (name, scale)
    for name in EXPERIMENTS
    for scale in SCALES
    if (name, scale) != ("market", "digits")
]


def rows_of(name: str, scale: str) -> list[Row]:
    return EXPERIMENTS[name].chosen(SCALES[scale], ())


def all_trainings(scale: str) -> dict[str, Training]:
    rows = [row for name, at in ALL if at == scale for row in rows_of(name, at)]
    return {training.name: training for training in trainings_of(rows)}


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, "full")


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_every_experiment_can_be_trained_at_every_scale(name, scale, place):
    experiment, rows = EXPERIMENTS[name], rows_of(name, scale)
    assert rows
    for training in trainings_of(rows):
        config = place.config(training, 3)
        assert config.seed == 3
        assert config.folder.endswith(f"{training.name}/seed-3")
        assert config.deterministic == (scale not in ("full", "medium"))
        assert len(config.teachers) == len(training.teachers)
    for row in rows:
        for value in (row.baseline, row.ours):
            alone = value.training.settings.get("independent", False)
            assert value.phase == "mutual" or alone, row.label
        assert row.baseline.number.unit == row.ours.number.unit
    changes = experiment.changes(SCALES[scale])
    assert bool(changes) == (scale != "full")
    assert not any(change.startswith("1 epochs") for change in changes)
    assert all(note.endswith(".") for note in experiment.notes(SCALES[scale]))


@pytest.mark.parametrize("scale", SCALES)
def test_trainings_of_one_name_are_one_training(scale):
    """`trainings_of` raises where they are not."""
    assert all_trainings(scale)


def test_the_full_scale_is_the_papers_settings(place):
    found = all_trainings("full")
    assert found.keys() >= CHANGED.keys()
    for name, training in found.items():
        market = training.settings["data"] == "market1501"
        config = place.config(training, 0).to_dict()
        expected = {**(MARKET if market else CIFAR), **CHANGED.get(name, {})}
        expected["peers"] = list(training.settings["peers"])
        assert {key: config[key] for key in expected} == expected, name
    assert SCALES["full"].seeds == 3


def test_the_papers_pairs_and_figures():
    found = {}
    for row in rows_of("table2", "full"):
        peers = row.ours.training.settings["peers"]
        assert row.baseline.training == row.ours.training
        found.setdefault(peers, []).append((row.baseline.paper, row.ours.paper))
    assert found == {
        ("resnet32", "resnet32"): [(68.99, 71.19), (68.99, 70.75)],
        ("wrn_28_10", "resnet32"): [(78.69, 78.96), (68.99, 70.73)],
        ("mobilenet", "resnet32"): [(73.65, 76.13), (68.99, 71.10)],
        ("mobilenet", "mobilenet"): [(73.65, 76.21), (73.65, 76.10)],
        ("wrn_28_10", "mobilenet"): [(78.69, 80.28), (73.65, 77.39)],
        ("wrn_28_10", "wrn_28_10"): [(78.69, 80.28), (78.69, 80.08)],
    }
    cifar10 = [(row.baseline.paper, row.ours.paper) for row in rows_of("cifar10", "full")]
    assert cifar10 == [
        (95.01, 95.75), (92.47, 93.18), (93.59, 94.24), (92.47, 93.32), (92.47, 92.68),
        (92.47, 92.80),
    ]  # fmt: skip


def test_distillation_at_the_full_scale():
    rows = rows_of("distillation", "full")
    against = {row.choice: row for row in rows if "against one-way" in row.label}
    figures = {choice: (row.baseline.paper, row.ours.paper) for choice, row in against.items()}
    assert figures == {
        "wrn_28_10+resnet32": (69.48, 70.73),
        "mobilenet+resnet32": (69.12, 71.10),
        "market-googlenet+mobilenet": (49.11, 52.87),
        "market-mobilenet+mobilenet": (45.16, 51.26),
    }
    one_way = against["wrn_28_10+resnet32"].baseline.training
    (teacher,) = one_way.teachers
    assert one_way.settings["peers"] == ("resnet32",)
    assert teacher.training.settings["peers"][teacher.peer] == "wrn_28_10"
    assert teacher.phase == "independent"


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("cohort-size", [
            (46.4, 46), (46.4, 52.1), (46.4, 55), (46.4, 55.7), (46.4, 56), *[(None, None)] * 3,
            (50.4, 57), (54.8, 58.4), (55.9, 60.6), (56.4, 61.7), *[(None, None)] * 3,
        ]),
        ("ensemble-target", [(56.0, 53.7), (None, None), (None, None)]),
        ("market", [
            (None, 68.83), (83.94, 87.73), (None, 77.14), (None, 91.66), (46.4, 52.1), (None, None),
        ]),
        ("semi-supervised", [(None, None)] * 4),
        ("flat-minima", [(None, None)] * 3),
        ("entropy", [(0.2602, 1.7099), (96, 70)]),
    ],
)  # fmt: skip
def test_the_papers_other_figures(name, figures):
    """Beside the baseline's and ours, row after row."""
    assert [(row.baseline.paper, row.ours.paper) for row in rows_of(name, "full")] == figures


def test_the_small_trainings(place):
    """By name: those that results are of."""
    common = {
        "data": "cifar100", "subset": 20_000, "epochs": 8, "schedule": "cosine", "eval_every": 4,
        "deterministic": True, "tensorboard": False, "figures": (),
    }  # fmt: skip
    pair = ("resnet14", "resnet14")
    expected = {
        "cifar100-resnet14-x4": {**common, "peers": pair * 2, "independent": True},
        "cifar100-resnet14-x2": {**common, "peers": pair, "independent": False},
        "cifar100-resnet14-x4-ensemble-target": {
            **common, "peers": pair * 2, "target": "ensemble", "independent": False,
        },
        "cifar100-resnet14-distilled": {**common, "peers": ("resnet14",)},
        "cifar100-resnet14-x2-semi": {
            **common, "peers": pair, "labelled": 2000, "independent": False,
        },
        "cifar100-resnet14-x2-labelled": {
            **common, "peers": pair, "labelled": 2000, "unlabelled_share": 0.0, "epochs": 80,
            "eval_every": 40, "independent": True,
        },
    }  # fmt: skip
    found = {name: each for name, each in all_trainings("small").items() if "resnet14" in name}
    assert {name: each.settings for name, each in found.items()} == expected
    (teacher,) = place.config(found["cifar100-resnet14-distilled"], 2).teachers
    assert teacher.endswith("/cifar100-resnet14-x4/seed-2/independent:resnet14-2")


@pytest.mark.parametrize("scale", SCALES)
def test_labels_alone_are_those_of_the_same_images(scale):
    alone, semi = semi_supervised.trainings(SCALES[scale])
    for name in ("data", "subset", "labelled"):
        assert alone.settings.get(name) == semi.settings.get(name)
    assert alone.settings["unlabelled_share"] == 0.0
    assert "unlabelled_share" not in semi.settings


@pytest.mark.parametrize("name", ["table2", "cifar10"])
def test_figures_of_other_networks_are_said_to_be_that(name):
    """A row that names ResNet-8 has the figure of the paper's ResNet-32 beside it."""
    experiment = EXPERIMENTS[name]
    assert not any(experiment.notes(SCALES[scale]) for scale in ("full", "small", "smoke"))
    (note,) = experiment.notes(SCALES["digits"])
    assert "paper's figures" in note
    assert f"on {experiment.title.split()[-1]}" in note
    for row in rows_of(name, "digits"):
        assert f"here {row.label.split(', ')[-1]}" in note


def test_networks_that_are_the_papers_are_no_change():
    replaced = "in place of the paper's networks"
    assert not any(replaced in text for text in EXPERIMENTS["entropy"].changes(SCALES["medium"]))
    assert any(replaced in text for text in EXPERIMENTS["entropy"].changes(SCALES["small"]))


def test_cohort_sizes():
    rows = rows_of("cohort-size", "full")
    assert [row.x for row in rows if row.series == "single"] == [*range(1, 9)]
    assert [row.x for row in rows if row.series == "ensemble"] == [*range(2, 9)]
    assert [len(row.ours.training.settings["peers"]) for row in rows[1:8]] == [*range(2, 9)]
    assert {row.baseline.training.name for row in rows} == {"cifar100-resnet32-x8"}


def test_names_of_experiments_and_rows():
    ((table2, choices), (entropy, all_of_it)) = find_experiments(
        ["table2:resnet32+resnet32", "entropy:posterior", "table2:mobilenet+resnet32", "entropy"]
    )
    assert choices == ("resnet32+resnet32", "mobilenet+resnet32")
    assert (entropy.name, all_of_it) == ("entropy", ())
    assert len(table2.chosen(SCALES["smoke"], choices)) == 4
    digits = table2.chosen(SCALES["digits"], ("mobilenet+resnet32",))
    assert digits[0].ours.training.settings["peers"] == ("resnet14", "resnet8")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("tabel2", r"unknown experiment 'tabel2'; did you mean table2\?"),
        ("table2:", "table2: names no row: leave the colon out for all of them"),
        ("table2:resnet32+resnet3", r"no row .* did you mean resnet32\+resnet32\?"),
        ("cohort-size:k9", "no row 'k9' at scale small; there is k1, k2, k4"),
    ],
)
def test_wrong_names_get_the_nearest(wrong, said):
    def chosen() -> list:
        return [one.chosen(SCALES["small"], rows) for one, rows in find_experiments([wrong])]

    with pytest.raises(InputError, match=said):
        chosen()


def test_market_is_refused_where_it_makes_no_sense():
    with pytest.raises(InputError, match="give --scale medium or small or smoke"):
        rows_of("market", "digits")


def test_names_may_stand_between_options():
    words = ["table2", "--scale", "digits", "entropy", "--seeds", "2", "cifar10"]
    parser = parser_of(command.reproduce)
    assert parser.parse(words).names == ["table2", "entropy", "cifar10"]


def test_the_command_has_the_same_scales():
    assert sorted(command.SCALES) == sorted(SCALES)


def test_the_steps_that_a_note_names():
    """Of trainings with labels alone and with all images, as loaders of these images take them."""
    scale = SCALES["digits"]
    trainings = semi_supervised.trainings(scale)
    images = load("digits")[0]
    steps = []
    for training in trainings:
        alone = training.settings.get("unlabelled_share") == 0
        count = training.settings["labelled"] if alone else len(images)
        loader = make_loader("resident", images.subset(count), 64, train=True)
        steps.append(training.settings["epochs"] * len(loader))
    (note,) = semi_supervised.notes(scale)
    assert f"in {steps[0]} steps against {steps[1]}." in note


@pytest.mark.parametrize("number", [peer(0, "nll"), ensemble("nll"), mean_of(1, "nll")])
def test_a_score_that_is_null_is_no_number(number):
    scores = {"nll": [None], "ensemble_nll": None}
    run = SimpleNamespace(scores=lambda phase: scores)
    assert math.isnan(number.read(run, "mutual"))
