"""The log of a run across kills and resumes."""

from __future__ import annotations

import json
import math

import pytest

from fastdml.errors import InputError
from fastdml.report.metrics_log import MetricsLog, read_metrics

NAMES = ["resnet20-1", "resnet20-2"]


def log_steps(log: MetricsLog, steps: range, *, lower: float = 0.0) -> None:
    for step in steps:
        ce = [3.0 / step - lower, 4.0 / step - lower]
        log.log("train", step, step / 4, ce=ce, kl=[0.1, 0.2], pairwise_kl=[[0.0, 0.2], [0.1, 0.0]])
        if step % 4 == 0:
            log.log("test", step, step / 4, top1=[0.4, 0.5], ensemble_top1=0.6)


def without_time(folder) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "time"} for r in read_metrics(folder)]


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
    assert len(read_metrics(tmp_path)) == 3
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
        read_metrics(tmp_path)
    with pytest.raises(InputError, match="not the folder of a run"):
        read_metrics(tmp_path / "absent")
