"""A run as its folder tells it, ended or not, of this version or an earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdml.errors import InputError
from fastdml.paths import expanded
from fastdml.report.metrics_log import INDEPENDENT, METRICS, read_metrics
from fastdml.report.plots import is_mutual
from fastdml.report.predictions import Predictions, read_predictions
from fastdml.report.summary import prolonged, read_summary
from fastdml.yaml_file import CONFIG, read_settings

OWN_IMAGES = ("folder", "reid_folder")  # data that `root` decides
# Settings that say where and how a run took place, not what it learnt from
PLACES = {"folder", "root", "resume", "dry_run", "download", "progress"}
LARGEST_NUMBER = 1e100  # differences and squares of such are finite


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds. Values of its files are only as good as the files: `number`,
    `numbers` and `table` read them without trusting their kind."""

    folder: Path
    settings: dict[str, Any]
    records: list[dict[str, Any]]  # of metrics.jsonl
    peers: list[str]
    summary: dict[str, Any]  # empty where there is none
    predictions: Predictions | None
    independent: RunFiles | None
    ended: bool  # whether the last weights are there, of the length that the settings say
    problems: list[str] = field(default_factory=list)  # a line each: files that cannot be read

    @property
    def name(self) -> str:
        return self.folder.resolve().name or str(self.folder)

    @property
    def label(self) -> str:
        """Whether the peers learnt from each other: "mutual" or "independent"."""
        return "mutual" if len(self.peers) == 1 or is_mutual(self.settings) else INDEPENDENT

    @property
    def groups(self) -> int:
        """In which the peers are, each an ensemble of its own."""
        return int(number(self.settings.get("groups")) or 1)

    @property
    def teachers(self) -> list[str]:
        """Names of the frozen networks that taught the peers."""
        found = self.summary.get("teachers")
        if not isinstance(found, list):  # it has not ended
            found = self.settings.get("teachers") or []
            return [str(name) for name in found] if isinstance(found, (list, tuple)) else []
        return [str(table(teacher).get("name")) for teacher in found]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    @property
    def epochs(self) -> float:
        """Epochs trained."""
        return max((r["epoch"] for r in self.records[1:] if _finite(r["epoch"])), default=0)

    @property
    def chosen_on(self) -> str:
        """The set that chose the best weights, "validation" or "test"."""
        said = self.summary.get("chosen_on")
        if said is None and not self.summary and self.of_kind("validation"):
            said = "validation"
        return "validation" if said == "validation" else "test"

    @property
    def scored_on(self) -> str:
        """The set that the scores are of."""
        if self.summary:
            return "validation" if self.summary.get("scored_on") == "validation" else "test"
        return "test" if self.of_kind("test") else "validation"

    @property
    def phase(self) -> dict[str, Any]:
        """The run's own entry in its summary, empty where there is none."""
        return table(self.summary.get("mutual"))

    def scores(self, weights: str) -> dict[str, Any]:
        """The scores of the "last" or the "best" weights, empty where nothing was evaluated. Of a
        run that has not ended, the last evaluation's."""
        name = "scores" if weights == "last" else "best_scores"
        if found := table(self.phase.get(name)):
            return found
        records = self.of_kind("test") or self.of_kind("validation")
        chosen = [r for r in records if r.get("weights", "last") == weights] or records
        return dict(chosen[-1]) if chosen else {}


def read_run(folder: str | Path) -> RunFiles:
    """The run in a folder. Raises InputError where the folder is none of a run; what else cannot be
    read is among its `problems`."""
    folder = expanded(folder)
    records = read_metrics(folder)
    problems: list[str] = []
    settings = _or_none(lambda: read_settings(folder / CONFIG), problems) or {}
    summary = _or_none(lambda: read_summary(folder), problems) or {}
    found = _or_none(lambda: read_predictions(folder), problems)
    peers = records[0]["names"]
    if found is not None and list(found.peers) != peers:
        problems.append(f"{folder / 'predictions.npz'} is of other peers: left out")
        found = None
    independent = None
    if (folder / INDEPENDENT / METRICS).exists():
        independent = _or_none(lambda: read_run(folder / INDEPENDENT), problems)
        if independent is not None and independent.peers != peers:
            problems.append(f"{folder / INDEPENDENT} is of other peers: left out")
            independent = None
    return RunFiles(
        folder=folder,
        settings=settings,
        records=records,
        peers=peers,
        summary=summary,
        predictions=found,
        independent=independent,
        ended=(folder / "cohort.json").is_file() and not prolonged(settings, summary),
        problems=[*problems, *(independent.problems if independent else ())],
    )


def data_text(settings: Mapping[str, Any]) -> str:
    """What a run with these settings was trained on, for a sentence."""
    data, root = settings.get("data", "its data"), settings.get("root")
    text = str(data)
    if data in OWN_IMAGES and isinstance(root, str):
        text = f"the images of {Path(root).name or root}"
    if not number(settings.get("unlabelled_share")):
        return text
    if labels := number(settings.get("labelled")):
        text += f" with {labels:,.0f} labels"
    folder = settings.get("unlabelled")
    if folder and isinstance(folder, str):
        text += f" and the unlabelled images of {Path(folder).name or folder}"
    return text


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None; what no float32 could hold is none either."""
    return value if _finite(value) else None


def numbers(value: Any, count: int) -> list[float | None]:
    """`count` numbers, each None where `value` holds no finite one."""
    found = [number(v) for v in value] if isinstance(value, list) else []
    return (found + [None] * count)[:count]


def table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _finite(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and type(value) is not bool
        and abs(value) < LARGEST_NUMBER  # which NaN is not
    )


def _or_none(read: Any, problems: list[str]) -> Any:
    try:
        return read()
    except InputError as error:
        problems.append(str(error))
        return None
