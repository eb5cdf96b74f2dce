"""Runs with teachers: where they come from, what is written of them, and how such a run resumes."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import pytest
import torch
import yaml
from reid_runs import SMALL as SMALL_REID
from runs import crashing, logged, same_weights
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_runs import CLASSES, CPU, TinyPeer, make_cohort, make_images, make_loaders
from torch import nn

import fastdml
from fastdml import cli
from fastdml.cohort import Cohort
from fastdml.cohort_teachers import Teacher, digest
from fastdml.data import ResidentLoader
from fastdml.errors import InputError
from fastdml.predictor import Predictor
from fastdml.train import fit
from fastdml.train.teacher_cache import _digest
from fastdml.train.teachers import found

pytestmark = pytest.mark.usefixtures("_no_pictures")
SMALL = ["--subset", "16", "--batch-size", "8", "--epochs", "1", "--no-tensorboard", "--threads",
         "1", "--execution", "eager", "--schedule", "step", "--amp", "off"]  # fmt: skip


def train(*options):
    return cli.main(["train", "digits", *SMALL, *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two peers, from which others take teachers."""
    folder = tmp_path_factory.mktemp("teachers")
    assert train("--peers", "resnet8", "resnet14", "--folder", str(folder / "big")) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "big", "big")
    return tmp_path


def taught(*teachers, folder="small", peers=("resnet8",), more=()):
    return train("--peers", *peers, "--folder", folder, *more, "--teachers", *teachers)


def test_a_peer_of_a_run_teaches_and_is_named_everywhere(here, capsys):
    assert taught("big:resnet14", more=["--csv"]) == 0
    assert "taught by big:resnet14" in capsys.readouterr().err
    teacher = Cohort.load("big").peers[1]
    entry = {"name": "big:resnet14", "source": "big:resnet14", "model": "resnet14",
             "sha256": digest(teacher)}  # fmt: skip
    said = json.loads((here / "small/cohort.json").read_text())
    assert said["teachers"] == [entry]
    assert json.loads((here / "small/summary.json").read_text())["teachers"] == [entry]
    state = torch.load("small/last.ckpt", weights_only=True)
    assert state["description"]["teachers"] == [entry]
    assert all(key.startswith("peers.0.") for key in state["cohort"])
    assert yaml.safe_load((here / "small/config.yaml").read_text())["teachers"] == ["big:resnet14"]
    (epoch,) = (r for r in logged("small") if r["kind"] == "epoch")
    assert epoch["teacher_kl/big:resnet14"] == pytest.approx(epoch["kl"])
    assert cli.main(["report", "small", "--to", "page.html"]) == 0
    page = (here / "page.html").read_text()
    assert "KL from teacher big:resnet14" in page
    assert f"resnet8 {epoch['teacher_kl/big:resnet14'][0]:.3f}" in page
    assert cli.main(["export", "small", "--format", "safetensors"]) == 0
    card = (here / "small/export/00-resnet8.md").read_text()
    assert "taught by big:resnet14" in card
    assert digest(teacher) in card
    predictor = fastdml.load("small/export/00-resnet8.safetensors")
    assert predictor.names == ["resnet8"]
    assert cli.main(["evaluate", "small"]) == 0
    assert taught("small/export/00-resnet8.safetensors", folder="next") == 0
    (entry,) = json.loads((here / "next/cohort.json").read_text())["teachers"]
    assert entry["sha256"] == digest(Cohort.load("small").peers[0])


def test_a_place_without_a_name_of_its_own_is_called_as_its_folder(here, monkeypatch):
    (here / "big").rename(here / "a:None")
    monkeypatch.chdir(here / "a:None")
    for given, source in ((".:0", ".:resnet8"), ("../a:None", "../a:None:resnet8")):
        teacher = found([given])[0]
        assert (teacher.name, teacher.source) == ("a:None:resnet8", source)


