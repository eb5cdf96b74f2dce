"""The share that each column of a mesh gets of a user's own data, what is refused of it, and that
the rows of a column see the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from runs import Inputs
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
)

from fastdml.cohort import Cohort
from fastdml.data import ImageSet, ResidentLoader
from fastdml.data.image_set import IGNORED
from fastdml.data.samplers import part
from fastdml.errors import InputError
from fastdml.parallel import make_mesh
from fastdml.train import TrainConfig, fit
from fastdml.train.batches import as_batches
from fastdml.train.config.reid import ReidConfig
from fastdml.train.sharding import SeenBatches
from fastdml.train.tasks.task import Prepared, Task, prepared, task_of
from fastdml.train.unlabelled import PairedBatches, learns_without_labels, with_unlabelled

CPU, CLASSES = torch.device("cpu"), 7


def rows(n, first=0):
    """Inputs that hold their own numbers, so that no two are alike."""
    return torch.arange(first, first + n, dtype=torch.float32)[:, None].expand(n, 3).contiguous()


def own_data(kind, n, batch_size, seed):
    """A function from (rank, world) to batches of n labelled rows, and of others without labels
    where there are such."""
    x, y = rows(n), torch.arange(n) % CLASSES
    sizes = {"batch_size": batch_size, "seed": seed}
    if kind in ("arrays", "data set"):
        data = (x, y) if kind == "arrays" else TensorDataset(x, y)
        return lambda rank, world: as_batches(data, CPU, CLASSES, **sizes, rank=rank, world=world)
    more = rows(2 * n, first=1000)
    data, others = {
        "arrays, unlabelled": ((x, y), more),
        "data sets, unlabelled": (TensorDataset(x, y), Inputs(more)),
        "pairs": (TensorDataset(x, y), more),
    }[kind]

    def check(labels, images, num_classes, where, values):
        pass

    return lambda rank, world: with_unlabelled(
        data, others, CPU, CLASSES, check, rows=batch_size // 2, **sizes, rank=rank, world=world
    )


KINDS = ["arrays", "data set", "arrays, unlabelled", "data sets, unlabelled", "pairs"]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_show_the_batches_of_one_process_from_any_step_on(kind):
    @settings(max_examples=12, deadline=None)
    @given(
        st.integers(12, 40), st.integers(4, 12), st.integers(1, 4), st.integers(0, 2**63 - 1),
        st.integers(0, 3), st.data(),
    )  # fmt: skip
    def check(n, batch_size, world, seed, epoch, data):
        smallest = min(batch_size // 2, batch_size - batch_size // 2)
        world = min(world, smallest) if kind == "pairs" else world
        make = own_data(kind, n, batch_size, seed)
        whole, columns = make(0, 1), [make(rank, world) for rank in range(world)]
        assert {len(column) for column in columns} == {len(whole)}
        assert {column.batch_size for column in columns} == {whole.batch_size}
        assert len({learns_without_labels(batches) for batches in (whole, *columns)}) == 1
        start = data.draw(st.integers(0, len(whole) - 1), label="start")
        batches = zip(
            whole.epoch(epoch, start), *(c.epoch(epoch, start) for c in columns), strict=True
        )
        for step, ((inputs, labels), *shares) in enumerate(batches, start):
            found = [torch.cat(values) for values in zip(*shares, strict=True)]
            if kind == "pairs":  # each column: its share of the labelled, then of the others
                order = torch.sort((found[1] == IGNORED).long(), stable=True).indices
                found = [values[order] for values in found]
            assert torch.equal(found[0], inputs)
            assert torch.equal(found[1], labels)
            if kind == "arrays":
                samples = torch.cat([column.samples(epoch, step) for column in columns])
                assert torch.equal(samples.float(), inputs[:, 0])

    check()


def test_batches_with_too_few_rows_for_all_columns_are_refused():
    for data in ((rows(9), torch.zeros(9).long()), TensorDataset(rows(9), torch.zeros(9).long())):
        with pytest.raises(InputError, match=r"batch size 2 for 3 ranks.*give 3 or more"):
            as_batches(data, CPU, CLASSES, batch_size=2, seed=0, rank=1, world=3)


def cut(rank, world, *, by="sampler"):
    data = TensorDataset(rows(24), torch.arange(24) % CLASSES)
    sampler = DistributedSampler(data, num_replicas=world, rank=rank, seed=3)
    if by == "sampler":
        return DataLoader(data, batch_size=4, sampler=sampler)
    return DataLoader(data, batch_sampler=BatchSampler(sampler, 4, drop_last=True))


@pytest.mark.parametrize("by", ["sampler", "batch_sampler"])
def test_a_data_loader_that_cuts_by_itself_is_taken(by):
    columns = [
        as_batches(cut(rank, 2, by=by), CPU, CLASSES, rank=rank, world=2) for rank in range(2)
    ]
    seen = {}
    for epoch in range(2):
        shown = [[int(x) for batch, _ in c.epoch(epoch) for x in batch[:, 0]] for c in columns]
        assert sorted(shown[0] + shown[1]) == list(range(24))
        seen[epoch] = shown
    assert seen[0] != seen[1], "its sampler is told the epoch"
    if by == "sampler":
        assert columns[0].batch_size == 8  # of both


def resident(**share):
    images = torch.zeros(12, 3, 4, 4, dtype=torch.uint8)
    labels = torch.arange(12) % CLASSES
    return ResidentLoader(
        ImageSet(images, labels, CLASSES, tuple("abcdefg"), (0.0,) * 3, (1.0,) * 3),
        4, train=True, pad=0, **share,
    )  # fmt: skip


class Steps:
    """Batches by `epoch`, as another's loader may give them."""

    batch_size = 4

    def __init__(self, **share):
        vars(self).update(share)

    def __len__(self):
        return 2

    def epoch(self, epoch, start=0):
        return iter([(rows(4), torch.zeros(4).long())] * (2 - start))


