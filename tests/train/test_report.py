"""What a run leaves behind: the log across kills and resumes, the summary, the table."""

from __future__ import annotations

import json
import math

import pytest

from fastdml.errors import InputError
from fastdml.train import report
from fastdml.train.report import MetricsLog

NAMES = ["resnet20-1", "resnet20-2"]


def log_steps(log: MetricsLog, steps: range, *, lower: float = 0.0) -> None:
    for step in steps:
        ce = [3.0 / step - lower, 4.0 / step - lower]
        log.log("train", step, step / 4, ce=ce, kl=[0.1, 0.2], pairwise_kl=[[0.0, 0.2], [0.1, 0.0]])
        if step % 4 == 0:
            log.log("test", step, step / 4, top1=[0.4, 0.5], ensemble_top1=0.6)


def without_time(folder) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "time"} for r in report.read_metrics(folder)]


def tensorboard_scalars(folder) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_every_log_point_is_one_json_object_a_line(tmp_path):
    with MetricsLog(tmp_path, NAMES) as log:
        log_steps(log, range(1, 5))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"kind": "peers", "step": 0, "names": NAMES}
    assert [json.loads(line)["kind"] for line in lines[1:]] == ["train"] * 4 + ["test"]
    assert json.loads(lines[1])["ce"] == [3.0, 4.0]


def test_a_line_is_on_disk_before_the_run_ends(tmp_path):
    log = MetricsLog(tmp_path, NAMES, tensorboard=False)
    log_steps(log, range(1, 3))
    assert len(report.read_metrics(tmp_path)) == 3
    log.close()


