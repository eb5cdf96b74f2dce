"""The command where its streams, its loading processes, its signals or its disk fail."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from recovery import SETTINGS, outcome

from fastdml.train import checkpoint

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which is absent")
PEERS = ["train", "digits", "--peers", "resnet8", "--subset", "128", "--batch-size", "32"]
PLAIN = ["--device", "cpu", "--execution", "eager", "--amp", "off", "--no-tensorboard"]
TRAIN = [*PEERS, *PLAIN, "--epochs", "2", "--folder", "run"]


def epochs(folder: Path) -> list[int]:
    """Those that the log of a run has whole."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r["epoch"] for r in map(json.loads, lines) if r["kind"] == "epoch"]


class TestStreams:
    @pytest.mark.parametrize(
        ("streams", "code"),
        [
            ({1: "closed"}, 0),
            ({2: "closed"}, 0),
            ({0: "closed", 1: "closed", 2: "closed"}, 0),
            ({2: "full"}, 0),
            ({2: "gone"}, 0),
            ({1: "full"}, 1),
            ({1: "full", 2: "full"}, 1),
            ({1: "gone"}, 141),
            ({1: "gone", 2: "gone"}, 141),
        ],
        ids=str,
    )
    def test_that_fail_do_not_end_training(self, warm, tmp_path, streams, code):
        request = {"streams": streams, "arguments": TRAIN}
        ended = warm.run("jobs.with_streams", request, tmp_path / "log")
        assert ended.code == code, ended.output
        assert "Traceback" not in ended.output
        assert epochs(tmp_path / "run") == [1, 2]
        assert (tmp_path / "run" / "summary.json").stat().st_size > 0
        assert checkpoint.load(tmp_path / "run" / "last.ckpt")["position"] == 8
        if streams == {1: "full"}:
            last = ended.output.splitlines()[-1]
            assert last == "fastdml: error: cannot write the output: No space left on device"

    @pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["evaluate", "--help"]])
    def test_that_are_full_are_said_by_every_command(self, warm, tmp_path, arguments):
        request = {"streams": {1: "full"}, "arguments": arguments}
        ended = warm.run("jobs.with_streams", request, tmp_path / "log")
        assert ended.code == 1
        assert ended.output == "fastdml: error: cannot write the output: No space left on device\n"

    def test_that_are_closed_hide_no_mistake(self, warm, tmp_path):
        for arguments in (["train", "digits", "--lr", "-1"], ["train", "nothing"]):
            request = {"streams": {1: "closed"}, "arguments": arguments}
            ended = warm.run("jobs.with_streams", request, tmp_path / "log")
            assert (ended.code, ended.output.count("\n")) == (2, 1)


@pytest.fixture(scope="module")
def whole(warm, tmp_path_factory):
    """What a run leaves whose loading processes live."""
    folder = tmp_path_factory.mktemp("whole")
    train = [*TRAIN, "--loader", "torch"]
    ended = warm.run("command_without_pictures", train, folder / "log")
    assert ended.code == 0, ended.output
    return outcome(folder / "run")


class TestDeadWorkers:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS])
    def test_are_one_line_and_the_run_goes_on(self, warm, tmp_path, whole, number):
        train = [*TRAIN, "--loader", "torch"]
        request = {"arguments": train, "number": number, "after": 6}
        ended = warm.run("jobs.with_dead_workers", request, tmp_path / "log")
        assert ended.code == 2, ended.output
        _, _, first, *others, last = ended.output.replace("\0", "").splitlines()
        assert "epoch 1/2" in first
        assert all(line.startswith("ERROR: Unexpected") for line in others)  # torch's own
        assert last.startswith("fastdml: error: a process that loads images has died (")
        assert last.endswith("training goes on with resume")
        ended = warm.run("command_without_pictures", [*train, "--resume"], tmp_path / "log")
        assert ended.code == 0, ended.output
        assert outcome(tmp_path / "run") == whole

    def test_in_mid_save_are_not_taken_for_a_full_disk(self, warm, tmp_path):
        """Torch raises the error from its handler of SIGCHLD, wherever the process is."""
        train = [*TRAIN, "--loader", "torch", "--save-every-steps", "1"]
        request = {"arguments": train, "save": 2, "at": {3: ["worker"]}}
        ended = warm.run("jobs.interrupted_saving", request, tmp_path / "log")
        assert ended.code == 2, ended.output
        assert "a process that loads images has died" in ended.output.splitlines()[-1]
        assert "cannot write" not in ended.output
        assert "Traceback" not in ended.output
        assert checkpoint.load(tmp_path / "run" / "last.ckpt")["position"] == 1


