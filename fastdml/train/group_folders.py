"""The folders of a run's groups, written at its end: each a run folder like that of a run of this
group alone, so that reports, analyses, `fastdml.load` and the commands take it as any other.

RUN/groups/G has the group's peers and settings, with the seed that its weights began from, its part
of metrics.jsonl and of summary.json, its predictions, and independent/ of the same form. It shares
the files of weights with the run where the file system can, and its seconds are an equal share of
the run's. It has no checkpoint: RUN is what is resumed. What the summary says of the command names
the seed of the batches, which is that of group 0.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdml.cohort_files import peer_file
from fastdml.files import partial, write_atomically, writing
from fastdml.names import unique
from fastdml.report.metrics_log import METRICS, group_folder, read_metrics, to_json
from fastdml.report.scoring import Scoring
from fastdml.report.summary import write_summary
from fastdml.train.config.base import TrainConfig
from fastdml.train.run_folder import BEST
from fastdml.yaml_file import CONFIG

COHORT = "cohort.json"


def write_group_folders(
    folder: Path,
    config: TrainConfig,
    *,
    scoring: Scoring,
    mutual: Mapping[str, Any] | None,
    independent: Mapping[str, Any] | None,
    parameters: Sequence[int],
    command: str,
    **facts: Any,
) -> None:
    """Writes those of the run, or of the independent phase, in `folder`, which has ended. mutual,
    independent, facts: as `write_summary` takes them; mutual None: no summary. Raises InputError
    where a file cannot be written."""
    groups = config.groups
    size = len(config.peers) // groups
    records = read_metrics(folder)
    for g in range(groups):
        own = slice(g * size, (g + 1) * size)
        place = group_folder(folder, g)
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
        kinds = config.peers[own]
        names = unique(kinds)
        config_of_group = config.replace(
            peers=kinds, groups=1, seed=config.seed + g, folder=str(place)
        )
        config_of_group.save(place / CONFIG)
        found = [{**of_group(record, g, groups), **_named(record, names)} for record in records]
        write_atomically(place / METRICS, "".join(f"{to_json(record)}\n" for record in found))
        for weights in (folder, folder / BEST):
            if (weights / COHORT).is_file():
                _share_weights(weights, place / weights.relative_to(folder), own, names)
        if mutual is None:
            continue
        phases = {"mutual": mutual, "independent": independent}
        own_phases: Any = {n: v and _phase(v, g, groups) for n, v in phases.items()}
        which = f"group {g} of {groups}, batches of seed {config.seed}"
        write_summary(
            place,
            config=config_of_group.to_dict(),
            scoring=scoring,
            peers=names,
            parameters=parameters[own],
            command=f"{command}, {which}",
            **own_phases,
            **facts,
        )


def of_group(record: Mapping[str, Any], g: int, groups: int) -> dict[str, Any]:
    """What a record of all peers, of scores or of a log point, says of group g: of lists a value a
    peer those of its peers, and its own ensemble. The training's `ensemble_top1`, known as the mean
    over the groups alone, is left out."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if name == "groups" or name.startswith("group_"):
            continue
        if name.startswith("ensemble_") and "groups" not in record:
            continue
        if isinstance(value, (list, tuple)):
            size = len(value) // groups
            own = slice(g * size, (g + 1) * size)
            value = [row[own] if isinstance(row, list) else row for row in value[own]]
        found[name] = value
    for name in found:
        if name.startswith("ensemble_"):
            each = record[f"group_{name.removeprefix('ensemble_')}"]
            found[name] = each[g * len(each) // groups]
    return found


def _named(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {"names": [*names]} if "names" in record else {}


def _phase(values: Mapping[str, Any], g: int, groups: int) -> dict[str, Any]:
    """A phase's entry in summary.json, of one group."""
    found = {**values, "wall_seconds": values["wall_seconds"] / groups}
    for name in ("scores", "best_scores"):
        found[name] = found[name] and of_group(found[name], g, groups)
    if found["validation"]:
        found["validation"] = {
            name: of_group(scores, g, groups) for name, scores in found["validation"].items()
        }
    folder = Path(found["weights"]["last"])
    place = group_folder(folder, g)
    found["weights"] = {
        name: str(place / Path(path).relative_to(folder)) for name, path in found["weights"].items()
    }
    return found


def _share_weights(source: Path, place: Path, own: slice, names: Sequence[str]) -> None:
    """Writes cohort.json and peers/ of some of the peers that are saved in `source`, under their
    names there."""
    description = json.loads((source / COHORT).read_text())
    entries = list(enumerate(description["peers"]))[own]
    peers = []
    with writing(place):
        (place / "peers").mkdir(parents=True, exist_ok=True)
        for k, ((number, entry), name) in enumerate(zip(entries, names, strict=True)):
            _link(source / peer_file(number, entry["name"]), place / peer_file(k, name))
            peers.append({**entry, "name": name})
    description = {n: v for n, v in description.items() if n != "groups"} | {"peers": peers}
    write_atomically(place / COHORT, json.dumps(description, indent=2))


def _link(source: Path, path: Path) -> None:
    """The file under another name too; a copy where the file system has one name a file."""
    new = partial(path)
    new.unlink(missing_ok=True)
    try:
        os.link(source, new)
    except OSError:
        shutil.copyfile(source, new)
    os.replace(new, path)
