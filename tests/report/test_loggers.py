"""metrics.csv and Weights & Biases, across kills and resumes."""

from __future__ import annotations

import csv
import errno
import importlib.util
import json
import math
import os
import sys
from types import SimpleNamespace

import pytest

from fastdml import train
from fastdml.errors import InputError, MissingExtra
from fastdml.report import loggers
from fastdml.report.metrics_log import MetricsLog, read_metrics

NAMES = ["resnet20-1", "resnet20-2"]
TINY = {
    "peers": ["resnet8", "resnet8"], "subset": 32, "batch_size": 16, "schedule": "step",
    "threads": 1, "execution": "eager", "figures": (), "tensorboard": False,
}  # fmt: skip


def log_epochs(log: MetricsLog, epochs: range, *, evaluated=lambda epoch: True) -> None:
    for epoch in epochs:
        log.log("train", 4 * epoch - 2, epoch - 0.5, ce=[9.0, 9.0])
        log.log("epoch", 4 * epoch, epoch, ce=[3.0 / epoch, 4.0 / epoch], pairwise_kl=[[0, 1]] * 2)
        if evaluated(epoch):
            log.log("test", 4 * epoch, epoch, top1=[0.1 * epoch, 0.2], ensemble_top1=0.6)


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def timeless(rows):
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


