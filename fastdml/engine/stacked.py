"""Peers of one architecture as one network: K times the channels, the same number of launches.

A copy of the first peer gets layers that hold all K peers side by side in the channels:

    convolution   K * groups groups; the stem, which sees the images once, is one plain convolution
                  with K * C_out outputs
    BatchNorm     over K * C channels, which is exactly BatchNorm of each peer
    linear        one batched product (K, N, F) x (K, F, C)
    shortcuts and concatenations of the models here: a peer at a time, along the channels

Everything between (ReLU, pooling, sums) does not mix channels and stays as it is, so any model of
these layers stacks: the result is compared with the peers on random images, and a model that it
does not fit is refused.

Every stacked weight is the peers' weights one after another along the first dimension, and from
then on the peers' own parameters and buffers are views of it: nothing is ever copied back. Their
state dicts, checkpoints, evaluation and optimizer are those of ordinary modules, always current.
Moving the peers to another device or dtype afterwards breaks this, and the next step says so.

Dropout draws its masks a peer at a time: with one such layer a peer they are those of the eager
step, with several they are other masks of the same kind.

Saving one peer's state dict with torch.save writes the memory of all; `Cohort.save` writes its own.

On a CPU it is worth a little on small maps, and less than nothing on others, where K convolutions
are faster than one in K groups. `torch.func`'s stack_module_state and vmap do the same without
layers of their own, and slower (forward and backward in fp32, one thread, medians of interleaved
rounds: 2 resnet8 at 64 x 8x8 eager 62.6, stacked 54.0, vmap 80.5 ms; 4 of them 121.0, 114.8, 157.4;
2 resnet32 at 64 x 32x32 2367, 2189, 2706).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdml.engine.guards import replicated
from fastdml.engine.step import EagerStep, Outputs, StepOutput, WithFeatures
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.models.googlenet import Inception
from fastdml.models.reid import GeMPool
from fastdml.models.resnet_cifar import Shortcut

PROBE = 2  # images in the comparison with the peers
TOLERANCE = 0.02  # of the norm of the logits: far above rounding, TF32 included


class StackedStep(EagerStep):
    name = "stacked"

    def networks(self) -> list[nn.Module]:
        self.stack = Stack(super().networks())
        self.proved = False
        return [self.stack]

    def train(self, images: Tensor, labels: Tensor) -> StepOutput:
        self.stack.check()
        self.prove(images)
        self.stack.train(self.peers[0].training)
        self.stack.drop_gradients()
        output = super().train(images, labels)
        self.stack.drop_gradients()
        return output

    def prove(self, images: Tensor) -> None:
        """Refuses peers that the stack does not fit; once."""
        if not self.proved:
            prove(self.stack, super().networks(), images[:PROBE])
            self.proved = True

    def checked(self, k: int, out: Tensor | tuple[Tensor, ...], images: Tensor) -> Outputs:
        """Of the stack, (K, N, C) and more; what peer 0 gives is looked at for all."""
        out = (out,) if isinstance(out, Tensor) else out
        own = [t[0] for t in out]
        super().checked(0, own[0] if len(own) == 1 else tuple(own), images)
        return out

    def gradients(self, images: Tensor, labels: Tensor, loss: MutualLoss) -> StepOutput:
        out = self.forward(0, images)  # logits (K, N, C), and with a metric loss features (K, N, D)
        losses, stats, grads = loss.value_and_grad(out[0].detach(), labels)
        output = StepOutput(losses, stats)
        if self.options.metric is not None:
            metric, more = self.options.metric.value_and_grad(out[1].detach().unbind(), labels)
            output = StepOutput(losses + metric, stats, metric)
            grads = [*grads, torch.stack(more)]
        self.backward([out], [grads])
        self.stack.share_gradients()
        return output


class Stack(nn.Module):
    """x (N, channels, H, W) -> logits (K, N, C) of the peers, whose weights become views; or all
    that the peers give, in the same way."""

    def __init__(self, peers: Sequence[nn.Module]) -> None:
        super().__init__()
        check_alike(peers)
        self.K = len(peers)
        self.network = _converted(peers, {})

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = self.network(x)  # (N, K * C)
        if isinstance(out, Tensor):
            return self._apart(out)
        return tuple(self._apart(t) for t in out)

    def _apart(self, t: Tensor) -> Tensor:
        return t.view(len(t), self.K, -1).transpose(0, 1)

    def layers(self) -> Iterable[Layer]:
        return (m for m in self.modules() if isinstance(m, Layer))

    def share_gradients(self) -> None:
        """Gives every peer's parameter its part of the gradient, without a copy."""
        for layer in self.layers():
            layer.share_gradients()

    def drop_gradients(self) -> None:
        for w in self.parameters():
            w.grad = None

    def check(self) -> None:
        """Notices peers that were moved or cast since; a look at one weight, on the host."""
        layer = next(iter(self.layers()))
        for stacked, own in layer.shared.values():
            if stacked.data_ptr() != own[0].data_ptr():
                raise InputError(
                    "the peers no longer share memory with their stacked network: move or cast a "
                    "cohort before make_step, not after"
                )


