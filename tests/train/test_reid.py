"""Re-identification runs: what they train on, what they leave, how they go on, what is refused."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from reid_runs import SMALL
from report_runs import Page
from runs import Crash, CrashingLoader, environment, logged, same_weights

from fastdml import cli, metrics
from fastdml import train as training
from fastdml.cohort import Cohort
from fastdml.data import Market1501, PKSampler, TorchLoader
from fastdml.data.loaders import make
from fastdml.data.reid_split import MEAN, STD, ReidSplit
from fastdml.data.sets.stand_in import StandIn
from fastdml.engine.amp import Amp
from fastdml.errors import InputError
from fastdml.models import ReidHead
from fastdml.report.metrics_log import read_metrics
from fastdml.report.run_files import read_run
from fastdml.report.tables import summary_table
from fastdml.reproduce.experiment import Training
from fastdml.reproduce.market import multi
from fastdml.reproduce.trainings import Finished
from fastdml.train import ReidConfig, RetrievalScores, checkpoint, learning_rate
from fastdml.train.tasks import reid, retrieval
from fastdml.train.tasks.task import task_of

CPU = torch.device("cpu")
ALL_LOSSES = {
    "triplet_weight": 1.0,
    "center_weight": 0.01,
    "circle_weight": 0.1,
    "distance_mutual_weight": 0.1,
}


@pytest.fixture
def settings(market_root, tmp_path):
    """Makes settings for a run in the test's own folder."""

    def make(**changes) -> ReidConfig:
        values = {"root": market_root, "folder": str(tmp_path / "run"), **SMALL, **changes}
        return ReidConfig(**values)

    return make


@pytest.fixture
def market(market_root) -> Market1501:
    with pytest.warns(UserWarning, match="figures from a subset"):
        return Market1501(market_root)


# --- settings become losses ---


def test_the_authors_sum_over_peers_and_the_papers_mean():
    K = 3
    logits = list(torch.randn(K, 8, 5, generator=torch.Generator().manual_seed(0)))
    labels = torch.arange(8) % 5
    kl = {}
    for summed in (False, True):
        loss = task_of(ReidConfig()).mutual_loss(ReidConfig(kl_sum=summed, ce_weight=0.0), K)
        kl[summed] = loss(logits, labels)
    torch.testing.assert_close(kl[True], (K - 1) * kl[False])


def test_metric_losses_follow_their_weights():
    cohort = Cohort(["resnet8"], 5, head=ReidHead())
    assert task_of(ReidConfig()).metric_loss(ReidConfig(), cohort) is None
    loss = task_of(ReidConfig()).metric_loss(ReidConfig(triplet_weight=2.0, margin=None), cohort)
    features = [torch.randn(6, 64, generator=torch.Generator().manual_seed(1))]
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    expected = 2 * batch_hard(features[0], labels)
    torch.testing.assert_close(loss(features, labels), expected[None])


def batch_hard(features, labels):
    """Soft-margin batch-hard triplet loss, anchor by anchor."""
    total = []
    for i in range(len(labels)):
        d = (features - features[i]).square().sum(1).sqrt()
        same = (labels == labels[i]) & (torch.arange(len(labels)) != i)
        gap = d[same].max() - d[labels != labels[i]].min()
        total.append(torch.nn.functional.softplus(gap))
    return torch.stack(total).mean()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Luo et al. 2019: up to 3.5e-4 within ten epochs, a tenth from the 40th and the 70th on
        ({"recipe": "strong"}, {1: 3.5e-5, 10: 3.5e-4, 40: 3.5e-4, 41: 3.5e-5, 71: 3.5e-6}),
        ({"recipe": "paper"}, {1: 2e-4, 12_500: 2e-4}),
        ({"lr_drop_every": 3, "lr": 1.0}, {3: 1.0, 4: 0.1, 7: 0.01}),
        ({"lr": 1.0, "schedule": "cosine", "iterations": 81}, {1: 0.982, 10: 0.0015, 11: 0.0}),
    ],
)
def test_learning_rates(changes, expected):
    config = training.config.sources.preset("market1501", **changes)
    steps = 8
    table = learning_rate.rates(config, steps)
    assert len(table) == learning_rate.total_steps(config, steps)
    for epoch, rate in expected.items():
        last = min(epoch * steps, len(table)) - 1
        assert table[last] == pytest.approx(rate, rel=1e-5, abs=0.005 * config.lr)


