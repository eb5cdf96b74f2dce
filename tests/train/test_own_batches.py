"""`fit` with arrays, data sets of torch and inputs that are no images: text, rows of numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from runs import Crash, logged, same_weights
from sklearn.datasets import load_wine
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastdml.cohort import Cohort
from fastdml.data import load_digits
from fastdml.errors import InputError
from fastdml.train import ReidConfig, TrainConfig, evaluate, fit
from fastdml.train.batches import as_batches
from fastdml.train.own_batches import ArrayBatches

pytestmark = pytest.mark.usefixtures("_no_pictures")
CPU = torch.device("cpu")
CLASSES = 3


def seeded(build, *args):
    with torch.random.fork_rng():
        torch.manual_seed(args[-1])
        return build(*args)


def mlp(width: int, drop: float, seed: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(13, width), nn.ReLU(), nn.Dropout(drop), nn.Linear(width, CLASSES)
    )


class Bag(nn.Module):
    """Tokens' embeddings, averaged; 0 is padding."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.table = nn.Embedding(30, width, padding_idx=0)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, ids):  # (N, L)
        count = ids.ne(0).sum(1, keepdim=True).clamp(min=1)
        return self.head(self.table(ids).sum(1) / count)


def rows(seed: int = 0, drop: float = 0.1):
    return Cohort([seeded(mlp, 8, drop, seed), seeded(mlp, 8, drop, seed + 1)], CLASSES)


def texts(seed: int = 0):
    return Cohort([seeded(Bag, 8, seed), seeded(Bag, 12, seed + 1)], CLASSES)


def wine() -> tuple[np.ndarray, np.ndarray]:
    """(178, 13) float64 and (178,) int64, in an order that mixes the classes."""
    data = load_wine()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    return x[order], data.target[order]


def as_float(array: np.ndarray) -> torch.Tensor:
    found = torch.from_numpy(array)
    return found.float() if found.is_floating_point() else found


