"""How alike the features of the peers are: linear centred kernel alignment.

CKA (Kornblith et al., "Similarity of neural network representations revisited", 2019) compares
which images two networks find alike: 1 for features that differ by a rotation and a factor, 0 for
features that have nothing to do with each other. The plain estimate is too high where there are
fewer images than features, and cannot be put together from batches; the debiased one (Song et al.,
"Feature selection via dependence maximization", 2012) can, as a mean over batches (Nguyen et al.,
"Do wide and deep networks learn the same things?", 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdml.analysis.networks import (
    Models,
    Networks,
    device_of,
    fixed_batches,
    in_precision_of,
    networks,
    rows_of,
)
from fastdml.analysis.plots import drawn, heat_map
from fastdml.arguments import listed, numbers, of_kind
from fastdml.errors import InputError
from fastdml.eval_mode import evaluating
from fastdml.names import advice
from fastdml.peer_outputs import has_head
from fastdml.report.analysis_file import Result

FEATURES = "features"  # what peers are compared by where no layers are named
FEWEST = 4  # images that the debiased estimate needs


@dataclass(frozen=True)
class KernelAlignment(Result):
    """Of K networks at L layers."""

    peers: tuple[str, ...]
    layers: tuple[str, ...]
    alignment: np.ndarray  # (L, K, K) float64, symmetric, 1 on the diagonals
    images: int
    debiased: bool


def linear_cka(x: Any, y: Any, *, debiased: bool = False) -> float:
    """Linear CKA of two features of the same N images, (N, D) and (N, E) arrays or tensors, in
    float64. debiased: may be slightly below 0, and needs 4 images. NaN where a feature is the same
    for all images. Raises InputError."""
    a, b = (
        torch.from_numpy(numbers(name, value).astype(np.float64))
        for name, value in (("x", x), ("y", y))
    )
    if a.dim() != 2 or b.dim() != 2 or len(a) != len(b):
        raise InputError(
            f"features must be (N, D) and (N, E) of the same images, not {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    if debiased and len(a) < FEWEST:
        raise InputError(f"the debiased alignment needs {FEWEST} images, not {len(a)}")
    kernels = [_kernel(a, debiased), _kernel(b, debiased)]
    return float(_normalised(_pairs(kernels, debiased))[0, 1])


def kernel_alignment(
    models: Models,
    batches: Any,
    *,
    layers: Sequence[str | Sequence[str]] | None = None,
    debiased: bool = True,
) -> KernelAlignment:
    """Linear CKA between the features of all networks on the images of `batches`, in evaluation
    mode.

    batches: of (inputs, labels), as `fixed_batches` takes them; the labels are not looked at.
    layers: names of modules, as `named_modules` has them, whose outputs are compared, flattened to
    (N, D); for networks of several architectures a list of one name each in place of a name. None:
    what the last linear layer gets, or with a re-identification head what `embed` gives. debiased:
    the mean over batches of at least 4 images, smaller ones are left out, which keeps N x N numbers
    of a batch in memory; else the plain one of all images at once. Raises InputError.
    """
    found = networks(models)
    names, taps = _taps(found, layers)
    data = fixed_batches(batches, device_of(found.modules[0]))
    K, L = len(found.modules), len(names)
    sums = torch.zeros(L, K, K, dtype=torch.float64)
    images = 0
    if debiased:
        for inputs, _ in data:
            if len(inputs) < FEWEST:
                continue
            images += len(inputs)
            for at, features in enumerate(_features(found, taps, inputs)):
                kernels = [_kernel(x, debiased) for x in features]
                sums[at] += len(inputs) * _pairs(kernels, debiased).cpu()
        if not images:
            raise InputError(f"the debiased alignment needs a batch of {FEWEST} images")
    else:
        images = rows_of(data)
        parts = [[[x.cpu() for x in xs] for xs in _features(found, taps, i)] for i, _ in data]
        for at in range(L):
            whole = [torch.cat([part[at][k] for part in parts]) for k in range(K)]
            sums[at] = _pairs([_kernel(x, debiased) for x in whole], debiased)
    alignment = torch.stack([_normalised(s) for s in sums]).numpy()
    return KernelAlignment(found.names, names, alignment, images, debiased)


def _kernel(x: Tensor, debiased: bool) -> Tensor:
    """(N, N) float64 inner products of features (N, D): with a diagonal of 0, or centred."""
    x = x.double()
    # Centring changes neither, and keeps digits. What is the same for all images becomes 0, which
    # its mean, rounded, would miss.
    x = torch.where((x == x[:1]).all(0), 0.0, x - x.mean(0))
    kernel = x @ x.T
    return kernel.fill_diagonal_(0) if debiased else kernel


def _pairs(kernels: Sequence[Tensor], debiased: bool) -> Tensor:
    """(K, K): the Hilbert-Schmidt independence criterion of every pair, up to a factor."""
    flat = torch.stack([kernel.flatten() for kernel in kernels])
    found = flat @ flat.T
    if debiased:
        n = len(kernels[0])
        rows = torch.stack([kernel.sum(1) for kernel in kernels])  # (K, N)
        totals = rows.sum(1)
        found = found + torch.outer(totals, totals) / ((n - 1) * (n - 2))
        found = (found - 2 / (n - 2) * (rows @ rows.T)) / (n * (n - 3))
    return found


def _normalised(pairs: Tensor) -> Tensor:
    own = pairs.diagonal()
    own = torch.where(own > 0, own, math.nan).sqrt()
    return pairs / torch.outer(own, own)


# The module that is looked at, and whether its input or its output is; None: `embed` is called.
Tap = tuple[nn.Module, bool] | None


def _taps(
    found: Networks, layers: Sequence[str | Sequence[str]] | None
) -> tuple[tuple[str, ...], list[list[Tap]]]:
    """The names of the layers, and for each what is looked at in each network."""
    if layers is None:
        return (FEATURES,), [[_last(*pair) for pair in zip(*found, strict=True)]]
    layers = listed("layers", layers, "names of modules")
    if not layers:
        raise InputError("layers must be a list of names of modules, not an empty one")
    taps: list[list[Tap]] = []
    titles = []
    for layer in layers:
        if isinstance(layer, str):
            wanted = [layer] * len(found.names)
        else:
            wanted = listed("a layer", layer, "names, one a network")
        if len(wanted) != len(found.names):
            raise InputError(f"{layer} names {len(wanted)} modules for {len(found.names)} networks")
        row: list[Tap] = []
        for name, module, path in zip(*found, wanted, strict=True):
            known = dict(module.named_modules())
            if not isinstance(path, str) or path not in known:
                there = advice(str(path), known, others="its named_modules() has the names")
                raise InputError(f"{name} has no module {path!r}; {there}")
            row.append((known[path], False))
        taps.append(row)
        titles.append(layer if isinstance(layer, str) else " / ".join(wanted))
    return tuple(titles), taps


def _last(name: str, module: nn.Module) -> Tap:
    if has_head(module):
        return None
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise InputError(f"{name} has no linear layer, whose inputs are features: name layers")
    return linear[-1], True


def _features(found: Networks, taps: Sequence[Sequence[Tap]], inputs: Tensor) -> list[list[Tensor]]:
    """[L][K] features (N, D) of a batch."""
    rows: list[list[Tensor]] = [[] for _ in taps]
    with torch.inference_mode():
        for k, (name, module) in enumerate(zip(*found, strict=True)):
            with evaluating(module), _looking([row[k] for row in taps]) as seen:
                anyone: Any = module
                run = anyone.embed if taps[0][k] is None else module
                embedded = run(in_precision_of(module, inputs))
            for at, row in enumerate(taps):
                value = embedded if row[k] is None else seen.get(at)
                if not isinstance(value, Tensor) or value.shape[:1] != inputs.shape[:1]:
                    raise InputError(
                        f"a layer of {name} that is compared gives no tensor (N, ...), or is not "
                        "used: name others"
                    )
                rows[at].append(value.flatten(1))
    return rows


@contextmanager
def _looking(taps: Sequence[Tap]) -> Iterator[dict[int, Any]]:
    """What the modules got or gave in the block, by the place of the tap."""
    seen: dict[int, Any] = {}

    def keep(at: int, value: Any) -> None:
        seen[at] = value[0] if isinstance(value, (tuple, list)) and value else value

    def got(at: int, module: nn.Module, args: Any) -> None:
        keep(at, args)

    def gave(at: int, module: nn.Module, args: Any, out: Any) -> None:
        keep(at, out)

    with ExitStack() as stack:
        for at, tap in enumerate(taps):
            if tap is None:
                continue
            module, is_input = tap
            if is_input:
                stack.enter_context(module.register_forward_pre_hook(partial(got, at)))
            else:
                stack.enter_context(module.register_forward_hook(partial(gave, at)))
        yield seen


def plot_kernel_alignment(
    found: KernelAlignment, where: Any, layer: str | None = None
) -> Path | None:
    """The alignment of every pair of networks at a layer, by default the last, as a heat map.
    where: as of `drawn`. Raises InputError for a layer that is not there."""
    of_kind("found", found, KernelAlignment, "kernel_alignment")
    if layer is not None and layer not in found.layers:
        raise InputError(f"there is no layer {layer!r}; {advice(str(layer), found.layers)}")
    at = len(found.layers) - 1 if layer is None else found.layers.index(layer)

    def draw(axes: Any) -> None:
        heat_map(axes, found.alignment[at], found.peers, found.peers, "{:.2f}")
        axes.set_title(f"alignment of {found.layers[at]}", loc="left")

    return drawn(where, draw, height=0.9 + 0.4 * len(found.peers))
