"""Writes the generated parts of the documentation: settings from the dataclasses that define them,
tables of figures from the measurements in bench/results and the reproductions in results/.

python -m docs.generate            writes what is out of date (make docs)

A part that is generated stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bench import (
    host_time,
    linear,
    mesh,
    mesh_pipeline,
    report,
    scaling,
    time_to_accuracy,
    traps_page,
)
from docs import results
from fastdml.data.registry import dataset_names
from fastdml.train import FolderConfig, ReidConfig, TrainConfig
from fastdml.train.checkpoint import FREE_ON_RESUME
from fastdml.train.config.fields import field_texts
from fastdml.train.config.sources import preset

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md", "docs/settings.md", "docs/performance.md", "docs/benchmarks.md",
    "docs/api.md", "docs/scaling.md", "docs/results.md", "docs/faq.md", "kernels/README.md",
)  # fmt: skip
RESULTS = ROOT / "bench" / "results"
PART = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS = {int: "whole number", float: "number", str: "text", bool: "yes or no"}


def page(text: str) -> str:
    """The text of a page with each of its generated parts as it should be."""
    return PART.sub(lambda found: f"{found[1]}{part(found[2])}\n{found[3]}", text)


def part(name: str) -> str:
    """One generated part: `settings ...`, or a file of bench/results and the titles of tables."""
    if name.startswith("settings"):
        return SETTINGS[name]()
    if name.startswith("traps "):
        return traps_page.part(name)
    if name.startswith("results "):
        return results.part(name)
    if name.startswith("api "):
        return _names_of(name.removeprefix("api "))
    if name == "loss against rivals":
        return _loss_against_rivals()
    if name == "kernels":
        return _kernels("3.8")
    if name == "kernels before and now":
        return _kernels_before_and_now()
    if name in scaling.TABLES:
        return f"```text\n{scaling.TABLES[name]()}\n```"
    for bench in (host_time, mesh_pipeline, mesh, linear, time_to_accuracy):
        if name.startswith(bench.__name__.rpartition(".")[2].replace("_", "-")):
            found = json.loads((RESULTS / f"{name}.json").read_text())
            return f"```text\n{bench.table(**found)}\n```"
    rows, where = report.load(str(RESULTS / f"{name}.json"))
    return f"```text\n{report.tables(rows, where)}\n```"


def _loss_against_rivals() -> str:
    """The loss beside the loop that people write and careful torch, the short form of its table."""
    rows, _ = report.load(str(RESULTS / "loss-cpu-epyc.json"))
    times: dict[tuple[int, int, int], dict[str, report.Row]] = {}  # by K, N, C and contender
    for row in rows:
        if (row["bench"], row["direction"]) == ("loss", "forward_backward"):
            times.setdefault((row["K"], row["N"], row["C"]), {})[row["name"]] = row
    cells = [
        [
            f"{K}, {N}, {C:,}",
            f"{1e3 * found['ours']['median']:.2f} ms",
            *(
                f"{report.over_ours(found[name], found['ours']):.1f}x"
                for name in ("pairwise", "closed-c")
            ),
        ]
        for (K, N, C), found in times.items()
    ]
    head = ["K, N, C", "fastdml", "a kl_div for each pair", "closed form, torch.compile"]
    return _table(head, cells)


Report = dict[str, Any]  # one kernel's, as `fastdml kernels --json` prints it


def _static_reports(version: str) -> list[Report]:
    """For sm_90, by a version of triton, or by "VERSION-before"."""
    return json.loads((RESULTS / f"kernels-triton-{version}.json").read_text())


def _shape(r: Report) -> list[str]:
    return [r["kernel"], str(r["K"] or "-"), f"{r['C']:,}" if r["C"] else "-"]


def _kernels(version: str) -> str:
    def widths(counts: dict[str, int]) -> str:
        return ", ".join(f"{width}Bx{count}" for width, count in counts.items())

    head = ["kernel", "K", "C", "options", "samples x classes a program", "warps", "registers",
            "spills", "shared bytes", "loads", "stores", "reads", "writes", "ratio",
            "instructions", "barriers", "waits", "bound"]  # fmt: skip
    return _table(head, [
        [*_shape(r), r["options"] or "-", f"{r['rows']}x{r['block_c']}", str(r["warps"]),
         str(r["registers"]), str(r["spills"]), str(r["shared_bytes"]), widths(r["load_widths"]),
         widths(r["store_widths"]), str(r["reads"]), str(r["writes"]), f"{r['ratio']:.3g}",
         f"{r['instructions']:,.0f}", f"{r['barriers']:.4g}", f"{r['waits']:.3g}",
         f"{r['bound']['name']} {r['bound']['share']:.0%}"]
        for r in _static_reports(version)
    ])  # fmt: skip


def _kernels_before_and_now() -> str:
    """Registers, spills, instructions and barriers of a row, by the oldest and newest triton."""

    def cells(old: Report, new: Report) -> list[str]:
        figures = [("registers", ".0f"), ("spills", ".0f"), ("instructions", ",.0f"),
                   ("barriers", ".4g")]  # fmt: skip
        return [f"{old[name]:{form}} → {new[name]:{form}}" for name, form in figures]

    columns = ["registers", "spills", "instructions", "barriers"]
    versions = ("3.6", "3.8")
    now = {v: [r for r in _static_reports(v) if not r["options"]] for v in versions}
    both = [(_static_reports(f"{v}-before"), now[v]) for v in versions]
    head = ["kernel", "K", "C", *(f"{name}, {v}" for v in versions for name in columns)]
    rows = []
    for reports in zip(*(reports for pair in both for reports in pair), strict=True):
        assert len({tuple(_shape(r)) for r in reports}) == 1
        old_36, new_36, old_38, new_38 = reports
        rows.append([*_shape(old_36), *cells(old_36, new_36), *cells(old_38, new_38)])
    return _table(head, rows)


def _values(kind: type, name: str) -> str:
    """What a setting may be."""
    hint = get_type_hints(kind)[name]
    several = get_origin(hint) is tuple
    if several or NoneType in get_args(hint):
        hint = next(h for h in get_args(hint) if h is not NoneType)
    if get_origin(hint) is Literal:
        text = ", ".join(f"`{choice}`" for choice in get_args(hint))
    else:
        text = KINDS[hint]
        if name in kind.limits:
            text += f", {kind.limits[name][1]}"
    return f"{text}, one or more" if several else text


def _value(value: Any) -> str:
    """A default, as the command line takes it."""
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value))}`" if value else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _names_of(module: str) -> str:
    """The public names of a module, with the first sentence of what each says of itself."""
    home = importlib.import_module(module)
    rows = []
    for name in home.__all__:
        value = getattr(home, name)
        if callable(value):
            text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
            sentence = re.split(r"\. (?=[A-Z]|\w+: )|: see ", text)[0].rstrip(".:")
            rows.append([f"`{name}`", "" if text.startswith(f"{name}(") else f"{sentence}."])
    return _table(["name", "what it is"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _settings() -> str:
    """Every setting of a run, in the groups that the dataclass has."""
    groups: dict[str, list[list[str]]] = {}
    for group, name, text in field_texts(TrainConfig):
        default = _value(getattr(TrainConfig(), name))
        row = [f"`{name}`", _values(TrainConfig, name), default, text]
        groups.setdefault(group, []).append(row)
    head = ["setting", "values", "default", "meaning"]
    return "\n\n".join(f"### {group}\n\n{_table(head, rows)}" for group, rows in groups.items())


def _settings_of_data() -> str:
    """What the data sets of classification change in the defaults."""
    plain = preset("cifar100")
    names = [*dataset_names("classification"), *dataset_names("own_images")]
    columns = {data: preset(data) for data in names if data != plain.data}
    rows = [
        [f"`{name}`", *(_value(getattr(c, name)) for c in (plain, *columns.values()))]
        for name in (field.name for field in dataclasses.fields(TrainConfig))
        if name != "data"
        and any(getattr(c, name) != getattr(plain, name) for c in columns.values())
    ]
    return _table(["setting", "cifar100", *columns], rows)


def _settings_of_own_images() -> str:
    """What images of one's own add or see otherwise."""
    rows = [
        [f"`{name}`", _values(FolderConfig, name), _value(getattr(preset("folder"), name)), text]
        for _, name, text in field_texts(FolderConfig)
        if name not in ("data", "download")
    ]
    return _table(["setting", "values", "default", "meaning"], rows)