class TestSecondSignal:
    @pytest.mark.parametrize("at", [1, 3, 20])
    @pytest.mark.parametrize(
        ("numbers", "code"),
        [
            ([signal.SIGINT, signal.SIGINT], 130),
            ([signal.SIGTERM, signal.SIGINT], 130),
            ([signal.SIGINT, signal.SIGTERM], -signal.SIGTERM),
        ],
    )
    def test_in_mid_save_ends_at_once_and_keeps_the_checkpoint(
        self, warm, tmp_path, at, numbers, code
    ):
        train = [*TRAIN, "--save-every-steps", "1"]
        request = {"arguments": train, "save": 2, "at": {at: numbers}}
        ended = warm.run("jobs.interrupted_saving", request, tmp_path / "log")
        assert ended.code == code, ended.output
        told = [line for line in ended.output.splitlines() if line.startswith("fastdml:")]
        assert told == ["fastdml: interrupted"] * (code > 0)
        assert "Traceback" not in ended.output
        assert checkpoint.load(tmp_path / "run" / "last.ckpt")["position"] == 1

    def test_one_alone_finishes_the_save(self, warm, tmp_path):
        train = [*TRAIN, "--save-every-steps", "1"]
        request = {"arguments": train, "save": 2, "at": {3: [signal.SIGINT]}}
        ended = warm.run("jobs.interrupted_saving", request, tmp_path / "log")
        assert ended.code == 130
        assert "stopped by SIGINT in epoch 1, after 2 of 4 steps; saved to" in ended.output
        assert checkpoint.load(tmp_path / "run" / "last.ckpt")["position"] == 2


@pytest.mark.parametrize("limit", [500, 20_000, 700_000])
def test_a_disk_that_fills_up_is_one_line_at_any_point(warm, tmp_path, limit):
    request = {"arguments": [*SETTINGS, "--folder", "run"], "limit": limit}
    ended = warm.run("jobs.with_small_files", request, tmp_path / "log")
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output
    assert "File too large" in ended.output.splitlines()[-1]
    assert not [*tmp_path.rglob("*.partial")]


LONG = [
    ["train", "digits", "--folder", "x" * 300],
    ["train", "digits", "--folder", "/".join(["x" * 100] * 41)],
    ["train", "digits", "--folder", "/".join(["x" * 100] * 40)],  # its files would be too long
    ["train", "digits", "--folder", "x" * 300, "--resume"],
    ["train", "digits", "--folder", "x" * 300, "--dry-run"],
    ["train", "digits", "--config", "x" * 300],
    ["train", "cifar10", "--root", "x" * 300],
    ["train", "market1501", "--root", "x" * 300],
    ["evaluate", "x" * 300],
    ["export", "x" * 5000],
]


@pytest.mark.parametrize("arguments", LONG, ids=lambda a: " ".join(a)[:40])
def test_a_path_that_is_too_long_is_one_line(warm, tmp_path, arguments):
    ended = warm.run("command", arguments, tmp_path / "log")
    assert ended.code == 2
    assert ended.output.startswith("fastdml: error: ")
    assert ended.output.count("\n") == 1
    assert "File name too long" in ended.output
    assert [p.name for p in tmp_path.iterdir()] == ["log"]
