"""`fit` with data and peers of one's own: mistakes are one line before there is a folder, and what
ran is what is recorded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from fastdml import cli, train
from fastdml.cohort import Cohort
from fastdml.data import ImageSet, ResidentLoader
from fastdml.engine.amp import resolve_amp
from fastdml.errors import InputError
from fastdml.models import ReidHead
from fastdml.train import ReidConfig, TrainConfig, checkpoint, checks, fit
from fastdml.train.batches import IterableBatches
from fastdml.train.checks import WORLD_SIZES

pytestmark = pytest.mark.usefixtures("_no_pictures")
CLASSES, SHAPE = 4, (3, 12, 10)


def net(width: int = 4, seed: int = 0, channels: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, width, 3),
            nn.BatchNorm2d(width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, CLASSES),
        )


def cohort(*others: nn.Module) -> Cohort:
    return Cohort([net(), *(others or [net(5)])], CLASSES)


def pairs(n: int = 24, shape=SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    images = torch.randn(n, *shape, generator=generator)
    return images, torch.arange(n) % CLASSES


def loader(images=None, labels=None, batch_size: int = 8) -> DataLoader:
    x, y = pairs()
    data = TensorDataset(x if images is None else images, y if labels is None else labels)
    return DataLoader(data, batch_size=batch_size)


@pytest.fixture
def settings(tmp_path):
    def make(**changes) -> TrainConfig:
        values = {"folder": str(tmp_path / "run"), "epochs": 1, "amp": "off", "tensorboard": False}
        return TrainConfig(**{**values, **changes})

    return make


@pytest.fixture
def refused(settings, tmp_path):
    """`fit` must refuse in one line that matches, and leave no folder behind."""

    def check(peers, batches, pattern: str, test=None, **changes) -> InputError:
        with pytest.raises(InputError, match=pattern) as caught:
            fit(peers, batches, test, settings(**changes))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()
        return caught.value

    return check


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class TestMistakes:
    @pytest.mark.parametrize(
        ("peers", "pattern"),
        [
            (["resnet8", "resnet8"], r"must be a fastdml.Cohort, not a list: .* Cohort\(\['resn"),
            (net(), r"must be a fastdml.Cohort, not a Sequential"),
            ("resnet8", "must be a fastdml.Cohort, not a str"),
            (Cohort([nn.Flatten()], CLASSES), "the peers have no parameters"),
        ],
    )
    def test_no_cohort(self, refused, peers, pattern):
        refused(peers, loader(), pattern)

    def test_no_settings(self, tmp_path):
        with pytest.raises(InputError, match="config must be a TrainConfig, not a dict"):
            fit(cohort(), loader(), None, {"folder": str(tmp_path / "run")})

    @pytest.mark.parametrize(
        ("batch", "pattern"),
        [
            ({"image": 1, "label": 2}, r"batch 0 is a dict of 'image', 'label': batches must be"),
            (pairs(8)[0], r"batch 0 is a Tensor: batches must be pairs \(inputs, labels\)"),
            ((*pairs(8), 3), "batch 0 is 3 things"),
            ((pairs(8)[0].numpy(), pairs(8)[1]), "batch 0: inputs are a ndarray, not a tensor"),
            ((pairs(8)[0], [0] * 8), "batch 0: labels are a list, not a tensor"),
            ((pairs(8)[0][:, 0, 0, 0], pairs(8)[1]), r"of shape \(8,\): give \(N, channels, "),
            ((pairs(8)[0].flatten(1), pairs(8)[1]), r"Sequential-1 fails on .*inputs \(8, 360\)"),
            ((pairs(8)[0][:0], pairs(8)[1][:0]), r"of shape \(0, 3, 12, 10\)"),
            ((pairs(8)[0].byte(), pairs(8)[1]), r"images are uint8: normalise .*float\(\) / 255"),
            ((pairs(8)[0].long(), pairs(8)[1]), "images are int64: normalise them to floats"),
            ((pairs(8)[0], pairs(8)[1].float()), r"labels are float32 of .*\(labels.long\(\)\)"),
            (
                (pairs(8)[0], nn.functional.one_hot(pairs(8)[1])),
                r"labels are int64 of shape \(8, 4\) for 8 images: .*argmax\(1\) makes them",
            ),
            ((pairs(8)[0], pairs(8)[1][:7]), r"labels are int64 of shape \(7,\) for 8 images"),
            ((pairs(8)[0], pairs(8)[1] + 1), "label 4 is no class: .* 4 classes labels are 0 to 3"),
            ((pairs(8)[0], pairs(8)[1] - 1), "label -1 is no class: .*without a label: -100"),
            ((pairs(8)[0].log(), pairs(8)[1]), "image 0 .* NaN or infinite: look at the data"),
            ((pairs(8)[0] / 0, pairs(8)[1]), "of 8 images. has values that are NaN or infinite"),
            ((pairs(8, (1, 12, 10))[0], pairs(8)[1]), r"Sequential-1 fails on .*images \(8, 1, "),
            ((pairs(8)[0].double(), pairs(8)[1]), "Sequential-1 fails .* RuntimeError: .*ouble"),
            (
                (pairs(8)[0].double(), pairs(8)[1]),
                r"Sequential-1 fails .* are float64 and its weights float32: images\.float\(\)",
            ),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("role", ["train", "test"])
    def test_batches(self, refused, batch, pattern, role):
        if role == "train":
            refused(cohort(), [batch], pattern)
        else:
            where = "" if "Sequential" in pattern else "test .*"
            refused(cohort(), loader(), where + pattern, test=[batch])

    @pytest.mark.parametrize(
        ("source", "pattern"),
        [
            ([*pairs(8)], "batch 0 is a Tensor"),
            (pairs(8), "not one training batch: batch_size is 64 and there are 8 samples"),
            (TensorDataset(*pairs()), "not one training batch: batch_size is 64 and there are 24"),
            (5, "a int is not batches with a length, such as .* nor a pair of arrays"),
            (DataLoader(Stream()), "a DataLoader is not batches with a length"),
            (Stream(), "a Stream is not batches with a length"),
            ([], "not one training batch"),
        ],
    )
    def test_sources(self, refused, source, pattern):
        refused(cohort(), source, pattern)

    def test_labels_without_a_label_are_none(self, settings):
        labels = pairs()[1]
        labels[::3] = -100
        assert fit(cohort(), loader(labels=labels), None, settings()).history[0]["step"] == 3

    def test_a_set_of_more_classes_than_the_peers(self, refused):
        images = torch.zeros(20, *SHAPE, dtype=torch.uint8)
        names = tuple("abcdef")
        data = ImageSet(
            images, torch.zeros(20, dtype=torch.int64), 6, names, (0.0,) * 3, (1.0,) * 3
        )
        batches = ResidentLoader(data, 8, train=True, pad=0)
        refused(cohort(), batches, "data have 6 classes and the peers 4: .* num_classes=6")

    def test_later_batches_of_another_size_are_named(self, settings):
        batches = [pairs(8), pairs(8), pairs(8, (3, 12, 16))]
        with pytest.raises(
            InputError, match=r"batch 2 holds images of 3x12x16, .* of 3x12x10: res"
        ):
            fit(cohort(), batches, None, settings())

    @pytest.mark.parametrize(
        ("spoil", "pattern"),
        [
            (lambda x, y: (x, y + 9), "training batch 1: label 9 is no class"),
            (lambda x, y: (x * float("inf"), y), "training batch 1: image 0 .* NaN or infinite"),
            (lambda x, y: (x.byte(), y), "training batch 1: images are uint8"),
        ],
    )
    def test_later_batches_are_looked_at_too(self, settings, spoil, pattern):
        with pytest.raises(InputError, match=pattern):
            fit(cohort(), [pairs(8), spoil(*pairs(8))], None, settings())

    def test_a_length_that_promises_too_much(self, settings):
        class Short(list):
            def __len__(self):
                return 5

        with pytest.raises(InputError, match="ended after 2 of the 5 that their length promises"):
            fit(cohort(), Short([pairs(8), pairs(8)]), None, settings())


class Broken(nn.Module):
    """A peer of one's own with a mistake."""

    def __init__(self, forward: Callable) -> None:
        super().__init__()
        self.net, self.mistake = net(seed=9), forward

    def forward(self, x):
        return self.mistake(self, self.net(x))


