"""The check that a stacked network computes what its peers compute, forward and backward.

It runs copies of both in float64, where rounding is far smaller than any mistake. Noise is added to
weights and images, so that the zeros and ones of a fresh network (the last BatchNorm of a block,
running statistics) hide no mistake. Layers are in the modes that they are in now, since networks
branch on them. The peers, their statistics and all random generators are left as they were.

Costs, once for each set of modes and size of images, two passes of a few images through each
peer, and memory for two copies of all peers in float64.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdml.engine.guards import Generators
from fastdml.engine.stack import Stack, StackedDropout
from fastdml.engine.stackable import INTERNAL, Contents, unknown
from fastdml.errors import InputError
from fastdml.torch_private import DispatchMode

IMAGES = 4
TOLERANCE = 1e-5  # of a tensor's norm: a network may compute a part in float32
NOISE = 0.1  # of a tensor's root mean square


class Plain(DispatchMode):
    """Within it, an operation that draws random numbers, reads values on the host or communicates
    with other processes raises."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise unknown(f"a source of random numbers but nn.Dropout ({func.name()})")
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}:
            raise unknown(f"a model that looks at values ({func.name()})")
        if "c10d" in func.namespace:
            raise unknown(f"a model that talks to other processes ({func.name()})")
        return func(*args, **(kwargs or {}))


def prove(stack: type[Stack], peers: Sequence[nn.Module], images: Tensor) -> None:
    """Raises Unstackable where the stack's outputs or gradients differ from the peers' on such
    images. Waits for the device."""
    generators = Generators(images.device)
    try:
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            _prove(stack, peers, images[:IMAGES])
    finally:
        generators.restore()


def _prove(stack: type[Stack], peers: Sequence[nn.Module], images: Tensor) -> None:
    peer = getattr(peers[0], "peer", peers[0])
    way = unknown(f"the way that {type(peer).__name__} combines its layers")
    copies = [_generic_copy(peer) for peer in peers]
    one = stack(copies)
    _fix_dropout(copies, one)
    x = _generic(images) if images.is_floating_point() else images
    modules = [m for peer in copies for m in peer.modules()]
    states, contents = [(m, _python_state(m)) for m in modules], Contents(modules)
    seen, seen_by_one = x.clone(), x.clone()

    outputs = _run(copies, seen)
    if not all(isinstance(t, Tensor) for out in outputs for t in out):
        raise unknown(f"outputs of type {type(outputs[0][0]).__name__}")
    seeds = [[torch.rand_like(t) for t in out] for out in outputs]
    try:
        grads = [
            _gradients(out, list(peer.parameters()), own)
            for out, peer, own in zip(outputs, copies, seeds, strict=True)
        ]
    except RuntimeError as error:
        raise _failed(error) from None
    try:
        with Plain():
            found = _tuple(one(seen_by_one))
        joined = [torch.stack(own) for own in zip(*outputs, strict=True)]
        seed = [torch.stack(own) for own in zip(*seeds, strict=True)]
        if any(a.shape != b.shape for a, b in zip(found, joined, strict=True)):
            raise way
        found_grads = _gradients(found, list(one.parameters()), seed)
    except InputError:
        raise
    except Exception:  # shapes that do not fit, attributes that a stacked layer lacks
        raise way from None
    fits = all(map(_close, found, joined)) and torch.equal(seen, seen_by_one)
    floor = TOLERANCE**2 * sum(float(g.norm()) for own in grads for g in own.values())
    for layer in one.layers():
        for stacked, own in layer.shared.values():
            if isinstance(stacked, nn.Parameter):
                expected = [g.get(id(w)) for g, w in zip(grads, own, strict=True)]
                fits = fits and _parts_close(found_grads.get(id(stacked)), expected, floor)
            else:
                fits = fits and _parts_close(stacked, own, floor)
    if not fits:
        raise way
    for m, state in states:
        if _python_state(m) != state:
            raise unknown(f"a model that changes its attributes ({type(m).__name__})")
    if contents.changed():
        raise unknown(f"a model that changes what its attributes hold ({type(peer).__name__})")


