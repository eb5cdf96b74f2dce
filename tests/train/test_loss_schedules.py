"""Temperature and kl_weight that change during a run: settings, steps, records and resuming."""

from __future__ import annotations

import pytest
from runs import Crash, CrashingLoader, logged, same_weights
from tiny_runs import make_cohort, make_loaders

from fastdml import ScalarSchedule
from fastdml.errors import InputError
from fastdml.report.html import run_page
from fastdml.report.plots import is_mutual
from fastdml.report.run_files import read_run
from fastdml.train import TrainConfig, fit
from fastdml.train.tasks.task import task_of

pytestmark = pytest.mark.usefixtures("_no_pictures")
STEPS, EPOCHS = 6, 3
RAMPS = {
    "kl_weight": 2.0,
    "kl_schedule": "linear",
    "kl_weight_end": 0.5,
    "kl_warmup_epochs": 0.5,
    "temperature": 4.0,
    "temperature_schedule": "cosine",
    "temperature_end": 2.0,
}


def expected() -> dict[str, list[float]]:
    """The values at the last step of each epoch."""
    total = STEPS * EPOCHS
    ramps = {
        "kl_weight": ScalarSchedule(2.0, 0.5, steps=total, warmup=3),
        "temperature": ScalarSchedule(4.0, 2.0, steps=total, kind="cosine"),
    }
    values = {}
    for name, ramp in ramps.items():
        values[name] = []
        for step in range(total):
            if step % STEPS == STEPS - 1:
                values[name].append(float(ramp.value))
            ramp.advance()
    return values


@pytest.mark.parametrize("execution", ["eager", "threads"])
def test_a_run_follows_them_records_them_and_resumes_bit_for_bit(settings, tmp_path, execution):
    whole, again = make_cohort(), make_cohort()
    for cohort in (whole, again):
        for peer in cohort.peers:
            peer.drop.p = 0.0  # threads refuse peers that draw
    options = {**RAMPS, "execution": execution, "save_every_steps": 2}
    result = fit(whole, *make_loaders(), settings(**options))
    for name, values in expected().items():
        assert [record[name] for record in result.history] == values
        assert [r[name] for r in logged(result.folder) if r["kind"] == "epoch"] == values

    config = settings(**options, folder=str(tmp_path / "broken"))
    train, test = make_loaders()
    broken = make_cohort()
    for peer in broken.peers:
        peer.drop.p = 0.0
    with pytest.raises(Crash):
        fit(broken, CrashingLoader(train, 9), test, config)
    resumed = fit(again, *make_loaders(), config.replace(resume=True))
    assert same_weights(whole, again)
    assert logged(resumed.folder) == logged(result.folder)

    other = settings(folder=str(tmp_path / "constant"), temperature=4.0, kl_weight=2.0)
    constant = fit(make_cohort(), *make_loaders(), other)
    assert constant.history[-1]["kl"] != result.history[-1]["kl"]
    assert "kl_weight" not in constant.history[0]


def test_the_independent_run_has_no_schedule_of_the_weight(settings):
    config = settings(**RAMPS, independent=True, epochs=1)
    result = fit(make_cohort(), *make_loaders(), config)
    assert "kl_weight" not in result.independent.history[0]
    assert result.independent.history[0]["temperature"] == result.history[0]["temperature"]
    page = run_page.run_page(read_run(result.folder), task_of(config).scoring)
    assert "Weight of the KL term" in page
    assert "Temperature" in page


def test_a_weight_that_rises_from_zero_is_mutual_learning(settings):
    rising = {"kl_weight": 0.0, "kl_schedule": "linear", "kl_weight_end": 1.0}
    assert is_mutual(settings(**rising).to_dict())
    assert settings(**rising, ce_weight=0.0).kl_weight_end == 1.0
    assert not is_mutual(settings(**rising).alone().to_dict())


def test_a_longer_run_is_refused_where_a_schedule_ends_with_it(settings):
    config = settings(epochs=1, kl_schedule="linear", kl_weight_end=0.0)
    fit(make_cohort(), *make_loaders(), config)
    message = "epochs was 1 and is now 2 .with kl_schedule linear every kl_weight depends on it"
    with pytest.raises(InputError, match=message):
        fit(make_cohort(), *make_loaders(), config.replace(epochs=2, resume=True))


def test_a_run_that_ends_in_the_warm_ups_is_prolonged_bit_for_bit(settings, tmp_path):
    rising = {"warmup_epochs": 1.25, "kl_warmup_epochs": 1.5, "temperature_warmup_epochs": 1.0}
    options = {"epochs": 0, "temperature": 4.0, **rising}
    whole, parts = make_cohort(), make_cohort()
    last = fit(whole, *make_loaders(), settings(**options, iterations=11)).history[-1]
    config = settings(**options, iterations=3, folder=str(tmp_path / "parts"))
    first = fit(make_cohort(), *make_loaders(), config).history[-1]
    assert (first["kl_weight"], first["temperature"]) == (pytest.approx(3 / 9), 1 + 3 * 3 / 6)
    fit(parts, *make_loaders(), config.replace(iterations=11, resume=True))
    assert same_weights(whole, parts)
    assert (last["kl_weight"], last["temperature"]) == (1.0, 4.0)


def test_a_schedule_that_has_no_step_after_its_warm_up_is_refused(settings, tmp_path):
    ends = {"kl_schedule": "linear", "kl_weight_end": 0.0, "kl_warmup_epochs": 1.0}
    for length in ({"epochs": 1}, {"epochs": 0, "iterations": 4}):
        with pytest.raises(InputError, match=r"epochs is 6 steps, and the run has [64], so that"):
            fit(make_cohort(), *make_loaders(), settings(**ends, **length))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_schedule": "linear"}, "kl_schedule linear needs kl_weight_end"),
        ({"kl_weight_end": 2.0}, "kl_weight_end 2 has no effect with kl_schedule constant"),
        ({"temperature_schedule": "cosine"}, "temperature_schedule cosine needs temperature_end"),
        ({"temperature_schedule": "linear", "temperature_end": 0.0}, "temperature_end must be abo"),
        ({"kl_warmup_epochs": 4.0, "epochs": 3}, r"kl_warmup_epochs .4. must not exceed epochs"),
    ],
)
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**changes)