def test_without_a_peer_all_of_a_run_teach_and_the_independent_phase_has_none(here):
    assert taught("big", peers=("resnet8", "resnet8"), more=["--independent"]) == 0
    names = [t["name"] for t in json.loads((here / "small/cohort.json").read_text())["teachers"]]
    assert names == ["big:resnet8", "big:resnet14"]
    alone = json.loads((here / "small/independent/cohort.json").read_text())
    assert "teachers" not in alone
    assert yaml.safe_load((here / "small/independent/config.yaml").read_text())["teachers"] == []
    assert not any("teacher" in key for r in logged("small/independent") for key in r)


def test_a_dry_run_names_them(here, capsys):
    assert taught("big:1", more=["--dry-run", "--augment", "none", "--cache-teachers"]) == 0
    shown = capsys.readouterr().out
    assert "teacher 0   big:resnet14, frozen" in shown
    assert "teacher_logits.safetensors" in shown
    assert not (here / "small").exists()


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("big:resnet15", "teacher big:resnet15: there is no peer 'resnet15'"),
        ("bug:resnet8", "teacher bug:resnet8: there is no bug: give the folder of a run"),
        ("big:ensemble", "teacher big:ensemble: an ensemble gives no logits"),
        ("big/peers", "teacher big/peers: big/peers is neither the folder of a run"),
        ("grey", "teacher grey:TinyPeer tells 4 classes apart, and the peers 10"),
        ("big big:1", "teacher big:resnet14 is named twice: name it once"),
    ],
)
def test_what_cannot_teach_is_one_line(here, capsys, teacher, message):
    if teacher == "grey":
        cohort = Cohort(["resnet8"], 4, in_channels=1)
        cohort.names = ["TinyPeer"]
        cohort.save("grey")
    assert taught(*teacher.split()) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1, err
    assert message in err[0]
    assert not (here / "small").exists()


def test_a_run_goes_on_with_the_same_teachers_wherever_they_are(here, capsys):
    assert taught("big", folder="whole", more=["--epochs", "2"]) == 0
    assert taught("big") == 0
    on = ["train", "digits", "--folder", "small", "--resume", "--epochs", "2"]
    (here / "big").rename("moved")
    capsys.readouterr()
    assert cli.main(on) == 2
    message = capsys.readouterr().err
    assert "cannot resume small: teacher big: there is no big" in message
    assert "--teachers says where they are now" in message
    assert cli.main([*on, "--teachers", "moved:resnet14", "moved:resnet8"]) == 2
    message = capsys.readouterr().err
    assert "cannot resume small/last.ckpt: teacher big:resnet8 had weights of SHA-256" in message
    assert "and those of moved:resnet14 are" in message
    assert cli.main([*on, "--teachers", "moved:resnet14"]) == 2
    message = "its teachers were big:resnet8, big:resnet14 and are now moved:resnet14"
    assert message in capsys.readouterr().err
    assert cli.main([*on, "--teachers", "moved"]) == 0
    assert same_weights(Cohort.load("small"), Cohort.load("whole"))
    assert logged("small") == logged("whole")  # by the names that they had
    entry = Cohort.load("small").taught_by[1]
    assert (entry.name, entry.source) == ("big:resnet14", "moved:resnet14")


class Drawn(fastdml.train.Callback):
    def on_epoch_start(self, event):
        generator = torch.Generator().manual_seed(int(event.epoch))
        weights = torch.rand(event.networks, event.networks, generator=generator)
        event.set_peer_weights(weights)


