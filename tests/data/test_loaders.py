"""Resident, DALI and torch: the same batches, in the same protocol, and the same refusals."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import numbered_set, random_set
from torch.utils.data._utils import signal_handling

from fastdml import train as training
from fastdml.data import (
    DALILoader,
    ImageSet,
    MixedSampler,
    PKSampler,
    RandomSampler,
    RepeatedSampler,
    ResidentLoader,
    TorchLoader,
    load_cifar100,
    make_loader,
)
from fastdml.data.files.decode import decode
from fastdml.data.loaders import make, torch_workers
from fastdml.data.loaders.dali import checked
from fastdml.data.samplers import part
from fastdml.errors import InputError, MissingExtra
from fastdml.report import plots
from fastdml.train import checkpoint
from fastdml.train.tasks import reid

MARKET = {"size": (256, 128), "pad": 10, "padding": "black", "erase": 0.5}
# of a batch normalised by ImageNet's deviations: rounding alone, and that of weights to 1/256
EXACT, RESIZED = 1e-5, 0.02

needs_dali = pytest.mark.skipif(not make.has_dali(), reason="DALI is not installed")
both = pytest.mark.parametrize(
    "make",
    [pytest.param(DALILoader, marks=needs_dali), lambda *a, **k: TorchLoader(*a, workers=0, **k)],
    ids=["dali", "torch"],
)


def close(loader, found, expected, tolerance) -> bool:
    if isinstance(loader, TorchLoader):
        return torch.equal(found, expected)
    return bool((found - expected).abs().max() <= tolerance)


KINDS = {
    "resident": ResidentLoader,
    "torch": lambda *a, **k: TorchLoader(*a, workers=0, **k),
    "dali": lambda *a, **k: DALILoader(*a, threads=1, **k),
}


def a_sampler(kind: str, n: int, batch_size: int, data):
    """(sampler or None, batch size that it asks for)."""
    if kind == "repeated":
        return RepeatedSampler(n, data.draw(st.integers(1, min(3, n)))), batch_size
    if kind == "mixed" and min(n, batch_size) > 1:
        labelled = data.draw(st.integers(1, n - 1))
        unlabelled = data.draw(st.integers(1, batch_size - 1))
        labels = torch.where(torch.arange(n) * 7 % n < labelled, 0, -100)
        labels[0], labels[-1] = 0, -100
        return MixedSampler(labels, batch_size, unlabelled), batch_size
    if kind in ("random", "mixed"):
        return data.draw(st.sampled_from([None, RandomSampler(n)])), batch_size
    identities = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    ids = torch.tensor(identities)
    p = data.draw(st.integers(1, min(3, len(set(identities)))))
    k = data.draw(st.integers(1, 3))
    cameras = torch.arange(n) % 3 if kind == "cameras" else None
    return PKSampler(ids, p, k, cameras), p * k


@pytest.mark.parametrize("sampler", ["random", "repeated", "pk", "cameras", "mixed"])
@pytest.mark.parametrize(
    ("kind", "examples"),
    [("resident", 25), ("torch", 15), pytest.param("dali", 4, marks=needs_dali)],
)
def test_an_epoch_is_the_samplers_for_any_batch_ranks_and_resume(kind, examples, sampler):
    """Whatever the batch size, the number of ranks, the step at which they were stopped and the
    number that goes on from there, each batch, the ranks' shares side by side, is the next of the
    sampler's order, less a last batch that is too short. So a random sampler shows every sample
    once."""

    @settings(max_examples=examples, deadline=None)
    @given(
        st.integers(1, 60), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**63 - 1),
        st.integers(0, 9), st.data(),
    )  # fmt: skip
    def check(n, batch_size, world, seed, epoch, data):
        chosen, batch_size = a_sampler(sampler, n, min(batch_size, n), data)
        options = {"seed": seed, "train": True, "sampler": chosen, "pad": 0, "flip": False}
        source = numbered_set(n)
        order = (chosen or RandomSampler(n)).order(seed, epoch).sample
        steps = len(order) // batch_size
        together = getattr(chosen, "k", 1)
        if steps == 0 or batch_size // together < world:
            with pytest.raises(InputError, match=r"is larger than the|a share of every batch"):
                KINDS[kind](source, batch_size, **options, rank=world - 1, world=world)
            return
        stop = data.draw(st.integers(0, steps), label="stop")
        other = data.draw(st.integers(1, batch_size // together), label="ranks after the stop")
        shown = torch.full((steps, batch_size), -1)
        for ranks, start, end in ((world, 0, stop), (other, stop, steps)):
            if start == end:
                continue
            for rank in range(ranks):  # each a process of its own
                loader = KINDS[kind](source, batch_size, **options, rank=rank, world=ranks)
                assert len(loader) == steps
                share = part(0, batch_size, rank, ranks, together)
                batches = loader.epoch(epoch, start)
                for step in range(start, end):
                    images, labels = next(batches)
                    assert images.shape == (share.stop - share.start, 1, 2, 2)
                    assert (images == labels.view(-1, 1, 1, 1)).all()
                    assert (shown[step, share] == -1).all()
                    assert torch.equal(loader.samples(epoch, step), labels)
                    shown[step, share] = labels
        assert torch.equal(shown.view(-1), order[: shown.numel()])
        if sampler == "random":
            assert len(shown.unique()) == shown.numel()
            assert n - shown.numel() < batch_size

    check()


@both
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"train": True, **MARKET}, EXACT),
        ({"train": False, "size": (256, 128)}, EXACT),
        ({"train": True, **MARKET, "erase": 1.0, "cutout": 40, "flip": False}, EXACT),
        ({"train": True, **MARKET, "size": (200, 100)}, RESIZED),
        ({"train": True, **MARKET, "size": (50, 36)}, RESIZED),
        ({"train": True, "pad": 3, "padding": "black"}, EXACT),
        ({"train": True, "size": (128, 64), "pad": 0, "padding": "black"}, EXACT),
    ],
)
def test_market_batches_are_the_resident_ones(market, make, options, tolerance):
    sampler = PKSampler(market.train.ids, 4, 4, market.train.cameras) if options["train"] else None
    resident = ResidentLoader(market.train.decode(), 16, seed=3, sampler=sampler, **options)
    loader = make(market.train, 16, seed=3, sampler=sampler, **options)
    assert len(loader) == len(resident) == 8
    assert loader.num_classes == 8
    for step, (images, labels) in zip(range(2), loader.epoch(1), strict=False):
        expected = resident.batch(1, step)
        assert torch.equal(labels, expected[1])
        assert images.shape == expected[0].shape
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert close(loader, images, expected[0], tolerance)


@both
@pytest.mark.parametrize("train", [True, False])
def test_cifar_batches_are_the_resident_ones(cifar100_root, make, train):
    images = load_cifar100(cifar100_root)[0].subset(300)
    resident = ResidentLoader(images, 64, seed=1, train=train)
    loader = make(images, 64, seed=1, train=train)
    found = list(loader.epoch(2))
    assert len(found) == len(loader) == len(resident) == (4 if train else 5)
    for step, (pixels, labels) in enumerate(found):
        expected = resident.batch(2, step)
        assert torch.equal(labels, expected[1])
        assert close(loader, pixels, expected[0], EXACT)


@both
def test_resuming_and_leaving(market, make):
    """The rest of an epoch is the same, bit for bit, from a fresh loader and from one that was left
    in the middle of another epoch."""
    options = {"train": True, **MARKET, "seed": 7}
    first = make(market.train, 16, **options)
    whole = [images.clone() for images, _ in first.epoch(4)]
    second = make(market.train, 16, **options)
    next(iter(second.epoch(0)))
    for loader in (make(market.train, 16, **options), second, first):
        rest = [images for images, _ in loader.epoch(4, 5)]
        assert len(rest) == 3
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[5:], strict=True))


@needs_dali
@pytest.mark.gpu
def test_dali_on_a_gpu_makes_the_batches_of_a_cpu():
    """Also where the copies of its memory come late, behind other work of their stream."""
    options = {"seed": 1, "train": True, "erase": 0.5}
    expected = list(DALILoader(random_set(300, 3, 32, 32), 16, **options).epoch(2))
    found = []
    for batch in DALILoader(random_set(300, 3, 32, 32), 16, **options, device="cuda").epoch(2):
        found.append(batch)
        torch.cuda._sleep(10**7)  # cycles
    for (images, labels), (on_gpu, gpu_labels) in zip(expected, found, strict=True):
        assert torch.equal(gpu_labels.cpu(), labels)
        assert (on_gpu.cpu() - images).abs().max() <= EXACT


@pytest.mark.parametrize("kind", ["resident", "torch", pytest.param("dali", marks=needs_dali)])
@pytest.mark.parametrize("train", [True, False])
def test_batches_between_are_left_out(kind, train):
    loader = KINDS[kind](numbered_set(29), 4, train=train, pad=0)
    whole = [labels.tolist() for _, labels in loader.epoch(1)]
    for start, every in ((0, 2), (2, 3), (1, 20), (9, 2)):
        assert [labels.tolist() for _, labels in loader.epoch(1, start, every)] == (
            whole[start::every]
        )


@both
def test_iterators_beside_each_other(market, make):
    """None of them shows another's batches."""
    loader = make(market.train, 16, train=True, **MARKET)
    expected = [images for images, _ in loader.epoch(0)]
    first, second = loader.epoch(0), loader.epoch(0, 3)
    for step in range(3):
        assert torch.equal(next(first)[0], expected[step])
        assert torch.equal(next(second)[0], expected[3 + step])
    assert torch.equal(loader.batch(0, 7)[0], expected[7])
    assert torch.equal(next(first)[0], expected[3])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["resident", "torch", pytest.param("dali", marks=needs_dali)])
