"""What a run's steps run as: measured at its start, kept to its end, said, recorded."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone

import pytest
import torch
from runs import Crash, CrashingLoader, logged, same_weights
from torch import nn

from fastdml import Cohort, cli
from fastdml import train as training
from fastdml.data import ResidentLoader, load
from fastdml.engine import cpus, rehearsal
from fastdml.train import TrainConfig, checkpoint, fit
from fastdml.units import duration

pytestmark = [
    pytest.mark.usefixtures("_no_pictures"),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]
C = 10


class Peer(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.num_classes = C
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, C)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def loaders():
    pytest.importorskip("sklearn")
    train, test = load("digits")
    return (
        ResidentLoader(train.subset(160, 0), 32, train=True, pad=1, flip=False),
        ResidentLoader(test.subset(60, 0), 30, train=False),
    )


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two cores, of which the user has said nothing."""
    monkeypatch.setattr(cpus.host, "cpus", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def make(**changes) -> TrainConfig:
        values = {
            "data": "digits", "folder": str(tmp_path / "run"), "batch_size": 32, "epochs": 2,
            "amp": "off", "device": "cpu", "tensorboard": False,
        }  # fmt: skip
        return TrainConfig(**{**values, **changes})

    with cpus.threads(2):
        yield make
        assert torch.get_num_threads() == 2  # the caller's again


class Fails(CrashingLoader):
    """Before a step that is counted through both phases."""

    def epoch(self, epoch, start=0):
        if self.asked == 3:  # a look at the peers, two epochs
            self.at -= 10
        yield from super().epoch(epoch, start)


def make_cohort(seen: list | None = None) -> Cohort:
    """seen: where the peers, not copies of them, note whether they learn, on how many threads."""
    own = set()

    class Noting(Peer):
        def forward(self, x):
            if id(self) in own:
                seen.append((self.training, torch.get_num_threads()))
            return super().forward(x)

    peers = [Noting(1), Noting(2)]
    if seen is not None:
        own.update(map(id, peers))
    return Cohort(peers, C)


@pytest.mark.parametrize(
    ("execution", "threads", "inside", "elsewhere"),
    [("eager", 1, 1, 1), ("stacked", 2, 2, 1), ("threads", 2, 1, 1)],
)
def test_a_choice_is_for_the_whole_run(
    config, loaders, take, execution, threads, inside, elsewhere
):
    """Its independent phase and its evaluations; the caller's number is back in the end."""
    asked = take(execution, threads)
    seen: list = []
    cohort = make_cohort(seen)
    result = fit(cohort, *loaders, config(independent=True))
    assert len(asked) == 2  # what steps run as, and what else does: once
    if execution == "stacked":  # whose steps run another network
        assert seen[-16:] == [(False, elsewhere)] * 16  # evaluations of two peers
    else:
        chosen = next(i for i, (learns, _) in enumerate(seen) if learns)
        assert set(seen[chosen:]) == {(True, inside), (False, elsewhere)}
    for run in (result, result.independent):
        assert (run.execution, run.threads) == (execution, threads)
        state = checkpoint.load(run.folder / "last.ckpt")
        assert state["execution"] == execution
        assert state["threads"] == {"step": threads, "elsewhere": elsewhere}
        summary = json.loads((run.folder / "summary.json").read_text())
        assert (summary["execution"], summary["threads"]) == (execution, threads)


@pytest.mark.parametrize(
    ("execution", "threads", "at"), [("threads", 2, 3), ("stacked", 1, 7), ("eager", 2, 13)]
)
def test_a_resumed_run_takes_what_it_began_with(
    config, loaders, take, tmp_path, execution, threads, at
):
    """Bit for bit, whatever would be measured now; in either phase."""
    take(execution, threads)
    settings = {"independent": True, "save_every_steps": 1}
    whole = fit(make_cohort(), *loaders, config(folder=str(tmp_path / "whole"), **settings))
    with pytest.raises(Crash):
        fit(make_cohort(), Fails(loaders[0], at), loaders[1], config(**settings))
    asked = take("eager", 1)
    resumed = fit(make_cohort(), *loaders, config(resume=True, **settings))
    assert asked == []  # nothing is measured again
    for a, b in ((whole, resumed), (whole.independent, resumed.independent)):
        assert (b.execution, b.threads) == (execution, threads)
        assert logged(a.folder) == logged(b.folder)
        assert same_weights(*(Cohort.load(r.folder, peers=[*make_cohort().peers]) for r in (a, b)))


def test_settings_win_over_what_was_chosen(config, loaders, take):
    take("threads", 2)
    with pytest.raises(Crash):
        fit(make_cohort(), CrashingLoader(loaders[0], 7), loaders[1], config(save_every_steps=1))
    resumed = fit(make_cohort(), *loaders, config(resume=True, execution="eager", threads=1))
    assert (resumed.execution, resumed.threads) == ("eager", 1)


def test_checkpoints_without_threads_go_on_with_torchs(config, loaders, take):
    take("eager", 1)
    with pytest.raises(Crash):
        fit(make_cohort(), CrashingLoader(loaders[0], 7), loaders[1], config(save_every_steps=1))
    path = config().folder + "/last.ckpt"
    state = torch.load(path, weights_only=True)
    del state["threads"], state["config"]["threads"]
    torch.save(state, path)
    resumed = fit(make_cohort(), *loaders, config(resume=True))
    assert (resumed.execution, resumed.threads) == ("eager", 2)


def test_a_run_begun_on_cuda_measures_threads_here(config, loaders, take):
    with pytest.raises(Crash):
        fit(
            make_cohort(),
            CrashingLoader(loaders[0], 7),
            loaders[1],
            config(save_every_steps=1, execution="eager", threads=1),
        )
    path = config().folder + "/last.ckpt"
    state = torch.load(path, weights_only=True)
    state["threads"] = {"step": None, "elsewhere": None}
    torch.save(state, path)
    asked = take("eager", 2)
    resumed = fit(make_cohort(), *loaders, config(resume=True, execution="eager", threads=0))
    assert (resumed.execution, resumed.threads) == ("eager", 2)
    assert asked


@pytest.mark.parametrize(
    ("settings", "environment", "threads"),
    [({"threads": 1}, None, 1), ({"threads": 2}, "1", 2), ({}, "1", 1)],
)
def test_what_the_user_asks_for(
    config, loaders, monkeypatch, capsys, settings, environment, threads
):
    """Executions alone are measured then."""
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
        torch.set_num_threads(int(environment))
    seen: list = []
    result = fit(make_cohort(seen), *loaders, config(**settings))
    assert result.threads == threads
    assert {n for learns, n in seen if not learns} == {threads}
    line = next(s for s in capsys.readouterr().err.splitlines() if s.startswith("execution"))
    assert f"eager on {threads} " in line
    assert f" on {3 - threads}" not in line
    torch.set_num_threads(2)


def test_a_quota_holds_for_what_is_not_measured(config, loaders, monkeypatch, tmp_path, capsys):
    """For the look at the peers before a run, and for the command that evaluates."""
    monkeypatch.setattr(cpus.host, "cpus", lambda: 1)
    seen: list = []
    result = fit(make_cohort(seen), *loaders, config())
    assert {n for _, n in seen} == {1} == {result.threads}
    run = training.digits(
        ["resnet8"], epochs=1, subset=128, tensorboard=False, folder=str(tmp_path / "digits")
    )
    capsys.readouterr()
    assert cli.main(["evaluate", str(run.folder)]) == 0
    assert ", 1 thread\n" in capsys.readouterr().out
    torch.set_num_threads(2)


def test_deterministic_runs_measure_nothing(config, loaders, monkeypatch, tmp_path):
    monkeypatch.setattr(rehearsal.Rehearsal, "run", None)
    cohorts = [make_cohort() for _ in range(2)]
    for cohort, name in zip(cohorts, "ab", strict=True):
        result = fit(cohort, *loaders, config(deterministic=True, folder=str(tmp_path / name)))
        assert (result.execution, result.threads) == ("threads", 2)
    assert same_weights(*cohorts)
    assert logged(tmp_path / "a") == logged(tmp_path / "b")


def test_the_line_at_the_start(config, loaders, take, capsys):
    """Before the first epoch's, with what was measured once in front; then the time left."""
    take("threads", 2)
    fit(make_cohort(), *loaders, config(independent=True))
    chosen, start, first, last, second, *_ = capsys.readouterr().err.splitlines()
    assert chosen.startswith("execution: threads, 2 threads (ms a step: eager on 1 ")
    each = r"[\d.,]+ ms \(\d+ %\)"
    pattern = (
        r"mutual: .+, 2 threads, fp32, execution threads, 10 steps, folder (\S+), about [\d.,]+ s; "
        rf"each peer alone: Noting-1 {each}, Noting-2 {each}"
    )
    assert re.fullmatch(pattern, start)[1] == config().folder
    assert re.search(r"^mutual epoch 1/2 .*  [\d.]+ s left$", first)
    assert re.search(r"^mutual epoch 2/2 .*(/s|%|\d)$", last)
    assert "left" not in last
    assert second.startswith("independent: ")
    assert second.endswith(f"folder {config().folder}/independent")


def test_the_bar_says_the_time_left_and_what_each_peer_costs(config, loaders, take, capsys):
    take("threads", 2)
    fit(make_cohort(), *loaders, config(progress=True))
    bars = re.findall(r"mutual: +\d+%[^\r\n]*", capsys.readouterr().err)
    loss, share = r"\d+\.\d{3}", r"\d+"
    shown = rf"\d+%.* \[[\d:]+<[\d:?]+, .+, loss {loss} {loss}, cost {share} {share} %\]"
    assert re.search(shown, bars[-1]), bars[-1]


def test_a_dry_run_chooses_and_says_so(config, loaders, take, capsys):
    take("threads", 2)
    assert fit(make_cohort(), *loaders, config(dry_run=True)) is None
    out, err = capsys.readouterr()
    assert re.search(r"^device +.+, 2 threads, fp32, ", out, re.MULTILINE)
    assert re.search(r"^execution +threads$", out, re.MULTILINE)
    assert "ms a step" in err


def test_the_summary_says_when_and_by_what(tmp_path, monkeypatch, loaders, config):
    monkeypatch.chdir(tmp_path)
    before = datetime.now(timezone.utc).replace(microsecond=0)
    command = ["train", "digits", "--peers", "resnet8", "--epochs", "1", "--subset", "128",
               "--no-tensorboard", "--threads", "1", "--folder", "a run"]  # fmt: skip
    assert cli.main(command) == 0
    small = {"epochs": 1, "subset": 128, "tensorboard": False, "threads": 1, "peers": ["resnet8"]}
    training.digits(folder="b", **small)
    fit(make_cohort(), *loaders, config(folder="c", epochs=1))
    expected = {
        "a run": "fastdml train digits --peers resnet8 --epochs 1 --subset 128 --no-tensorboard "
        "--threads 1 --folder 'a run'",
        "b": "fastdml.train.run",
        "c": "fastdml.train.fit",
    }
    for folder, said in expected.items():
        summary = json.loads((tmp_path / folder / "summary.json").read_text())
        assert summary["command"] == said
        when = datetime.fromisoformat(summary["date"])
        assert when.utcoffset().total_seconds() == 0
        assert before <= when <= datetime.now(timezone.utc)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (89, "89 s"), (90, "1.5 min"),
     (5300, "88 min"), (5400, "1.5 h"), (129_000, "36 h"), (129_600, "1.5 days"),
     (10**8, "1,157 days")],
)  # fmt: skip
def test_durations(seconds, said):
    assert duration(seconds) == said
