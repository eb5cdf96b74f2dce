"""What the analyses of networks share: peers by name, batches that are read once, the loss on them,
and weights that come back.

Everything is computed in the precision of the weights, without autocast; losses are summed in
float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdml.arguments import listed, shown
from fastdml.cohort import Cohort
from fastdml.data.image_set import IGNORED
from fastdml.errors import InputError
from fastdml.eval_mode import evaluating
from fastdml.names import unique
from fastdml.peer_outputs import peer_numbers
from fastdml.train.batches import check_batch
from fastdml.train.own_batches import as_tensor, is_arrays

Models: TypeAlias = "Cohort | nn.Module | Sequence[nn.Module]"
Batch: TypeAlias = tuple[Tensor, Tensor]
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ROWS = 500  # of a batch that is cut from arrays


class Networks(NamedTuple):
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    def numbers(self, peers: Sequence[int | str]) -> list[int]:
        """Of the peers that are meant by these names or numbers. Raises InputError."""
        found = [peer_numbers(self.names, peer) for peer in peers]
        if any(len(numbers) != 1 for numbers in found) and len(self.names) > 1:
            raise InputError("peers are meant one by one, and the ensemble has no weights")
        return [numbers[0] for numbers in found]


def networks(models: Models) -> Networks:
    """The peers of a cohort, or networks of one's own, by name. Raises InputError."""
    if isinstance(models, Cohort):
        if models.mesh is not None:
            raise InputError("the peers are spread over a mesh: load them in one process")
        return Networks(tuple(models.names), tuple(models))
    what = "modules of torch, or a Cohort"
    modules = (models,) if isinstance(models, nn.Module) else tuple(listed("models", models, what))
    for module in modules:
        if not isinstance(module, nn.Module):
            raise InputError(f"{module!r} is no network: give modules of torch or a Cohort")
    if not modules:
        raise InputError("there is no network to look at: give at least one")
    return Networks(tuple(unique([type(module).__name__ for module in modules])), modules)


def device_of(module: nn.Module) -> torch.device:
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def same_architecture(a: nn.Module, b: nn.Module) -> bool:
    """Whether they differ in the values of parameters and buffers alone, as far as the names,
    shapes and order of these tell."""
    return _shapes(a) == _shapes(b)


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [(name, tensor.shape) for name, tensor in tensors]


def fixed_batches(batches: Any, device: torch.device) -> list[Batch]:
    """All batches, read once and kept on `device`, so that every network and every change of its
    weights is judged on the same inputs.

    batches: any iterable of (inputs, labels), a pair of arrays (inputs, labels), or a loader of
    `fastdml.data`, of which it is the first epoch. Labels are class indices (N,), -100 where a row
    has none. torch's generator, from which a DataLoader draws, is left as it was. Raises InputError
    for other batches, and where there is none.
    """
    source: Iterable[Any]
    if is_arrays(batches) and as_tensor(batches[1], "labels").dim() == 1:
        inputs, labels = as_tensor(batches[0], "inputs"), as_tensor(batches[1], "labels")
        if inputs.dim() < 1 or len(inputs) != len(labels):
            raise InputError(
                f"inputs of shape {tuple(inputs.shape)} and {len(labels)} labels: give as many"
            )
        source = zip(inputs.split(ROWS), labels.split(ROWS), strict=True)
    elif hasattr(batches, "epoch"):
        source = batches.epoch(0)
    elif hasattr(batches, "__iter__") or hasattr(batches, "__len__"):
        source = batches
    else:
        raise InputError(f"batches must be pairs (inputs, labels), not {shown(batches)}")
    found = []
    with torch.random.fork_rng(devices=[]):
        for step, batch in enumerate(source):
            inputs, labels = check_batch(batch, f"batch {step}")
            if labels.shape != inputs.shape[:1] or labels.is_floating_point():
                raise InputError(
                    f"batch {step}: labels of shape {tuple(labels.shape)} and {labels.dtype} for "
                    f"{len(inputs)} inputs: give class indices ({len(inputs)},)"
                )
            found.append((inputs.detach().to(device), labels.to(device, torch.int64)))
    if not found:
        raise InputError("there are no batches: a generator gives its batches once, give a list")
    return found