LISTED = [(rows(4), torch.zeros(4).long())] * 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: LISTED, "a list gives each of the 2 columns of the mesh the same batches"),
        (lambda: DataLoader(TensorDataset(rows(8), torch.zeros(8).long())), "a DataLoader gives"),
        (lambda: cut(0, 2), "the DataLoader gives this column, 1 of 2, the share 0 of 2"),
        (lambda: cut(1, 4), "1 of 2, the share 1 of 4"),
        (lambda: cut(2, 4, by="batch_sampler"), "1 of 2, the share 2 of 4"),
        (lambda: resident(), "the share of rank 0 of 1, .*with rank=1, world=2"),
        (lambda: resident(rank=1, world=3), "the share of rank 1 of 3, .*with rank=1, world=2"),
        (lambda: Steps(), "a Steps gives each .* attributes rank"),
        (lambda: Steps(rank=0, world=2), "this column, 1 of 2, the share 0 of 2"),
    ],
)
def test_batches_that_are_no_share_are_refused_in_one_line(source, message):
    with pytest.raises(InputError, match=message) as error:
        as_batches(source(), CPU, CLASSES, rank=1, world=2)
    assert "\n" not in str(error.value)


def test_shares_that_fit_and_batches_of_a_mesh_of_one_column_are_taken():
    for source in (cut(1, 2), resident(rank=1, world=2), Steps(rank=1, world=2)):
        as_batches(source, CPU, CLASSES, rank=1, world=2)
    for source in (LISTED, DataLoader(TensorDataset(rows(8), torch.zeros(8).long())), Steps()):
        as_batches(source, CPU, CLASSES, rank=0, world=1)
    with pytest.raises(InputError, match="with rank=0, world=1"):
        as_batches(resident(rank=1, world=2), CPU, CLASSES)


def test_pairs_of_data_loaders_must_both_cut():
    data = TensorDataset(rows(24), torch.arange(24) % CLASSES)
    options = {"rows": 2, "batch_size": 4, "seed": 0, "rank": 1, "world": 2}

    def pair(others):
        return with_unlabelled(cut(1, 2), others, CPU, CLASSES, lambda *a: None, **options)

    assert isinstance(pair(cut(1, 2)), PairedBatches)
    with pytest.raises(InputError, match="unlabelled data: a DataLoader gives"):
        pair(DataLoader(data, batch_size=2))


def test_a_task_whose_batches_cannot_be_cut_is_refused_where_there_are_columns():
    class Whole(Task):
        name, title, settings = "whole", "whole", TrainConfig

        def prepare(self, config, device, hint=""):
            return Prepared(None, None, None)

    assert prepared(Whole(), TrainConfig(), CPU, "") == (None, None, None, None)
    with pytest.raises(InputError, match=r"whole runs cannot be cut into 2 columns: Whole.prepare"):
        prepared(Whole(), TrainConfig(), CPU, "", 0, 2)


@pytest.mark.parametrize("name", ["digits", "reid"])
def test_the_tasks_give_each_column_its_share(name, market_root):
    if name == "digits":
        config = TrainConfig(data="digits", peers=("resnet8",), batch_size=30, amp="off", pad=1)
    else:
        config = ReidConfig(
            peers=("resnet8",), root=str(market_root), height=16, width=8, batch_size=16,
            images_per_id=4, pad=1, amp="off",
        )  # fmt: skip
    task = task_of(config)
    with prepared(task, config, CPU, "") as whole:
        images, labels = whole.train.batch(2, 1)
    found = []
    for rank in range(3):
        with prepared(task, config, CPU, "", rank, 3) as column:
            together = config.images_per_id if name == "reid" else 1
            share = part(0, config.batch_size, rank, 3, together)
            found.append(column.train.batch(2, 1))
            assert len(found[-1][1]) == share.stop - share.start
            assert column.train.batch_size == config.batch_size
    for values, shares in zip((images, labels), zip(*found, strict=True), strict=True):
        assert torch.equal(torch.cat(shares), values)


