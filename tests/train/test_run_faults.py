"""Runs meet damaged files, full disks, a stderr that is closed, and losses that are not finite."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import resource
import sys
from pathlib import Path

import pytest
from runs import CrashingLoader
from tiny_runs import (
    CLASSES,
    make_cohort,
    make_loaders,
)
from torch import nn

from fastdml import files
from fastdml.cohort import Cohort
from fastdml.errors import InputError
from fastdml.report import loggers
from fastdml.report.metrics_log import read_metrics
from fastdml.train import (
    TrainingDiverged,
    checkpoint,
    fit,
)

pytestmark = pytest.mark.usefixtures("_no_pictures")  # a test that wants them calls undo


class TestDamagedMetrics:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (b"", "does not begin with the peers' names"),
            (b"\x00\x00\x00\x00", "does not begin with the peers' names"),
            (b"[1]\n", "does not begin with the peers' names"),
            (b'{"kind": "peers", "step": 0, "names": "ab"}\n', "does not begin with"),
            (b'{"kind": "train"}\n', "does not begin with the peers' names"),
            (None, "line 2, is not a JSON object"),
            (b"\xff\xfe\n{}\n", "line 1, is not a JSON object"),
            (b"null\n", "line 2, is no log point of 2 peers"),
            (b'{"kind": "train"}\n', "line 2, is no log point of 2 peers"),
            (b'{"kind": "train", "step": 1, "epoch": 1, "ce": [1.0]}\n', "line 2, is no log point"),
            (b'{"kind": "train", "step": 1, "epoch": 1, "ce": [[1], [2]]}\n', "line 2, is no log"),
            (b'{"kind": "train", "step": 1, "epoch": 1, "ce": {}}\n', "line 2, is no log point"),
        ],
    )
    def test_is_found_before_training_goes_on(self, settings, text, said):
        config = settings(epochs=1)
        result = fit(make_cohort(), *make_loaders(), config)
        path = result.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        if text is None:
            path.write_bytes(lines[0] + lines[1].decode().encode("utf-16") + b"".join(lines[2:]))
        elif said.startswith("line 2"):
            path.write_bytes(lines[0] + text)
        else:
            path.write_bytes(text)
        stamp = (result.folder / "last.ckpt").stat().st_mtime_ns
        with pytest.raises(InputError, match=rf"metrics\.jsonl,? {said}") as error:
            fit(make_cohort(), *make_loaders(), config.replace(epochs=2, resume=True))
        assert "\n" not in str(error.value)
        assert (result.folder / "last.ckpt").stat().st_mtime_ns == stamp
        path.unlink()  # as the message advises
        longer = fit(make_cohort(), *make_loaders(), config.replace(epochs=2, resume=True))
        assert longer.history[-1]["epoch"] == 2

    @pytest.mark.parametrize("text", [b"", b"\xff\n{}\n", b"null\n"])
    def test_of_the_second_phase_are_looked_at_too(self, settings, text):
        config = settings(independent=True, epochs=1)
        folder = fit(make_cohort(), *make_loaders(), config).folder
        (folder / "independent" / "metrics.jsonl").write_bytes(text)
        stamp = (folder / "last.ckpt").stat().st_mtime_ns
        with pytest.raises(InputError, match=r"independent/metrics\.jsonl"):
            fit(make_cohort(), *make_loaders(), config.replace(epochs=2, resume=True))
        assert (folder / "last.ckpt").stat().st_mtime_ns == stamp

    @pytest.mark.parametrize("kind", ["pipe", "directory"])
    def test_that_are_no_file_are_found_too(self, settings, kind):
        result = fit(make_cohort(), *make_loaders(), settings(epochs=1))
        path = result.folder / "metrics.jsonl"
        path.unlink()
        path.mkdir() if kind == "directory" else os.mkfifo(path)
        with pytest.raises(InputError, match=r"metrics\.jsonl is not a file"):
            fit(make_cohort(), *make_loaders(), settings(epochs=2, resume=True))

    def test_log_lines_are_on_disk_before_the_checkpoint_that_counts_on_them(
        self, settings, monkeypatch
    ):
        order = []
        fsync, save = os.fsync, checkpoint.save

        def note_fsync(fd):
            order.append(Path(os.path.realpath(f"/proc/self/fd/{fd}")).name)
            fsync(fd)

        def note_save(path, state):
            if state["position"]:
                order.append(("save", len(read_metrics(path.parent))))
            save(path, state)

        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(checkpoint, "save", note_save)
        fit(make_cohort(), *make_loaders(), settings(epochs=2, log_every=1))
        saves = [i for i, what in enumerate(order) if isinstance(what, tuple)]
        assert [order[i][1] for i in saves] == [9, 17]  # peers; then 6 readings, epoch and test
        for i in saves:
            assert order[i - 1] == "metrics.jsonl"


class Failing:
    """`fastdml.files.create`, but files of some names cannot be written."""

    def __init__(self, name: str, error: int) -> None:
        self.name, self.error, self.create = name, error, files.create

    def __call__(self, path):
        if self.name in path.name:
            raise OSError(self.error, os.strerror(self.error))
        return self.create(path)


class TestNoRoom:
    @pytest.mark.parametrize(
        ("name", "error"),
        [
            ("curves.png", errno.ENOSPC),
            ("pairwise_kl.png", errno.EDQUOT),
            ("summary.json", errno.ENOSPC),
            ("summary.json", errno.EIO),
            ("predictions.npz", errno.ENOSPC),
        ],
    )
    def test_at_the_end_is_one_line_and_the_rest_is_done_by_resuming(
        self, settings, monkeypatch, name, error
    ):
        monkeypatch.undo()
        with monkeypatch.context() as patch:
            patch.setattr(files, "create", Failing(name, error))
            with pytest.raises(
                InputError,
                match=rf"cannot write .*{name}: {os.strerror(error)}.*the peers are trained and "
                r"saved, resume does the rest$",
            ):
                fit(make_cohort(), *make_loaders(), settings(epochs=1))
        folder = Path(settings().folder)
        assert not (folder / name).exists()
        assert not [*folder.glob(".*.partial")]
        fit(make_cohort(), *make_loaders(), settings(epochs=1, resume=True))
        assert (folder / name).stat().st_size > 0

    def test_for_the_first_of_tensorboards_files_is_one_line(self, settings, monkeypatch):
        monkeypatch.setattr(loggers, "create", Failing("tfevents", errno.ENOSPC))
        with pytest.raises(InputError, match=r"cannot write .*tensorboard: No space left"):
            fit(make_cohort(), *make_loaders(), settings(tensorboard=True))

    @pytest.mark.parametrize("at", [1, 5, 100])
    def test_for_tensorboard_costs_its_events_alone(self, settings, monkeypatch, capfd, at):
        write, count = loggers.Events._write, iter(range(1000))

        def fail(events, event):
            if next(count) == at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(events, event)

        with monkeypatch.context() as patch:
            patch.setattr(loggers.Events, "_write", fail)
            result = fit(make_cohort(), *make_loaders(), settings(tensorboard=True))
        lines = [x for x in capfd.readouterr().err.splitlines() if "TensorBoard" in x]
        told = "TensorBoard's events are no longer written (No space left on device)"
        assert [line.startswith(told) for line in lines] == [True] * (at < 100)
        assert [r["epoch"] for r in read_metrics(result.folder) if r["kind"] == "test"] == [1, 2, 3]
        fit(make_cohort(), *make_loaders(), settings(tensorboard=True, resume=True))
        (events,) = (result.folder / "tensorboard").iterdir()
        assert events.stat().st_size > 1000

    def test_for_a_line_of_the_log_is_one_line(self, settings):
        train, test = make_loaders()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        path = Path(settings().folder) / "metrics.jsonl"

        def fill():
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))

        try:
            with pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl: File too large"):
                fit(make_cohort(), CrashingLoader(train, 8, fill), test, settings())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        fit(make_cohort(), train, test, settings(resume=True))
        assert [r["epoch"] for r in read_metrics(path.parent) if r["kind"] == "test"] == [1, 2, 3]


class TestStderr:
    @pytest.mark.parametrize("kind", ["closed", "none", "full", "no reader"])
    def test_that_cannot_be_written_to_stops_nothing(self, settings, monkeypatch, kind):
        reader, writer = os.pipe()
        os.close(reader)
        place = {"full": "/dev/full", "no reader": writer}.get(kind, os.devnull)
        with contextlib.suppress(OSError), open(place, "w", 1) as stream:
            if kind == "closed":
                stream.close()
            monkeypatch.setattr(sys, "stderr", None if kind == "none" else stream)
            before = sys.stderr
            result = fit(make_cohort(), *make_loaders(), settings(progress=True))
            assert sys.stderr is before
        assert result.history[-1]["epoch"] == 3
        if kind != "no reader":
            os.close(writer)

    def test_gets_its_line_after_the_checkpoint_of_the_epoch(self, settings, monkeypatch):
        positions = []

        class Stream(io.StringIO):
            def write(self, text):
                if "epoch" in text:
                    state = checkpoint.load(Path(settings().folder) / "last.ckpt")
                    positions.append(state["position"])
                return len(text)

        monkeypatch.setattr(sys, "stderr", Stream())
        fit(make_cohort(), *make_loaders(), settings(log_every=0, save_every_minutes=0))
        assert positions == [6, 12, 18]


class Bomb(nn.Module):
    """A peer whose logits turn bad at one of its forward passes in training."""

    def __init__(self, peer: nn.Module, at: int, value: float = math.nan) -> None:
        super().__init__()
        self.peer, self.at, self.value = peer, at, value
        self.num_classes = CLASSES
        self.passes = 0

    def forward(self, x):
        z = self.peer(x)
        if self.training:
            self.passes += 1
            if self.passes == self.at:
                z = z * self.value
        return z


class TestDivergence:
    @pytest.mark.parametrize("log_every", [0, 1, 4])
    def test_stops_with_peer_step_and_loss_and_keeps_the_checkpoint(self, settings, log_every):
        peers = list(make_cohort(widths=(4, 5, 6)).peers)
        cohort = Cohort([peers[0], Bomb(peers[1], at=9), peers[2]], CLASSES)
        config = settings(log_every=log_every, save_every_steps=1 if log_every == 1 else 0)
        with pytest.raises(TrainingDiverged) as stopped:
            fit(cohort, *make_loaders(), config)
        message = str(stopped.value)
        assert "at step 9 (epoch 2) the cross-entropy of peer 1 (Bomb) is not finite" in message
        assert "last.ckpt, from before it, is kept" in message
        assert "\n" not in message
        state = checkpoint.load(Path(config.folder) / "last.ckpt")
        assert state["position"] == (8 if log_every == 1 else 6)
        for value in state["cohort"].values():
            assert value.isfinite().all()

    def test_in_the_first_epoch_the_start_is_kept(self, settings):
        peers = list(make_cohort().peers)
        cohort = Cohort([Bomb(peers[0], at=2, value=math.inf), peers[1]], CLASSES)
        with pytest.raises(TrainingDiverged, match=r"step 2 \(epoch 1\).*from before it, is kept"):
            fit(cohort, *make_loaders(), settings())
        assert checkpoint.load(Path(settings().folder) / "last.ckpt")["position"] == 0

    def test_weights_gone_bad_in_the_last_update_are_not_saved(self, settings):
        cohort = make_cohort()
        train, _ = make_loaders()

        def spoil():
            cohort.peers[1].head.bias.register_hook(lambda g: g * math.nan)

        with pytest.raises(TrainingDiverged, match=r"step 12 \(epoch 2\) a weight of peer 1"):
            fit(cohort, CrashingLoader(train, 11, spoil), None, settings())
        state = checkpoint.load(Path(settings().folder) / "last.ckpt")
        assert state["position"] == 6


@pytest.mark.parametrize("peers", [(0,), (0, 1)])
def test_overflow_in_fp16_holds_the_schedule_back_where_no_peer_is_updated(settings, peers):
    """A peer that overflows alone skips its own update; the other and the schedule go on."""
    cohort = make_cohort()
    train, test = make_loaders()

    def overflow_in(steps):
        count = iter(range(1000))
        return lambda g: g * math.inf if next(count) in steps else g

    for k in peers:
        cohort.peers[k].head.bias.register_hook(overflow_in((1, 2, 3)))
    config = settings(amp="fp16", epochs=2, warmup_epochs=2, lr=0.12)
    result = fit(cohort, train, test, config)
    held = 3 if len(peers) == 2 else 0
    assert result.skipped_steps == held
    assert [r["skipped_steps"] for r in result.history] == [held, held]
    assert result.history[-1]["skipped_updates"] == [3, 3 if len(peers) == 2 else 0]
    # 12 steps of warm-up; where 3 were held back, the rate of the ninth
    assert result.history[-1]["lr"] == pytest.approx(0.12 * (12 - held) / 12)
    assert all(w.isfinite().all() for w in cohort.parameters())