class TestFailingPeers:
    @pytest.mark.parametrize(
        ("mistake", "pattern", "cause"),
        [
            (lambda self, z: z @ z, "peer Broken fails on .* RuntimeError: mat1", RuntimeError),
            (lambda self, z: self.absent, "fails on .*AttributeError: .*absent", AttributeError),
            (lambda self, z: z[99], "fails on images .8, 3, 12, 10.: IndexError", IndexError),
            (
                lambda self, z: z.missing if self.training else z,
                "peer Broken fails on images .* in training: AttributeError",
                AttributeError,
            ),
            (
                lambda self, z: z.exp().mul_(2).log_().mul(z.exp().relu_()).add_(z.sigmoid_()),
                "peer Broken fails on .* in training: RuntimeError: .* in-?place",
                RuntimeError,
            ),
            (
                lambda self, z: (z, z) if self.training else z,
                "for 8 images in training returned tuple",
                None,
            ),
            (lambda self, z: z[:, :2], r"must return logits \(N, 4\), .* returned \(8, 2\)", None),
            (lambda self, z: None, "must return logits .* returned NoneType", None),
        ],
    )  # fmt: skip
    def test_are_named_and_their_own_error_is_the_cause(self, refused, mistake, pattern, cause):
        error = refused(cohort(Broken(mistake)), loader(), pattern)
        assert isinstance(error.__cause__, cause) if cause else error.__cause__ is None

    def test_a_look_changes_nothing(self, settings):
        """Statistics, counters, gradients and generators of the peers are those of the steps."""
        peers = cohort()
        result = fit(peers, loader(), None, settings())
        assert peers.peers[0][1].num_batches_tracked == len(loader()) == result.history[0]["step"]
        weights = [w.detach().clone() for w in cohort().parameters()]
        plain = cohort()
        step = checks.first_look(
            plain, IterableBatches(loader(), torch.device("cpu"), CLASSES), settings(),
            resolve_amp("off", torch.device("cpu")),
        )  # fmt: skip
        assert step.shape == (8, *SHAPE)
        assert all(torch.equal(a, b) for a, b in zip(weights, plain.parameters(), strict=True))
        assert all(w.grad is None for w in plain.parameters())
        assert plain.peers[0][1].num_batches_tracked == 0


