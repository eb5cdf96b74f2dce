"""One network in place of K peers of one architecture: K times the channels, as many launches as
one peer.

A copy of the first peer gets layers that hold all K peers side by side in the channels:

    convolution   K * groups groups; the stem, which sees the images once, is one plain convolution
                  with K * C_out outputs
    BatchNorm     over K * C channels, which is exactly BatchNorm of each peer
    linear        one batched product (K, N, F) x (K, F, C)
    shortcuts and concatenations of the models here: a peer at a time, along the channels

Everything between (ReLU, pooling, sums) does not mix channels and stays as it is, so any model of
these layers stacks.

Every stacked weight is the peers' weights one after another along the first dimension. `adopt`
makes the peers' own parameters and buffers views of it, so that nothing is ever copied back: their
state dicts, checkpoints, evaluation and optimizer are those of ordinary modules, always current. A
state dict that was taken before refers to the old memory, and to its values.

Dropout draws its masks a peer at a time: with one such layer a peer they are those of the eager
step, with several they are other masks of the same distribution.

torch.save of one peer's state dict writes the memory of all peers; `Cohort.save` that peer's alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdml.engine.stackable import unknown
from fastdml.models.googlenet import Inception
from fastdml.models.reid_head import GeMPool
from fastdml.models.resnet_cifar import Shortcut
from fastdml.torch_private import buffer_table, child_table, parameter_table, set_child_table


class Stack(nn.Module):
    """x (N, channels, H, W) -> logits (K, N, C) of the peers; a tuple of such tensors for peers
    that return several.

    Made from `peers` it holds copies of their weights; after `adopt` their weights are views of it.
    """

    def __init__(self, peers: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.pairs: list[tuple[nn.Module, nn.Module]] = []  # modules here, and of the first peer
        if peers:
            self.fill(peers)
            self.follow()

    def fill(self, peers: Sequence[nn.Module]) -> None:
        self.K = len(peers)
        done: dict[int, nn.Module] = {}
        self.network = _converted(peers, done)
        self.pairs = [(done[id(m)], m) for m in peers[0].modules()]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = self.network(x)  # (N, K * C)
        if isinstance(out, Tensor):
            return self._apart(out)
        return tuple(self._apart(t) for t in out)

    def _apart(self, t: Tensor) -> Tensor:
        return t.unflatten(1, (self.K, -1)).transpose(0, 1)

    def layers(self) -> Iterator[Layer]:
        return (m for m in self.modules() if isinstance(m, Layer))

    def adopt(self) -> None:
        """Makes the peers' weights views of the stack's, which have the same values."""
        for layer in self.layers():
            for stacked, own in layer.shared.values():
                for t, part in zip(own, stacked.detach().chunk(self.K), strict=True):
                    t.data = part.as_strided(t.shape, t.stride())

    def release(self) -> None:
        """Gives the peers' weights memory of their own again."""
        for layer in self.layers():
            for stacked, own in layer.shared.values():
                memory = stacked.untyped_storage().data_ptr()
                for t in own:
                    if t.untyped_storage().data_ptr() == memory:
                        t.data = t.data.clone()
        self.network, self.pairs = nn.Identity(), []

    def follow(self) -> None:
        """Sets the stack's training flags as the first peer's, and requires_grad as the peers'."""
        for module, own in self.pairs:
            module.__dict__["training"] = own.training
            if isinstance(module, Layer):
                for stacked, weights in module.trained():
                    trained = any(w.requires_grad for w in weights)
                    if stacked.requires_grad != trained:
                        stacked.requires_grad_(trained)

    def share_gradients(self) -> None:
        """Adds to every peer's gradients its part of the stack's; a peer without gradients gets
        views of it, not copies."""
        for layer in self.layers():
            for stacked, own in layer.trained():
                if stacked.grad is None:
                    continue
                for w, grad in zip(own, stacked.grad.chunk(self.K), strict=True):
                    if not w.requires_grad:
                        continue
                    if w.grad is None:
                        w.grad = grad
                    else:
                        w.grad.add_(grad)
                stacked.grad = None