class TestTable:
    def test_a_row_is_an_epoch_with_its_evaluation(self, tmp_path):
        with MetricsLog(tmp_path, NAMES, tensorboard=False, csv=True) as log:
            log_epochs(log, range(1, 3))
        first, second = table(tmp_path)
        assert list(first) == [
            "step", "epoch", "time", "epoch/ce/resnet20-1", "epoch/ce/resnet20-2",
            "test/top1/resnet20-1", "test/top1/resnet20-2", "test/ensemble_top1",
        ]  # fmt: skip
        assert [second[name] for name in list(second)[3:]] == ["1.5", "2.0", "0.2", "0.2", "0.6"]
        assert (second["step"], second["epoch"]) == ("8", "2")
        assert float(second["time"]) >= float(first["time"]) > 1.7e9

    def test_columns_keep_their_places_when_the_first_evaluation_comes_late(self, tmp_path):
        with MetricsLog(tmp_path, NAMES, tensorboard=False, csv=True) as log:
            log_epochs(log, range(1, 4), evaluated=lambda epoch: False)
            early = table(tmp_path)
            log_epochs(log, range(4, 7), evaluated=lambda epoch: epoch == 5)
        rows = table(tmp_path)
        assert list(rows[0])[: len(early[0])] == list(early[0])
        assert [row["step"] for row in rows] == ["4", "8", "12", "16", "20", "24"]
        assert [row["test/ensemble_top1"] for row in rows] == ["", "", "", "", "0.6", ""]
        assert [row["epoch/ce/resnet20-2"] for row in rows[:2]] == ["4.0", "2.0"]

    def test_a_row_is_on_disk_before_the_run_ends(self, tmp_path):
        log = MetricsLog(tmp_path, NAMES, tensorboard=False, csv=True)
        log_epochs(log, range(1, 3))
        assert len(table(tmp_path)) == 2
        log.close()

    def test_a_resumed_run_has_each_epoch_once(self, tmp_path):
        with MetricsLog(tmp_path / "whole", NAMES, tensorboard=False, csv=True) as log:
            log_epochs(log, range(1, 6))
        with MetricsLog(tmp_path / "cut", NAMES, tensorboard=False, csv=True) as log:
            log_epochs(log, range(1, 5))
        with (tmp_path / "cut" / "metrics.csv").open("a") as file:
            file.write("20,5,17")  # killed within a row
        resumed = MetricsLog(
            tmp_path / "cut", NAMES, resume_step=12, tensorboard=False, csv=True
        )  # the checkpoint is older than the last rows
        with resumed as log:
            log_epochs(log, range(4, 6))
        assert timeless(table(tmp_path / "cut")) == timeless(table(tmp_path / "whole"))

    def test_asked_for_on_resuming_it_has_the_epochs_before(self, tmp_path):
        with MetricsLog(tmp_path, NAMES, tensorboard=False) as log:
            log_epochs(log, range(1, 3))
        with MetricsLog(tmp_path, NAMES, resume_step=8, tensorboard=False, csv=True) as log:
            log_epochs(log, range(3, 4))
        assert [row["epoch"] for row in table(tmp_path)] == ["1", "2", "3"]

    def test_numbers_that_are_not_finite_are_empty(self, tmp_path):
        with MetricsLog(tmp_path, NAMES, tensorboard=False, csv=True) as log:
            log.log("epoch", 4, 1, ce=[math.nan, 1.0], lr=math.inf)
            log.log("epoch", 8, 2, ce=[1.0, math.nan], lr=0.1)
        first, second = table(tmp_path)
        assert (first["epoch/ce/resnet20-2"], first["epoch/ce/resnet20-1"], first["epoch/lr"]) == (
            "1.0", "", "",
        )  # fmt: skip
        assert second["epoch/ce/resnet20-2"] == ""

    def test_the_best_weights_have_columns_of_their_own(self, tmp_path):
        with MetricsLog(tmp_path, NAMES, tensorboard=False, csv=True) as log:
            log.log("epoch", 4, 1, lr=0.1)
            log.log("test", 4, 1, top1=[0.1, 0.2], weights="last")
            log.log("test", 4, 1, top1=[0.3, 0.4], weights="best")
        (row,) = table(tmp_path)
        assert (row["test/top1/resnet20-1"], row["test_best/top1/resnet20-1"]) == ("0.1", "0.3")

    def test_a_full_disk_costs_the_table_alone(self, tmp_path, monkeypatch, caplog):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with MetricsLog(tmp_path, NAMES, tensorboard=False, csv=True) as log:
            log_epochs(log, range(1, 2))
            monkeypatch.setattr(loggers.Table, "_lines", full)
            log_epochs(log, range(2, 4))
        told = "the rows of metrics.csv are no longer written (No space left on device)"
        assert [line.startswith(told) for line in caplog.messages] == [True]
        assert len([r for r in read_metrics(tmp_path) if r["kind"] == "epoch"]) == 3

    def test_a_run_writes_it(self, tmp_path):
        folder = tmp_path / "run"
        result = train.digits(**TINY, epochs=2, csv=True, folder=folder)
        assert [row["epoch"] for row in table(folder)] == ["1", "2"]
        losses = [float(row["epoch/loss/resnet8-2"]) for row in table(folder)]
        assert losses == [record["loss"][1] for record in result.history]
        assert float(table(folder)[-1]["test/ensemble_top1"]) == result.scores.ensemble_top1


class Client:
    """In place of the module wandb: notes what it is asked for."""

    def __init__(self):
        self.inits, self.logged, self.finished, self.fails = [], [], [], False
        self.Settings = dict

    def init(self, **arguments):
        self.inits.append(arguments)
        return SimpleNamespace(offline=False, url="URL", log=self.log, finish=self.finish)

    def log(self, values, step):
        if self.fails:
            raise RuntimeError("the service is gone")
        self.logged.append((step, values))

    def finish(self, exit_code):
        self.finished.append(exit_code)


@pytest.fixture
def client(monkeypatch):
    fake = Client()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # or it would stay set
    return fake


