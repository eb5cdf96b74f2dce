"""Inputs without labels, from a folder or the caller's own, beside labelled ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Inputs, crashing, logged, same_weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastdml.cli.main import main
from fastdml.cohort import Cohort
from fastdml.data import ImageSet
from fastdml.data.image_set import IGNORED
from fastdml.data.semi_supervised import joined, load_unlabelled
from fastdml.errors import InputError
from fastdml.train import checkpoint, fit
from fastdml.train.unlabelled import with_unlabelled

pytestmark = pytest.mark.usefixtures("_no_pictures")
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """photos: 3 classes of 6 images and 2 to validate on; unlabelled: 20 images in two layers, a
    text, and a file that is no image. Not to be changed."""
    image = pytest.importorskip("PIL.Image", reason="writing pictures needs Pillow")
    root, random = tmp_path_factory.mktemp("semi"), np.random.default_rng(0)

    def write(path: Path, k: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 100, (*random.integers(10, 16, 2), 3))
        pixels[..., k] += 150
        image.fromarray(pixels.astype(np.uint8)).save(path)

    for k, name in enumerate(("cat", "dog", "red panda")):
        for i in range(8):
            write(root / "photos" / ("val" if i > 5 else "train") / name / f"{i}.png", k)
    for i in range(20):
        write(root / "unlabelled" / ("deep/er" if i % 2 else "") / f"{i}.png", i % 3)
    (root / "unlabelled/notes.txt").write_text("none")
    shutil.copytree(root / "unlabelled", root / "damaged")
    (root / "damaged/broken.png").write_bytes(b"none")
    return root


def command(folders, run, *options: str, unlabelled: str = "unlabelled") -> int:
    return main(
        [
            *("train", "folder", "--root", str(folders / "photos"), "--peers", "resnet8,resnet8"),
            *("--unlabelled", str(folders / unlabelled), "--folder", str(run), "--size", "12"),
            *("--pad", "1", "--batch-size", "8", "--epochs", "2", "--lr", "0.01", "--amp", "off"),
            *("--execution", "eager", "--threads", "1", "--no-tensorboard", *options),
        ]
    )


@pytest.mark.parametrize("loader", ["resident", pytest.param("torch", marks=pytest.mark.slow)])
def test_a_folder_joins_images_of_ones_own(folders, tmp_path, capsys, loader):
    assert command(folders, tmp_path / "whole", "--loader", loader) == 0
    assert "18 labelled images and 20 without a label" in capsys.readouterr().err
    whole = Cohort.load(tmp_path / "whole")
    options = ("--loader", loader, "--save-every-steps", "1")
    with crashing(6):
        command(folders, tmp_path / "broken", *options)
    moved = tmp_path / "moved"
    shutil.copytree(folders / "unlabelled", moved)  # which may be elsewhere when a run goes on
    assert command(folders, tmp_path / "broken", *options, "--resume", unlabelled=str(moved)) == 0
    assert same_weights(Cohort.load(tmp_path / "broken"), whole)
    assert logged(tmp_path / "broken") == logged(tmp_path / "whole")
    (moved / "0.png").unlink()
    capsys.readouterr()
    assert command(folders, tmp_path / "broken", *options, "--resume", unlabelled=str(moved)) == 2
    assert "the training data are others than before" in capsys.readouterr().err


def test_bad_files_end_it_with_their_names_or_are_left_out(folders, tmp_path, capsys):
    run = tmp_path / "run"
    assert command(folders, run, unlabelled="damaged") == 2
    said = capsys.readouterr().err
    assert "1 of 21 files are bad" in said
    assert "broken.png" in said
    assert "set bad_files to skip" in said
    assert not run.exists()
    assert command(folders, run, "--bad-files", "skip", "--dry-run", unlabelled="damaged") == 0
    out = capsys.readouterr()
    assert "18 with a label, 20 without" in out.out
    assert "left out: 1 of 21 files are bad" in out.err


def test_where_the_folder_is_wrong_one_line_says_so(folders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for place, message in (
        ("nowhere", "no such folder: give the one that holds the images"),
        (str(tmp_path / "empty"), "holds no images"),
        ("photos", "18 of its images are labelled ones too"),
        ("photos/val", "6 of its images are validation ones too"),
    ):
        assert command(folders, tmp_path / "run", unlabelled=place) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_joins_a_set_in_memory(folders):
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8, generator=random)
    names = tuple("abc")
    cifar = ImageSet(pixels, torch.arange(30) % 3, 3, names, (120.0,) * 3, (60.0,) * 3)
    others = load_unlabelled(folders / "unlabelled", cifar, progress=False)
    both = joined(cifar, others)
    assert both.image_shape == (3, 8, 8)
    assert both.labels.tolist() == [*cifar.labels.tolist(), *[IGNORED] * 20]
    assert len(both.files) == 20
    assert (both.mean, both.std) == (cifar.mean, cifar.std)
    assert torch.equal(both.images[:30], cifar.images)
    assert both.pixels.is_contiguous()
    with pytest.raises(InputError, match=r"1 of 21 files are bad: .*: restore or remove them$"):
        load_unlabelled(folders / "damaged", cifar, progress=False)


# --- the caller's own ---

N, M, CLASSES = 24, 40, 3


def data():
    random = torch.Generator().manual_seed(3)
    labels = torch.arange(N) % CLASSES
    x = torch.randn(N, 5, generator=random)
    x[:, 0] += labels
    return x, labels, torch.randn(M, 5, generator=random)


def mlps() -> Cohort:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peers = [
            nn.Sequential(nn.Linear(5, w), nn.ReLU(), nn.Dropout(0.1), nn.Linear(w, CLASSES))
            for w in (8, 9)
        ]
    return Cohort(peers, CLASSES)


KINDS = {
    "arrays": lambda x, y, u: ((x.numpy(), y.numpy()), u.numpy()),
    "arrays and their labels": lambda x, y, u: ((x, y), (u, torch.zeros(M, dtype=torch.int64))),
    "data sets": lambda x, y, u: (TensorDataset(x, y), Inputs(u)),
    "DataLoaders": lambda x, y, u: (
        DataLoader(TensorDataset(x, y), batch_size=4),
        DataLoader(TensorDataset(u), batch_size=6),
    ),
    "arrays and a DataLoader": lambda x, y, u: ((x, y), DataLoader(Inputs(u), batch_size=8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fit_takes_them_and_resumes_bit_for_bit(settings, tmp_path, kind):
    options = {"batch_size": 16, "epochs": 3, "save_every_steps": 1}
    whole, again = mlps(), mlps()
    train, unlabelled = KINDS[kind](*data())
    result = fit(whole, train, None, settings(**options), unlabelled=unlabelled)
    config = settings(**options, folder=str(tmp_path / "broken"))
    with crashing(6):
        fit(mlps(), train, None, config, unlabelled=unlabelled)
    train, unlabelled = KINDS[kind](*data())
    resumed = fit(again, train, None, config.replace(resume=True), unlabelled=unlabelled)
    assert same_weights(whole, again)
    assert logged(resumed.folder) == logged(result.folder)
    paired = "DataLoader" in kind
    steps = N // 4 if kind == "DataLoaders" else N // 8 if paired else (N + M) // 16
    assert checkpoint.load(result.folder / "last.ckpt")["steps_per_epoch"] == steps
    assert result.images == (None if paired else {"labelled": N, "unlabelled": M})


def test_arrays_and_data_sets_are_the_same_run_and_none_is_the_supervised_one(settings, tmp_path):
    x, y, u = data()

    def run(name, train, unlabelled, **changes):
        cohort = mlps()
        config = settings(batch_size=8, folder=str(tmp_path / name), **changes)
        fit(cohort, train, None, config, unlabelled=unlabelled)
        return cohort

    arrays = run("arrays", (x, y), u)
    assert same_weights(arrays, run("sets", TensorDataset(x, y), Inputs(u)))
    plain = run("plain", (x, y), None)
    assert same_weights(plain, run("no share", (x, y), u, unlabelled_share=0.0))
    assert not same_weights(plain, arrays)


def test_batches_of_loaders_go_round_and_go_on_over_epochs():
    x, y, u = data()
    train = DataLoader(TensorDataset(x, y), batch_size=6)  # 4 batches

    def batches():
        others = DataLoader(Inputs(u), batch_size=16)  # 3, the last of 8
        size = {"batch_size": 8, "rows": 4, "seed": 0}
        return with_unlabelled(train, others, CPU, CLASSES, None, **size)

    source = batches()
    shown = [inputs[6:] for epoch in range(3) for inputs, _ in source.epoch(epoch)]
    assert torch.equal(torch.cat(shown), u.repeat(4, 1))
    fresh = batches()
    for step, (inputs, labels) in enumerate(fresh.epoch(1, 2), 6):
        assert torch.equal(inputs[6:], shown[step])
        assert (labels[6:] == IGNORED).all()
        assert (labels[:6] != IGNORED).all()


@pytest.mark.parametrize(
    ("unlabelled", "changes", "message"),
    [
        (torch.randn(8, 4), {}, "the unlabelled inputs are 4 and the labelled ones 5"),
        (torch.full((8, 5), float("nan")), {}, "unlabelled data: .* NaN or infinite"),
        (["a", "b"], {}, "unlabelled batch 0"),
        (torch.randn(8, 5), {"unlabelled_share": 0.01}, "0 unlabelled of 8 images in a batch"),
        (torch.randn(8, 5), {"gate": "best"}, "gate best goes by labels"),
        (torch.randn(8, 5), {"batch_size": 64}, "batch_size is 64 and there are 32 samples"),
        (7, {}, "unlabelled data: a int is not batches with a length"),
    ],
)
def test_mistakes_are_one_line(settings, unlabelled, changes, message):
    x, y, _ = data()
    with pytest.raises(InputError, match=message):
        fit(mlps(), (x, y), None, settings(batch_size=8).replace(**changes), unlabelled=unlabelled)


@pytest.mark.slow
def test_on_real_cifar100_peers_learn_from_4000_labels_and_46000_images_without(
    cifar100_root, tmp_path
):
    """Half an epoch; the labels that are gone are asked for nowhere."""
    run = tmp_path / "run"
    code = main(
        [
            *("train", "cifar100", "--root", str(cifar100_root), "--peers", "resnet8", "resnet8"),
            *("--labelled", "4000", "--iterations", "400", "--folder", str(run)),
            *("--no-tensorboard", "--execution", "eager", "--lr", "0.05"),
        ]
    )
    assert code == 0
    records = [r for r in logged(run) if r["kind"] == "train"]
    assert min(records[-1]["ce"]) < 4.2  # log(100) is 4.605
    assert max(records[-1]["top1"]) > 0.06
    summary = (run / "summary.json").read_text()
    assert '"labelled": 4000' in summary
    assert '"unlabelled": 46000' in summary
