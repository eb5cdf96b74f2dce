"""Scores, kept predictions and retrieval on a mesh are those of one process, to the last bit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastdml import Cohort, parallel
from fastdml.data import ImageSet, Market1501, ResidentLoader, TorchLoader
from fastdml.engine import Ema
from fastdml.engine.amp import resolve_amp
from fastdml.errors import InputError
from fastdml.metrics import Classification
from fastdml.models import ReidHead
from fastdml.parallel import make_mesh
from fastdml.report.predictions import PREDICTIONS
from fastdml.train import extract_features, predictions
from fastdml.train.batches import as_batches
from fastdml.train.config.reid import ReidConfig
from fastdml.train.evaluations import load_into, scored, scoring_weights
from fastdml.train.predictions import Scorer, save_predictions
from fastdml.train.tasks import classification
from fastdml.train.tasks.retrieval import Features, Retrieval

CPU, CLASSES, SIDE, BATCH = torch.device("cpu"), 5, 6, 4
SHAPES = [
    (2, 2),
    *(pytest.param(s, marks=pytest.mark.slow) for s in [(4, 1), (1, 4)]),
]  # rows, columns
SIZES = {"several batches": 26, "a batch fewer than columns": 11, "one batch": 3}


class Peer(nn.Module):
    num_classes = CLASSES

    def __init__(self, seed, running=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 4 + seed, 3)
            self.norm = nn.BatchNorm2d(4 + seed, track_running_stats=running)
            self.head = nn.Linear(4 + seed, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def images(n):
    g = torch.Generator().manual_seed(n)
    pixels = torch.randint(0, 256, (n, 3, SIDE, SIDE), dtype=torch.uint8, generator=g)
    labels = torch.randint(0, CLASSES, (n,), generator=g)
    files = tuple(f"/photos/{i}.png" for i in range(n))
    names = tuple("abcde")
    return ImageSet(pixels, labels, CLASSES, names, (120.0,) * 3, (60.0,) * 3, files=files)


def sources(n):
    """The same batches of every kind that there is."""
    resident = ResidentLoader(images(n), BATCH, train=False)
    x, y = (torch.cat(parts) for parts in zip(*resident.epoch(0), strict=True))
    x = x.contiguous()
    listed = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, n, BATCH)]
    own = {
        "arrays": (x, y),
        "data set": TensorDataset(x, y),
        "DataLoader": DataLoader(TensorDataset(x, y), BATCH),
        "batches": listed,
    }
    made = {
        kind: as_batches(data, CPU, CLASSES, "test", batch_size=BATCH) for kind, data in own.items()
    }
    torch_loader = TorchLoader(images(n), BATCH, train=False, workers=0)
    return {"resident": resident, "torch": torch_loader, **made}


@dataclass
class Right:
    ensemble: float
    each: list[float]


def by_hand(cohort, data, draw=None):
    """A user's function from the cohort to its scores."""
    right = [0] * (len(cohort) + 1)
    for x, y in data.epoch(0):
        for k, z in enumerate([*cohort(x), cohort.ensemble(x)]):
            right[k] += int((z.argmax(1) == y).sum())
    if draw is not None:
        right[-1] += draw
    return Right(right[-1], [float(r) for r in right[:-1]])


def classified(cohort, folder):
    """What is said of images, under the names of what is checked."""
    amp, found = resolve_amp("off", CPU), {}
    cohort.eval()
    for size, n in SIZES.items():
        of_size = sources(n)
        kinds = of_size if n == 26 else ["resident", "batches"]
        for kind in kinds:
            scorer = Scorer(of_size[kind], amp)
            found[f"{size}, {kind}"] = (
                asdict(scorer(cohort)),
                *kept(scorer.predictions(cohort, "last")),
            )
    save_predictions(folder, cohort, Scorer(sources(26)["resident"], amp))
    found["user's function"] = asdict(scored(partial(by_hand, data=sources(26)["arrays"]), cohort))
    task = partial(classification.score, test=sources(26)["resident"], amp=amp)
    found["a task's own"] = asdict(scored(task, cohort))
    return found


def kept(predictions):
    values = vars(predictions)
    arrays = {name: v for name, v in values.items() if isinstance(v, np.ndarray)}
    return arrays, {name: v for name, v in values.items() if name not in arrays}


def averaged(cohort, ema):
    """Scores by the averages of weights and the columns' mean running statistics."""
    amp = resolve_amp("off", CPU)
    trainer = SimpleNamespace(cohort=cohort, ema=ema)
    with scoring_weights(trainer):
        return asdict(Scorer(sources(26)["resident"], amp)(cohort))