class Layer(nn.Module):
    """K layers as one; `shared` has each stacked tensor with the peers' views of it."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.K = len(layers)
        self.shared: dict[str, tuple[Tensor, list[Tensor]]] = {}
        for name, _ in layers[0].named_parameters(recurse=False):
            own = [getattr(layer, name) for layer in layers]
            trained = any(w.requires_grad for w in own)
            stacked = nn.Parameter(_join(own), requires_grad=trained)
            self.register_parameter(name, stacked)
            self.shared[name] = (stacked, own)
        for name, _ in layers[0].named_buffers(recurse=False):
            own = [getattr(layer, name) for layer in layers]
            self.register_buffer(name, _join(own))
            self.shared[name] = (getattr(self, name), own)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if name not in self.shared:
                setattr(self, name, None)

    def share_gradients(self) -> None:
        for stacked, own in self.shared.values():
            if stacked.grad is None:
                continue
            for w, grad in zip(own, stacked.grad.chunk(self.K), strict=True):
                if w.requires_grad:
                    w.grad = grad


class StackedConv(Layer):
    def __init__(self, layers: Sequence[nn.Conv2d]) -> None:
        super().__init__(layers)
        conv = layers[0]
        if conv.padding_mode != "zeros":
            raise _refusal(f"a convolution with padding_mode={conv.padding_mode!r}")
        self.channels_in, self.groups = conv.in_channels, conv.groups
        self.geometry = (conv.stride, conv.padding, conv.dilation)

    def forward(self, x: Tensor) -> Tensor:
        groups = self.K * self.groups
        if x.shape[1] == self.channels_in and self.groups == 1:
            groups = 1  # all peers see the same images
        elif x.shape[1] == self.channels_in:
            x = x.repeat(1, self.K, 1, 1)
        return F.conv2d(x, self.weight, self.bias, *self.geometry, groups)


class StackedNorm(Layer):
    def __init__(self, layers: Sequence[nn.BatchNorm1d | nn.BatchNorm2d]) -> None:
        super().__init__(layers)
        norm = layers[0]
        if norm.momentum is None and norm.track_running_stats:
            raise _refusal("BatchNorm with momentum=None")
        self.channels, self.momentum, self.eps = norm.num_features, norm.momentum, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == self.channels:
            x = x.repeat(1, self.K, *(1,) * (x.dim() - 2))
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        from_batch = self.training or self.running_mean is None
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, from_batch,
            self.momentum or 0.0, self.eps,
        )  # fmt: skip


class StackedLinear(Layer):
    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__(layers)
        self.features_in = layers[0].in_features

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, K * F), or (N, F) that all peers see -> (N, K * F')."""
        if x.dim() != 2:
            raise _refusal(f"a linear layer on {x.dim()} dimensions")
        x = x.view(len(x), -1, self.features_in).transpose(0, 1).expand(self.K, -1, -1)
        weight = self.weight.view(self.K, -1, self.features_in).transpose(1, 2)  # (K, F, F')
        if self.bias is None:
            out = torch.bmm(x, weight)
        else:
            out = torch.baddbmm(self.bias.view(self.K, 1, -1), x, weight)
        return out.transpose(0, 1).flatten(1)