def tokens(n: int = 96, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of three words a sequence holds."""
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(5, 30, (n, length), generator=generator)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    ids[:, 2] = 1 + labels
    return ids, labels


@pytest.fixture
def settings(tmp_path):
    def make(**changes) -> TrainConfig:
        values = {
            "folder": str(tmp_path / "run"), "epochs": 3, "batch_size": 16, "amp": "off",
            "tensorboard": False, "execution": "eager", "threads": 1, "lr": 0.05,
        }  # fmt: skip
        return TrainConfig(**{**values, **changes})

    return make


class Noisy(Dataset):
    """Augments each sample it gives by torch's global generator, as transforms do; breaks once it
    has given `last`."""

    classes = ("a", "b", "c")

    def __init__(self, last: int = 10**9) -> None:
        self.x, self.y = (torch.from_numpy(a) for a in wine())
        self.given, self.last = 0, last

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        self.given += 1
        if self.given > self.last:
            raise Crash
        return self.x[i].float() + 0.1 * torch.randn(13), self.y[i]


class TestKinds:
    @pytest.mark.parametrize("kind", ["arrays", "tensors", "dataset", "batches"])
    def test_train_validation_and_test(self, settings, kind):
        x, y = wine()
        parts = [(x[a:b], y[a:b]) for a, b in ((0, 120), (120, 150), (150, 178))]
        tensors = [(torch.from_numpy(a).float(), torch.from_numpy(b)) for a, b in parts]
        sources = {
            "arrays": parts,
            "tensors": tensors,
            "dataset": [TensorDataset(*pair) for pair in tensors],
            "batches": [DataLoader(TensorDataset(*pair), 16) for pair in tensors],
        }
        train, validation, test = sources[kind]
        peers = rows()
        result = fit(peers, train, test, settings(epochs=8, lr=0.2), validation=validation)
        assert (result.scores.rows, result.validation_scores.rows) == (28, 30)
        assert min(result.best_scores.top1) > 0.8
        saved = Cohort.load(result.folder, peers=[*rows(5).peers])
        assert evaluate(saved, test, "off") == result.scores == evaluate(peers, test, "off")
        assert saved.image_shape is None
        assert result.config.data.endswith("batches of 16, inputs 13, with validation")

    def test_images_as_arrays(self, settings):
        x = np.random.default_rng(0).random((48, 3, 8, 8))
        labels = np.arange(48) % CLASSES
        cohort = Cohort(["resnet8", "resnet8"], CLASSES)
        result = fit(cohort, (x, labels), (x, labels), settings(epochs=1))
        assert cohort.image_shape == (3, 8, 8)
        assert result.scores.rows == 48
        (images, _), *_ = as_batches((x, labels), CPU, CLASSES, batch_size=16).epoch(0)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, torch.from_numpy(x[:16]).float())

    def test_an_epoch_shows_each_sample_once_in_an_order_of_its_own(self):
        x, y = wine()
        for source in ((x, y), TensorDataset(torch.from_numpy(x), torch.from_numpy(y))):
            batches = as_batches(source, CPU, CLASSES, batch_size=16, seed=3)
            epochs = [torch.cat([b for b, _ in batches.epoch(e)]) for e in (0, 1, 0)]
            assert len(epochs[0]) == 16 * (178 // 16)
            assert len(epochs[0].unique(dim=0)) == len(epochs[0])
            assert torch.equal(epochs[0], epochs[2])
            assert not torch.equal(epochs[0], epochs[1])
            later = torch.cat([b for b, _ in batches.epoch(1, 4)])
            assert torch.equal(later, epochs[1][64:])
            other = as_batches(source, CPU, CLASSES, batch_size=16, seed=4)
            assert not torch.equal(next(iter(other.epoch(0)))[0], epochs[0][:16])

    def test_arrays_and_their_data_set_train_alike(self, settings, tmp_path):
        x, y = wine()
        one, other = rows(), rows()
        fit(one, (x, y), None, settings())
        data = TensorDataset(torch.from_numpy(x).float(), torch.from_numpy(y))
        fit(other, data, None, settings(folder=str(tmp_path / "other")))
        assert same_weights(one, other)

    @pytest.mark.parametrize("seed", [None, 3])
    def test_which_samples_a_batch_shows(self, seed):
        inputs, labels = torch.randn(20, 3), torch.arange(20)
        batches = ArrayBatches(inputs, labels, 6, seed)
        for step, (found, shown) in enumerate(batches.epoch(1)):
            assert torch.equal(batches.samples(1, step), shown)
            assert torch.equal(inputs[shown], found)
        assert step == (3 if seed is None else 2)

    def test_without_a_seed_in_order_to_the_end(self):
        x, y = wine()
        batches = as_batches((x, y), CPU, CLASSES, batch_size=50)
        assert [len(b) for _, b in batches.epoch(5)] == [50, 50, 50, 28]
        assert torch.equal(torch.cat([b for _, b in batches.epoch(5)]), torch.from_numpy(y))

    def test_classes_of_a_data_set_are_recorded(self, settings):
        peers = rows()
        fit(peers, Noisy(), None, settings(epochs=1))
        assert peers.classes == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("kind", "execution"),
    [
        *(("rows", execution) for execution in ("eager", "threads", "stacked")),
        *(("texts", execution) for execution in ("eager", "threads")),
    ],
)
class TestExecutions:
    """Rows of numbers and token ids in every way to run a step on a CPU."""

    def data(self, kind):
        return wine() if kind == "rows" else tokens()

    def cohort(self, kind, seed: int = 0):
        return rows(seed, drop=0.0) if kind == "rows" else texts(seed)

    def test_resume_exactly(self, settings, tmp_path, kind, execution):
        x, y = self.data(kind)
        config = settings(execution=execution, lr=0.1, save_every_steps=1)
        whole, again = self.cohort(kind), self.cohort(kind)
        unbroken = fit(whole, (x, y), (x, y), config)
        config = config.replace(folder=str(tmp_path / "broken"))

        class Stops:
            """The arrays, until a step."""

            batch_size = 16

            def __init__(self):
                self.own = as_batches((x, y), CPU, CLASSES, batch_size=16, seed=0)

            def __len__(self):
                return len(self.own)

            def epoch(self, epoch, start=0):
                for step, batch in enumerate(self.own.epoch(epoch, start), start):
                    if (epoch, step) == (1, 3):
                        raise Crash
                    yield batch

        with pytest.raises(Crash):
            fit(self.cohort(kind), Stops(), (x, y), config)
        torch.rand(7)
        resumed = fit(again, (x, y), (x, y), config.replace(resume=True))
        assert same_weights(again, whole)
        assert logged(resumed.folder) == logged(unbroken.folder)

    def test_are_eager_training(self, settings, tmp_path, kind, execution):
        config = settings(execution=execution, lr=0.1)
        eager, other = self.cohort(kind), self.cohort(kind)
        folder = str(tmp_path / "eager")
        fit(eager, self.data(kind), None, config.replace(execution="eager", folder=folder))
        result = fit(other, self.data(kind), None, config)
        assert result.execution == execution
        for a, b in zip(eager.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TestText:
    def padded(self, batch):
        """Each batch as long as its longest sequence."""
        ids, labels = zip(*batch, strict=True)
        return nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.stack(labels)

    def sequences(self):
        ids, labels = tokens()
        return [(row[: 3 + k % 5], y) for k, (row, y) in enumerate(zip(ids, labels, strict=True))]

    def test_sequences_may_vary_in_length(self, settings):
        pairs = self.sequences()
        train = DataLoader(pairs, batch_size=2, collate_fn=self.padded)
        assert len({x.shape[1] for x, _ in train}) > 1
        result = fit(texts(), train, train, settings(epochs=6, lr=0.05))
        assert min(result.scores.top1) > 0.9
        assert "batches of 2, inputs of int64" in result.config.data

    def test_execution_auto(self, settings):
        result = fit(texts(), tokens(), None, settings(execution="auto", epochs=1))
        assert result.execution in ("eager", "threads")

    def test_what_cannot_be_stacked_says_so(self, settings, tmp_path):
        with pytest.raises(
            InputError, match="execution 'stacked' does not know a layer of type Embedding"
        ):
            fit(texts(), tokens(), None, settings(execution="stacked"))
        assert not (tmp_path / "run").exists()

    def test_batches_of_a_tokenizer(self, settings):
        """The dict that Hugging Face's collators give becomes a pair; the peer makes the mask."""
        ids, labels = tokens()
        dicts = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
        collate = torch.utils.data.default_collate
        with pytest.raises(InputError, match="a dict of 'input_ids', 'labels': batches must"):
            fit(texts(), DataLoader(dicts, 16), None, settings())

        def pairs(batch):
            found = collate(batch)
            return found["input_ids"], found["labels"]

        loader = DataLoader(dicts, 16, collate_fn=pairs)
        assert fit(texts(), loader, None, settings(epochs=1)).history[0]["step"] == 6


class TestKindsOfArrays:
    """Each trains as the plain arrays do, bit for bit."""

    @pytest.mark.parametrize("kind", ["other byte order", "strides", "gradients", "batches"])
    def test_are_the_same_run(self, settings, tmp_path, kind):
        x, y = wine()
        x = x.astype(np.float32)
        leaf = torch.from_numpy(x).requires_grad_()
        data = {
            "other byte order": (x.astype(x.dtype.newbyteorder()), y.astype(">i8")),
            "strides": (np.repeat(x, 2, axis=1)[:, ::2], y[::-1].copy()[::-1]),
            "gradients": (leaf * 1, torch.from_numpy(y)),  # such as features of a network
            "batches": TensorDataset(leaf * 1, torch.from_numpy(y)),
        }[kind]
        plain, other = rows(), rows()
        fit(plain, (x, y), (x, y), settings(epochs=1))
        fit(other, data, data, settings(epochs=1, folder=str(tmp_path / "other")))
        assert same_weights(plain, other)
        assert leaf.grad is None


class TestDataSets:
    @pytest.mark.parametrize("at", [2, 14])
    def test_that_augment_at_random_resume_exactly(self, settings, tmp_path, at):
        whole, again = rows(), rows()
        config = settings(save_every_steps=1)
        fit(whole, Noisy(), None, config)
        config = config.replace(folder=str(tmp_path / "broken"))
        with pytest.raises(Crash):
            fit(rows(), Noisy(last=16 * at + 3), None, config)
        fit(again, Noisy(), None, config.replace(resume=True))
        assert same_weights(whole, again)

    def test_independent_too(self, settings):
        result = fit(rows(), Noisy(), Noisy(), settings(independent=True, epochs=1))
        table = json.loads((result.folder / "summary.json").read_text())["peers"]
        assert all(peer["accuracy_independent"] > 0 for peer in table)


class TestMistakes:
    @pytest.fixture
    def refused(self, settings, tmp_path):
        def check(source, pattern, config=None):
            with pytest.raises(InputError, match=pattern) as error:
                fit(rows(), source, None, config or settings())
            assert "\n" not in str(error.value)
            assert not (tmp_path / "run").exists()

        return check

    def test_of_arrays(self, refused):
        x, y = wine()
        bad = x.copy()
        bad[100, 3] = np.nan
        for source, pattern in (
            ((x, y[:50]), r"training data: labels are int64 of shape \(50,\) for 178 inputs: give"),
            ((x, y + 1), "training data: label 3 is no class: with 3 classes"),
            (
                (x, y.astype(float)),
                r"labels are float32 .*\(labels.long\(\)\)$",
            ),
            ((x, y[:, None]), r"of shape \(178, 1\) .* int64 \(labels\[:, 0\]\)$"),
            ((x, np.eye(3)[y]), r"of shape \(178, 3\) .* \(labels.argmax\(1\) makes them"),
            ((bad, y), "training data: input 100 .1 of 178 inputs. has values that are NaN"),
            ((x[:, 0], y), r"inputs are of shape \(178,\): give \(N, channels, H, W\)"),
            ((x[:0], y[:0]), r"inputs are of shape \(0, 13\)"),
            ((x[:10], y[:10]), "not one training batch: batch_size is 16 and there are 10 samples"),
            ((x.astype(object), y), "training data: an array of object is none of numbers"),
            (
                (x, np.array(["a", "b"])[y % 2]),
                r"an array of <U1 .* numpy\.unique\(names, return_inv",
            ),
            ((x[:, :5], y), r"peer Sequential-1 fails on inputs \(16, 5\): RuntimeError: mat1"),
            (
                (torch.from_numpy(x), torch.from_numpy(y)),
                r"the inputs are float64 and its weights float32: inputs\.float\(\) in the data",
            ),
            ((np.zeros((48, 3, 8, 8), np.uint8), y[:48]), "images are uint8: normalise them"),
        ):
            refused(source, pattern)

    def test_of_the_test_data(self, settings, tmp_path):
        x, y = wine()
        with pytest.raises(InputError, match=r"fails on test inputs \(16, 5\): RuntimeError"):
            fit(rows(), (x, y), (x[:, :5], y), settings())
        assert not (tmp_path / "run").exists()

    def test_of_peers_that_give_no_logits(self, settings):
        peers = Cohort([nn.Sequential(nn.Linear(13, 2)) for _ in range(2)], CLASSES)
        with pytest.raises(
            InputError, match=r"logits \(N, 3\), and for 16 inputs returned \(16, 2\)"
        ):
            fit(peers, wine(), None, settings())

    def test_of_sets_of_images(self, refused):
        message = (
            r"training data: an ImageSet is not batches yet: .*make_loader\('auto', images, bat"
        )
        refused(load_digits()[0], message)

    @pytest.mark.parametrize("kind", ["arrays", "batches"])
    def test_of_test_data_without_labels(self, settings, tmp_path, kind):
        """Found before an epoch is trained; to train on they are skipped."""
        x, y = wine()
        y = np.where(np.arange(len(y)) % 9 == 8, -100, y)
        test = (x, y) if kind == "arrays" else DataLoader(TensorDataset(*map(as_float, (x, y))), 20)
        with pytest.raises(
            InputError, match=r"^test data: .* rows have no label \(-100\), so that"
        ):
            fit(rows(), (x, y), test, settings())
        assert not (tmp_path / "run").exists()
        assert fit(rows(), (x, y), None, settings(epochs=1)).history

    def test_of_lazy_peers(self, settings, tmp_path):
        peers = Cohort([nn.Sequential(nn.LazyLinear(CLASSES)) for _ in range(2)], CLASSES)
        with pytest.raises(InputError, match="peer Sequential-1 has lazy layers, whose weights"):
            fit(peers, wine(), None, settings())
        assert not (tmp_path / "run").exists()

    def test_of_re_identification(self, tmp_path):
        config = ReidConfig(
            folder=str(tmp_path / "run"), batch_size=16, epochs=1, images_per_id=0, iterations=0
        )
        with pytest.raises(InputError, match="re-identification learns from images"):
            fit(rows(), wine(), None, config)

    def test_rows_of_another_length_are_named(self, settings):
        x, y = (torch.from_numpy(a) for a in wine())
        batches = [(x[:8].float(), y[:8]), (x[:8, :12].float(), y[:8])]
        with pytest.raises(InputError, match="batch 1 holds inputs of 12, the first one of 13: "):
            fit(rows(), batches, None, settings())

    def test_an_array_is_not_written_to(self, settings):
        x, y = wine()
        before = x.copy(), y.copy()
        x.flags.writeable = y.flags.writeable = False
        fit(rows(), (x, y), (x, y), settings(epochs=1))
        assert (x == before[0]).all()
        assert (y == before[1]).all()