def rows_that_see(seeds):
    """What each rank of peer=2, data=2 says of labels that it shuffles by its own seed."""
    mesh = make_mesh(2, 2, timeout=20)
    data = TensorDataset(rows(16), torch.arange(16) % CLASSES)
    said = {}
    for name, (shuffled, seed) in seeds.items():
        generator = torch.Generator().manual_seed(seed[mesh.rank])
        loader = DataLoader(data, 4, sampler=RandomSampler(data, generator=generator))
        seen = SeenBatches(mesh, SimpleNamespace(epoch=None) if shuffled else resident())
        for batch in loader:
            seen.add(*batch)
        said[name] = refusal(seen.check)
    return said


def refusal(function):
    try:
        function()
    except InputError as error:
        return str(error)
    return None


class Linear(nn.Module):
    """A peer that draws."""

    num_classes = CLASSES

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, CLASSES))

    def forward(self, x):
        return self.layers(x)


class Noisy(TensorDataset):
    """Augmented by torch's generator, or by one of each process's own."""

    def __init__(self, own=None):
        super().__init__(rows(16), torch.arange(16) % CLASSES)
        self.own = own

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.randn(3, generator=self.own), y


def runs_with_loaders(folder):
    """What the ranks of peer=2, data=2 say of runs with DataLoaders that cut by themselves."""
    torch.set_num_threads(1)
    mesh, said = make_mesh(2, 2, timeout=60), {}

    def loader(data, seed=0):
        sampler = DistributedSampler(data, mesh.data, mesh.column, seed=seed)
        return DataLoader(data, 4, sampler=sampler)

    loaders = {
        "alike": loader(Noisy()),
        "order": loader(Noisy(), seed=mesh.row),
        "noise": loader(Noisy(own=torch.Generator().manual_seed(mesh.rank))),
        "whole": DataLoader(Noisy(), 4),
    }
    for name, train in loaders.items():
        cohort = Cohort([Linear(1), Linear(2)], CLASSES)
        config = TrainConfig(
            folder=str(folder / name), epochs=2, log_every=1, eval_every=1, amp="off", threads=1,
            tensorboard=False, figures=(), execution="eager",
        )  # fmt: skip
        said[name] = refusal(lambda c=cohort, t=train, f=config: fit(c, t, None, f, mesh=mesh))
    return said


def ranks_that_see(seeds, folder):
    return rows_that_see(seeds), runs_with_loaders(folder)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    pytest.importorskip("tqdm", reason="runs need the extra train")
    seeds = {
        "alike": (True, [5, 6, 5, 6]),
        "others": (True, [5, 6, 5, 7]),
        "by the seed": (False, [1, 2, 3, 4]),
    }
    return run_ranks(4, ranks_that_see, seeds, tmp_path_factory.mktemp("loaders"))


def test_rows_that_saw_other_batches_are_refused_on_all_ranks(seen):
    """Rows 0 and 1 are ranks 0, 1 and 2, 3; column 1 is ranks 1 and 3."""
    for said, _ in seen:
        assert said["alike"] is said["by the seed"] is None
        assert said["others"].startswith("the rows of column 1 of the mesh have trained on other")
        assert "\n" not in said["others"]


def test_a_run_takes_a_loader_that_cuts_and_stops_where_rows_shuffle_or_augment_otherwise(seen):
    for _, said in seen:
        assert said["alike"] is None
        for name in ("order", "noise"):
            assert "the rows of column 0 of the mesh have trained on other batches" in said[name]
        assert (
            "a DataLoader gives each of the 2 columns of the mesh the same batches"
            in (said["whole"])
        )


def test_the_sum_over_batches_tells_orders_and_inputs_apart():
    mesh, sums = SimpleNamespace(peer=2), set()
    for order in ([[1, 2], [3, 4]], [[2, 1], [3, 4]], [[3, 4], [1, 2]], [[1], [2, 3, 4]]):
        for shift in (0.0, 1e-6):
            seen = SeenBatches(mesh, [])
            for labels in order:
                seen.add(torch.ones(len(labels), 3, 40, 40) + shift, torch.tensor(labels))
            sums.add(seen.seen.value())
    assert len(sums) == 8