class StackedDropout(Layer):
    def __init__(self, layers: Sequence[nn.Dropout]) -> None:
        super().__init__(layers)
        self.p = layers[0].p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        # Laid out as a peer's own activations are: a mask follows the memory, not the indices.
        images = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if images else torch.contiguous_format
        own = [t.contiguous(memory_format=layout) for t in x.chunk(self.K, 1)]
        return torch.cat([F.dropout(t, self.p, True) for t in own], 1)


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

    def forward(self, x: Tensor) -> Tensor:
        p = self.p.repeat_interleave(x.shape[1] // self.K)  # (K * F,)
        x = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(min=GeMPool.EPS)
        return x.pow(p[:, None, None]).mean((2, 3)).pow(1 / p)


class StackedInception(Layer):
    def __init__(self, layers: Sequence[Inception], branches: nn.ModuleList) -> None:
        super().__init__(layers)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        outs = [branch(x).chunk(self.K, 1) for branch in self.branches]
        return torch.cat([t for own in zip(*outs, strict=True) for t in own], 1)


LAYERS = {
    nn.Conv2d: StackedConv,
    nn.BatchNorm1d: StackedNorm,
    nn.BatchNorm2d: StackedNorm,
    nn.Linear: StackedLinear,
    nn.Dropout: StackedDropout,
    Shortcut: StackedShortcut,
    GeMPool: StackedGeM,
}


def check_alike(peers: Sequence[nn.Module]) -> None:
    """Same modules with the same settings and shapes throughout, and nothing hooked into them."""
    first = _description(peers[0])
    for k, peer in enumerate(peers):
        if (found := replicated(peer)) is not None:
            raise _refusal(found)
        other = _description(peer)
        if other.keys() != first.keys():
            raise InputError(
                f"execution 'stacked' needs peers of one architecture: peers 0 and {k} have "
                "different layers; use another execution"
            )
        for name, layer in first.items():
            if other[name] != layer:
                where = name or type(peer).__name__
                raise InputError(
                    f"execution 'stacked' needs peers of one architecture: {where} differs between "
                    f"peers 0 and {k}; use another execution"
                )
        for module in peer.modules():
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                raise _refusal("a module with hooks")
        if any(w._backward_hooks for w in peer.parameters()):
            raise _refusal("a parameter with hooks")


def _description(peer: nn.Module) -> dict[str, tuple]:
    """What has to be equal, a module each."""
    description = {}
    for name, m in peer.named_modules():
        own = [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]
        tensors = tuple((n, t.shape, t.stride(), t.dtype, t.device) for n, t in own)
        settings = m.extra_repr() if not any(m.children()) else ""
        description[name] = (type(m), settings, m.training, tensors)
    return description


def _converted(modules: Sequence[nn.Module], done: dict[int, nn.Module]) -> nn.Module:
    """The module that does for all peers what `modules` do, one each; `done` keeps sharing."""
    first = modules[0]
    if id(first) in done:
        return done[id(first)]
    kind = type(first)
    if kind in LAYERS:
        module = LAYERS[kind](modules)
    else:
        if first._parameters or first._buffers:
            raise _refusal(f"a layer of type {kind.__name__} with weights of its own")
        children = {
            name: child and _converted([m._modules[name] for m in modules], done)
            for name, child in first._modules.items()
        }
        if kind is Inception:
            module = StackedInception(modules, children["branches"])
        else:
            module = copy.copy(first)
            module._modules = children
    done[id(first)] = module
    return module


def _join(own: Sequence[Tensor]) -> Tensor:
    """The tensors one after another along the first dimension, each of them a view of it now."""
    first = own[0].detach()
    rows = first.shape[0] if first.dim() else 1
    outermost = first.stride(0) * rows == first.numel() if first.dim() and rows > 1 else True
    if not outermost or any(t.stride() != first.stride() for t in own):
        raise _refusal(f"a weight of shape {tuple(first.shape)} and strides {first.stride()}")
    n = first.numel()
    flat = torch.cat([t.detach().as_strided((n,), (1,)) for t in own])
    for t, part in zip(own, flat.split(n), strict=True):
        t.data = part.as_strided(first.shape, first.stride())
    shape = (len(own) * rows, *first.shape[1:])
    stride = (n // rows, *first.stride()[1:])
    return flat.as_strided(shape, stride)


@torch.no_grad()
def prove(stack: Stack, peers: Sequence[nn.Module], images: Tensor) -> None:
    """Compares the stack with its peers, in evaluation mode, on `images`. Waits for the device."""
    modules = [m for network in (stack, *peers) for m in network.modules()]
    training = [m.training for m in modules]
    try:
        for network in (stack, *peers):
            network.eval()
        each = [_tuple(peer(images)) for peer in peers]
        if not all(isinstance(t, Tensor) for own in each for t in own):
            raise _refusal(f"outputs of type {type(each[0][0]).__name__}")
        try:
            fits = True
            for found, own in zip(_tuple(stack(images)), zip(*each, strict=True), strict=True):
                expected = torch.stack(own)
                error = (found - expected).norm() / expected.norm().clamp(min=1e-12)
                fits = fits and bool(error < TOLERANCE)
        except (RuntimeError, ValueError):  # shapes that do not fit
            fits = False
    finally:
        for module, was in zip(modules, training, strict=True):
            module.training = was
    if not fits:
        peer = peers[0].peer if isinstance(peers[0], WithFeatures) else peers[0]
        raise _refusal(f"the way that {type(peer).__name__} combines its layers")


def _tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _refusal(what: str) -> InputError:
    return InputError(f"execution 'stacked' does not know {what}; use another execution")