def statistics(cohort, column):
    """Gives a column running statistics of its own."""
    for k, peer in enumerate(cohort):
        if isinstance(peer, Peer):
            peer.norm.running_mean.fill_(0.1 * k + 0.25 * column)
            peer.norm.running_var.fill_(1.0 + column)


def reid_config(root):
    return ReidConfig(root=str(root), height=16, width=8, amp="off")


def reid_cohort():
    names = ["resnet8", "resnet8", "resnet14", "resnet8"]
    return Cohort(names, 6, head=ReidHead(), seed=1).eval()


def retrieved(cohort, root, **share):
    market, config = Market1501(root, progress=False), reid_config(root)
    retrieval = Retrieval(market, config, CPU, **share)
    for features in (retrieval.query, retrieval.gallery):  # a batch of 128 holds all of this set
        features.__init__(features.source, (16, 8), CPU, batch_size=4, **share)
    found = {"during training": asdict(retrieval(cohort))}
    scores, *features = retrieval.all_scores(cohort, expansion=2)
    found |= {name: asdict(s) for name, s in scores.items() if s is not None}
    extracted = extract_features(cohort, market.query, (16, 8), amp="off", batch_size=4)
    return found, [f.numpy() for f in (*features[0], *features[1], *extracted)]


def refused(cohort, mesh):
    said = {}
    x, y = torch.randn(8, 3, SIDE, SIDE), torch.arange(8) % CLASSES
    g = torch.Generator().manual_seed(mesh.rank)
    shuffled = DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=g)
    amp = resolve_amp("off", CPU)
    cases = {
        "shuffled": lambda: Scorer(as_batches(shuffled, CPU, CLASSES, "test"), amp)(cohort),
        "drawn": lambda: scored(
            partial(by_hand, data=sources(11)["arrays"], draw=mesh.rank), cohort
        ),
    }
    for name, case in cases.items():
        with pytest.raises(InputError) as error:
            case()
        said[name] = str(error.value)
    return said


def peers(running=True):
    """One more than the ranks, so that rows have unequal numbers of them. running: whether they
    keep running statistics."""
    return Cohort([Peer(k, running) for k in range(1, 6)], CLASSES)


def on_mesh(shape, root, folder):
    torch.set_num_threads(1)
    mesh, cohort = make_mesh(*shape, timeout=30), peers()
    taken = mesh.distribute(cohort)
    if mesh.lead:
        folder.mkdir()
    mesh.share(None)
    found = {"classified": classified(cohort, folder), "refused": refused(cohort, mesh)}
    statistics(cohort, mesh.column)
    found["averaged"] = averaged(cohort, trained(cohort))
    columns = [cohort.peers[k].norm.running_var[0].item() for k in mesh.local]
    found["own again"] = columns == [1.0 + mesh.column] * len(columns)
    mesh.collect(cohort, taken)
    found["collected"] = cohort.mesh is None
    cohort = reid_cohort()
    mesh.distribute(cohort)
    found["retrieved"] = retrieved(cohort, root, rank=mesh.column, world=mesh.data)
    with pytest.raises(InputError) as error:
        retrieved(cohort, root, rank=0, world=mesh.data + 1)
    found["refused"]["other share"] = str(error.value)
    return found


def trained(cohort):
    """The averages of a cohort whose weights then go on."""
    ema = Ema(cohort, 0.5)
    for weight in cohort.parameters():
        weight.data.mul_(1.5)
    return ema


def of_shards(folder):
    """What is said of peers that are cut over two columns, whose forward passes are collectives; a
    saved cohort is then read into them."""
    torch.set_num_threads(1)
    mesh, cohort, amp = make_mesh(1, 2, timeout=30), peers(), resolve_amp("off", CPU)
    mesh.distribute(cohort)
    parallel.shard(cohort, mesh)
    found = {}
    for size, n in SIZES.items():
        scorer = Scorer(sources(n)["resident"], amp)
        cohort.eval()
        scores = asdict(scorer(cohort))
        found[f"{size}, resident"] = scores, *kept(scorer.predictions(cohort, "last"))
    load_into(cohort, folder, CPU)
    return found, asdict(Scorer(sources(26)["resident"], amp)(cohort))


@pytest.mark.slow
def test_sharded_peers_are_scored_as_whole_ones(expected, tmp_path):
    cohort = peers()
    for weight in cohort.parameters():
        weight.data.mul_(-1.0)
    cohort.save(tmp_path)
    cohort.eval()
    wanted = asdict(Scorer(sources(26)["resident"], resolve_amp("off", CPU))(cohort))
    for found, again in run_ranks(2, of_shards, tmp_path):
        for name, said in found.items():
            assert same(said, expected["classified"][name]), name
        assert same(again, wanted)