def test_resume_logs_nothing_twice(tmp_path):
    with MetricsLog(tmp_path / "whole", NAMES) as log:
        log_steps(log, range(1, 11))
    with MetricsLog(tmp_path / "cut", NAMES) as log:
        log_steps(log, range(1, 9), lower=0.5)
    # Killed while it wrote step 9, last checkpoint at step 6: 7 and 8 are to be done again.
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 9, "ce": [0.')
    before = without_time(tmp_path / "cut")
    with MetricsLog(tmp_path / "cut", NAMES, resume_step=6) as log:
        assert without_time(tmp_path / "cut") == [r for r in before if r["step"] <= 6]
        log_steps(log, range(7, 11))

    whole, cut = without_time(tmp_path / "whole"), without_time(tmp_path / "cut")
    assert [(r["kind"], r["step"]) for r in cut] == [(r["kind"], r["step"]) for r in whole]
    assert cut[-1] == whole[-1]
    scalars = tensorboard_scalars(tmp_path / "cut")
    ce = scalars["train/ce/resnet20-2"]
    assert [step for step, _ in ce] == list(range(1, 11))
    assert [value for _, value in ce] == pytest.approx(
        [4.0 / s - (0.5 if s <= 6 else 0.0) for s in range(1, 11)]
    )
    assert [step for step, _ in scalars["test/ensemble_top1"]] == [4, 8]
    assert not [tag for tag in scalars if "pairwise" in tag or "names" in tag]


def test_tensorboard_can_be_left_out(tmp_path):
    with MetricsLog(tmp_path, NAMES, tensorboard=False) as log:
        log_steps(log, range(1, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_going_on_without_tensorboard_keeps_its_events(tmp_path):
    with MetricsLog(tmp_path, NAMES) as log:
        log_steps(log, range(1, 3))
    before = tensorboard_scalars(tmp_path)
    with MetricsLog(tmp_path, NAMES, resume_step=2, tensorboard=False) as log:
        log_steps(log, range(3, 5))
    assert tensorboard_scalars(tmp_path) == before
    with MetricsLog(tmp_path, NAMES, resume_step=4):
        pass
    assert [s for s, _ in tensorboard_scalars(tmp_path)["train/ce/resnet20-2"]] == [1, 2, 3, 4]


def test_another_runs_metrics_are_not_overwritten(tmp_path):
    with MetricsLog(tmp_path, NAMES, tensorboard=False) as log:
        log_steps(log, range(1, 3))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="another run's metrics"):
        MetricsLog(tmp_path, NAMES)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_numbers_that_json_lacks_become_null(tmp_path):
    with MetricsLog(tmp_path, NAMES, tensorboard=False) as log:
        log.log("train", 1, 0.5, ce=[math.nan, 1.0], kl=[math.inf, 0.0])
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text.splitlines()[1], parse_constant=lambda name: pytest.fail(name))
    assert record["ce"] == [None, 1.0]
    assert record["kl"] == [None, 0.0]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "peers", "step": 0}\n{oops\n{"step": 1}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        report.read_metrics(tmp_path)
    with pytest.raises(InputError, match="not the folder of a run"):
        report.read_metrics(tmp_path / "absent")


def scores(top1: list[float], ensemble: float) -> dict:
    return {
        "rows": 10_000,
        "top1": top1,
        "top5": [0.9] * len(top1),
        "ece": [0.031] * len(top1),
        "nll": [1.25] * len(top1),
        "entropy": [0.5] * len(top1),
        "nonfinite": [0] * len(top1),
        "ensemble_top1": ensemble,
        "ensemble_top5": 0.95,
        "ensemble_ece": 0.02,
        "ensemble_nll": 1.0,
        "ensemble_entropy": math.nan,
    }


def summarise(folder, *, independent: bool) -> dict:
    def run(top1, ensemble, rate):
        return {"scores": scores(top1, ensemble), "images_per_second": rate, "wall_seconds": 60.5}

    return report.write_summary(
        folder,
        config={"data": "cifar100", "epochs": 200},
        peers=NAMES,
        parameters=[278_324, 278_324],
        device="one device",
        execution="threads",
        threads=2,
        command="fastdml train cifar100 --epochs 200",
        mutual=run([0.7119, 0.7075], 0.7312, 4321.4),
        independent=run([0.6899, 0.6912], 0.7201, 4400.0) if independent else None,
    )


def test_summary_holds_what_was_run_and_what_came_out(tmp_path):
    summary = summarise(tmp_path, independent=True)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["config"] == {"data": "cifar100", "epochs": 200}
    assert set(summary["versions"]) == {"python", "fastdml", "torch", "triton", "numpy"}
    assert summary["device"] == "one device"
    assert summary["peers"][1] == {
        "name": "resnet20-2",
        "parameters": 278_324,
        "accuracy_mutual": 0.7075,
        "accuracy_independent": 0.6912,
    }
    assert summary["ensemble_mutual"] == 0.7312
    assert summary["ensemble_independent"] == 0.7201
    assert summary["mutual"]["wall_seconds"] == 60.5
    assert summary["mutual"]["scores"]["ensemble_entropy"] is None


def test_table_compares_independent_and_mutual(tmp_path):
    table = report.summary_table(summarise(tmp_path, independent=True))
    assert table.splitlines() == [
        "peer        parameters  independent %  mutual %  ensemble %  images/s",
        "---------------------------------------------------------------------",
        "resnet20-1     278,324          68.99     71.19       73.12     4,321",
        "resnet20-2     278,324          69.12     70.75       73.12     4,321",
        "ensemble: mean of the mutual peers' probabilities (independent peers': 72.01 %); "
        "images/s: all peers together (independent: 4,400)",
    ]


def test_table_without_the_comparison(tmp_path):
    summary = summarise(tmp_path, independent=False)
    assert summary["ensemble_independent"] is None
    row = report.summary_table(summary).splitlines()[2].split()
    assert row == ["resnet20-1", "278,324", "-", "71.19", "73.12", "4,321"]


def test_a_run_too_short_for_a_rate_has_a_dash(tmp_path):
    summary = summarise(tmp_path, independent=True)
    for run in ("mutual", "independent"):
        summary[run]["images_per_second"] = 0.0
    lines = report.summary_table(summary).splitlines()
    assert lines[2].split()[-1] == "-"
    assert lines[-1].endswith("all peers together (independent: -)")


def test_a_run_without_an_evaluation_has_a_table_too(tmp_path):
    run = {"scores": None, "images_per_second": 10.0, "wall_seconds": 1.0}
    summary = report.write_summary(
        tmp_path, config={}, peers=["a"], parameters=[5], device="cpu", mutual=run,
        execution="eager", threads=None, command="fastdml.train.fit",
    )  # fmt: skip
    assert report.summary_table(summary).splitlines()[2].split() == ["a", "5", "-", "-", "-", "10"]


def test_scores_table_has_a_row_a_peer_and_one_for_the_ensemble():
    lines = report.scores_table(NAMES, scores([0.7, 0.5], 0.75)).splitlines()
    assert lines[0].split("  ")[0] == "peer"
    assert lines[2].split() == ["resnet20-1", "70.00", "90.00", "3.10", "1.2500", "0.5000"]
    assert lines[4].split() == ["ensemble", "75.00", "95.00", "2.00", "1.0000", "nan"]
    assert lines[5] == "10,000 test images"
    broken = scores([0.7, 0.5], 0.75) | {"nonfinite": [0, 3]}
    assert report.scores_table(NAMES, broken).endswith("outputs that are not finite: resnet20-2: 3")


def test_device_name_of_this_processor():
    name = report.device_name("cpu")
    assert "thread" in name
    assert "\n" not in name
