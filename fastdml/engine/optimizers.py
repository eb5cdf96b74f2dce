"""One optimizer for all peers, a parameter group each, and its learning rates on the device.

The learning rate of each group is a 0-d tensor of its own, so any scheduler of torch works on it as
on numbers, and none re-captures a CUDA graph. `Schedule` puts one tensor into all groups instead:
then the fused implementation updates the tensors of all peers in a few launches. Its table is on
the device too, so a step in which fp16 skipped every peer holds it back without the host knowing.
Two of Apex's optimizers take a number instead; the host then counts, skipped or not.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, SparseAdam

from fastdml.absent_tensors import is_sharded
from fastdml.engine.apex import NAMES as APEX_NAMES
from fastdml.engine.apex import make_apex_optimizer, takes_number
from fastdml.engine.weights import check_weights, same
from fastdml.errors import InputError
from fastdml.parallel.remote_peer import RemotePeer
from fastdml.torch_private import step_pre_hooks

if TYPE_CHECKING:
    from fastdml.cohort import Cohort

OptimizerName = Literal["sgd", "adam", "adamw", "apex_sgd", "apex_adam", "apex_lamb"]

FUSED_DEVICES = ("cpu", "cuda")


def make_optimizer(
    cohort: Cohort,
    name: OptimizerName = "sgd",
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
) -> Optimizer:
    """One optimizer over all peers that follows schedules without a new capture of a CUDA graph.

    Its groups are one a peer, of the weights that require a gradient; the learning rate of each is
    a 0-d float32 tensor on the device, for Apex's SGD and LAMB a number. State lies as its weight
    does: shape, dtype, memory format. Groups added later get `lr` as a number, as torch's own do,
    and train with it.

    name: "sgd", "adam", "adamw", or with NVIDIA Apex "apex_sgd", "apex_adam", "apex_lamb".
    momentum: of SGD; the first beta of all others. nesterov: of SGD with a momentum.
    weight_decay: added to the gradient by "sgd" and "adam", to the step by "adamw" and Apex's Adam.

    Raises InputError where the name does not exist, where Apex is not installed, is another package
    of that name or has no CUDA device, where no weight requires a gradient, and where some cannot
    be trained (on the meta device, of lazy layers, inference tensors, of Apex shards). Peers that
    are sharded (`fastdml.parallel.shard`) are so before their optimizer is made.
    """
    check_weights(cohort, shards=name not in APEX_NAMES)
    groups = [
        {"params": [w for w in peer.parameters() if w.requires_grad]} for peer in cohort.peers
    ]
    tensors = [w for group in groups for w in group["params"]]
    # Of a mesh's peers those that train may be on other ranks: the first step asks them.
    if not tensors and not any(isinstance(peer, RemotePeer) for peer in cohort.peers):
        raise InputError("no peer has a parameter to train: all have requires_grad=False")
    device = next(cohort.parameters()).device
    if name in APEX_NAMES:
        return make_apex_optimizer(
            name,
            [group for group in groups if group["params"]],
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            device=device,
        )
    rate = torch.tensor(lr, dtype=torch.float32, device=device)
    fused = device.type in FUSED_DEVICES
    if name == "sgd":
        nesterov = nesterov and momentum > 0
        optimizer: Optimizer = SGD(
            groups, rate, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fused
        )
        if momentum > 0:
            for w in tensors:
                optimizer.state[w]["momentum_buffer"] = torch.zeros_like(w)
        return _prepared(optimizer, lr)
    if name in ("adam", "adamw"):
        kind = Adam if name == "adam" else AdamW
        optimizer = kind(groups, rate, (momentum, 0.999), weight_decay=weight_decay, fused=fused)
        return _prepared(optimizer, lr)
    known = ", ".join(get_args(OptimizerName))
    raise InputError(f"optimizer must be one of {known}, not {name!r}")


def _prepared(optimizer: Optimizer, lr: float) -> Optimizer:
    _separate_rates(optimizer)
    optimizer.register_load_state_dict_post_hook(_separate_rates)  # a state may share its rates
    optimizer.defaults["lr"] = lr  # of groups added later, which would share a tensor
    follow_layouts(optimizer)
    return optimizer


def _separate_rates(optimizer: Optimizer) -> None:
    """A tensor for each group: a scheduler multiplies the rate of every group in place, and would
    multiply a tensor that they share once a group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].clone()


def follow_layouts(optimizer: Optimizer) -> LayoutHook:
    """Has `LayoutHook` run before each step of a fused optimizer."""
    for hook in step_pre_hooks(optimizer):
        if isinstance(hook, LayoutHook):
            return hook
    hook = LayoutHook()
    optimizer.register_step_pre_hook(hook)
    return hook


