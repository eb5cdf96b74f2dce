"""The tables of docs/faq.md from results/traps.json: a row a number, its mean and standard
deviation over the seeds, and what it differs by on the same seeds, with a 95 % interval by
Student's t."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from fastdml.reproduce.statistics import difference, spread

UNTRAINED = "mobilenet"  # the one measurement that no seed changes
RESULTS = Path(__file__).resolve().parents[1] / "results" / "traps.json"


class Row(NamedTuple):
    label: str  # in the file
    against: str = ""  # the label of the number that it is compared with
    unit: str = "%"
    text: str = ""  # where the page says more than the label


def _budgets() -> list[Row]:
    return [
        row
        for epochs in (1, 2, 5, 10, 20, 40)
        for row in (
            Row(f"independent, {epochs} epochs", text=f"{epochs} ep., independent"),
            Row(
                f"mutual, {epochs} epochs",
                f"independent, {epochs} epochs",
                text=f"{epochs} ep., mutual",
            ),
        )
    ]


BOTH = [Row("independent"), Row("mutual", "independent")]
TABLES: dict[str, list[Row]] = {
    "budgets": _budgets(),
    "class-mean": [
        *BOTH,
        Row("mean over classes", "mutual"),
        Row("apart, independent", unit="nats", text="KL between independent peers"),
        Row("apart, mutual", unit="nats", text="KL between mutual peers"),
        Row("apart, mean over classes", "apart, mutual", "nats", "the same, mean over classes"),
    ],
    "detach": [
        *BOTH,
        Row("not detached", "mutual"),
        Row("apart, mutual", unit="nats", text="KL between mutual peers"),
        Row("apart, not detached", "apart, mutual", "nats", "the same, not detached"),
    ],
    "identical": [
        *BOTH,
        Row("identical, independent", text="identical start, independent"),
        Row("identical, mutual", "identical, independent", text="identical start, mutual"),
        Row("largest divergence of a step", unit="nats", text="largest KL in any step"),
        Row(
            "largest difference of a weight",
            unit="",
            text="largest difference of a weight, mutual to independent",
        ),
    ],
    "baselines": [
        Row("mutual"),
        Row("independent", "mutual", text="independent, the same settings"),
        Row("a tenth of the rate", "mutual", text="independent, a tenth of the learning rate"),
        Row("no weight decay", "mutual", text="independent, no weight decay"),
        Row("half of the epochs", "mutual", text="independent, half of the epochs"),
    ],
    "best-epoch": [
        row
        for name in ("independent", "mutual")
        for row in (
            Row(f"{name}, last epoch"),
            Row(f"{name}, best on held-out images", f"{name}, last epoch"),
            Row(f"{name}, best on the test images", f"{name}, best on held-out images"),
        )
    ],
    "mean-of-means": [
        Row("accuracy, of images", text="accuracy, mean over images"),
        Row("accuracy, of batches", "accuracy, of images", text="accuracy, mean of batch means"),
        Row("error of the accuracy", unit="points", text="size of that error"),
        Row("error of the loss, percent", text="error of the loss, of itself"),
        Row("error of the gradient, percent", text="error of a gradient, of its norm"),
    ],
    "temperature": [
        Row("mutual", text="T = 1"),
        Row("T = 4, with T squared", "mutual"),
        Row("T = 4, without", "mutual", text="T = 4, without T squared"),
        Row(
            "KL gradient, T = 4, with T squared",
            unit="",
            text="norm of the KL's gradient, T = 4 to T = 1",
        ),
        Row("KL gradient, T = 4, without", unit="", text="the same, without T squared"),
    ],
    "direction": [*BOTH, Row("reverse", "mutual", text="KL in the other direction")],
    "peer-sum": [
        Row("independent"),
        Row("mean over peers", "independent", text="four peers, mean of three divergences"),
        Row("sum over peers", "mean over peers", text="four peers, their sum"),
        Row("apart, mean over peers", unit="nats", text="KL between peers, mean"),
        Row("apart, sum over peers", "apart, mean over peers", "nats", "KL between peers, sum"),
    ],
    "ensemble": [
        Row("one independent peer"),
        Row("one mutual peer", "one independent peer"),
        Row("ensemble, independent", "one independent peer", text="two independent peers' mean"),
        Row("ensemble, mutual", "ensemble, independent", text="two mutual peers' mean"),
    ],
    "teacher-mode": [
        Row("no teacher"),
        Row("taught in eval mode", "no teacher"),
        Row("taught in train mode", "taught in eval mode"),
    ],
    "mean-as-target": [
        Row("DML"),
        Row("DML_e", "DML"),
        Row("largest difference of a weight", unit="", text="largest difference of a weight"),
        Row("KL term, DML", unit="nats", text="KL term at the end, DML"),
        Row("KL term, DML_e", "KL term, DML", "nats", "KL term at the end, DML_e"),
    ],
    "mobilenet": [
        Row(f"{what}, {form}", unit=unit)
        for form in ("CIFAR form", "64 -> 128 block of stride 2", "ImageNet stem and block")
        for what, unit in (
            ("parameters", "M"),
            ("multiply-adds", "M"),
            ("side of the last map", "pixels"),
        )
    ],
    "mobilenet-trained": [
        Row(f"{what}{form}", unit=unit)
        for form in ("CIFAR form", "64 -> 128 block of stride 2")
        for what, unit in (("", "%"), ("last cross-entropy, ", "nats"))
    ],
}


def part(name: str) -> str:
    """A generated part of the page: "traps NAME", a table, or "traps provenance", a sentence."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    name = name.removeprefix("traps ")
    return _provenance(found) if name == "provenance" else table(name, found)