class Folder(TensorDataset):
    """A data set with the attributes of torchvision's."""

    classes = ["wolf", "cat", "dog", "ant"]  # noqa: RUF012 - as torchvision has it
    target_transform = None
    transform = None


class Compose:
    def __init__(self, *steps) -> None:
        self.transforms = list(steps)


def step(name: str, **values):
    return type(name, (), values)()


USUAL = {"mean": [0.2] * 3, "std": [0.4] * 3}


class TestRecord:
    def test_what_ran_is_recorded_everywhere(self, settings):
        result = fit(
            cohort(), loader(), None, settings(peers=("resnet32",), batch_size=64, subset=9)
        )
        ran = {
            "data": "own data: 3 batches of 8, images 3x12x10",
            "peers": ["Sequential", "Sequential"],
            "batch_size": 8,
            "subset": 0,
            "pad": 0,
            "flip": False,
        }
        saved = yaml.safe_load((result.folder / "config.yaml").read_text())
        state = checkpoint.load(result.folder / "last.ckpt")
        for values in (saved, state["config"], result.config.to_dict()):
            assert {key: values[key] for key in ran} == ran
        description = json.loads((result.folder / "cohort.json").read_text())
        for values in (description, state["description"]):
            assert values["image_shape"] == [3, 12, 10]

    def test_peers_by_name_and_batch_sampler(self, settings, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        batches = DataLoader(TensorDataset(*pairs()), batch_sampler=[[0, 1, 2, 3], [4, 5, 6, 7]])
        result = fit(Cohort(["resnet8", net()], CLASSES), batches, None, settings(folder=None))
        assert result.config.peers == ("resnet8", "Sequential")
        assert result.config.batch_size == 4
        assert str(result.folder) == "runs/own_data-resnet8-Sequential-001"

    def test_the_label_of_the_data_is_kept(self, settings):
        result = fit(cohort(), loader(), None, settings(data="birds"))
        assert result.config.data == "birds: 3 batches of 8, images 3x12x10"
        again = fit(cohort(), loader(), None, result.config.replace(resume=True, epochs=2))
        assert again.config.data == result.config.data

    @pytest.mark.parametrize(("epochs", "said"), [(1, "1 epoch, 3 in all"), (2, "2 epochs, 6 in")])
    def test_a_dry_run_too(self, settings, capsys, epochs, said):
        assert fit(cohort(), loader(), None, settings(dry_run=True, epochs=epochs)) is None
        assert f"3 an epoch of 8 images, {said}" in capsys.readouterr().out

    def test_of_our_loaders_everything_is_known(self, settings):
        images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
        mean, std, names = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), ("d", "b", "c", "a")
        data = ImageSet(images, torch.arange(20) % 4, 4, names, mean, std)
        peers = cohort()
        batches = ResidentLoader(data, 5, train=True, size=(6, 7), pad=2, flip=True)
        result = fit(peers, batches, None, settings())
        expected = {
            "image_shape": [3, 6, 7],
            "mean": [1, 2, 3],
            "std": [4, 5, 6],
            "classes": ["d", "b", "c", "a"],
            "resize": None,
            "stored": None,
        }
        assert peers.record() == expected
        loaded = Cohort.load(result.folder, peers=[net(), net(5)])
        assert loaded.record() == expected
        assert (result.config.pad, result.config.flip) == (2, True)

    @pytest.mark.parametrize("subset", [False, True])
    @pytest.mark.parametrize(
        ("transform", "mean"),
        [
            (None, None),
            (Compose(step("ToTensor"), step("Normalize", **USUAL)), 51.0),
            (Compose(step("ToTensor"), step("Normalize", mean=[0.2], std=(0.4,))), 51.0),
            (Compose(step("ToDtype", scale=True), step("Normalize", **USUAL), step("Erase")), 51.0),
            (Compose(step("ToDtype", scale=False), step("Normalize", **USUAL)), None),
            (Compose(step("ToTensor"), step("Lambda"), step("Normalize", **USUAL)), None),
            (Compose(step("Normalize", **USUAL)), None),
            (Compose(step("ToTensor"), step("Normalize", mean=[0.2] * 2, std=[0.4] * 2)), None),
            (Compose(step("ToTensor")), None),
        ],
    )  # fmt: skip
    def test_torchvisions_sets_say_their_classes_and_normalisation(
        self, settings, transform, mean, subset
    ):
        data = Folder(*pairs())
        data.transform = transform
        batches = DataLoader(Subset(data, range(16)) if subset else data, batch_size=8)
        peers = cohort()
        fit(peers, batches, None, settings())
        record = peers.record()
        assert record["classes"] == ["wolf", "cat", "dog", "ant"]
        assert record["mean"] == (None if mean is None else [pytest.approx(mean)] * 3)
        assert record["std"] == (None if mean is None else [pytest.approx(102.0)] * 3)

    def test_sources_that_mean_something_else_by_mean_say_nothing(self, settings):
        class Loader(list):
            class_names = "abcd"
            std = 3.0

            def mean(self):
                raise AssertionError

            def epoch(self, epoch, start=0):
                return iter(self[start:])

            batch_size = 8

        peers = cohort()
        fit(peers, Loader([pairs(8)]), None, settings())
        assert peers.record() == {**dict.fromkeys(peers.record()), "image_shape": [*SHAPE]}

    def test_classes_in_an_order_that_is_not_certain_are_left_out(self, settings):
        for changes in ({"target_transform": abs}, {"classes": ["a", "b"]}, {"classes": None}):
            data = Folder(*pairs())
            vars(data).update(changes)
            peers = cohort()
            fit(peers, DataLoader(data, batch_size=8), None, settings(folder=None, dry_run=True))
            assert peers.classes is None

    def test_what_the_caller_said_is_kept_and_checked(self, settings, refused):
        peers = cohort()
        peers.mean, peers.std, peers.classes = (1, 2, 3), (4, 5, 6), list("abcd")
        result = fit(peers, loader(), None, settings())
        loaded = Cohort.load(result.folder, peers=[net(), net(5)])
        assert loaded.mean == [1, 2, 3]
        assert loaded.classes == list("abcd")
        other = cohort()
        other.std = (1.0, 2.0)
        with pytest.raises(
            InputError, match="std must be one finite number above 0 a channel for 3"
        ):
            fit(other, loader(), None, settings(folder="unused"))
        assert not Path("unused").exists()

    def test_re_identification_settings_can_be_read_again(self, settings, tmp_path):
        peers = Cohort(["resnet8"], CLASSES, head=ReidHead("gem", neck=True, last_stride=2))
        config = ReidConfig(
            folder=str(tmp_path / "reid"), epochs=1, iterations=0, amp="off", tensorboard=False
        )
        result = fit(peers, loader(), None, config)
        saved = train.load_config(result.folder / "config.yaml")
        assert isinstance(saved, ReidConfig)
        assert (saved.size, saved.pooling, saved.neck) == ((12, 10), "gem", True)
        assert saved == result.config