def in_precision_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs that are floats in the precision of the network's first weights."""
    if not inputs.is_floating_point():
        return inputs
    weight = next((p for p in model.parameters() if p.is_floating_point()), inputs)
    return inputs.to(weight.dtype)


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """What the network says of a batch: its output (N, C), or the attribute `logits` of it, as the
    models of `transformers` have. float64. Raises InputError for an output of another kind."""
    out = model(in_precision_of(model, inputs))
    out = getattr(out, "logits", out)
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(inputs):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(
            f"{type(model).__name__} gives {got} for {len(inputs)} inputs, not logits (N, C): wrap "
            "it in a module that returns its logits"
        )
    return out.double()


class Score(NamedTuple):
    loss: float  # mean cross-entropy, nats
    accuracy: float  # 0 to 1


def score(model: nn.Module, batches: Sequence[Batch]) -> Score:
    """Mean over the rows that have a label, of a network in the mode that it is in; an answer that
    is NaN or infinite is wrong. Raises InputError for a label that is no class."""
    sums = torch.zeros(3, dtype=torch.float64, device=batches[0][0].device)
    with torch.inference_mode():
        for inputs, labels in batches:
            z = logits_of(model, inputs)
            known = labels != IGNORED
            if bool((known & ((labels < 0) | (labels >= z.shape[1]))).any()):
                raise InputError(
                    f"labels are {int(labels.min())} to {int(labels.max())}, and "
                    f"{type(model).__name__} tells {z.shape[1]} classes apart"
                )
            loss = F.cross_entropy(z, labels, ignore_index=IGNORED, reduction="sum")
            largest, said = z.max(1)
            right = (said == labels) & largest.isfinite()
            sums += torch.stack([loss, right.sum().double(), known.sum()])
    loss, hits, rows = sums.tolist()
    if not rows:
        raise InputError("no row of the batches has a label: the loss needs some")
    return Score(loss / rows, hits / rows)


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Within it `model` is in evaluation mode, and its parameters and buffers may be changed in
    place. However the block ends, each of them has its bits again, and each layer its mode."""
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        copies = [tensor.detach().clone() for tensor in tensors]
    with evaluating(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, copy in zip(tensors, copies, strict=True):
                    tensor.copy_(copy)


def reestimate_batch_norm(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Gives each BatchNorm layer the mean over batches of what its inputs' mean and variance are
    with the present weights. Everything else stays in the mode it is in (`torch.optim.swa_utils`
    turns dropout on too). Batches smaller than the largest are left out, since each counts the
    same. Does nothing for a network without running statistics. Raises InputError for batches of
    which a layer gets one value a channel."""
    layers = [m for m in model.modules() if isinstance(m, BATCH_NORM) and m.track_running_stats]
    if not layers:
        return
    rows = max(len(inputs) for inputs, _ in batches)
    before = [(layer.momentum, layer.training) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean of all batches
            layer.train()
        with torch.no_grad():
            for inputs, _ in batches:
                if len(inputs) == rows:
                    model(in_precision_of(model, inputs))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            f"batches of {rows} are too small to estimate BatchNorm on: give larger ones, or "
            'batch_norm="stored"'
        ) from None
    finally:
        for layer, (momentum, training) in zip(layers, before, strict=True):
            layer.momentum, layer.training = momentum, training


def rows_of(batches: Sequence[Batch]) -> int:
    return sum(len(labels) for _, labels in batches)


def filters(weight: Tensor) -> Tensor:
    """The norm of each filter of `weight` (out, ...), in its shape (out, 1, ...). A filter is what
    makes one output: a slice along the first dimension. A vector is one filter."""
    if weight.dim() < 2:
        return weight.float().norm().expand(weight.shape)
    norms = weight.detach().flatten(1).float().norm(dim=1)
    return norms.view(-1, *[1] * (weight.dim() - 1))


def standard_normal(like: Sequence[Tensor], seeds: Sequence[int]) -> list[Tensor]:
    """Standard normal numbers in the shapes, precision and places of these tensors: drawn on the
    CPU, so that every device gets the same."""
    state = int(np.random.SeedSequence(tuple(seeds)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(state)
    draw = partial(torch.randn, generator=generator, device="cpu", dtype=torch.float32)
    return [draw(t.shape).to(t) for t in like]