def table(name: str, found: dict[str, Any]) -> str:
    seeds = found["measurements"][name]
    numbers = [seeds[seed]["values"] for seed in sorted(seeds, key=int)]
    count = f"{len(numbers)} seed{'s' * (len(numbers) > 1)}" if name != UNTRAINED else "untrained"
    lines = [f"| {count} | measured | difference |", "| --- | --- | --- |"]
    for row in TABLES[name]:
        values = [one[row.label] for one in numbers]
        gap = ""
        if row.against:
            to = next(r.text or r.label for r in TABLES[name] if r.label == row.against)
            gap = _gap(row, to, [one[row.against] for one in numbers], values)
        lines.append(f"| {row.text or row.label} | {_measured(values, row.unit)} | {gap} |")
    return "\n".join(lines)


def _measured(values: list[float], unit: str) -> str:
    _, middle, sd = spread(values)
    assert middle is not None
    text = _number(middle, unit)
    if sd:
        text += f" ± {_number(sd, unit)}"
    return f"{text} {unit}".strip()


def _gap(row: Row, to: str, baseline: list[float], ours: list[float]) -> str:
    """to: what the page calls the number that this one is compared with."""
    found = difference(baseline, ours)
    assert found.mean is not None
    against = f" against {to}"
    if found.same:
        size = _number(found.mean, row.unit, sign=True)
        return f"{size} on each seed{against}"
    text = _number(found.mean, row.unit, sign=True)
    if found.low is None or found.high is None:
        return text + against
    low, high = (_number(end, row.unit, sign=True) for end in (found.low, found.high))
    said = "" if found.clear else f": no clear effect{_one_way(baseline, ours)}"
    return f"{text} ({low} to {high}){against}{said}"


def _one_way(baseline: list[float], ours: list[float]) -> str:
    """What an interval does not tell that is wide since the seeds differ by much: that all of them
    differ one way."""
    gaps = [b - a for a, b in zip(baseline, ours, strict=True)]
    ways = {"lower": max(gaps) < 0, "higher": min(gaps) > 0}
    return next((f", though {way} on each seed" for way, so in ways.items() if so), "")


def _number(value: float, unit: str, sign: bool = False) -> str:
    if value == 0:
        return "0"
    if abs(value) < 0.005 and unit in ("%", "points") and not sign:
        return "0.00"
    if unit == "M":
        return f"{value / 1e6:.3g}"
    digits = {"%": ".2f", "points": ".2f", "pixels": ".0f"}.get(unit, ".3g")
    return f"{value:{'+' if sign else ''}{digits}}"


def _provenance(found: dict[str, Any]) -> str:
    of = found["provenance"]
    return (
        f"Measured by `{of['command']}` on {of['device']}, torch {of['versions']['torch']}, "
        f"{of['date'][:10]}, in {of['seconds'] / 60:.0f} minutes of CPU time."
    )