class TestResume:
    def test_goes_on_where_it_was(self, settings):
        whole, broken = cohort(), cohort()
        fit(whole, loader(), None, settings(epochs=3))
        folder = settings().folder + "-2"
        fit(broken, loader(), None, settings(epochs=2, folder=folder))
        again = cohort()
        fit(again, loader(), None, settings(epochs=3, folder=folder, resume=True))
        for a, b in zip(whole.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize(
        ("peers", "batches", "pattern"),
        [
            (cohort(), loader(pairs(24, (3, 8, 8))[0]), "data was .*3x12x10' and is now .*3x8x8'"),
            (cohort(), loader(batch_size=6), "data was 'own data: 3 .*: 4 batches of 6"),
            (Cohort([net(), nn.Sequential(nn.Flatten(), nn.Linear(360, 4)), net(6)], 4), loader(),
             "peers was .* and is now"),
        ],
    )  # fmt: skip
    def test_is_checked_against_what_ran(self, settings, peers, batches, pattern):
        fit(cohort(), loader(), None, settings())
        with pytest.raises(InputError, match=f"cannot resume: {pattern}"):
            fit(peers, batches, None, settings(resume=True, epochs=2))

    def test_other_classes_are_other_data(self, settings):
        data = Folder(*pairs())
        fit(cohort(), DataLoader(data, batch_size=8), None, settings())
        data.classes = ["cat", "wolf", "dog", "ant"]
        with pytest.raises(
            InputError, match=r"the classes of the images was \['wolf', 'cat'.* now"
        ):
            fit(cohort(), DataLoader(data, batch_size=8), None, settings(resume=True, epochs=2))
        unsaid = cohort()  # what is not said is as it was
        fit(unsaid, loader(), None, settings(resume=True, epochs=2))
        assert unsaid.classes == ["wolf", "cat", "dog", "ant"]

    def test_folders_of_earlier_versions_go_on(self, settings):
        """They recorded the defaults, and nothing of the images."""
        fit(cohort(), loader(), None, settings())
        folder = Path(settings().folder)
        old = {"data": "cifar100", "peers": ["resnet32", "resnet32"], "batch_size": 64, "pad": 4,
               "flip": True, "subset": 0}  # fmt: skip
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | old))
        state = checkpoint.load(folder / "last.ckpt")
        del state["description"], state["format"]
        state["config"] |= old
        checkpoint.save(folder / "last.ckpt", state)
        result = fit(cohort(), loader(), None, settings(resume=True, epochs=2))
        assert result.history[-1]["epoch"] == 2
        assert result.config.data.startswith("own data")
        with pytest.raises(InputError, match=r"steps an epoch was 3|data was"):
            fit(cohort(), loader(batch_size=6), None, settings(resume=True, epochs=3))

    @pytest.mark.parametrize("data", ["digits", "cifar100", "market1501"])
    def test_the_command_takes_no_such_folder(self, settings, capfd, data):
        folder = str(fit(cohort(), loader(), None, settings()).folder)
        assert cli.main(["train", data, "--resume", "--folder", folder]) == 2
        err = capfd.readouterr().err.splitlines()[-1]
        assert f"on own data: 3 batches of 8, images 3x12x10, not on {data}" in err
        assert "go on in Python, by fit(..., config.replace(resume=True))" in err


