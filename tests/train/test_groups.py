"""Peers in groups that do not learn from each other: each trains as in a run of its own."""

from __future__ import annotations

import copy
import html
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import crashing, logged
from tiny_runs import CLASSES, SIDE, TinyPeer, make_loaders
from torch import nn

import fastdml
from fastdml.cli.main import main
from fastdml.cohort import Cohort
from fastdml.errors import InputError
from fastdml.report.metrics_log import group_folder, group_folders
from fastdml.report.predictions import read_predictions
from fastdml.train import TrainConfig, fit
from fastdml.train.config.reid import ReidConfig

pytestmark = pytest.mark.usefixtures("_no_pictures")
DIGITS = {
    "peers": ("resnet8", "resnet8"), "batch_size": 16, "iterations": 2, "threads": 1,
    "deterministic": True, "amp": "off", "tensorboard": False, "device": "cpu",
    "execution": "eager",
}  # fmt: skip
NOT_OF_A_GROUP = ("ensemble_top1",)  # in training, where only the mean over the groups is known


def digits(folder, groups=1, **changes):
    settings = {**DIGITS, "folder": str(folder), **changes}
    settings["peers"] = settings["peers"] * groups
    return fastdml.train.digits(groups=groups, **settings)


def plain_peers(count):
    """Without dropout, whose draws depend on what else is run."""
    peers = [TinyPeer(4, seed) for seed in range(count)]
    for peer in peers:
        peer.drop = nn.Identity()
    return peers


@pytest.fixture
def run(settings, tmp_path):
    """Trains groups of two tiny peers into a folder of this name."""

    def train(name, groups=1, *, size=2, teachers=(), unlabelled=None, **changes):
        cohort = Cohort(plain_peers(groups * size), CLASSES, groups=groups)
        config = settings(folder=str(tmp_path / name), **changes)
        return fit(cohort, *make_loaders(), config, teachers=teachers, unlabelled=unlabelled)

    return train


def training_log(folder):
    return [
        {n: v for n, v in r.items() if r["kind"] == "test" or n not in NOT_OF_A_GROUP}
        for r in logged(folder)
    ]


def assert_same_run(folder, other):
    """Weights and all that is said of them are the same bits."""
    assert (folder / "cohort.json").read_text() == (other / "cohort.json").read_text()
    for path in (other / "peers").iterdir():
        assert path.read_bytes() == (folder / "peers" / path.name).read_bytes()
    assert training_log(folder) == training_log(other)
    one, two = (read_predictions(place) for place in (folder, other))
    for name in one.__dataclass_fields__:
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    one, two = (json.loads((place / "summary.json").read_text()) for place in (folder, other))
    assert one["peers"] == two["peers"]
    assert one["ensemble_mutual"] == two["ensemble_mutual"]
    assert one["mutual"]["scores"] == two["mutual"]["scores"]


def test_group_0_is_the_run_of_the_seed_bit_for_bit(tmp_path):
    digits(tmp_path / "one", seed=5, independent=True)
    result = digits(tmp_path / "grouped", 2, seed=5, independent=True)
    place = tmp_path / "grouped/groups/0"
    assert_same_run(place, tmp_path / "one")
    assert_same_run(place / "independent", tmp_path / "one/independent")
    assert group_folder(result.folder / "independent", 0) == place / "independent"
    assert [path.name for path in group_folders(result.folder)] == ["0", "1"]
    rows = [line.split("  ")[0] for line in str(result).splitlines()]
    assert rows[6:8] == ["ensemble of group 0", "ensemble of group 1"]
    each = [json.loads((p / "summary.json").read_text()) for p in group_folders(result.folder)]
    assert [one["config"]["seed"] for one in each] == [5, 6]
    # a group's folder holds no checkpoint: the run makes it again, as the group's page says
    run, lost = result.folder, group_folder(result.folder, 1) / "predictions.npz"
    was = lost.read_bytes()
    lost.unlink()
    with pytest.raises(InputError, match=f"is a group of the run {re.escape(str(run))}"):
        digits(place, resume=True)
    main(["report", str(lost.parent)])
    page = html.unescape((lost.parent / "report.html").read_text())
    assert f"fastdml train digits --resume --folder {run} writes it" in page
    assert main(["train", "digits", "--resume", "--folder", str(run)]) == 0
    assert lost.read_bytes() == was


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["streams", "graph", "stacked", "auto"])
def test_group_0_follows_the_run_of_the_seed_on_a_gpu(tmp_path, execution):
    """To rounding, which a few steps magnify little."""
    on_gpu = {"device": "cuda", "execution": execution, "deterministic": False, "iterations": 8}
    found = []
    for name, groups in (("one", 1), ("grouped", 3)):
        digits(tmp_path / name, groups, seed=5, log_every=1, **on_gpu)
        found.append(tmp_path / name)
    alone, together = (
        [r["loss"] for r in logged(folder) if r["kind"] == "train"]
        for folder in (found[0], group_folder(found[1], 0))
    )
    assert len(alone) == 8
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, rel=0.02)
    whole = [r["loss"] for r in logged(found[1]) if r["kind"] == "train"]
    assert len({loss[0] for loss in zip(*whole, strict=True)}) == 6  # six networks


