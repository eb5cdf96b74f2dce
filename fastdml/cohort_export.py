"""Peers as files for other programs: ONNX, or a program of torch.export."""

from __future__ import annotations

import copy
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from fastdml.cohort_files import peer_file
from fastdml.errors import InputError, one_line, require
from fastdml.files import write_atomically, writing
from fastdml.models import ReidModel
from fastdml.paths import expanded

if TYPE_CHECKING:
    from fastdml.cohort import Cohort

Format = Literal["onnx", "torch"]

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


def export(
    cohort: Cohort, folder: str | os.PathLike, example: Tensor | None, format: Format
) -> list[Path]:
    """Writes each peer in evaluation mode: see `Cohort.export`."""
    if format not in SUFFIXES:
        raise InputError(f"format must be 'onnx' or 'torch', not {format!r}")
    if format == "onnx":
        require("onnx", "onnx")
        require("onnxscript", "onnx")
    images = _example(cohort, example)
    record = {name: value for name, value in cohort.record().items() if value is not None}
    write = _onnx if format == "onnx" else _torch_program
    paths = []
    for k, (name, peer) in enumerate(zip(cohort.names, cohort.peers, strict=True)):
        peer = copy.deepcopy(peer).to("cpu").to(memory_format=torch.contiguous_format).eval()
        output = "logits"
        if _has_head(peer):
            peer, output = _Embedding(peer).eval(), "features"
        try:
            data = write(peer, images, output, record)
        except Exception as error:  # anything that a peer's code may raise, and the compiler
            raise InputError(
                f"peer {name} cannot be exported for images (N, "
                f"{', '.join(map(str, images.shape[1:]))}): {one_line(error)}"
            ) from error
        path = expanded(folder) / (Path(peer_file(k, name)).stem + SUFFIXES[format])
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        paths.append(path)
    return paths


def _example(cohort: Cohort, example: Tensor | None) -> Tensor:
    """Two images on the CPU: a batch of one row would be taken as fixed."""
    if example is None:
        shape = cohort.record()["image_shape"]
        if shape is None:
            raise InputError(
                "nothing says what images these peers take: give example=, a tensor "
                f"(N, {cohort.in_channels}, H, W)"
            )
        return torch.zeros(2, *shape)
    found = tuple(example.shape) if isinstance(example, Tensor) else (type(example).__name__,)
    own = not any(cohort.models)  # modules take as many channels as they like
    if len(found) != 4 or not found[0] or not (own or found[1] == cohort.in_channels):
        raise InputError(f"example must be images (N, {cohort.in_channels}, H, W), not {found}")
    return example.detach().cpu()[:1].repeat(2, 1, 1, 1)


class _Embedding(nn.Module):
    """Exported in place of a peer with a re-identification head: its features."""

    def __init__(self, peer: nn.Module) -> None:
        super().__init__()
        self.peer = peer

    def forward(self, images: Tensor) -> Tensor:
        return cast(ReidModel, self.peer).embed(images)


def _has_head(peer: nn.Module) -> bool:
    """Both methods: networks of all kinds have an `embed` that means something else."""
    return all(callable(getattr(peer, name, None)) for name in ("embed", "logits_and_features"))


def _onnx(peer: nn.Module, images: Tensor, output: str, record: dict[str, Any]) -> bytes:
    program = torch.onnx.export(
        peer, (images,), input_names=["images"], output_names=[output],
        dynamic_shapes=({0: "batch"},), dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None, "the exporter with dynamo=True returns a program"
    model = program.model_proto
    for name, value in record.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    return model.SerializeToString()


def _torch_program(peer: nn.Module, images: Tensor, output: str, record: dict[str, Any]) -> bytes:
    batch = torch.export.Dim("batch")
    program = torch.export.export(peer, (images,), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(
        program, buffer, extra_files={"images.json": json.dumps({"output": output, **record})}
    )
    return buffer.getvalue()
