"""What the ranks of a run do together: stop, save, refuse, call back, and say."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from mesh_runs import cohort
from ranks import run_ranks
from whole_runs import EPOCHS, QUIET, arrays, assert_same, logged, quick, settings, trained

from fastdml.errors import InputError
from fastdml.parallel import RemotePeer, make_mesh
from fastdml.report.html.run_page import run_page
from fastdml.report.run_files import read_run
from fastdml.train import (
    Callback,
    TrainingDiverged,
    TrainingStopped,
    checkpoint,
    checks,
    digits,
    fit,
    load_config,
)
from fastdml.train import ranks as ranks_module
from fastdml.train import trainer as trainer_module
from fastdml.train.sharding import SeenBatches
from fastdml.train.tasks.classification import SCORING


class Signalled(SeenBatches):
    """Sends this process a signal after so many steps."""

    number, after = 0, 0

    def add(self, *batch: torch.Tensor) -> None:
        super().add(*batch)
        Signalled.after -= 1
        if Signalled.after == 0:
            os.kill(os.getpid(), Signalled.number)


def signalled(rank: int, number: int, after: int, *arguments: Any, **changes: Any) -> Any:
    """A run of which one rank gets a signal; its result, or how it was stopped."""
    Signalled.number, Signalled.after = number, after if rank else -1
    trainer_module.SeenBatches = Signalled
    try:
        return trained(*arguments, **changes)
    except TrainingStopped as stop:
        return stop.code, str(stop)
    finally:
        trainer_module.SeenBatches = SeenBatches


class Watcher(Callback):
    """Says whom peers learn from, and stops the training after the second epoch."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def on_epoch_start(self, event):
        self.called.append("start")
        if event.epoch == 1:
            event.set_peer_weights([[0.0, 2.0], [0.5, 0.0]])

    def on_epoch(self, event):
        self.called.append("epoch")
        return "enough" if event.epoch == 2 else None

    def on_end(self, event):
        self.called.append(f"end: {event.stopped}")


def refusal(mesh: Any, folder: Path, data: Any, **changes: Any) -> str:
    quick()
    try:
        fit(cohort(2), data, None, settings("", folder, **changes), mesh=mesh)
    except InputError as error:
        return str(error)
    return "nothing"


def diverging(mesh: Any, folder: Path) -> tuple[str, Any]:
    """The peer of rank 1 has a weight that is not finite from its seventh step on."""
    quick()
    peers = cohort(2)

    def spoil(module: torch.nn.Module, _: Any) -> None:
        if module.training and torch.is_grad_enabled():
            module.steps += 1
            if module.steps == 7:
                with torch.no_grad():
                    module[-1].bias.fill_(float("nan"))

    for peer in peers:
        peer.steps = 0
    peers.peers[1].register_forward_pre_hook(spoil)
    config = settings("", folder, log_every=6)
    try:
        fit(peers, arrays(), None, config, mesh=mesh)
    except TrainingDiverged as error:
        return str(error), [type(peer) is RemotePeer for peer in peers]
    return "nothing", None


def by_the_clock(folder: Path) -> tuple[list[int], Any]:
    """A run that saves as soon as its lead's clock says so, and the steps at which it did."""
    saved, save = [], trainer_module.Trainer.save

    def noted(trainer: Any) -> None:
        saved.append(trainer.progress.position)
        save(trainer)

    trainer_module.Trainer.save = noted
    try:
        values = {"save_every_minutes": 1e-9, "keep_checkpoints": 1, "epochs": EPOCHS}
        return saved, trained("peer=2", folder, **values)
    finally:
        trainer_module.Trainer.save = save


def together(folder: str) -> dict[str, Any]:
    mesh = make_mesh(peer=2, timeout=30)
    top, found = Path(folder), {}
    kept = {"save_every_minutes": 0.0, "keep_checkpoints": 9, "epochs": EPOCHS}
    found["whole"] = trained("peer=2", top / "whole", **kept)
    saved = mesh.rank, signal.SIGUSR1, 8, "peer=2", top / "saved"
    found["saved"] = signalled(*saved, **kept)
    stopped = mesh.rank, signal.SIGTERM, 8, "peer=2", top / "stopped"
    found["stopped"] = signalled(*stopped, **kept)
    found["resumed"] = trained("peer=2", top / "stopped", resume=True, **kept)
    found["clock"] = by_the_clock(top / "clock")
    half = {"amp": "fp16", "dtype": torch.float32, "epochs": 3}
    found["fp16"] = trained("peer=2", top / "fp16", **half)
    stopped = mesh.rank, signal.SIGTERM, 8, "peer=2", top / "fp16 stopped"
    found["fp16, stopped"] = signalled(*stopped, **half)
    found["fp16, resumed"] = trained("peer=2", top / "fp16 stopped", resume=True, **half)
    watcher = Watcher()
    found["watched"] = trained("peer=2", top / "watched", callbacks=[watcher])
    found["called"] = watcher.called
    found["diverged"] = diverging(mesh, top / "diverged")
    of_rank = mesh.rank + 1
    found["settings"] = refusal(mesh, top / "no", arrays(), lr=0.1 * of_rank)
    found["data"] = refusal(mesh, top / "no", arrays(seed=of_rank))
    found["cache"] = refusal(mesh, top / "no", arrays(), cache_teachers=True)
    found["dry"] = refusal(mesh, top / "no", arrays(), dry_run=True)
    found["folder"] = refusal(mesh, top / "whole", arrays())
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return run_ranks(2, together, str(folder)), folder