@pytest.fixture(scope="module")
def expected(market_root, tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("one")
    found = {
        "classified": classified(peers(), folder),
        "predictions": (folder / PREDICTIONS).read_bytes(),
        "retrieved": retrieved(reid_cohort(), market_root),
    }
    for data in (1, 2, 4):
        cohort = peers()
        statistics(cohort, sum(range(data)) / data)
        found["averaged", data] = averaged(cohort, trained(cohort))
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def shape(request):
    return request.param


@pytest.fixture(scope="module")
def ranks(shape, market_root, tmp_path_factory):
    """What the ranks of a mesh say, and the folder of what they write."""
    folder = tmp_path_factory.mktemp("mesh") / "run"
    return run_ranks(4, on_mesh, shape, market_root, folder, timeout=120), folder


def same(found, wanted):
    """NaN is like NaN, and arrays are compared to the bit."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, (list, tuple)):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(wanted, np.ndarray):
        return np.array_equal(found, wanted, equal_nan=wanted.dtype.kind == "f")
    return found == wanted or (found != found and wanted != wanted)


class TestMeshes:
    def test_every_rank_gets_the_scores_and_predictions_of_one_process(
        self, ranks, expected, shape
    ):
        for said in ranks[0]:
            for name, wanted in expected["classified"].items():
                assert same(said["classified"][name], wanted), name

    def test_rank_0_writes_the_file_of_one_process(self, ranks, expected, shape):
        path = ranks[1] / PREDICTIONS
        assert path.read_bytes() == expected["predictions"]

    def test_averages_of_weights_and_columns_are_scored(self, ranks, expected, shape):
        for said in ranks[0]:
            assert same(said["averaged"], expected["averaged", shape[1]])
            assert said["own again"]
            assert said["collected"]

    def test_retrieval_is_that_of_one_process(self, ranks, expected, shape):
        scores, features = expected["retrieved"]
        assert {"single", "single_expanded_reranked", "multi_reranked"} <= scores.keys()
        for said in ranks[0]:
            assert same(said["retrieved"][1], features)
            assert same(said["retrieved"][0], scores)

    def test_what_differs_between_ranks_is_refused_on_all(self, ranks, shape):
        for said in ranks[0]:
            assert said["refused"]["shuffled"].startswith("the batches to score on differ")
            assert "says something else on rank 1 than on rank 0" in said["refused"]["drawn"]
            wrong = f"features of the share 0 of {shape[1] + 1}, in column "
            assert said["refused"]["other share"].startswith(wrong)


def on_cuda(root):
    """What a mesh of one GPU says, also by the collectives that several columns make."""
    torch.backends.cudnn.deterministic = True
    mesh, amp = make_mesh(1, 1, timeout=60), resolve_amp("off", torch.device("cuda"))
    cohort, said = peers().eval().to("cuda"), []
    batches = ResidentLoader(images(26), BATCH, train=False, device="cuda")
    for on_mesh in (False, True):
        if on_mesh:
            mesh.distribute(cohort)
        scorer = Scorer(batches, amp)
        said.append((asdict(scorer(cohort)), kept(scorer.predictions(cohort, "last"))))
    counts = Classification(len(cohort), CLASSES, "cuda", keep=True)
    for pixels, labels in batches.epoch(0):
        counts.update(cohort(pixels), labels)
    alone = asdict(counts.compute())
    predictions._add_columns(counts, len(batches), mesh)
    rows = predictions._all_rows(counts.kept_rows(), torch.arange(26), mesh)
    scorer.pictures.join(mesh)
    joined = asdict(counts.compute()), all(map(torch.equal, rows, counts.kept_rows()))
    share = {"rank": 0, "world": 1}
    market, heads = Market1501(root, progress=False), reid_cohort().to("cuda")
    features = Features(market.query, (16, 8), torch.device("cuda"), batch_size=4, **share)
    plain = features(heads, amp)
    mesh.distribute(heads)
    found = features(heads, amp)
    return said, alone, joined, all(map(torch.equal, plain, found))


@pytest.mark.gpu
def test_a_gpu_scores_on_a_mesh_as_without_one(market_root):
    ((plain, on_mesh), alone, joined, equal), *_ = run_ranks(1, on_cuda, market_root)
    assert same(on_mesh, plain)
    assert joined == (alone, True)
    assert equal