class LayoutHook:
    """Before a step, gives the state the layout that fused kernels expect.

    They read weights and state element by element in the order of memory. Where weights became
    channels_last after their state was made, or their state was loaded in another layout, CUDA's
    raise and the CPU's update a weight with the moments of another. The state follows to another
    device or dtype too.
    """

    def __init__(self) -> None:
        self.state: object = None  # that `known` is of; loading replaces it
        self.known: dict[int, tuple[list[Tensor], list[int]]] = {}  # by first weight

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, *_: object) -> None:
        if optimizer.state is not self.state:
            self.state, self.known = optimizer.state, {}
        for group in optimizer.param_groups:
            weights = group["params"]
            if not group.get("fused") or not weights or is_sharded(weights[0]):
                continue  # of shards a step has the local parts here
            memory = [w.data_ptr() for w in weights]
            known, was = self.known.get(id(weights[0]), ((), ()))
            if memory == was and same(weights, known):
                continue
            follows = [self._follows(optimizer, group, w) for w in weights]
            if all(follows):
                self.known[id(weights[0])] = (list(weights), memory)

    def _follows(self, optimizer: Optimizer, group: dict, w: Tensor) -> bool:
        """Gives the state of `w` its layout; whether there is a state."""
        state = optimizer.state.get(w, {})
        for name, t in state.items():
            if name == "step" or not isinstance(t, Tensor) or t.shape != w.shape:
                continue
            if (t.stride(), t.dtype, t.device) != (w.stride(), w.dtype, w.device):
                state[name] = torch.empty_like(w).copy_(t)
        momentum = group.get("momentum", 0) != 0 and group["dampening"] == 0
        if momentum and w.grad is not None and state.get("momentum_buffer") is None:
            # torch's kernel initialises momentum buffers only where no weight of the group has one
            # yet, and not in a step that overflows: fp16 would go on with uninitialised memory.
            optimizer.state[w]["momentum_buffer"] = torch.zeros_like(w)
            return True
        return bool(state)


def check_optimizer(optimizer: Optimizer) -> None:
    """Raises InputError for an optimizer whose step needs a closure or sparse gradients."""
    name = type(optimizer).__name__
    if not hasattr(optimizer, "param_groups"):
        raise InputError(
            f"the optimizer must be one torch optimizer over the weights of all peers, not {name}: "
            "make_optimizer makes one, with a group a peer"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            f"{name} computes the loss several times a step, by a closure, which the step does not "
            "have: use an optimizer that takes gradients, such as sgd or adamw of make_optimizer"
        )
    if isinstance(optimizer, SparseAdam):
        raise InputError(
            f"{name} takes sparse gradients alone, and the peers' are dense: use adam of "
            "make_optimizer"
        )


def learning_rates(
    *,
    lr: float,
    epochs: int,
    steps: int,  # an epoch
    schedule: str = "step",
    drop_every: int = 60,  # epochs
    drop_factor: float = 0.1,
    warmup_epochs: float = 0.0,
) -> Tensor:
    """The rate of every step of a run, (epochs * steps,) fp32 on the host.

    "step": lr * drop_factor**(epoch // drop_every). "cosine": half a cosine from lr to 0 over the
    steps after the warm-up. Warm-up rises linearly to the full rate at its last step.
    """
    total = epochs * steps
    warmup = min(round(warmup_epochs * steps), total)
    step = torch.arange(total, dtype=torch.float64)
    if schedule == "step":
        factor = drop_factor ** (step // (drop_every * steps))
    elif schedule == "cosine":
        past = ((step - warmup) / max(total - warmup, 1)).clamp(min=0)
        factor = (1 + (math.pi * past).cos()) / 2
    else:
        raise InputError(f"schedule must be step or cosine, not {schedule!r}")
    if warmup:
        factor = factor * ((step + 1) / warmup).clamp(max=1)
    return (lr * factor).float()


class Schedule:
    """Feeds the optimizer's learning rate from a table on the device; `advance` after each step.

    All groups share its tensor, so an optimizer follows either this or a scheduler of torch. What
    `advance` changes on the device is in `tensors()`, so it can be part of a captured step. torch's
    SGD reads a rate that is a tensor, and waits for the device, unless it is made with fused=True,
    as `make_optimizer` makes it.
    """

    def __init__(self, optimizer: Optimizer, rates: Tensor) -> None:
        device = next(w for group in optimizer.param_groups for w in group["params"]).device
        self.optimizer = optimizer
        self.rates = rates.to(device)  # (steps of the run,)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)  # updates made so far
        self.numbers: list[float] | None = None  # the same table, for an optimizer that needs it
        if takes_number(optimizer):
            self.numbers = rates.tolist()
            self.position = 0
        self.lr = torch.empty((), dtype=torch.float32, device=device)
        self._publish()

    def advance(self, skipped: Tensor | None = None) -> None:
        """Moves on by one update, or by none where `skipped` (0-d, 0 or 1) is 1. Never waits."""
        if self.numbers is not None:
            self.position += 1
            skipped = None
        self.updates += 1 if skipped is None else (1 - skipped).long()
        self._publish()

    def load(self, updates: Tensor) -> None:
        """Goes to a saved position; call after the optimizer has loaded its own state."""
        self.updates.copy_(updates)
        if self.numbers is not None:
            self.position = int(updates)
        self._publish()

    def tensors(self) -> list[Tensor]:
        return [self.updates, self.lr]

    def _publish(self) -> None:
        last = len(self.rates) - 1
        self.lr.copy_(self.rates.index_select(0, self.updates.clamp(max=last).view(1))[0])
        lr = self.lr if self.numbers is None else self.numbers[min(self.position, last)]
        for group in self.optimizer.param_groups:  # an optimizer that loaded has copies of its own
            group["lr"] = lr