def steps_saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_signal_to_any_rank_saves_at_one_step_and_goes_on(runs):
    (first, second), folder = runs
    assert_same(first["saved"], first["whole"])
    more = set(steps_saved(folder / "saved")) - set(steps_saved(folder / "whole"))
    assert more == {"step-00000010"}  # two steps after the signal to rank 1
    assert second["saved"].result.scores == first["saved"].result.scores


def test_saves_by_time_are_at_one_step_and_the_best_checkpoint_stays(runs):
    (first, second), folder = runs
    (steps, run), (others, _) = first["clock"], second["clock"]
    assert steps == others
    assert steps[:4] == [3, 6, 9, 12]  # each epoch of 6 ends with one anyway
    best = int(run.result.best_epoch) * 6
    assert steps_saved(folder / "clock") == sorted({f"step-{step:08d}" for step in (best, 30)})
    assert_same(run, first["whole"])


def test_a_signal_to_any_rank_stops_all_at_one_step(runs):
    first, second = runs[0]
    assert first["stopped"] == second["stopped"]
    code, text = first["stopped"]
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM in epoch 2, after 4 of 6 steps" in text
    assert_same(first["resumed"], first["whole"])


def test_half_precision_goes_on_with_its_scale(runs):
    (first, second), folder = runs
    assert first["fp16, stopped"] == second["fp16, stopped"]
    assert first["fp16, stopped"][0] == 128 + signal.SIGTERM
    assert_same(first["fp16, resumed"], first["fp16"])
    scales = []
    for run in ("fp16", "fp16 stopped"):
        last = max((folder / run / "checkpoints").iterdir())
        scales.append(checkpoint.load(last / "run.ckpt")["scaler"])
    assert scales[0] == scales[1]
    assert scales[0]


def test_callbacks_of_rank_0_decide_for_all(runs, tmp_path):
    (first, second), _ = runs
    assert first["called"] == ["start", "epoch", "start", "epoch", "end: enough"]
    assert second["called"] == []
    alone = trained("", tmp_path / "run", callbacks=[Watcher()])
    assert second["watched"].result.stopped == "enough"
    assert_same(second["watched"], alone)


def test_a_loss_that_is_not_finite_ends_all_ranks_and_names_the_peer(runs):
    for text, given_back in (found["diverged"] for found in runs[0]):
        assert text.startswith("training diverged: at step 7 (epoch 2) the cross-entropy of peer 1")
        assert given_back == [False, False]
    assert not list(runs[1].glob("no*"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("settings", "rank 1 has another lr than rank 0: 0.2, not 0.1: start all ranks with"),
        ("data", "rank 1 has another training data than rank 0: "),
        ("cache", "cache_teachers does not go with a mesh"),
        ("dry", "nothing"),
        ("folder", "is there already and is not overwritten"),
    ],
)
def test_what_all_ranks_refuse_alike(runs, name, text):
    first, second = (found[name] for found in runs[0])
    assert first == second
    assert text in first


def test_rank_0_alone_writes_metrics(runs):
    records = logged(runs[1] / "whole")
    assert [r["step"] for r in records if r["kind"] == "epoch"] == [6, 12, 18, 24, 30]
    assert QUIET["tensorboard"] is False


def test_a_run_begun_on_a_mesh_goes_on_with_its_steps(tmp_path):
    """Without the setting too: what peers draw tells its steps from those of other runs."""
    whole = trained("peer=1", tmp_path / "whole", drop=0.2)
    trained("peer=1", tmp_path / "run", drop=0.2, epochs=2)
    again = trained("", tmp_path / "run", drop=0.2, resume=True)
    assert_same(again, whole)
    assert load_config(tmp_path / "run" / "config.yaml").mesh == "peer=1,data=1"
    with pytest.raises(AssertionError):
        assert_same(trained("", tmp_path / "other", drop=0.2), whole)


@pytest.mark.parametrize(
    ("name", "value"),
    [("exchange", "weights"), ("exchange_every", 2), ("fsdp", True), ("sync_batchnorm", True)],
)
def test_settings_of_several_devices_need_a_mesh(tmp_path, name, value):
    with pytest.raises(InputError, match=f"{name}={value} is for peers on several devices"):
        trained("", tmp_path, **{name: value})


def test_several_processes_without_a_mesh_are_told_how_to_share_a_run():
    with pytest.raises(InputError, match="say how they share it"):
        checks.one_process({"WORLD_SIZE": "2"})


def test_the_report_has_the_mesh(runs):
    page = run_page(read_run(runs[1] / "whole"), SCORING)
    assert "peer=2,data=1; 0.5 kB of logits, distances or weights a step" in page


def balanced(folder: str) -> tuple[int, ...]:
    """The largest peer takes as long as the three others together."""
    quick()
    ranks_module.peer_seconds = lambda peers, images, amp: [
        3.0 if sum(w.numel() for w in peers[0].parameters()) > 200_000 else 1.0
    ]
    values = {"subset": 40, "batch_size": 20, "epochs": 1}
    result = digits(
        peers=("resnet8", "resnet8", "resnet32", "resnet8"), mesh="auto", folder=folder,
        **{**QUIET, **values},
    )  # fmt: skip
    return tuple(result.mesh["rows"])


def test_a_mesh_by_itself_gives_a_dear_peer_a_row(tmp_path):
    found = run_ranks(2, balanced, str(tmp_path / "run"))
    assert found == [(1, 1, 0, 1)] * 2
