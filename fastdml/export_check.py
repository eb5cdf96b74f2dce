"""Whether an exported file computes what its peer computes, found by running it."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdml.cohort_files import load_peer
from fastdml.errors import InputError, MissingExtra, one_line, require
from fastdml.exported_weights import module_name, read_safetensors
from fastdml.peer_outputs import Embedding, Ensemble, FeatureEnsemble

if TYPE_CHECKING:
    from fastdml.cohort import Cohort

BATCHES = (1, 2, 5)  # images
LARGEST = 1e-4  # difference of an output, where outputs are of the size of logits
RELATIVE = 1e-5  # of the largest output, where outputs are larger than 10


class Check:
    """network: the peer, on the CPU. images: of the size exported for, (N, channels, H, W); None
    where it is unknown, as of peers that take no images. record: of `Cohort.record`."""

    def __init__(
        self,
        network: nn.Module,
        name: str,
        file: str,
        images: Tensor | None,
        record: Mapping[str, Any],
    ) -> None:
        self.network, self.name, self.file = network, name, file
        self.batches = [] if images is None else [_drawn(n, images, record) for n in BATCHES]

    def run(
        self,
        format: str,
        path: Path,
        cohort: Cohort,
        chosen: Sequence[int],
        texts: Mapping[str, str],
    ) -> str:
        """Runs what lies at `path`; says what was compared, with the largest difference found.
        Raises InputError where an output differs by more than rounding. texts: the files of Python
        that are written beside weights."""
        try:
            if format == "safetensors":
                return self._weights(path, cohort, chosen, texts)
            if format == "onnx":
                return self._onnx(path)
            program = torch.export.load(io.BytesIO(path.read_bytes())).module()
            return self._compared(program, "run by torch.export")
        except (InputError, OSError):
            raise
        except Exception as error:  # of a runtime, or of what a peer's code may raise
            raise InputError(
                f"{self.file}, just exported, does not run: {one_line(error)}; it is not kept"
            ) from error

    def _onnx(self, path: Path) -> str:
        try:
            runtime: Any = require("onnxruntime", "onnx")
        except MissingExtra as error:
            return f"{self.file} is not verified: {error}"
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        session = runtime.InferenceSession(path.read_bytes(), options, providers=providers)

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

        return self._compared(run, "run by ONNX Runtime")

    def _weights(
        self, path: Path, cohort: Cohort, chosen: Sequence[int], texts: Mapping[str, str]
    ) -> str:
        """Weights are compared bit for bit. Of peers that files of Python make, what these make of
        the weights is run too."""
        _, weights = read_safetensors(path)
        for place, k in enumerate(chosen):
            own = f"peers.{place}."
            found = {n.removeprefix(own): w for n, w in weights.items() if n.startswith(own)}
            for key, value in cohort.peers[k].state_dict().items():
                if not _same(found[key], value.cpu()):
                    raise InputError(f"{self.file}: {key} was not written as it is; not kept")
        made = [f"{module_name(k, cohort.names[k])}.py" for k in chosen]
        if not self.batches or not all(name in texts for name in made):
            return f"{self.file}: read again, weights bit for bit the same"
        peers = []
        for place, name in enumerate(made):
            peer = _module(texts[name]).build().eval()
            own = f"peers.{place}."
            found = {n.removeprefix(own): w for n, w in weights.items() if n.startswith(own)}
            load_peer(peer, self.name, found, path)
            peers.append(peer)
        network: nn.Module = peers[0]
        for kind in (Embedding, Ensemble, FeatureEnsemble):
            if type(self.network) is kind:
                network = kind(peers[0] if kind is Embedding else peers)
        return self._compared(network, "read again")

    def _compared(self, run: Callable[[Tensor], Tensor], how: str) -> str:
        largest = 0.0
        for images in self.batches:
            with torch.inference_mode():
                expected = copy.deepcopy(self.network)(images).float()
            with torch.no_grad():
                found = run(images).float()
            if found.shape != expected.shape:
                raise InputError(
                    f"{self.file} gives {tuple(found.shape)} for {len(images)} images, and "
                    f"{self.name} {tuple(expected.shape)}; it is not kept"
                )
            difference = (found - expected).abs()
            difference[(found == expected) | (found.isnan() & expected.isnan())] = 0
            most = float(difference.max())
            limit = max(LARGEST, RELATIVE * float(expected.abs().max().nan_to_num(0, 0, 0)))
            if not most <= limit:
                raise InputError(
                    f"{self.file} differs from {self.name} by {most:.2g} at {len(images)} images, "
                    f"more than {limit:.2g}; it is not kept"
                )
            largest = max(largest, most)
        sizes = ", ".join(map(str, BATCHES[:-1]))
        return (
            f"{self.file} {how} at batches of {sizes} and {BATCHES[-1]}: outputs differ by at most "
            f"{largest:.1e}"
        )


def _drawn(n: int, images: Tensor, record: Mapping[str, Any]) -> Tensor:
    """n images of random pixels, normalised as the peers' are, where that is known; of inputs that
    are no images, the example."""
    if images.dim() != 4 or not images.is_floating_point():
        return images[:1].expand(n, *images.shape[1:]).clone()
    generator = torch.Generator().manual_seed(n)
    shape = (n, *images.shape[1:])
    mean, std = record.get("mean"), record.get("std")
    if mean is None or std is None or len(mean) != shape[1]:
        return torch.randn(shape, generator=generator)
    # a pixel within two standard deviations of the mean, whatever its units are
    spread = 4 * torch.rand(shape, generator=generator) - 2
    pixels = torch.tensor(mean).view(-1, 1, 1) + spread * torch.tensor(std).view(-1, 1, 1)
    return (pixels.clamp(min=0).round() - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(
        std
    ).view(-1, 1, 1)


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(
        one.contiguous().view(-1).view(torch.uint8), two.contiguous().view(-1).view(torch.uint8)
    )


def _module(text: str) -> ModuleType:
    """A module made from the text of a file, as importing the file would make it."""
    module = ModuleType("fastdml_exported_model")
    sys.modules[module.__name__] = module  # where dataclasses look for the names of their fields
    with contextlib.ExitStack() as stack:
        stack.callback(sys.modules.pop, module.__name__, None)
        exec(compile(text, module.__name__, "exec"), module.__dict__)
    return module