# --- a run ---


@pytest.fixture(scope="module")
def run(market_root, tmp_path_factory) -> Path:
    """Two peers trained from the command line with all losses, mutually and independently."""
    folder = tmp_path_factory.mktemp("reid") / "run"
    config = folder.parent / "small.yaml"
    config.write_text(yaml.safe_dump({**SMALL, **ALL_LOSSES, "peers": list(SMALL["peers"])}))
    options = ["--config", str(config), "--root", str(market_root), "--folder", str(folder)]
    assert cli.main(["train", "market1501", *options, "--epochs", "3", "--independent"]) == 0
    return folder


def test_a_run_learns_and_leaves_what_it_promises(run):
    for name in ("curves.png", "pairwise_kl.png", "last.ckpt", "best/cohort.json", "cohort.json"):
        assert (run / name).stat().st_size > 0, name
    summary = json.loads((run / "summary.json").read_text())
    scores = RetrievalScores(**summary["mutual"]["scores"])
    assert scores.queries == 15
    for peer, mAP, rank1 in zip(summary["peers"], scores.mAP, scores.rank1, strict=True):
        assert (peer["mAP_mutual"], peer["rank1_mutual"]) == (mAP, rank1)
        assert 0.3 < peer["mAP_independent"] <= 1  # in random order about 0.17
        assert mAP > 0.3
    assert summary["ensemble_mutual"] == scores.ensemble_mAP
    table = summary_table(summary, reid.SCORING).splitlines()
    assert re.split(r"  +", table[0]) == [
        "peer", "parameters", "mAP independent %", "mAP mutual %", "rank-1 independent %",
        "rank-1 mutual %", "mAP ensemble %", "images/s",
    ]  # fmt: skip
    assert table[2].split()[3] == f"{100 * scores.mAP[0]:.2f}"
    assert "the mutual peers' features, concatenated" in table[-1]
    records = read_metrics(run)
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert len(epochs) == 3
    for record in epochs:
        terms = [record[name] for name in ("loss", "ce", "kl", "metric")]
        for loss, ce, kl, metric in zip(*terms, strict=True):
            assert loss == pytest.approx(ce + kl + metric, rel=1e-4)
            assert metric > 0
    assert epochs[-1]["loss"][0] < epochs[0]["loss"][0]
    alone = [r for r in read_metrics(run / "independent") if r["kind"] == "epoch"]
    saved = yaml.safe_load((run / "independent/config.yaml").read_text())
    assert (saved["kl_weight"], saved["distance_mutual_weight"]) == (0, 0)
    assert alone[0]["metric"][0] != epochs[0]["metric"][0]


def test_evaluate_repeats_the_scores_and_adds_the_other_protocols(run, capfd):
    assert cli.main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert found["scores"]["single"] == summary["mutual"]["scores"]
    assert list(found["scores"]) == ["single", "single_reranked", "multi", "multi_reranked"]
    assert (found["settings"]["ties"], found["settings"]["query_expansion"]) == ("worst", None)
    recorded = {**found["settings"]["reranking"]}
    assert recorded == {"k1": 20, "k2": 6, "lambda_value": 0.3, "metric": "euclidean"}
    usual = inspect.signature(metrics.k_reciprocal_rerank).parameters
    assert recorded == {name: usual[name].default for name in recorded}
    for scores in found["scores"].values():
        assert RetrievalScores(**scores).queries == 15
        assert all(0.3 < x <= 1 for x in scores["mAP"])