@pytest.mark.parametrize(
    "own",
    [
        {"gate": "entropy", "augment": "none", "cache_teachers": True},
        pytest.param({"target": "ensemble", "ema": 0.9}, marks=pytest.mark.slow),
        pytest.param({"peers": ("resnet8",), "accumulate": 2, "amp": "bf16"},
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_with_all_else_that_changes_over_a_run_it_resumes_bit_for_bit(here, own):
    """Few labels, schedules of both numbers, another divergence and a callback's weights; the
    cache changes no bit of it."""
    options = {
        "teachers": ["big"], "labelled": 20, "subset": 60, "batch_size": 12, "epochs": 2,
        "divergence": "jsd", "jsd_beta": 0.2, "kl_schedule": "cosine", "kl_weight_end": 0.1,
        "kl_warmup_epochs": 0.5, "temperature": 4.0, "temperature_schedule": "linear",
        "temperature_end": 1.0, "eval_every": 2, "save_every_steps": 1, "threads": 1, "amp": "off",
        "execution": "eager", "device": "cpu", "tensorboard": False, **own,
    }  # fmt: skip

    def run(folder, **changes):
        fastdml.train.digits(**{**options, "folder": folder, **changes}, callbacks=[Drawn()])
        return Cohort.load(folder)

    whole = run("whole")
    with crashing(8):
        run("broken")
    assert same_weights(run("broken", resume=True), whole)
    assert logged("broken") == logged("whole")
    if own.get("cache_teachers"):
        assert same_weights(run("asked", cache_teachers=False), whole)


class Says(nn.Module):
    """The same number for each image and class."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return torch.full((len(x), CLASSES), self.number)


class TestFit:
    def test_modules_teach_in_one_run_or_for_good(self, settings, tmp_path):
        teacher = TinyPeer(9, 77)
        found = []
        for own, given in (((teacher,), ()), ((), (teacher,))):
            cohort = make_cohort()
            cohort.teachers = own
            config = settings(folder=str(tmp_path / str(len(found))))
            result = fit(cohort, *make_loaders(), config, teachers=given)
            assert [t.name for t in result.teachers] == ["TinyPeer"]
            assert len(cohort.teachers) == len(own)
            assert cohort.taught_by == list(result.teachers)
            assert result.config.teachers == ("TinyPeer",)
            found.append(cohort)
        assert same_weights(*found)
        alone = make_cohort()
        fit(alone, *make_loaders(), settings(folder=str(tmp_path / "alone")))
        assert not same_weights(alone, found[0])
        assert alone.taught_by == []

    def test_averages_and_sequential_updates_resume_bit_for_bit(self, settings, tmp_path):
        options = {"ema": 0.9, "update": "sequential", "schedule": "step", "lr_drop_every": 0}
        cohorts = []
        for name, lengths in (("whole", (2,)), ("parts", (1, 2))):
            for epochs in lengths:
                cohort = make_cohort()
                folder = {"folder": str(tmp_path / name), "resume": (tmp_path / name).exists()}
                config = settings(epochs=epochs, **folder, **options)
                fit(cohort, *make_loaders(), config, teachers=[TinyPeer(9, 77)])
            cohorts.append(cohort)
        assert same_weights(*cohorts)
        again = settings(epochs=3, folder=str(tmp_path / "parts"), resume=True, **options)
        with pytest.raises(InputError, match="teacher TinyPeer had weights of SHA-256"):
            fit(make_cohort(), *make_loaders(), again, teachers=[TinyPeer(9, 78)])

    def test_what_load_gives_is_refused_with_its_remedy(self, settings):
        with pytest.raises(InputError, match=r"teachers=\[\*it\.peers\]"):
            fit(make_cohort(), *make_loaders(), settings(), teachers=[Predictor(make_cohort())])

    @pytest.mark.parametrize(
        ("teachers", "message"),
        [
            ("big", r"teachers must be a list, such as \['timm:resnet18'\], not 'big'"),
            (nn.Sequential(nn.Flatten()), "teachers must be a list, .* not Sequential"),
            (None, "teachers must be a list, .* not None"),
            ([Says(float("nan"))], "Says gives logits with NaN for 16 of the 16 first inputs"),
            ([Says(1)], "teacher Says gives logits of int64: wrap it"),
        ],
    )
    def test_what_gives_no_logits_to_learn_from_is_one_line(self, settings, teachers, message):
        with pytest.raises(InputError, match=message):
            fit(make_cohort(), *make_loaders(), settings(), teachers=teachers)

    def test_a_teacher_of_another_normalisation_gets_the_images_as_it_was_trained(
        self, settings, tmp_path
    ):
        """As a module that undoes the run's normalisation and does its own by hand."""
        taught = {"amp": "off", "epochs": 1}
        big = Cohort(["resnet8"], CLASSES, in_channels=1)
        fit(big, *make_loaders(), settings(folder=str(tmp_path / "big"), **taught))

        class ByHand(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = copy.deepcopy(big.peers[0])

            def forward(self, x):
                return self.net((x * 30 + 80 - 100) / 60)

        found = []
        for teacher in (str(tmp_path / "big"), ByHand()):
            images = dataclasses.replace(make_images(96, 1), mean=(80.0,), std=(30.0,))
            train = ResidentLoader(images, 16, train=True, device=CPU, pad=0, flip=False)
            cohort = Cohort(["resnet8"], CLASSES, in_channels=1, seed=5)
            config = settings(folder=str(tmp_path / str(len(found))), **taught)
            result = fit(cohort, train, None, config, teachers=[teacher])
            found.append(result.history[-1])
        assert found[0]["teacher_kl/big:resnet8"] == pytest.approx(
            found[1]["teacher_kl/ByHand"], rel=1e-4
        )
        assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)


class TestCache:
    """--cache-teachers: digits without augmentation."""

    PLAIN = ("--augment", "none", "--epochs", "2")

    @pytest.fixture(autouse=True)
    def _here(self, here):
        self.file = here / "cached/teacher_logits.safetensors"

    def cached(self, *more, folder="cached", epochs="2"):
        options = [*self.PLAIN[:-1], epochs, "--cache-teachers", *more]
        return taught("big", folder=folder, peers=("resnet8", "resnet8"), more=options)

    @pytest.mark.parametrize(
        "options",
        [
            # of 16: two are shown in no batch of the first epoch
            ("--batch-size", "7", "--amp", "bf16", "--update", "sequential"),
            ("--accumulate", "2"),
            pytest.param(("--loader", "torch"), marks=pytest.mark.slow),
            pytest.param(("--execution", "stacked"), marks=pytest.mark.slow),
            pytest.param(("--execution", "threads", "--threads", "2"), marks=pytest.mark.slow),
        ],
        ids=" ".join,
    )
    def test_a_run_with_it_is_the_run_without(self, options, monkeypatch):
        more = [*self.PLAIN, *options]
        assert taught("big", folder="plain", peers=("resnet8", "resnet8"), more=more) == 0
        calls = []
        forward = Teacher.forward
        monkeypatch.setattr(
            Teacher, "forward", lambda self, x: calls.append(len(x)) or forward(self, x)
        )
        assert self.cached(*options) == 0
        batches = 4 if "--batch-size" in options else 2
        assert len(calls) == 2 * (1 + batches)  # of each of the two teachers, after a first look
        if "bf16" in options:
            with safe_open(self.file, framework="pt") as file:
                assert file.get_tensor("0").dtype == torch.bfloat16
        for a, b in zip(logged("plain"), logged("cached"), strict=True):
            for key in ("loss", "teacher_kl/big:resnet14"):
                assert (key in a) == (key in b)
                assert a.get(key, []) == pytest.approx(b.get(key, []), rel=1e-5)
        with_it, without = Cohort.load("cached").state_dict(), Cohort.load("plain").state_dict()
        for key, w in with_it.items():
            torch.testing.assert_close(w, without[key], rtol=1e-5, atol=1e-6)

    def test_a_resumed_run_reads_it_and_makes_a_bad_one_anew(self, capsys):
        assert self.cached(folder="whole") == 0
        assert self.cached(epochs="1") == 0
        assert "the teachers' logits on 16 images" in capsys.readouterr().err
        good = self.file.read_bytes()

        def again(epochs):
            on = ["train", "digits", "--folder", "cached", "--resume", "--epochs", epochs]
            assert cli.main(on) == 0
            return capsys.readouterr().err

        err = again("2")
        assert "teacher_logits" not in err  # read, and nothing to say
        assert "the teachers' logits" not in err
        assert same_weights(Cohort.load("cached"), Cohort.load("whole"))

        damaged = bytearray(good)
        damaged[-3] ^= 0x40
        self.file.write_bytes(damaged)
        assert "teacher_logits.safetensors is made anew: it is damaged" in again("3")
        self.file.write_bytes(good[:100])
        assert "is made anew: it cannot be read" in again("4")
        with safe_open(self.file, framework="pt") as file:
            facts = file.metadata()
            tables = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        save_file(tables, self.file, {**facts, "made_of": "{}"})
        assert "is made anew: it was made of other teachers or images" in again("5")
        for epochs, other in (
            ("6", [t.roll(1, 0) for t in tables.values()]),
            ("7", [t[:3] for t in tables.values()]),
            ("8", [tables["0"].half(), tables["1"]]),
            ("9", [tables["0"]]),
        ):
            named = {str(i): t.contiguous() for i, t in enumerate(other)}
            save_file(named, self.file, {**facts, "sha256": _digest([*named.values()])})
            assert "is made anew: its rows are not what the teachers say" in again(epochs)
        assert "anew" not in again("10")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "keeps one prediction for each image, and these are augmented (pad)"),
            (("--pad", "0", "--flip"), "these are augmented (flip)"),
        ],
    )
    def test_with_augmentation_it_is_refused(self, options, message, capsys):
        more = [*options, "--cache-teachers"]
        assert taught("big", folder="cached", more=more) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1 or "stay in memory" in err
        assert not self.file.parent.exists()

    def test_without_teachers_or_numbers_of_images_it_is_refused(self, settings, capsys):
        assert train("--augment", "none", "--cache-teachers", "--folder", "cached") == 2
        assert "there are no teachers whose logits it could keep" in capsys.readouterr().err
        loader, _ = make_loaders()
        batches = list(loader.epoch(0))
        with pytest.raises(InputError, match="does not say which images a batch shows"):
            fit(make_cohort(), batches, None, settings(cache_teachers=True),
                teachers=[TinyPeer(9, 77)])  # fmt: skip

    def test_of_arrays(self, settings, tmp_path):
        images = make_images(40, 1)
        x, y = images.pixels.permute(0, 3, 1, 2).float() / 100, images.labels
        found = []
        for cached in (False, True):
            cohort = make_cohort()
            config = settings(folder=str(tmp_path / str(cached)), cache_teachers=cached)
            fit(cohort, (x, y), None, config, teachers=[TinyPeer(9, 77)])
            found.append(cohort.state_dict())
        for key, w in found[0].items():
            torch.testing.assert_close(w, found[1][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cached", [pytest.param(False, marks=pytest.mark.slow), True])
def test_identities_are_classes_to_a_teacher(market_root, tmp_path, cached):
    """Its classifier teaches beside losses on features, and the authors' sum counts it."""
    still = {"pad": 0, "flip": False, "erasing": 0.0} if cached else {}
    values = {"root": market_root, **SMALL_REID, **still, "epochs": 1, "triplet_weight": 1.0}
    train_reid = fastdml.train.market1501
    train_reid(**values, folder=str(tmp_path / "big"), independent=False)
    result = train_reid(
        **values, folder=str(tmp_path / "small"), teachers=[f"{tmp_path / 'big'}:1"], kl_sum=True,
        cache_teachers=cached,
    )  # fmt: skip
    (name,) = [t.name for t in result.teachers]
    (epoch,) = result.history
    pairs, taught = epoch["pairwise_kl"], epoch[f"teacher_kl/{name}"]
    for k in range(2):
        assert epoch["kl"][k] == pytest.approx(pairs[1 - k][k] + taught[k], rel=1e-4)
    assert (tmp_path / "small" / "teacher_logits.safetensors").exists() == cached