def test_group_1_begins_as_the_run_of_the_next_seed(tmp_path):
    grouped = Cohort(["resnet8"] * 4, 10, in_channels=1, seed=5, groups=2)
    for g, own in enumerate((grouped.peers[:2], grouped.peers[2:])):
        alone = Cohort(["resnet8"] * 2, 10, in_channels=1, seed=5 + g)
        for peer, other in zip(own, alone.peers, strict=True):
            pairs = zip(peer.state_dict().values(), other.state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "ensemble", "temperature": 2.0, "gate": "best"},
        {"divergence": "jsd", "gate": "entropy", "execution": "threads"},
        {"update": "sequential", "amp": "fp16"},
        {"accumulate": 2, "ema": 0.9, "kl_schedule": "linear", "kl_weight_end": 0.0},
        {"size": 3},
    ],
    ids=str,
)
def test_it_is_so_with(run, tmp_path, changes):
    unlabelled = torch.randn(40, 1, SIDE, SIDE) if "size" in changes else None
    run("one", unlabelled=unlabelled, **changes)
    run("grouped", 2, unlabelled=unlabelled, **changes)
    assert_same_run(tmp_path / "grouped/groups/0", tmp_path / "one")


@pytest.mark.slow  # resnet8 in several runs
def test_stacked_steps_train_groups_as_they_train_a_group(tmp_path):
    """A convolution of twice the channels may sum in another order."""
    digits(tmp_path / "one", execution="stacked", lr=0.01)
    digits(tmp_path / "grouped", 2, execution="stacked", lr=0.01)
    one, two = (Cohort.load(tmp_path / path) for path in ("one", "grouped/groups/0"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_teachers_teach_each_group(run, tmp_path):
    teacher = TinyPeer(5, 99)
    run("one", teachers=[teacher])
    run("grouped", 2, teachers=[copy.deepcopy(teacher)])
    assert_same_run(tmp_path / "grouped/groups/0", tmp_path / "one")


def test_a_run_that_is_resumed_ends_the_same(run, tmp_path):
    whole = run("whole", 2)
    with crashing(at=8):
        run("cut", 2, save_every_steps=1)
    assert group_folders(tmp_path / "cut") == []
    cut = run("cut", 2, save_every_steps=1, resume=True)
    for places in zip(group_folders(whole.folder), group_folders(cut.folder), strict=True):
        assert_same_run(*places)
    assert run("cut", 2, resume=True).scores == whole.scores  # one that has ended


def test_scores_are_a_groups_ensembles_and_their_mean(tmp_path, monkeypatch):
    result = digits(tmp_path / "run", 2, csv=True, tensorboard=True)
    scores = result.scores
    found = [fastdml.load(path, weights="last") for path in group_folders(result.folder)]
    assert [len(one.peers) for one in found] == [2, 2]
    each = [json.loads((p / "summary.json").read_text()) for p in group_folders(result.folder)]
    last = [one["mutual"]["scores"]["ensemble_top1"] for one in each]
    assert scores.group_top1 == [last[0], last[0], last[1], last[1]]
    assert scores.ensemble_top1 == pytest.approx(sum(last) / 2, abs=1e-12)
    summary = json.loads((result.folder / "summary.json").read_text())
    assert [peer["group"] for peer in summary["peers"]] == [0, 0, 1, 1]
    assert not (result.folder / "predictions.npz").exists()
    with pytest.raises(InputError, match=r"2 groups .* take the folder of one, groups/0 to groups"):
        fastdml.load(result.folder)
    assert len(fastdml.load(result.folder, peer=3).peers) == 1
    main(["export", str(result.folder), "--peer", "3", "--format", "safetensors"])
    (card,) = (result.folder / "export").glob("*.md")
    assert "One of 2 peers that learned together" in card.read_text()
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    assert len(result.to_frame()) == 4  # a row an epoch and peer


def test_own_peers_in_groups(settings):
    cohort = Cohort(plain_peers(4), CLASSES, groups=2)
    # Of two groups of the settings' own two peers none would learn anything.
    result = fit(cohort, *make_loaders(), settings(epochs=1, groups=2, ce_weight=0.0))
    assert result.config.groups == 2
    own = Cohort.load(group_folder(result.folder, 1), peers=[TinyPeer(4, 0), TinyPeer(4, 0)])
    assert torch.equal(own.peers[1].conv.weight, cohort.peers[3].conv.weight)
    assert own.names == ["TinyPeer-1", "TinyPeer-2"]


class Ring(fastdml.train.Callback):
    def on_epoch_start(self, event):
        event.set_peer_weights(torch.eye(event.networks).roll(1, 1))


def test_what_groups_cannot_mean_is_refused(settings):
    for changes, message in (
        ({"peers": ("resnet8",) * 3}, "groups 2 of 3 peers are not of one size"),
        ({"peers": ("resnet8", "resnet8", "resnet8", "resnet14")}, "peer 1 is resnet8 in group 0"),
        ({"peers": ("resnet8",)}, "groups must be a whole number from 1 to 1"),
        ({"peers": ("resnet8",) * 4, "mesh": "peer=2,data=1"}, "the groups share one device"),
        ({"peers": ("resnet8",) * 2, "ce_weight": 0.0}, "ce_weight = 0: a peer by itself"),
        ({"peers": ("resnet8",) * 2, "subset": 9}, "groups 2 with subset 9: the seed chooses"),
        ({"peers": ("resnet8",) * 2, "validation": 0.1}, "groups 2 with validation 0.1: the seed"),
        ({"peers": ("resnet8",) * 2, "labelled": 9}, "groups 2 with labelled 9: the seed chooses"),
    ):
        with pytest.raises(InputError, match=message):
            TrainConfig(groups=2, **changes)
    with pytest.raises(InputError, match="groups must be 1 in re-identification, not 2"):
        ReidConfig(groups=2)
    with pytest.raises(InputError, match="the cohort was made with 1"):
        fit(Cohort(plain_peers(3), CLASSES), *make_loaders(), settings(groups=3))
    for changes, message in (
        ({"groups": 3}, "groups must be a whole number from 1 to 2, the peers, not 3"),
        ({"groups": 2, "ce_weight": 0.0}, "ce_weight = 0: a peer by itself"),
    ):
        with pytest.raises(InputError, match=message):
            fastdml.train.run(TrainConfig(**changes))
    cohort = Cohort(plain_peers(4), CLASSES, groups=2)
    with pytest.raises(InputError, match="which learn from nobody outside"):
        fit(cohort, *make_loaders(), settings(), callbacks=[Ring()])


def test_a_cohort_of_groups_keeps_them(tmp_path):
    cohort = Cohort(["resnet8"] * 4, 10, in_channels=1, groups=2)
    cohort.save(tmp_path)
    assert Cohort.load(tmp_path).groups == 2
    with pytest.raises(InputError, match="each an ensemble of its own"):
        cohort.ensemble(torch.zeros(1, 1, 8, 8))
    description = json.loads((tmp_path / "cohort.json").read_text())
    for wrong in (3, 0, True, "2"):
        (tmp_path / "cohort.json").write_text(json.dumps({**description, "groups": wrong}))
        with pytest.raises(InputError):
            Cohort.load(tmp_path)
    del description["groups"]
    (tmp_path / "cohort.json").write_text(json.dumps(description))
    assert Cohort.load(tmp_path).groups == 1