def test_the_report_shows_the_summarys_scores(run, tmp_path):
    assert cli.main(["report", str(run), "--to", str(tmp_path / "page.html")]) == 0
    page, summary = Page((tmp_path / "page.html").read_text()), read_run(run).summary
    head, *rows = page.table("Scores on 15 queries")
    for phase in ("independent", "mutual"):
        for name, title in (("mAP", "mAP (%)"), ("rank1", "rank-1 (%)")):
            shown = [row[head.index(f"{phase} {title}")].partition(" | ")[0] for row in rows]
            scores = summary[phase]["scores"]
            values = [*scores[name], scores[f"ensemble_{name}"]]
            assert shown == [f"{100 * v:.2f}" for v in values]
    assert [row[0] for row in page.table("Queries with a match")[1:4]] == ["1", "5", "10"]
    assert page.table("mutual, epochs")


def test_evaluate_prints_a_table_and_draws(run, market_root, capfd):
    options = ["--data", str(market_root), "--weights", "best", "--no-rerank", "--ranked-lists"]
    assert cli.main(["evaluate", str(run), *options, "4"]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert re.split(r"  +", lines[0]) == [
        "peer", "query", "re-ranked", "rank-1 %", "rank-5 %", "rank-10 %", "rank-20 %", "mAP %",
        "mINP %", "TPR@1e-4 %", "TPR@1e-3 %", "TPR@1e-2 %",
    ]  # fmt: skip
    rows = [line.split()[:3] for line in lines[2:8]]
    names = ("resnet8-1", "resnet8-2", "ensemble")
    assert rows == [[name, query, "no"] for query in ("single", "multi") for name in names]
    assert lines[8].startswith("15 queries; ensemble: the peers' features, concatenated")
    pictures = [Path(line) for line in lines[10:]]
    assert [p.name for p in pictures] == ["resnet8-1.png", "resnet8-2.png", "ensemble.png"]
    from PIL import Image

    sizes = {Image.open(p).size for p in pictures}
    assert len(sizes) == 1
    assert "has 12,936/3,368/15,913/751" in err  # a subset is told


def test_evaluate_with_expanded_queries_and_ties_in_the_order_given(run, market, settings, capfd):
    options = ["--query-expansion", "3", "--ties", "given", "--no-rerank"]
    assert cli.main(["evaluate", str(run), *options, "--json"]) == 0
    output = json.loads(capfd.readouterr().out)
    assert output["settings"] == {
        "metric": "cosine",
        "flip_test": True,
        "ties": "given",
        "query_expansion": {"n": 3, "alpha": 0.0},
        "reranking": None,
        "distractors": False,
    }
    found = output["scores"]
    assert list(found) == ["single", "single_expanded", "multi", "multi_expanded"]
    cohort = Cohort.load(run)
    evaluation = retrieval.Retrieval(market, settings(), CPU)
    _, query, gallery = evaluation.all_scores(cohort, rerank=False)
    marks = (market.query.ids, market.gallery.ids, market.query.cameras, market.gallery.cameras)
    for k in (0, 1):
        expanded = metrics.average_query_expansion(query[k], gallery[k], 3)
        for protocol, features in (("single", query[k]), ("single_expanded", expanded)):
            expected = metrics.reid_scores(
                features, gallery[k], *marks, ties="given", fprs=(1e-4, 1e-2)
            )
            assert found[protocol]["mAP"][k] == pytest.approx(expected.mAP)
            assert found[protocol]["rank20"][k] == expected.rank(20)
            assert found[protocol]["tpr_1e2"][k] == pytest.approx(expected.tpr[1e-2])
            assert found[protocol]["tpr_1e4"][k] == pytest.approx(expected.tpr[1e-4])
    assert found["single"]["mAP"] != found["single_expanded"]["mAP"]
    together = metrics.ensemble_features(query), metrics.ensemble_features(gallery)
    together = metrics.average_query_expansion(*together, 3), together[1]
    expected = metrics.reid_scores(*together, *marks, ties="given")
    assert found["single_expanded"]["ensemble_mAP"] == pytest.approx(expected.mAP)
    assert found["single_expanded"]["ensemble_mINP"] == pytest.approx(expected.mINP)
    assert cli.main(["evaluate", str(run), *options]) == 0
    out = capfd.readouterr().out
    assert re.search(r"^resnet8-2  +single, expanded  +no  +\d", out, re.M)
    assert "; expanded: by their 3 nearest gallery images; ties: given\n" in out
    assert cli.main(["evaluate", str(run), "--query-expansion", "-1"]) == 2
    assert "--query-expansion -1: give 0 or more" in capfd.readouterr().err


def test_features_that_are_not_finite_are_one_line(run, tmp_path, capfd):
    shutil.copytree(run, tmp_path / "run")
    cohort = Cohort.load(tmp_path / "run")
    with torch.no_grad():
        next(cohort.peers[1].parameters()).fill_(torch.nan)
    cohort.save(tmp_path / "run")
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if "error" in x]
    assert re.search(r"resnet8-2: the features of (\d+) of \1 images are not finite", line)


