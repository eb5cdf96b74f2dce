"""The model card beside an exported file: what it holds, what it was trained on and how, how it
scores, and how it is loaded with and without fastdml.

Every figure is one that the run recorded; what is not known is left out, or said to be unknown.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdml.cohort import Cohort
from fastdml.cohort_export import SUFFIXES, Exported, exported
from fastdml.data.reid_split import STORED
from fastdml.exported_weights import module_name
from fastdml.files import write_atomically
from fastdml.report.run_files import PLACES, data_text
from fastdml.report.scoring import ensembles
from fastdml.report.summary import versions
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.sources import defaults_beside, is_known
from fastdml.train.run_weights import Weights, reported_scores, run_config, summary
from fastdml.train.tasks.task import scoring_of
from fastdml.units import percent

SAID_ELSEWHERE = {*PLACES, "data", "device", "seed"}  # settings that the card has no need to list


def write_card(path: Path, cohort: Cohort, peer: str | int, run: Path, weights: Weights) -> Path:
    """Writes NAME.md beside the exported file NAME.*, and returns its path. peer: of `cohort`, as
    for `Cohort.export`. run: the folder of the run that trained it. weights: of the run."""
    (what,) = exported(cohort, peer)
    card = path.with_suffix(".md")
    files = [path.with_suffix(suffix) for suffix in SUFFIXES.values()]
    names = [file.name for file in files if file.is_file()]
    config, facts = run_config(run), summary(run)
    parts = [
        f"# {what.name.removeprefix('peer ').removeprefix('the ')}",
        _introduction(cohort, what, config),
        _table(_architecture(cohort, what)),
        "## Data",
        _data(cohort, config),
        "## Scores",
        _scores(cohort, what, run, weights),
        "## Training",
        _training(cohort, config, facts),
        "## Use",
        *_use(cohort, what, names),
    ]
    write_atomically(card, "\n\n".join(parts) + "\n")
    return card


def _introduction(cohort: Cohort, what: Exported, config: TrainConfig) -> str:
    peers = len(cohort) // cohort.groups
    data = data_text(config.to_dict())
    if teachers := [teacher.name for teacher in cohort.taught_by]:
        data += f", taught by {', '.join(teachers)}"
    if peers == 1:
        return f"A network trained on {data}."
    who = f"The ensemble of {peers} peers" if what.ensemble else f"One of {peers} peers"
    return f"{who} that learned together, by Deep Mutual Learning, on {data}."


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _architecture(cohort: Cohort, what: Exported) -> list[tuple[str, str]]:
    rows = []
    for k in what.chosen:
        peer = cohort.peers[k]
        weights = sum(w.numel() for w in peer.parameters())
        model = cohort.models[k] or type(peer).__name__
        label = "architecture" if len(what.chosen) == 1 else cohort.names[k]
        rows.append((label, f"{model}, {weights:,} parameters"))
    record = cohort.record()
    shape = record["image_shape"]
    sizes = f"`images` (N, {', '.join(map(str, shape or ()))}), float32, normalised"
    rows.append(("input", sizes if shape else "batches as in training"))
    if record["mean"] and record["std"]:
        rows.append(("mean, std", f"{record['mean']}, {record['std']}, in units of stored pixels"))
    size = "N, D" if what.output == "features" else f"N, {cohort.num_classes}"
    rows.append(("output", f"`{what.output}` ({size})"))
    return rows


def _data(cohort: Cohort, config: TrainConfig) -> str:
    classes = cohort.classes
    shown = ""
    if classes is not None:
        names = ", ".join(list(classes)[:20])
        shown = f": {names}" + (", ..." if len(classes) > 20 else "")
    kind = "identities" if cohort.head is not None else "classes"
    return (
        f"{data_text(config.to_dict())}, {cohort.num_classes} {kind}{shown}.\n\n"
        "The licence of the data is not recorded: write it here before you pass the weights on."
    )


def _scores(cohort: Cohort, what: Exported, run: Path, weights: Weights) -> str:
    found = reported_scores(run, weights)
    if found is None:
        return "Not evaluated."
    scores, chosen_on, scored_on = found
    scoring = scoring_of(scores)
    rows = ["| | " + " | ".join(f"{s.label} %" for s in scoring.headlines) + " |"]
    rows += ["|---" * (len(scoring.headlines) + 1) + "|"]
    for k in what.chosen:
        values = (percent(scores[s.name][k]) for s in scoring.headlines)
        rows.append(f"| {cohort.names[k]} | {' | '.join(values)} |")
    if len(cohort) > 1:
        for name, own in ensembles(scores):
            values = (percent(own[s.name]) for s in scoring.headlines)
            who = name.replace("ensemble", f"ensemble of {len(cohort) // cohort.groups}", 1)
            rows.append(f"| {who} | {' | '.join(values)} |")
    note = f"On the {scored_on} images. These are the {weights} weights"
    if weights == "best":
        flatters = ", which flatters the score" if chosen_on == scored_on else ""
        note += f", chosen on the {chosen_on} images{flatters}"
    return "\n".join(rows) + f"\n\n{note}."


def _training(cohort: Cohort, config: TrainConfig, facts: dict[str, Any]) -> str:
    given = config.to_dict()
    lines = [f"- seed {config.seed}"]
    lines += [
        f"- teacher {teacher.name}: weights of SHA-256 {teacher.sha256}"
        for teacher in cohort.taught_by
    ]
    defaults = defaults_beside(given).to_dict()
    other = {k: v for k, v in given.items() if k not in SAID_ELSEWHERE and v != defaults.get(k)}
    told = ", ".join(f"`{k}` {_shown(v)}" for k, v in other.items())
    whose = f" for {config.data}" if is_known(config.data) else ""
    lines.append(f"- settings other than fastdml's defaults{whose}: {told or 'none'}")
    mutual = facts.get("mutual") or {}
    if facts:
        lines.append(
            f"- {mutual.get('epochs', 0):.4g} epochs, in {mutual.get('precision')}, on "
            f"{facts.get('device')}; ended {facts.get('date')}"
        )
    else:
        lines.append("- the run had not ended, or was not evaluated, when this was written")
    made = facts.get("versions") or {}
    lines.append("- trained with " + ", ".join(f"{k} {v}" for k, v in made.items()) if made else "")
    lines.append("- exported with " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    return "\n".join(filter(None, lines))


def _shown(value: Any) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _use(cohort: Cohort, what: Exported, names: Sequence[str]) -> Iterator[str]:
    """How each of the exported files called `names` is used."""
    record = cohort.record()
    pictures = not any(record[name] is None for name in ("image_shape", "mean", "std"))
    classifies = what.output != "features"
    own = not all(cohort.models[k] for k in what.chosen)
    for name in names:
        _, suffix = os.path.splitext(name)
        if suffix == ".safetensors":
            peers = ", peers=[...]" if own else ""
            call = "print(model.predict(['image.png'], top=5))"
            if not classifies:
                call = "print(model(model.preprocess('image.png')[None]))"
            if not pictures:
                call = "print(model(batch))  # prepared as in training"
            yield "With fastdml:"
            yield _code(["import fastdml", "", f"model = fastdml.load({name!r}{peers})", call])
            if not own:
                yield f"Without, in plain torch, beside the files `{name}` and `model_*.py`:"
                yield _code(plain_torch(cohort, what, name))
        elif suffix == ".pt2":
            yield "In plain torch, of the program:"
            yield _code(plain_torch(cohort, what, name))
        else:
            yield "With ONNX Runtime:"
            yield _code(plain_torch(cohort, what, name))
    if pictures and not (own and all(name.endswith(".safetensors") for name in names)):
        yield (
            "The lines without fastdml prepare images of 8 bits a channel. Grey of 16 bits fastdml "
            "scales to 8 first; Pillow's `convert` would clip it to white."
        )


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def plain_torch(cohort: Cohort, what: Exported, name: str) -> list[str]:
    """The lines that run an exported file called `name` on image.png without fastdml."""
    load, run, imports = _loading(cohort, what, name)
    prepare, more = _preparing(cohort)
    result = f"{run}.softmax(1)" if what.output == "logits" else run
    shown = f"{result}.topk(min(5, {cohort.num_classes}))" if what.output != "features" else result
    third = sorted({*imports, *more}, key=lambda i: (i.startswith("from model_"), i[0] == "f", i))
    return [
        *third,
        "",
        *load,
        *prepare,
        "with torch.inference_mode():",
        f"    print({shown})",
    ]


def _loading(cohort: Cohort, what: Exported, name: str) -> tuple[list[str], str, list[str]]:
    """Lines that load a file, the call that runs it on `image`, and the imports."""
    if name.endswith(".onnx"):
        call = "torch.from_numpy(session.run(None, {'images': image[None].numpy()})[0])"
        lines = [f"session = onnxruntime.InferenceSession({name!r})"]
        return lines, call, ["import onnxruntime", "import torch"]
    if name.endswith(".pt2"):
        lines = [f"model = torch.export.load({name!r}).module()"]
        return lines, "model(image[None])", ["import torch"]
    k = what.chosen[0]
    module = "model_ensemble" if what.ensemble else module_name(k, cohort.names[k])
    lines = ["model = build().eval()", f"model.load_state_dict(load_file({name!r}))"]
    imports = ["import torch", "from safetensors.torch import load_file"]
    features = what.output == "features" and not what.ensemble
    call = "model.embed(image[None])" if features else "model(image[None])"
    return lines, call, [*imports, f"from {module} import build"]


def _preparing(cohort: Cohort) -> tuple[list[str], list[str]]:
    """Lines that make `image` of image.png as evaluation during training did, and the imports."""
    record = cohort.record()
    shape, mean, std = record["image_shape"], record["mean"], record["std"]
    if shape is None:
        return ["image = torch.zeros(1)  # prepared as in training"], []
    channels, height, width = shape
    if mean is None or std is None or channels not in (1, 3):
        return [
            f"image = torch.zeros({channels}, {height}, {width})  # normalised as in training"
        ], []
    mode = "RGB" if channels == 3 else "L"
    lines = [f"image = ImageOps.exif_transpose(Image.open('image.png')).convert({mode!r})"]
    imports = ["from PIL import Image, ImageOps", "from torchvision.transforms import v2"]
    steps = []
    interpolated = ""
    if record["resize"] == "stretch":
        stored = tuple(record["stored"] or STORED)
        lines.append(f"image = image.resize({stored[::-1]}, Image.Resampling.BILINEAR)")
        if (height, width) != stored:
            interpolated = f"v2.Resize([{height}, {width}], antialias=False), "
    elif height == width:
        steps = [f"v2.Resize({height})", f"v2.CenterCrop({height})"]
    else:
        lines += [
            f"size = (max({width}, int({height} * image.width / image.height)), "
            f"max({height}, int({width} * image.height / image.width)))",
            "image = image.resize(size, Image.Resampling.BILINEAR)",
        ]
        steps = [f"v2.CenterCrop([{height}, {width}])"]
    first = ", ".join([*steps, "v2.PILToTensor()"])
    lines += [
        f"prepare = v2.Compose([{first}, v2.ToDtype(torch.float32),",
        f"                      {interpolated}v2.Normalize({mean}, {std})])",
        "image = prepare(image)",
    ]
    return lines, imports