def test_evaluate_scores_batches_of_ones_own(settings):
    peers = cohort()
    result = fit(peers, loader(), loader(), settings())
    loaded = Cohort.load(result.folder, peers=[net(), net(5)]).train()
    assert train.evaluate(loaded, loader(), amp="off") == result.scores
    assert all(m.training for m in loaded.modules())
    with pytest.raises(InputError, match="test batch 0: images are uint8"):
        train.evaluate(loaded, [(pairs()[0].byte(), pairs()[1])])


class TestSameImages:
    """What evaluation takes from the record of training, and what it refuses."""

    def folders(self, *names: str) -> DataLoader:
        data = Folder(*pairs())
        data.classes = list(names)
        return DataLoader(data, batch_size=8)

    @pytest.mark.parametrize(
        ("names", "pattern"),
        [
            (["ant", "cat", "dog"], "label 1 is 'bee' in training and 'cat' in the test"),
            (["ant", "cat", "bee", "dog"], "label 1 is 'bee' in training and 'cat' in the test"),
            (["ant", "bee", "cat", "dog", "elk"], "label 4 is None in training and 'elk' in the"),
        ],
    )
    def test_other_classes_or_another_order_are_refused(self, settings, refused, names, pattern):
        """A folder less in the test data shifts the labels of all classes behind it."""
        train_loader = self.folders("ant", "bee", "cat", "dog")
        refused(cohort(), train_loader, pattern, test=self.folders(*names))
        peers = cohort()
        fit(peers, train_loader, train_loader, settings())
        with pytest.raises(InputError, match=pattern):
            train.evaluate(peers, self.folders(*names))

    def test_another_normalisation_is_said(self, settings, capfd):
        loaders = []
        for std in ([0.4], [0.4] * 3, [0.4, 0.4, 0.5]):
            data = Folder(*pairs())
            data.transform = Compose(step("ToTensor"), step("Normalize", mean=[0.2], std=std))
            loaders.append(DataLoader(data, batch_size=8))
        fit(cohort(), loaders[0], loaders[1], settings())
        assert "normalised" not in capfd.readouterr().err
        fit(cohort(), loaders[0], loaders[2], settings(folder=settings().folder + "2"))
        assert "test images are normalised by another std than the" in capfd.readouterr().err

    def test_a_set_is_seen_as_in_training(self, settings):
        """Its size, normalisation and order of classes are those of the record."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (24, 3, 8, 8), dtype=torch.uint8, generator=generator)
        names, labels = ("ant", "bee", "cat", "dog"), torch.arange(24) % 4
        usual = ImageSet(images, labels, 4, names, (120.0,) * 3, (60.0,) * 3)
        peers = cohort()
        options = {"size": (12, 10)}
        batches = ResidentLoader(usual, 8, train=True, pad=0, flip=False, **options)
        test = ResidentLoader(usual, 8, train=False, **options)
        result = fit(peers, batches, test, settings(epochs=4))
        assert train.evaluate(peers, usual, amp="off") == result.scores
        order = torch.tensor([2, 0, 3, 1])
        other = ImageSet(
            images, order[labels], 4, ("bee", "dog", "ant", "cat"), (0.0,) * 3, (1.0,) * 3
        )
        assert train.evaluate(peers, other, amp="off") == result.scores
        foreign = ImageSet(images, labels, 4, ("a", "b", "c", "d"), (0.0,) * 3, (1.0,) * 3)
        with pytest.raises(InputError, match="label 0 is 'ant' in training and 'a' in the test"):
            train.evaluate(peers, foreign)


def test_one_peer_is_told_that_nothing_is_mutual(settings, capfd):
    fit(Cohort([net()], CLASSES), loader(), None, settings())
    assert "one peer learns from the labels alone: nothing is mutual" in capfd.readouterr().err
    fit(cohort(), loader(), None, settings(folder=settings().folder + "2"))
    assert "nothing is mutual" not in capfd.readouterr().err


class TestSeveralProcesses:
    @pytest.mark.parametrize(
        "variables",
        [*({name: "2"} for name in WORLD_SIZES), {"RANK": "0"}, {"WORLD_SIZE": "many"}],
        ids=str,
    )
    def test_are_refused(self, refused, monkeypatch, capfd, tmp_path, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        (name, value), *_ = variables.items()
        refused(cohort(), loader(), f"one of several processes .{name}={value}., each of which")
        monkeypatch.chdir(tmp_path)
        for options in ([], ["--dry-run"]):
            assert cli.main(["train", "digits", *options]) == 2
            assert f"several processes ({name}={value})" in capfd.readouterr().err
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "variables", [{"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_NTASKS": "4"}, {"PMI_SIZE": "1"}]
    )
    def test_one_of_one_is_none(self, settings, monkeypatch, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert fit(cohort(), loader(), None, settings()).history

    def test_of_torch_distributed_without_a_launcher(self, refused, monkeypatch):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        refused(cohort(), loader(), "torch.distributed has 2 processes., each of which")


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("matplotlib.figure", "matplotlib"),
        ("tensorboard", "tensorboard"),
        ("tqdm", "tqdm"),
        ("safetensors.torch", "safetensors"),
        ("yaml", "yaml"),
    ],
)
def test_extras_are_missed_before_the_first_step(refused, monkeypatch, module, name, dry_run):
    monkeypatch.setitem(sys.modules, module, None)
    pattern = rf"{name} is not installed: pip install 'fastdml\[train\]'"
    refused(cohort(), loader(), pattern, dry_run=dry_run, tensorboard=True)
    with pytest.raises(InputError, match=pattern):
        train.cifar100(root="nowhere", dry_run=dry_run)


def test_tensorboard_is_not_missed_where_it_is_not_wanted(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert fit(cohort(), loader(), None, settings()).history