def test_evaluate_of_a_run_on_other_data(run, tmp_path, capfd):
    (tmp_path / "config.yaml").write_text("data: digits\n")
    assert cli.main(["evaluate", str(tmp_path), "--ranked-lists", "3"]) == 2
    err = capfd.readouterr().err
    assert re.search("--ranked-lists is for runs on .*market1501.* is on digits", err)
    assert cli.main(["evaluate", str(run), "--ranked-lists", "-3"]) == 2
    assert "--ranked-lists -3: give 0 or more" in capfd.readouterr().err


def test_export(run, tmp_path, capfd):
    assert cli.main(["export", str(run), "--format", "torch-export", "--to", str(tmp_path)]) == 0
    paths = capfd.readouterr().out.split()
    files = {"images.json": ""}
    program = torch.export.load(paths[0], extra_files=files).module()
    facts = json.loads(files["images.json"])
    assert (facts["output"], facts["image_shape"]) == ("features", [3, 16, 8])
    assert facts["classes"] == [str(identity) for identity in range(1, 7)]
    assert (facts["mean"], facts["std"], facts["resize"]) == ([*MEAN], [*STD], "stretch")
    assert program(torch.zeros(3, 3, 16, 8)).shape == (3, 64)  # features, not the 6 identities


# --- resuming ---


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize(
    "changes",
    [
        {**ALL_LOSSES, "ema": 0.9},
        {**ALL_LOSSES, "peers": ("resnet8", "wrn_10_2"), "update": "sequential"},
        {"iterations": 8, "epochs": 0, "label_smoothing": 0.1, "kl_sum": True},
    ],
    ids=["losses", "sequential", "iterations"],
)
def test_a_crash_leaves_no_trace(settings, market, tmp_path, changes):
    config = settings(**{"epochs": 3, **changes}, save_every_steps=1)

    def prepared():
        return reid.prepare(market, config, CPU)[:3]

    whole, train, test = prepared()
    unbroken = training.fit(whole, train, test, config)
    assert unbroken.history[-1]["step"] == (config.iterations or 9)
    assert unbroken.history[-1]["epoch"] == (config.iterations or 9) / 3  # the last cut short

    broken = config.replace(folder=str(tmp_path / "broken"))
    cohort, train, test = prepared()
    with pytest.raises(Crash):
        training.fit(cohort, CrashingLoader(train, 4), test, broken)
    again, train, test = prepared()
    resumed = training.fit(again, train, test, broken.replace(resume=True))
    assert same_weights(again, whole)
    assert logged(resumed.folder) == logged(unbroken.folder)
    assert resumed.scores == unbroken.scores
    a, b = (checkpoint.load(r.folder / "last.ckpt")["metric"] for r in (resumed, unbroken))
    assert (a is None) == ("triplet_weight" not in changes)
    if a is not None:
        assert len(a) == 2  # a table of centres a peer
        for key in b:
            assert torch.equal(a[key], b[key])
            assert b[key].any()