class Layer(nn.Module):
    """K layers as one; `shared` lists each stacked tensor with the peers' tensors it is made of."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.K = len(layers)
        self.shared: dict[str, tuple[Tensor, list[Tensor]]] = {}
        for name, w in parameter_table(layers[0]).items():
            self.register_parameter(name, None)
            if w is not None:
                own = [getattr(layer, name) for layer in layers]
                self.register_parameter(name, nn.Parameter(_join(own)))
                self.shared[name] = (getattr(self, name), own)
        for name, b in buffer_table(layers[0]).items():
            self.register_buffer(name, None)
            if b is not None:
                own = [getattr(layer, name) for layer in layers]
                self.register_buffer(name, _join(own))
                self.shared[name] = (getattr(self, name), own)

    def trained(self) -> Iterator[tuple[nn.Parameter, list[Tensor]]]:
        for stacked, own in self.shared.values():
            if isinstance(stacked, nn.Parameter):
                yield stacked, own

    @staticmethod
    def unknown(layer: Any) -> str | None:
        """Why this layer cannot be stacked, in words; None where it can."""
        return None


class StackedConv(Layer):
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layers: Sequence[nn.Conv2d]) -> None:
        super().__init__(layers)
        conv = layers[0]
        self.channels_in, self.groups = conv.in_channels, conv.groups
        self.stride, self.dilation = conv.stride, conv.dilation
        self.padding: Any = conv.padding  # numbers or a word

    def forward(self, x: Tensor) -> Tensor:
        groups = self.K * self.groups
        if x.shape[1] == self.channels_in and self.groups == 1:
            groups = 1  # all peers see the same images
        elif x.shape[1] == self.channels_in:
            x = x.repeat(1, self.K, 1, 1)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, groups)

    @staticmethod
    def unknown(layer: nn.Conv2d) -> str | None:
        if layer.padding_mode == "zeros":
            return None
        return f"a convolution with padding_mode={layer.padding_mode!r}"


class StackedNorm(Layer):
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, layers: Sequence[nn.BatchNorm1d | nn.BatchNorm2d]) -> None:
        super().__init__(layers)
        norm = layers[0]
        self.channels, self.momentum, self.eps = norm.num_features, norm.momentum, norm.eps
        self.track_running_stats = norm.track_running_stats

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == self.channels:
            x = x.repeat(1, self.K, *(1,) * (x.dim() - 2))
        mean, var = self.running_mean, self.running_var
        from_batch = self.training or mean is None
        if self.training and not self.track_running_stats:
            mean = var = None
        elif self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, mean, var, self.weight, self.bias, from_batch, self.momentum or 0.0, self.eps
        )

    @staticmethod
    def unknown(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> str | None:
        if layer.momentum is None and layer.track_running_stats:
            return "BatchNorm with momentum=None"
        return None


class StackedLinear(Layer):
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__(layers)
        self.features_in = layers[0].in_features

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, K * F), or (N, F) that all peers see -> (N, K * F')."""
        if x.dim() != 2:
            raise unknown(f"a linear layer on {x.dim()} dimensions")
        x = x.unflatten(1, (-1, self.features_in)).transpose(0, 1).expand(self.K, -1, -1)
        weight = self.weight.view(self.K, -1, self.features_in).transpose(1, 2)  # (K, F, F')
        if self.bias is None:
            out = torch.bmm(x, weight)
        else:
            out = torch.baddbmm(self.bias.view(self.K, 1, -1), x, weight)
        return out.transpose(0, 1).flatten(1)


class StackedDropout(Layer):
    instead: Callable[[Tensor, int], Tensor] | None = None  # of (x, k), for the proof

    def __init__(self, layers: Sequence[nn.Dropout]) -> None:
        super().__init__(layers)
        self.p = layers[0].p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        # In the memory layout of a peer's own activations: torch draws a mask in memory order.
        images = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if images else torch.contiguous_format
        own = [t.contiguous(memory_format=layout) for t in x.chunk(self.K, 1)]
        drop = self.instead or self._drop
        return torch.cat([drop(t, k) for k, t in enumerate(own)], 1)

    def _drop(self, x: Tensor, k: int) -> Tensor:
        """Drops out of peer k's activations."""
        return F.dropout(x, self.p, True)


class StackedShortcut(Layer):
    """Option A of a ResNet: the new channels of each peer are zeros."""

    def __init__(self, layers: Sequence[Shortcut]) -> None:
        super().__init__(layers)
        self.stride = layers[0].stride

    def forward(self, x: Tensor) -> Tensor:
        own = x[:, :, :: self.stride, :: self.stride].chunk(self.K, 1)
        zeros = torch.zeros_like(own[0])
        return torch.cat([t for part in own for t in (part, zeros)], 1)


class StackedGeM(Layer):
    """One exponent a peer, for all of its channels."""

    p: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        p = self.p.repeat_interleave(x.shape[1] // self.K)  # (K * F,)
        x = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(min=GeMPool.EPS)
        return x.pow(p[:, None, None]).mean((2, 3)).pow(1 / p)


class StackedInception(Layer):
    def __init__(self, layers: Sequence[nn.Module], branches: nn.ModuleList) -> None:
        super().__init__(layers)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        outs = [branch(x).chunk(self.K, 1) for branch in self.branches]
        return torch.cat([t for own in zip(*outs, strict=True) for t in own], 1)


LAYERS: dict[type[nn.Module], type[Layer]] = {
    nn.Conv2d: StackedConv,
    nn.BatchNorm1d: StackedNorm,
    nn.BatchNorm2d: StackedNorm,
    nn.Linear: StackedLinear,
    nn.Dropout: StackedDropout,
    Shortcut: StackedShortcut,
    GeMPool: StackedGeM,
}
KNOWN = {kind: stacked.unknown for kind, stacked in LAYERS.items()}


def _converted(modules: Sequence[nn.Module], done: dict[int, nn.Module]) -> nn.Module:
    """One module that computes what `modules`, one of each peer, compute. `done`: the modules that
    are converted already, so that a module in two places is converted once."""
    first = modules[0]
    if id(first) in done:
        return done[id(first)]
    kind = type(first)
    module: nn.Module
    if kind in LAYERS:
        module = LAYERS[kind](modules)
    else:
        children: dict[str, nn.Module | None] = {}
        for name, child in child_table(first).items():
            own: list[Any] = [child_table(m)[name] for m in modules]
            children[name] = None if child is None else _converted(own, done)
        branches = children.get("branches")
        if kind is Inception and isinstance(branches, nn.ModuleList):
            module = StackedInception(modules, branches)
        else:
            module = copy.copy(first)
            set_child_table(module, children)
    done[id(first)] = module
    return module


def _join(own: Sequence[Tensor]) -> Tensor:
    """The tensors one after another along the first dimension, in memory too."""
    first = own[0].detach()
    n, rows = first.numel(), first.shape[0] if first.dim() else 1
    flat = torch.cat([t.detach().as_strided((n,), (1,)) for t in own])
    stride = (n // rows, *first.stride()[1:])
    return flat.as_strided((len(own) * rows, *first.shape[1:]), stride)