class TestWeightsAndBiases:
    def test_it_gets_every_number_at_its_step(self, client, tmp_path):
        with MetricsLog(tmp_path / "r", NAMES, tensorboard=False, wandb={"lr": 0.1}) as log:
            log_epochs(log, range(1, 2))
        (arguments,) = client.inits
        assert (arguments["project"], arguments["name"], arguments["config"]) == (
            "fastdml", "r", {"lr": 0.1},
        )  # fmt: skip
        assert [step for step, _ in client.logged] == [2, 4, 4]
        assert client.logged[-1][1] == {
            "test/epoch": 1, "test/top1/resnet20-1": 0.1, "test/top1/resnet20-2": 0.2,
            "test/ensemble_top1": 0.6,
        }  # fmt: skip
        assert client.finished == [0]

    def test_a_resumed_run_goes_on_there_and_logs_nothing_twice(self, client, tmp_path):
        options = {"tensorboard": False, "wandb": {}}
        with MetricsLog(tmp_path, NAMES, **options) as log:
            log_epochs(log, range(1, 4))
        with MetricsLog(tmp_path, NAMES, resume_step=4, **options) as log:
            log_epochs(log, range(2, 5))  # epochs 2 and 3 again
        first, second = (arguments["id"] for arguments in client.inits)
        assert first == second == (tmp_path / "wandb.id").read_text().strip()
        tests = [step for step, values in client.logged if "test/epoch" in values]
        assert tests == [4, 8, 12, 16]

    def test_asked_for_on_resuming_it_gets_what_was_before(self, client, tmp_path):
        with MetricsLog(tmp_path, NAMES, tensorboard=False) as log:
            log_epochs(log, range(1, 3))
        with MetricsLog(tmp_path, NAMES, resume_step=8, tensorboard=False, wandb={}) as log:
            log_epochs(log, range(3, 4))
        assert [s for s, values in client.logged if "epoch/epoch" in values] == [4, 8, 12]

    def test_the_independent_peers_are_a_run_of_the_same_group(self, client, tmp_path):
        for folder in (tmp_path / "r", tmp_path / "r" / "independent"):
            MetricsLog(folder, NAMES, tensorboard=False, wandb={}).close()
        assert [(a["group"], a["name"]) for a in client.inits] == [
            ("r", "r"), ("r", "r-independent"),
        ]  # fmt: skip

    def test_an_interrupted_run_is_told_as_one(self, client, tmp_path):
        log = MetricsLog(tmp_path, NAMES, tensorboard=False, wandb={})
        with pytest.raises(KeyboardInterrupt), log:
            raise KeyboardInterrupt
        assert client.finished == [1]

    def test_training_does_not_depend_on_it(self, client, tmp_path, caplog):
        with MetricsLog(tmp_path, NAMES, tensorboard=False, wandb={}) as log:
            log_epochs(log, range(1, 2))
            client.fails = True
            log_epochs(log, range(2, 4))
        (line,) = (m for m in caplog.messages if "no longer" in m)
        assert line.startswith(
            "log points for Weights & Biases are no longer written (RuntimeError: the service is "
            "gone"
        )
        assert len([r for r in read_metrics(tmp_path) if r["kind"] == "epoch"]) == 3

    def test_one_that_cannot_start_is_one_line(self, client, tmp_path, monkeypatch):
        def no_login(**_):
            raise ValueError("No API key configured.\nUse `wandb login`")

        monkeypatch.setattr(client, "init", no_login)
        with pytest.raises(InputError, match=r"cannot start .*API key.*WANDB_MODE=offline") as got:
            MetricsLog(tmp_path, NAMES, tensorboard=False, wandb={})
        assert "\n" not in str(got.value)

    def test_without_the_client_it_is_one_line_before_anything_is_written(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setitem(sys.modules, "wandb", None)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(MissingExtra, match=r"wandb is not installed: .*fastdml\[wandb\]"):
            train.digits(**TINY, epochs=1, wandb=True)
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
    def test_its_own_client_offline(self, tmp_path, monkeypatch):
        """Needs no login, and nothing leaves the machine."""
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        folder = tmp_path / "run"
        train.digits(**TINY, epochs=1, wandb=True, folder=folder)
        train.digits(resume=True, epochs=2, folder=folder)
        name = (folder / "wandb.id").read_text().strip()
        first, second = sorted((folder / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
        for file in (first, second):
            held = file.read_bytes()
            assert held.count(b"test/ensemble_top1") >= 1
            assert b"epoch/loss/resnet8-2" in held
        assert json.loads((folder / "summary.json").read_text())["mutual"]["epochs"] == 2