@pytest.mark.usefixtures("_no_pictures")
def test_resuming_from_the_settings_of_the_run(copy, tmp_path):
    folder = str(tmp_path / "run")
    options = {**SMALL, "iterations": 4, "epochs": 0, "images_per_id": 0}
    first = training.market1501(**options, folder=folder, root=copy)
    assert first.history[-1]["step"] == 4
    summary = json.loads((first.folder / "summary.json").read_text())["mutual"]
    steps = 3  # an epoch
    assert summary["epochs"] == summary["best_epoch"] == 4 / steps
    longer = training.market1501(folder=folder, resume=True, iterations=5)
    assert longer.history[-1]["step"] == 5
    assert longer.config.images_per_id == 0
    with pytest.raises(InputError, match="cannot resume: height was 16 and is now 24"):
        training.market1501(folder=folder, resume=True, height=24)
    moved = copy.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=f"{copy}: no such folder"):
        training.market1501(folder=folder, resume=True)
    training.market1501(folder=folder, resume=True, root=moved)
    assert training.load_config(Path(folder) / "config.yaml").root == str(moved)


@pytest.mark.gpu
@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize("execution", ["streams", "graph", "stacked"])
def test_every_execution_trains_alike_on_a_gpu(settings, tmp_path, execution):
    found = []
    for name in ("eager", execution):
        folder = str(tmp_path / name)
        config = settings(device="cuda", execution=name, folder=folder, **ALL_LOSSES, lr=1e-4)
        found.append(training.run(config))
    for a, b in zip(*(result.history for result in found), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)
    assert min(found[1].scores.mAP) > 0.3


# --- features ---


@pytest.fixture
def cohort() -> Cohort:
    cohort = Cohort(["resnet8", "resnet14"], 6, head=ReidHead())
    with torch.no_grad():  # statistics that are not those of the start
        cohort.train()(torch.randn(32, 3, 16, 8, generator=torch.Generator().manual_seed(0)))
    return cohort.train()


@pytest.mark.parametrize("flip_test", [True, False])
def test_features_are_the_normalised_mean_of_an_image_and_its_mirror(cohort, market, flip_test):
    features = training.extract_features(
        cohort, market.query, (16, 8), flip_test=flip_test, amp="off", batch_size=4
    )
    assert all(m.training for m in cohort.modules())  # as it was
    cohort.eval()
    loader = TorchLoader(market.query, 15, train=False, size=(16, 8), workers=0)
    images, _ = loader.batch(0, 0)
    with torch.no_grad():
        for k, found in enumerate(features):
            expected = cohort.peers[k].embed(images)
            if flip_test:
                expected = (expected + cohort.peers[k].embed(images.flip(3))) / 2
            expected = expected / expected.norm(dim=1, keepdim=True)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


