"""Peers as files for other programs: safetensors, ONNX, or a program of torch.export. What a file
computes is compared with the peer before the file gets its name.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastdml import export_check
from fastdml.cohort_files import peer_file
from fastdml.errors import InputError, one_line, require
from fastdml.exported_weights import module_name, to_safetensors
from fastdml.files import Staged, partial, writing
from fastdml.models import standalone
from fastdml.names import advice
from fastdml.paths import expanded
from fastdml.peer_groups import check_one_ensemble
from fastdml.peer_outputs import (
    Embedding,
    Ensemble,
    FeatureEnsemble,
    full_precision,
    has_head,
    peer_numbers,
)

if TYPE_CHECKING:
    from fastdml.cohort import Cohort

logger = logging.getLogger(__name__)

Format = Literal["safetensors", "onnx", "torch-export"]

SUFFIXES: dict[str, str] = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
ENSEMBLE = "ensemble"


class Exported(NamedTuple):
    """What one file holds."""

    stem: str  # of the file's name
    name: str  # for messages
    chosen: list[int]  # the peers within
    ensemble: bool
    output: str  # what a call gives: logits, features or probabilities


def export(
    cohort: Cohort,
    folder: str | os.PathLike,
    example: Tensor | None,
    format: Format,
    peer: str | int,
) -> list[Path]:
    """Writes peers in evaluation mode: see `Cohort.export`."""
    check_format(format)
    if format == "onnx":
        require("onnx", "onnx")
        require("onnxscript", "onnx")
    if format == "safetensors":
        cohort.check_savable()
    record = {name: value for name, value in cohort.record().items() if value is not None}
    images = _example(cohort, example, needed=format != "safetensors")
    whats = exported(cohort, peer)
    return [_write(cohort, what, folder, images, format, record) for what in whats]


def exported(cohort: Cohort, peer: str | int) -> list[Exported]:
    """What files `peer`, as for `Cohort.export`, means. Raises InputError where it means none."""
    if peer == "all":
        return [_one_peer(cohort, k) for k in range(len(cohort))]
    chosen = peer_numbers(cohort.names, peer)
    if peer != ENSEMBLE:
        return [_one_peer(cohort, chosen[0])]
    check_one_ensemble(cohort)
    output = "features" if all(map(has_head, cohort.peers)) else "probabilities"
    return [Exported(ENSEMBLE, "the ensemble", chosen, True, output)]


def _one_peer(cohort: Cohort, k: int) -> Exported:
    name = cohort.names[k]
    output = "features" if has_head(cohort.peers[k]) else "logits"
    return Exported(Path(peer_file(k, name)).stem, f"peer {name}", [k], False, output)


def check_format(format: str) -> None:
    """Raises InputError for a format that there is not, with the nearest."""
    if format == "torch":
        raise InputError("the format torch is now called torch-export: give torch-export")
    if format not in SUFFIXES:
        raise InputError(f"unknown format {format!r}; {advice(format, get_args(Format))}")


def _network(cohort: Cohort, what: Exported) -> nn.Module:
    """From images to `what.output`: copies of the peers on the CPU, in evaluation mode."""
    peers = []
    for k in what.chosen:
        peer = copy.deepcopy(cohort.peers[k]).to("cpu").to(memory_format=torch.contiguous_format)
        peers.append(full_precision(peer).eval())
    features = what.output == "features"
    if what.ensemble:
        return (FeatureEnsemble if features else Ensemble)(peers).eval()
    return Embedding(peers[0]).eval() if features else peers[0]


def _write(
    cohort: Cohort,
    what: Exported,
    folder: str | os.PathLike,
    images: Tensor | None,
    format: Format,
    record: dict[str, Any],
) -> Path:
    path = expanded(folder) / (what.stem + SUFFIXES[format])
    texts: dict[str, str] = {}  # files of Python beside the weights
    network = _network(cohort, what)
    try:
        if format == "safetensors":
            data = to_safetensors(cohort, what.chosen, what.ensemble, what.output)
            texts = _architectures(cohort, what, network)
        else:
            assert images is not None, "the example of these formats is needed"
            write = _onnx if format == "onnx" else _torch_program
            data = write(network, images, what.output, record)
    except Exception as error:  # anything that a peer's code may raise, and the compiler
        if isinstance(error, InputError):
            raise
        size = "" if images is None else f" for images (N, {_numbers(images.shape[1:])})"
        raise InputError(f"{what.name} cannot be exported{size}: {one_line(error)}") from error
    with writing(path), Staged() as staged:
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            staged.write(path.parent / name, text.encode())
        staged.write(path, data)
        del data
        check = export_check.Check(network, what.name, path.name, images, record)
        found = check.run(format, partial(path), cohort, what.chosen, texts)
    logger.info(found)
    return path


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _example(cohort: Cohort, example: Tensor | None, needed: bool) -> Tensor | None:
    """Two images on the CPU: a batch of one row would be taken as fixed."""
    if example is None:
        shape = cohort.record()["image_shape"]
        if shape is None and needed:
            raise InputError(
                "nothing says what images these peers take: give example=, a tensor "
                f"(N, {cohort.in_channels}, H, W)"
            )
        return None if shape is None else torch.zeros(2, *shape)
    found = tuple(example.shape) if isinstance(example, Tensor) else (type(example).__name__,)
    own = not any(cohort.models)  # modules take what they like
    of_images = own or (len(found) == 4 and found[1] == cohort.in_channels)
    if len(found) < 2 or not found[0] or not of_images:
        raise InputError(f"example must be images (N, {cohort.in_channels}, H, W), not {found}")
    return example.detach().cpu()[:1].expand(2, *found[1:]).clone()


def _onnx(network: nn.Module, images: Tensor, output: str, record: dict[str, Any]) -> bytes:
    program = torch.onnx.export(
        network, (images,), input_names=["images"], output_names=[output],
        dynamic_shapes=({0: "batch"},), dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None, "the exporter with dynamo=True returns a program"
    model = program.model_proto
    for name, value in record.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    return model.SerializeToString()


def _torch_program(
    network: nn.Module, images: Tensor, output: str, record: dict[str, Any]
) -> bytes:
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(
        program, buffer, extra_files={"images.json": json.dumps({"output": output, **record})}
    )
    return buffer.getvalue()


def _architectures(cohort: Cohort, what: Exported, network: nn.Module) -> dict[str, str]:
    """By name, the files of Python that make the networks which exported weights are loaded into:
    see `models.standalone`. Without those of modules, which nothing here can make."""
    texts = {}
    for k in what.chosen:
        model, name = cohort.models[k], cohort.names[k]
        if model is not None:
            size, head = cohort.image_size, cohort.head
            spec = standalone.Spec(model, cohort.num_classes, cohort.in_channels, head, size)
            text = standalone.module_source(spec, cohort.peers[k])
            texts[f"{module_name(k, name)}.py"] = text
    if what.ensemble and len(texts) == len(what.chosen):
        modules = [module_name(k, cohort.names[k]) for k in what.chosen]
        texts[f"model_{ENSEMBLE}.py"] = standalone.ensemble_source(type(network), modules)
    return texts