def _run(peers: Sequence[nn.Module], x: Tensor) -> list[tuple[Any, ...]]:
    """The peers' outputs; refuses peers that draw random numbers."""
    generators = Generators(x.device)
    try:
        with Plain():
            outputs = [_tuple(peer(x)) for peer in peers]
    except InputError:
        raise
    except Exception as error:
        raise _failed(error) from None
    if generators.moved():  # numpy's or Python's
        raise unknown("a source of random numbers but nn.Dropout")
    return outputs


def _failed(error: Exception) -> InputError:
    return unknown(f"peers that fail in float64 ({_in_short(error)})")


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _generic_copy(peer: nn.Module) -> nn.Module:
    try:
        twin = copy.deepcopy(peer).double().requires_grad_(True)
    except Exception as error:
        raise unknown(f"peers that cannot be copied ({_in_short(error)})") from None
    with torch.no_grad():
        for w in twin.parameters():
            w.copy_(_generic(w))
        for t in twin.buffers():
            if t.is_floating_point():  # running variances stay positive
                t.nan_to_num_(0, 0, 0).add_(NOISE * torch.rand_like(t))
    return twin


def _generic(t: Tensor) -> Tensor:
    """`t` in float64 with noise added and infinities replaced: a value without special
    structure."""
    t = t.detach().double().nan_to_num(0, 0, 0)
    scale = t.square().mean().sqrt()
    return t + NOISE * torch.where(scale > 0, scale, 1) * torch.randn_like(t)


def _fix_dropout(copies: Sequence[nn.Module], one: Stack) -> None:
    """Replaces dropout by a multiplication with a factor of each peer's own. Nothing then draws but
    what is not dropout, and a layer applied to the wrong peer changes the result."""
    for k, peer in enumerate(copies):
        for m in peer.modules():
            if type(m) is nn.Dropout:
                vars(m)["forward"] = partial(_dropped, m, k)
    for layer in one.layers():
        if isinstance(layer, StackedDropout):
            layer.instead = _masked


def _dropped(dropout: nn.Dropout, k: int, x: Tensor) -> Tensor:
    if not dropout.training:
        return x
    return x.mul_(1 + k) if dropout.inplace else _masked(x, k)


def _masked(x: Tensor, k: int) -> Tensor:
    return x * (1 + k)


def _tuple(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else (out,)


def _python_state(m: nn.Module) -> dict[str, tuple[int, int | None]]:
    """Identity and length of the value of each attribute, by which a change in a pass shows."""
    return {
        name: (id(value), len(value) if isinstance(value, (list, dict, set, deque)) else None)
        for name, value in vars(m).items()
        if name not in INTERNAL
    }


def _gradients(
    outputs: Sequence[Tensor], weights: list[Tensor], seeds: Sequence[Tensor]
) -> dict[int, Tensor]:
    """Gradients by id of the weight, for those weights that the outputs depend on."""
    pairs = [(t, g) for t, g in zip(outputs, seeds, strict=True) if t.requires_grad]
    if not pairs:
        return {}
    tensors, seeds = zip(*pairs, strict=True)
    grads = torch.autograd.grad(tensors, weights, seeds, allow_unused=True)
    return {id(w): g for w, g in zip(weights, grads, strict=True) if g is not None}


def _parts_close(whole: Tensor | None, parts: Sequence[Tensor | None], floor: float) -> bool:
    known = [t for t in parts if t is not None]
    if whole is None or len(known) < len(parts):
        return whole is None and not known
    pairs = zip(whole.chunk(len(known)), known, strict=True)
    return all(_close(a.reshape(b.shape), b, floor) for a, b in pairs)


def _close(found: Tensor, expected: Tensor, floor: float = 0.0) -> bool:
    error = (found.double() - expected.double()).norm()
    return bool(error <= TOLERANCE * expected.double().norm() + floor)