SCRIPT = """
import sys, warnings, torch, torch.distributed as dist
from fastdml.cohort import Cohort
from fastdml.data import Market1501
from fastdml.models import ReidHead
from fastdml.train import extract_features
warnings.simplefilter("ignore")
torch.set_num_threads(1)
rank, root, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
cohort = Cohort.load(folder)
found = extract_features(cohort, Market1501(root).query, (16, 8), amp="off", batch_size=4)
torch.save(found, f"{folder}/features{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_extract_a_share_each_and_get_all(cohort, market, market_root, tmp_path):
    """15 images: an uneven share."""
    cohort.save(tmp_path)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(market_root), str(tmp_path)],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in started:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    expected = training.extract_features(cohort, market.query, (16, 8), amp="off", batch_size=4)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"features{rank}.pt")
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


def test_scores_are_those_of_the_metrics(cohort, market, settings):
    """Each protocol, put together by hand from features."""
    evaluation = retrieval.Retrieval(market, settings(), CPU)
    scores, query, gallery = evaluation.all_scores(cohort.eval())
    amp = Amp(CPU, None, None)
    drawn = retrieval.Features(market.multi_query, (16, 8), CPU)(cohort, amp)
    asked = zip(market.query.ids, market.query.cameras, strict=True)
    names = [(f"{i:04d}", f"c{c}") for i, c in asked]
    marks = (market.query.ids, market.gallery.ids, market.query.cameras, market.gallery.cameras)
    for k in (0, 1):
        mean = []
        for identity, camera in names:
            of = [f"{identity}_{camera}s" in path for path in market.multi_query.paths]
            mean.append(drawn[k][torch.tensor(of)].mean(0))
        for protocol, features in (("single", query[k]), ("multi", torch.stack(mean))):
            expected = metrics.reid_scores(features, gallery[k], *marks)
            assert scores[protocol].mAP[k] == pytest.approx(expected.mAP)
            assert scores[protocol].rank5[k] == expected.cmc[4]
            assert scores[protocol].mINP[k] == pytest.approx(expected.mINP)
    d = metrics.k_reciprocal_rerank(query[0], gallery[0])
    expected = metrics.reid_scores(None, None, *marks, distances=d)
    assert scores["single_reranked"].mAP[0] == expected.mAP
    together = torch.cat(query, 1), torch.cat(gallery, 1)
    expected = metrics.reid_scores(*together, *marks)
    assert scores["single"].ensemble_mAP == pytest.approx(expected.mAP)


def test_without_gt_bbox_there_is_no_multi_query(run, market_root, tmp_path, capfd):
    shutil.copytree(market_root, tmp_path / "market", ignore=shutil.ignore_patterns("gt_bbox"))
    assert cli.main(["evaluate", str(run), "--data", str(tmp_path / "market")]) == 0
    out = capfd.readouterr().out
    assert "no multiple queries: the folder gt_bbox is not there" in out
    assert "multi " not in out


def test_a_reproduction_reads_multiple_queries_as_evaluate_does(run, market_root, tmp_path, capfd):
    """Of the phase that is asked for, from real files; kept, so that nothing is evaluated again."""
    folder = shutil.copytree(run, tmp_path / "run")
    without = tmp_path / "market"
    shutil.copytree(market_root, without, ignore=shutil.ignore_patterns("gt_bbox"))

    def read(root: Path, name: str) -> float:
        peers = Training("market", {"data": "market1501", "peers": SMALL["peers"]})
        return multi(name).read(Finished(peers, 0, folder, str(root), "cpu"), "independent")

    with pytest.raises(InputError, match="no gt_bbox, the images of multiple queries"):
        read(without, "mAP")
    found = [read(market_root, name) for name in ("mAP", "rank1")]
    capfd.readouterr()
    assert cli.main(["evaluate", str(folder / "independent"), "--no-rerank", "--json"]) == 0
    scores = json.loads(capfd.readouterr().out)["scores"]["multi"]
    assert found == pytest.approx([50 * sum(scores[name]) for name in ("mAP", "rank1")])
    assert read(tmp_path / "gone", "mAP") == found[0]


# --- data ---


def test_loaders_train_alike(settings, market, monkeypatch):
    """The same images, whichever loader made them."""
    for module in (reid, retrieval, make):  # DALI need not look at each file first
        monkeypatch.setattr(module, "checked", lambda split, bad_files: split)
    found = {}
    for loader in ("resident", "torch", "dali")[: 3 if make.has_dali() else 2]:
        config = settings(loader=loader)
        _, train, test, _ = reid.prepare(market, config, CPU)
        assert type(train).__name__.lower().startswith(loader)
        assert type(test.query.loader) is type(train)
        batch = next(iter(train.epoch(1)))
        assert isinstance(train.sampler, PKSampler)
        assert len(batch[1].unique()) == 4
        found[loader] = batch
    assert torch.equal(found["torch"][0], found["resident"][0])
    for images, labels in found.values():
        assert torch.equal(labels, found["resident"][1])
        assert images.shape == (16, 3, 16, 8)


@pytest.mark.usefixtures("_no_pictures")
def test_bad_files(settings, market_root, tmp_path, capfd):
    root = tmp_path / "market"
    shutil.copytree(market_root, root)
    bad = sorted((root / "bounding_box_train").iterdir())[3]
    bad.write_bytes(b"no picture")
    with pytest.raises(InputError, match=f"{bad.name}: not an image.*set bad_files to skip"):
        training.run(settings(root=root))
    assert not Path(settings().folder).exists()
    result = training.run(settings(root=root, bad_files="skip", epochs=1, subset=24))
    assert f"left out: 1 of 112 files are bad: {bad}" in capfd.readouterr().err
    assert result.scores.queries == 15


def test_a_subset_is_even(settings, market):
    train = reid.prepare(market, settings(subset=24), CPU).train
    assert train.n == 24
    assert torch.equal(torch.bincount(train.labels), torch.full((6,), 4))


def test_a_dry_run_writes_nothing(settings, tmp_path, capsys):
    assert training.run(settings(dry_run=True, **ALL_LOSSES)) is None
    out = capsys.readouterr().out
    assert "3 an epoch of 16 images, 2 epochs, 6 in all" in out
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_standin(cifar100_root, tmp_path, monkeypatch):
    """A root with real CIFAR-100, whose stand-in is a small one."""
    (tmp_path / "data").mkdir()
    for folder in cifar100_root.glob("cifar-100-*"):
        (tmp_path / "data" / folder.name).symlink_to(folder)
    small = StandIn(train_ids=8, test_ids=5, images=12, junk=3, distractors=5, train_images=16)
    monkeypatch.setattr(reid, "STANDIN", small)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def test_the_standin_is_built_below_root_and_kept(small_standin, capfd):
    options = [
        "--standin",
        "--peers",
        "resnet8",
        "--epochs",
        "2",
        "--batch-size",
        "16",
        "--no-tensorboard",
    ]
    assert cli.main(["train", "market1501", *options, "--dry-run"]) == 0
    assert not (small_standin / "market1501-standin").exists()
    assert not Path("runs").exists()
    assert cli.main(["train", "market1501", *options]) == 0
    out, err = capfd.readouterr()
    assert "run folder: runs/market1501-resnet8-001" in out
    assert "figures from a subset" not in err  # it does not claim to be the real set
    folder = small_standin / "market1501-standin" / "Market-1501-v15.09.15"
    assert len(list((folder / "bounding_box_train").iterdir())) == 8 * 16
    assert cli.main(["evaluate", "runs/market1501-resnet8-001", "--json"]) == 0
    scores = json.loads(capfd.readouterr().out)["scores"]
    assert scores["single"]["queries"] == scores["multi"]["queries"] == 30


@pytest.mark.slow
def test_the_standin_is_learnt(cifar100_root, tmp_path, monkeypatch):
    """The real one and its settings, for a part of their epochs: a network that has learnt nothing
    is at an mAP of 4 %, a random order at 2.5 %."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for folder in cifar100_root.glob("cifar-100-*"):
        (tmp_path / "data" / folder.name).symlink_to(folder)
    result = training.market1501(standin=True, epochs=2, independent=True, tensorboard=False)
    for scores in (result.scores, result.independent.scores):
        assert scores.queries == 240
        assert min(scores.mAP) > 0.055
        assert scores.ensemble_mAP > 0.06