def test_ranks_show_the_batches_of_one_process_to_the_last_bit(market, kind, world):
    """Of files, augmented, in batches that are cut between identities."""
    make, sampler = KINDS[kind], PKSampler(market.train.ids, 4, 4, market.train.cameras)
    options = {"train": True, "sampler": sampler, "seed": 3, **MARKET, "size": (40, 24)}
    whole = make(market.train, 16, **options)
    ranks = [make(market.train, 16, **options, rank=r, world=world) for r in range(world)]
    assert len(whole) == len(ranks[0]) == 8
    epochs = zip(whole.epoch(1, 6), *(loader.epoch(1, 6) for loader in ranks), strict=True)
    for step, ((images, labels), *shares) in enumerate(epochs, 6):
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)
        for loader, (_, own) in zip(ranks, shares, strict=True):
            assert own.unique(return_counts=True)[1].tolist() == [4] * (len(own) // 4)
            assert torch.equal(market.train.labels[loader.samples(1, step)], own)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_from_the_torch_loader(split, workers):
    loader = TorchLoader(split, 16, train=True, **MARKET, workers=workers)
    gone = split.paths[int(loader.order(0).sample[20])]
    os.unlink(gone)
    with pytest.raises(InputError) as error:
        list(loader.epoch(0))
    assert f"{gone}: the file is not there" in str(error.value)
    assert "\n" not in str(error.value)


def test_there_are_as_many_workers_as_cpus(split, monkeypatch):
    found = []
    for cpus in (1, 4, 64):
        monkeypatch.setattr(torch_workers.host, "cpus", lambda cpus=cpus: cpus)
        found.append(TorchLoader(split, 16, train=True, **MARKET).workers)
    assert found == [2, 4, 8]


def test_workers_leave_the_parents_garbage_alone(market, monkeypatch):
    """What a fork must not finalize, a DALI pipeline for one, may lie in a cycle in the parent."""
    parent = os.getpid()

    class ForTheParentAlone:
        def __del__(self):
            if os.getpid() != parent:
                os._exit(1)

    def collecting(function):
        """With what automatic collection, of which there is none here, could do meanwhile."""

        def collect(*arguments):
            if gc.isenabled():
                gc.collect()
            return function(*arguments)

        return collect

    monkeypatch.setattr(torch_workers, "decode", collecting(decode))
    start = signal_handling._set_worker_signal_handlers  # a worker's first call
    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", collecting(start))
    loader = TorchLoader(market.train, 16, train=True, workers=1)
    expected = TorchLoader(market.train, 16, train=True, workers=0).batch(0, 0)
    thresholds = gc.get_threshold()
    gc.set_threshold(10**9)
    try:
        garbage = ForTheParentAlone()
        garbage.itself = garbage
        del garbage
        found = loader.batch(0, 0)
    finally:
        gc.set_threshold(*thresholds)
    assert gc.isenabled()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_workers_end_when_their_parent_says_so(market):
    """And not by a signal to all processes of a run, which the parent answers by saving."""
    batches = TorchLoader(market.train, 16, train=True, workers=1).epoch(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert len(list(batches)) == 7
    batches = TorchLoader(market.train, 16, train=True, workers=1).epoch(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


@needs_dali
@pytest.mark.parametrize("damage", ["gone", "cut", "pipe", "link to a pipe", "folder"])
def test_a_file_that_vanishes_from_dali(split, damage, tmp_path):
    loader = DALILoader(split, 16, train=True, **MARKET)
    whole = [images for images, _ in loader.epoch(1)]
    spoilt = Path(split.paths[int(loader.order(1).sample[20])])
    content = spoilt.read_bytes()
    spoilt.unlink()
    if damage == "cut":
        spoilt.write_bytes(content[:800])
    elif damage == "pipe":  # DALI would wait for it for ever
        os.mkfifo(spoilt)
    elif damage == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        spoilt.symlink_to(tmp_path / "pipe")
    elif damage == "folder":
        spoilt.mkdir()
    with pytest.raises(InputError) as error:
        list(loader.epoch(1))
    assert str(spoilt) in str(error.value)
    assert "\n" not in str(error.value)
    if damage in ("pipe", "link to a pipe", "folder"):
        assert f"{spoilt}: not a file" in str(error.value)
        spoilt.rmdir() if damage == "folder" else spoilt.unlink()
    spoilt.write_bytes(content)  # restored: training goes on where it was
    assert all(torch.equal(a, b) for (a, _), b in zip(loader.epoch(1, 1), whole[1:], strict=True))


def test_a_file_that_vanishes_from_the_resident_loader(standin_copy, split):
    """Before it is in memory it is missed; afterwards it is not needed."""
    loader = make_loader("resident", split, 16, train=True, **MARKET)
    whole = list(loader.epoch(0))
    shutil.rmtree(standin_copy / "bounding_box_train")
    for (images, labels), expected in zip(loader.epoch(0), whole, strict=True):
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])
    with pytest.raises(InputError) as error:
        make_loader("resident", split, 16, train=True, **MARKET)
    missing = f"{split.paths[0]}: the file is not there"
    assert str(error.value) == f"{missing}: restore it, or set bad_files to skip"


@pytest.mark.parametrize("kind", ["torch", pytest.param("dali", marks=needs_dali)])
def test_a_file_that_vanishes_ends_a_run_that_goes_on(standin_copy, kind, tmp_path, monkeypatch):
    """One line and a checkpoint; with the file back, the run resumes in the middle of the epoch and
    ends with the weights of a run that nothing happened to, bit for bit."""
    monkeypatch.setattr(plots, "draw", lambda folder, headlines, formats: [])
    lost: dict[Path, bytes] = {}

    class Losing:
        """At the second step of the second epoch, a file of its last step disappears."""

        def __init__(self, loader, split):
            self.loader, self.split, self.batch_size = loader, split, loader.batch_size

        def __len__(self):
            return len(self.loader)

        def epoch(self, epoch, start=0):
            for step, batch in enumerate(self.loader.epoch(epoch, start), start):
                if (epoch, step) == (1, 1):
                    last = self.loader.part(epoch, len(self) - 1)
                    path = Path(self.split.paths[self.loader.order(epoch).sample[last][0]])
                    lost[path] = path.read_bytes()
                    path.unlink()
                yield batch

    def train(folder: str, **changes) -> dict:
        result = training.market1501(
            ["resnet8"], root=standin_copy.parent, folder=str(tmp_path / folder), loader=kind,
            height=16, width=8, pad=1, batch_size=16, images_per_id=4, iterations=0, epochs=2,
            eval_every=2, amp="off", device="cpu", execution="eager", tensorboard=False,
            save_every_steps=1, erasing=0.5, **changes,
        )  # fmt: skip
        return checkpoint.load(result.folder / "last.ckpt")["cohort"]

    expected = train("unbroken")

    def losing(kind, split, *arguments, **options):
        loader = make_loader(kind, split, *arguments, **options)
        return Losing(loader, split) if options["train"] else loader

    with monkeypatch.context() as patch:
        patch.setattr(reid, "make_loader", losing)
        with pytest.raises(InputError) as error:
            train("broken")
    ((path, content),) = lost.items()
    assert str(error.value).startswith(f"{path}: the file is not there: restore it")
    assert "\n" not in str(error.value)
    path.write_bytes(content)
    at = checkpoint.load(tmp_path / "broken" / "last.ckpt")["position"]
    assert at == 15, "all batches but the last were trained on"
    found = train("broken", resume=True)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@needs_dali
def test_what_dali_refuses_is_found_before(split, capsys):
    spoilt = Path(split.paths[9])
    content = spoilt.read_bytes()
    spoilt.write_bytes(content[:2] + b"\xff\x00" + content[2:])  # Pillow reads on, DALI does not
    with pytest.raises(InputError, match=r"1 of 128 files are bad.*DALI cannot decode it") as error:
        checked(split, "error")
    assert str(spoilt) in str(error.value)
    assert len(checked(split, "skip")) == 127
    assert str(spoilt) in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["resident", "torch", pytest.param("dali", marks=needs_dali)])