def _settings_of_reid() -> str:
    """What re-identification adds or sees otherwise, under its recipes."""
    columns = {
        "paper": preset("market1501"),
        "strong": preset("market1501", recipe="strong"),
        "stand-in": preset("market1501", standin=True),
    }
    texts = {name: text for _, name, text in field_texts(ReidConfig)}
    inherited = {name: text for _, name, text in field_texts(TrainConfig)}
    rows = []
    for field in dataclasses.fields(ReidConfig):
        name = field.name
        if name == "data":
            continue
        if name in ("recipe", "standin"):  # which say which column holds
            defaults = ["", "", ""]
        else:
            defaults = [_value(getattr(config, name)) for config in columns.values()]
        if name in texts or len(set(defaults)) > 1:
            text = texts.get(name) or inherited[name]
            rows.append([f"`{name}`", _values(ReidConfig, name), *defaults, text])
    return _table(["setting", "values", *columns, "meaning"], rows)


def _settings_on_resume() -> str:
    names = [f.name for f in dataclasses.fields(TrainConfig) if f.name in FREE_ON_RESUME]
    return ", ".join(f"`{name}`" for name in names) + "."


SETTINGS = {
    "settings": _settings,
    "settings of data sets": _settings_of_data,
    "settings of own images": _settings_of_own_images,
    "settings of re-identification": _settings_of_reid,
    "settings on resume": _settings_on_resume,
}


def main() -> int:
    for folder in results.write_outdated():
        print(f"{folder}: written")
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = page(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{name}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