# --- what is refused, in a line ---


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Trains from the command line, which must fail: exit 2, one line that matches, no files."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def check(root, options: str, *patterns: str) -> None:
        code = cli.main(["train", "market1501", "--root", str(root), *options.split()])
        out, err = capfd.readouterr()
        assert code == 2, err
        assert out == ""
        assert err.startswith("fastdml: error: ")
        assert err.count("\n") == 1, err
        for pattern in patterns:
            assert re.search(pattern, err), err
        assert list((tmp_path / "here").iterdir()) == []

    return check


@pytest.fixture
def copy(market_root, tmp_path):
    shutil.copytree(market_root, tmp_path / "copy")
    return tmp_path / "copy"


def test_wrong_layouts(refused, copy, tmp_path):
    refused("nowhere", "", "nowhere: no such folder", "holds Market-1501")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "", "holds no Market-1501", "no bounding_box_train", "no query")
    shutil.rmtree(copy / "query")
    refused(copy, "", "query missing from Market-1501")


def test_cameras_missing(refused, copy):
    picture = next((copy / "query").iterdir())
    picture.rename(picture.with_name("0101_000000.png"))
    refused(copy, "", r"0101_000000\.png", "identity and camera are unknown")


def test_one_camera(refused, copy):
    for folder in ("query", "bounding_box_test"):
        for picture in sorted((copy / folder).iterdir()):
            if "_c1s" not in picture.name:
                picture.unlink()
    refused(copy, "", "no query has a gallery image of its identity from another camera")