def test_make_loader(market, kind, capsys):
    loader = make_loader(kind, market.train, 16, train=True, **MARKET)
    images, labels = next(iter(loader.epoch(0)))
    assert images.shape == (16, 3, 256, 128)
    assert labels.shape == (16,)
    told = capsys.readouterr().err
    assert told == ("128 images stay in memory: 3 MB\n" if kind == "resident" else "")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(64, "0.1 kB"), (8192, "8.2 kB"), (499_999, "500.0 kB"), (1e6, "1 MB"), (3.2e9, "3,200 MB")],
)
def test_sizes_are_never_0_mb(nbytes, text):
    assert make.size(nbytes) == text


def test_a_small_set_says_what_it_takes(capsys):
    images = torch.zeros(32, 1, 8, 8, dtype=torch.uint8)
    source = ImageSet(images, torch.arange(32) % 4, 4, tuple("abcd"), (1.0,), (1.0,))
    make_loader("resident", source, 8, train=False)
    assert capsys.readouterr().err == "32 evaluation images stay in memory: 2.1 kB\n"


def test_what_does_not_fit_is_streamed(market, monkeypatch, capsys):
    monkeypatch.setattr(make, "free_bytes", lambda device: 4_000_000)
    for dali, kind in ((True, DALILoader), (False, TorchLoader)):
        if dali and not make.has_dali():
            continue
        monkeypatch.setattr(make, "has_dali", lambda dali=dali: dali)
        assert type(make_loader("auto", market.train, 16, train=True, **MARKET)) is kind
        told = capsys.readouterr().err
        assert told.startswith("128 images would take 3 MB, more than 50% of the 4 MB free")
        assert told.count("\n") == 1


def test_what_is_wrong_is_named(market, monkeypatch):
    with pytest.raises(InputError, match="loader 'ffcv': give one of auto, resident, dali, torch"):
        make_loader("ffcv", random_set(), 5, train=True)
    if make.has_dali():
        with pytest.raises(InputError, match="no border by reflection"):
            DALILoader(market.train, 16, train=True, size=(256, 128))
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    missing = r"^NVIDIA DALI is not installed: pip install 'fastdml\[dali\]'$"
    with pytest.raises(MissingExtra, match=missing):
        DALILoader(random_set(), 5, train=True)
