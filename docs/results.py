"""The generated parts of docs/results.md and of the front page that are of results/: every figure
there comes from a reproduction.json.

A folder results/SCALE/EXPERIMENT is what `fastdml reproduce EXPERIMENT --scale SCALE` wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastdml.reproduce import plots
from fastdml.reproduce.outcome import outcome, verdict
from fastdml.reproduce.record import RECORD, Record, read_record
from fastdml.reproduce.results import CSV, TABLE, write_results
from fastdml.reproduce.scales import COSINE
from fastdml.reproduce.statistics import t_quantile
from fastdml.reproduce.tables import (
    comma_separated,
    cost,
    legend,
    markdown,
    scaled_down,
    table,
)
from fastdml.reproduce.texts import difference_of, escaped, interval, signed
from fastdml.units import duration

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
SCALES = ("full", "medium", "small", "digits", "smoke")  # in the order of the page
PICTURES = {
    plots.DIFFERENCES: "Of each row the mean difference, its interval and the seeds",
    plots.CURVE: "Both sides by what is varied, mean and standard deviation, and the seeds",
}
# What the front page tells of.
IN_SHORT = (("medium", "table2"), ("small", "table2"), ("small", "cohort-size"))


def records() -> dict[tuple[str, str], Record]:
    """Every record of results/ by its scale and experiment, larger scales first."""
    found = {}
    for path in sorted(RESULTS.glob(f"*/*/{RECORD}")):
        record = read_record(path)
        place = path.parent.parent.name, path.parent.name
        if place != (record.scale, record.experiment):
            raise ValueError(f"{path} is of {record.experiment} at scale {record.scale}")
        found[place] = record
    return dict(sorted(found.items(), key=lambda item: SCALES.index(item[0][0])))


def part(name: str) -> str:
    """`results NAME` of an experiment, or another of the parts below."""
    what = name.removeprefix("results ")
    return PARTS[what]() if what in PARTS else experiment(what)


def experiment(name: str) -> str:
    """All that there is of an experiment, a scale after the other: what was changed, what it says,
    its table and pictures."""
    found = [record for (_, of), record in records().items() if of == name]
    return "\n\n".join(_shown(record) for record in found) or "Nobody has run this one yet."


def _shown(record: Record) -> str:
    folder = f"results/{record.scale}/{record.experiment}"
    pictures = [
        f'<img src="../{folder}/{name}.png" width="400" alt="{text}">'
        for name, text in PICTURES.items()
        if (ROOT / folder / f"{name}.png").exists()
    ]
    files = ", ".join(f"[{name}](../{folder}/{name})" for name in (TABLE, CSV, RECORD))
    parts = [
        f"**{scaled_down(record) or 'The full settings.'}**",
        " ".join(outcome(record)),
        table(record),
        " ".join([*legend(record), *map(escaped, record.notes)]),
        "\n".join(pictures),
        f"{escaped(cost(record))} Everything of it: {files}.",
    ]
    return "\n\n".join(filter(None, parts))


def in_short() -> str:
    """Each experiment and scale in a line of a table: how many of its rows came out which way."""
    lines = ["| | scale | seeds | rows | gain | no difference shown | loss | other |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (scale, name), record in records().items():
        counts = dict.fromkeys(("gain", "open", "loss", "other"), 0)
        for row in record.rows:
            found = difference_of(row)
            kind = verdict(row, found) if found else "other"
            counts[kind if kind in counts else "other"] += 1
        cells = [f"`{name}`", scale, len(record.seeds), len(record.rows), *counts.values()]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def budget() -> str:
    """What all of results/ cost, each training once, a scale a line."""
    lines = ["| scale | what was changed | trainings | time | device |"]
    lines.append("| --- | --- | --- | --- | --- |")
    found = records()
    for scale in dict.fromkeys(scale for scale, _ in found):
        of_scale = [record for (of, _), record in found.items() if of == scale]
        trainings = {(t.name, t.seed): t for record in of_scale for t in record.trainings}
        devices = " and ".join(dict.fromkeys(t.device for t in trainings.values()))
        common = [
            change
            for change in of_scale[0].changes
            if all(change in record.changes for record in of_scale)
        ]
        seconds = sum(t.seconds for t in trainings.values())
        cells = [scale, "; ".join(common) or "nothing", str(len(trainings)), duration(seconds)]
        lines.append(f"| {' | '.join(map(escaped, [*cells, devices]))} |")
    return "\n".join(lines)


def intervals() -> str:
    """How wide an interval is for its number of seeds."""
    counts = sorted({len(record.seeds) for record in records().values()} - {1})
    texts = [f"{t_quantile(n - 1) / n**0.5:.2f} with {n} seeds" for n in counts]
    return (
        "Half of an interval is so many standard deviations of the differences between seeds: "
        f"{', '.join(texts)}."
    )


def front_page() -> str:
    """One line: what mutual learning gained over independent networks, on a GPU and on a CPU."""
    found = records()
    texts = [_shortly(found[place]) for place in IN_SHORT if place in found]
    if not texts:
        return "Results of our own: [docs/results.md](docs/results.md)."
    return (
        "Scaled down, mutual against independent networks on CIFAR-100, mean difference in top-1 "
        "and its 95 % interval (where that holds 0, no difference is shown): "
        f"{'; '.join(texts)}. [What else came out](docs/results.md)."
    )


def _shortly(record: Record) -> str:
    device = record.trainings[0].device
    what = escaped("; ".join(change for change in record.changes if change != COSINE))
    gains = ", ".join(_gains(record))
    return f"on an {device} ({what}; {len(record.seeds)} seeds): {gains}"


def _gains(record: Record) -> Iterator[str]:
    for row in record.rows:
        found = difference_of(row)
        if found is None or row.series not in ("", "single") or row.x == 1:
            continue
        if (between := interval(found, "%")) and found.mean is not None:
            # of a pair's row the last words name the network of the peer once more
            label = row.label.partition(", ")[0].replace(": ", ", ")
            what = f"{row.x:g} peers" if row.x else label
            yield f"{what} {signed(found.mean, '%')} points ({between})"


PARTS = {"in short": in_short, "budget": budget, "intervals": intervals, "in a line": front_page}


def outdated() -> Iterator[Path]:
    """Files of results/ that are not what their records make."""
    for (scale, name), record in records().items():
        folder = RESULTS / scale / name
        for file, text in ((TABLE, markdown(record)), (CSV, comma_separated(record))):
            if not (folder / file).exists() or (folder / file).read_text("utf-8") != text:
                yield folder / file
        drawn = plots.pictures_of(record)
        for file in PICTURES:
            picture = folder / f"{file}.png"
            if _digest_in(picture) != (plots.digest(record) if file in drawn else None):
                yield picture


def _digest_in(picture: Path) -> str | None:
    """That of the record that a picture was drawn from; None where there is no picture."""
    from PIL import Image

    if not picture.exists():
        return None
    with Image.open(picture) as image:
        return image.text.get(plots.MARK, "")


def write_outdated() -> list[str]:
    """Writes all files again of each folder that has one out of date; returns their names."""
    folders = dict.fromkeys(path.parent for path in outdated())
    for folder in folders:
        write_results(folder, read_record(folder / RECORD))
    return [str(folder.relative_to(ROOT)) for folder in folders]