def test_peers_that_do_not_fit(refused, market_root, tmp_path, monkeypatch):
    (tmp_path / "own_backbones.py").write_text(
        "from torch import nn\n"
        "def flat(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 4, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    small = "--height 8 --width 4"
    refused(market_root, f"{small} --peers own_backbones:flat", "own_backbones:flat", "feature map")
    refused(market_root, f"{small} --peers mobilnet", "mobilnet", "mobilenet")
    refused(market_root, f"{small} --peers resnet8 --pretrained", "resnet8", "pretrained")


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ("--recipe weak", "recipe|weak"),
        ("--images-per-id 3", r"batch_size \(16\) must be a multiple of images_per_id \(3\)"),
        ("--images-per-id 1 --peers resnet8", "batches of 16 identities from 6"),
        ("--images-per-id 1 --triplet-weight 1", "triplet_weight needs two images"),
        ("--batch-size 512 --peers resnet8", "batch size 512 is larger than the 48"),
        ("--epochs 3 --iterations 7", r"epochs \(3\) and iterations \(7\) both say how long"),
        ("--recipe strong --epochs 3", "warmup_epochs"),
        ("--triplet-weight 1 --accumulate 2", "accumulate above 1 does not go with triplet_weight"),
        ("--download", "Market-1501 cannot be downloaded"),
        ("--ids-per-batch 3", "did you mean --images-per-id|unknown option"),
        ("--erasing 2", r"erasing must be within 0\.\.1"),
    ],
)
def test_wrong_settings(refused, market_root, options, pattern):
    if options == "--recipe weak":  # the parser lists the choices in a frame
        with pytest.raises(InputError, match="recipe must be one of paper, strong, not 'weak'"):
            training.market1501(root=market_root, recipe="weak")
        return
    refused(market_root, options, pattern)


def test_pictures_of_peers_whose_file_names_would_be_equal(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        metrics, "save_ranked_lists", lambda path, *rest, ties: drawn.append(path.name)
    )
    one = torch.zeros(1, dtype=torch.int64)
    split = ReidSplit([Path("0001_c1.jpg")], one, one)
    images = SimpleNamespace(source=split)
    both = SimpleNamespace(query=images, gallery=images)
    peers = ["models:net", "models_net", "ensemble"]
    features = [torch.eye(1, 4)] * len(peers)
    cohort = type("Peers", (), {"names": peers, "__len__": lambda self: len(peers)})()
    paths = retrieval.Retrieval.draw(both, cohort, features, features, 1, tmp_path)
    assert drawn == [path.name for path in paths]
    assert drawn == ["models_net-1.png", "models_net-2.png", "ensemble-1.png", "ensemble-2.png"]
