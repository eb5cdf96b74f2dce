"""Every use of torch's private API: why, and the public API that would do instead, if there is one.

Names that begin with an underscore, undocumented attributes and modules may change with any release
of torch. They are used here and nowhere else in `fastdml`, each in a function that says why, and
tried on the oldest and the newest torch by a test of its own. ("Public: none" is as of torch 2.14.)
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules import module as _module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

# ---- containers of tensors


def register_tree_node(
    kind: type,
    fields_of: Callable[[Any], list[Any]],
    of_fields: Callable[[list[Any]], Any],
    name: str,
) -> None:
    """Has torch's functions on nested containers (`tree_map`, `torch.export`) reach the fields of
    a class; `name` stands for it in exported programs. Public: none but for dataclasses
    (`torch.export.register_dataclass`)."""
    _pytree.register_pytree_node(
        kind,
        lambda value: (fields_of(value), None),
        lambda fields, _: of_fields(list(fields)),
        serialized_type_name=name,
    )


# ---- several processes


def default_store() -> Any:
    """The store through which the ranks of torch.distributed found each other. Public: none, where
    another's code has initialised it."""
    return torch.distributed.distributed_c10d._get_default_store()


# ---- many tensors in one launch


def foreach_copy_(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies each of `values` into the tensor at its place: one multi-tensor launch for hundreds of
    small tensors. Public: none; `torch.optim` uses the same."""
    torch._foreach_copy_(cast("list[Tensor]", to), cast("list[Tensor]", values))


def foreach_mul_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies all by a 0-d tensor in place, as `foreach_copy_`. Public: none."""
    torch._foreach_mul_(cast("list[Tensor]", tensors), factor)


def foreach_lerp_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Moves each tensor by this share of its way to the end, as `foreach_copy_`. Public: none;
    `torch.optim.swa_utils` uses the same."""
    torch._foreach_lerp_(cast("list[Tensor]", tensors), cast("list[Tensor]", ends), weight)


# ---- loss scale and optimizers


def unscale_(grads: list[Tensor], overflow: Tensor, inverse_scale: Tensor) -> None:
    """Multiplies gradients of one dtype by `inverse_scale` () and sets `overflow` () to 1 where one
    is not finite. `torch.amp.GradScaler` calls this with one flag for the whole optimizer; here
    each peer has its own. Public: none."""
    torch._amp_foreach_non_finite_check_and_unscale_(grads, overflow, inverse_scale)


def update_scale_(
    scale: Tensor, steps: Tensor, overflow: Tensor, growth: float, backoff: float, interval: int
) -> None:
    """Grows or backs off the loss `scale` () as `torch.amp.GradScaler` does, on the device. `steps`
    () int32 counts the steps since the last overflow. Public: none."""
    torch._amp_update_scale_(scale, steps, overflow, growth, backoff, interval)


def step_unless(optimizer: Optimizer, overflow: Tensor) -> None:
    """A step of one of torch's fused optimizers, whose kernel changes nothing where `overflow` ()
    is 1. `torch.amp.GradScaler` passes the flag in these attributes. Public: none."""
    own: Any = optimizer
    own.grad_scale, own.found_inf = None, overflow
    try:
        optimizer.step()
    finally:
        del own.grad_scale, own.found_inf


def step_pre_hooks(optimizer: Optimizer) -> list[Any]:
    """The hooks given to `register_step_pre_hook`, to find our own among them. Public: none."""
    return list(optimizer._optimizer_step_pre_hooks.values())


# ---- what modules hold


def parameter_table(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dict itself in which `module` keeps its own parameters. Comparing it before each step
    shows a replaced parameter without a walk over the modules. `named_parameters(recurse=False)`
    makes new objects, and leaves out names whose parameter is None. Public: none."""
    return module._parameters


def buffer_table(module: nn.Module) -> dict[str, Tensor | None]:
    """As `parameter_table`. Public: none."""
    return module._buffers


def child_table(module: nn.Module) -> dict[str, nn.Module | None]:
    """As `parameter_table`; `named_children` gives a module that has two names only once. Public:
    none."""
    return module._modules


def set_child_table(module: nn.Module, children: dict[str, nn.Module | None]) -> None:
    """Replaces the dict of children that a shallow copy of a module shares with the original.
    Public: none."""
    module._modules = children


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TABLES = ("_parameters", "_buffers", "_modules")


def base_attributes() -> frozenset[str]:
    """Names of the attributes that every module has; all others are a layer's own settings. Public:
    none."""
    return frozenset(vars(nn.Module()))


def attributes(module: nn.Module) -> dict[str, Any]:
    """A copy of all attributes, in which the dicts of parameters, buffers, children and hooks are
    copies too, since torch changes those in place. Public: none."""
    found = dict(vars(module))
    return found | {name: dict(found[name]) for name in (*TABLES, *HOOKS)}


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run in this module's forward or backward pass. Public: none."""
    return any(getattr(module, name) for name in HOOKS)


def hooks_on_all_modules() -> bool:
    """Whether there are hooks that run for every module: `register_module_forward_hook` and its
    like. Public: none."""
    return any(getattr(_module, f"_global{name}") for name in HOOKS)


def any_tensor_has_hooks(tensors: Iterable[Tensor]) -> bool:
    """Whether any has a hook from `register_hook` or `register_post_accumulate_grad_hook`. Public:
    none."""
    return any(t._backward_hooks or t._post_accumulate_grad_hooks for t in tensors)


def is_compiled(module: nn.Module) -> bool:
    """Whether it was made by `torch.compile(module)` or went through `module.compile()`. Public:
    none."""
    named = any("_dynamo" in kind.__module__ for kind in type(module).__mro__)
    return named or module._compiled_call_impl is not None


def wraps_compiled(module: nn.Module) -> bool:
    """Whether it was made by `torch.compile(module)`, found out without importing the compiler,
    which takes a second. Public: none."""
    return hasattr(module, "_orig_mod")


# ---- what autograd and the dispatcher know


class DispatchMode(TorchDispatchMode):
    """Within it, `__torch_dispatch__` is called in place of each operation. torch's documentation
    imports it from this private module. Public: none."""


def tensor_version(t: Tensor) -> int:
    """A counter that each in-place change of the tensor raises; -1 for inference tensors, which
    have none. Public: none."""
    return -1 if t.is_inference() else t._version


ACCUMULATE_GRAD = type(get_gradient_edge(nn.Parameter(torch.zeros(()))).node)


def tensors_with_held_accumulators() -> list[Tensor]:
    """Weights whose AccumulateGrad node some Python object refers to, as it must to put a hook on
    it. Nodes do not list their hooks, so all objects are searched for nodes. Public: none."""
    nodes: list[Any] = [node for node in gc.get_objects() if type(node) is ACCUMULATE_GRAD]
    return [node.variable for node in nodes]


# ---- several processes


def sum_in_next_backward(replica: DistributedDataParallel) -> None:
    """Has the next backward pass through a network communicate whose forward passes ran within its
    `no_sync`. Public: none; DistributedDataParallel decides this at the forward pass, where parts
    of a batch that overlap do not know yet which backward pass will be the last."""
    replica.reducer.prepare_for_backward([])


def batch_norm_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,) float32 or more, of x (N, C, ...) on CUDA,
    read once in its own dtype. Public: none; `nn.SyncBatchNorm` uses the same."""
    mean, invstd = torch.batch_norm_stats(x, 0.0)
    return mean, invstd.square().reciprocal().masked_fill(invstd == 0, 0.0)  # 0: no variance


def batch_norm_sums(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel (C,) the sums of dy and of dy * (x - mean) * invstd in the dtype of mean, in
    one pass over both. Public: none."""
    ones = torch.ones_like(mean)
    _, away, plain = torch.ops.aten.native_batch_norm_backward(
        dy, x, ones, None, None, mean, invstd, True, 0.0, [False, True, True]
    )
    return plain, away


def batch_norm_input_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_dy: Tensor,
    sum_dy_away: Tensor,
    counts: Tensor,
) -> Tensor:
    """The gradient of x on CUDA, from the sums of dy and dy * (x - mean) over all processes, whose
    numbers of values are `counts`. Public: none; `nn.SyncBatchNorm` uses the same."""
    return torch.batch_norm_backward_elemt(
        dy, x, mean, invstd, weight, sum_dy, sum_dy_away, counts.to(torch.int32)
    )


# ---- CUDA


def end_allocation_to_pool(device: int, pool: Any) -> None:
    """After a failed capture the allocator still takes memory from the graph's pool: ends that, and
    releases the pool. Raises RuntimeError where there is nothing to end. Public: none;
    `torch.cuda.graph` does this only after a successful capture."""
    torch._C._cuda_endAllocateToPool(device, pool)
    torch._C._cuda_releasePool(device, pool)


# ---- profiler and data loader


def stream_of(event: Any) -> int:
    """The CUDA stream of an event of `torch.profiler`, or an operator's thread. Public: none."""
    return getattr(event, "device_resource_id", event.thread)


def is_annotation(event: Any) -> bool:
    """Whether an event of `torch.profiler` is a range marked by `record_function`, not an operator
    or a kernel. Public: none."""
    return getattr(event, "is_user_annotation", False)


def fetches_from_worker(code: CodeType) -> bool:
    """Whether this is the code of the function in which a DataLoader waits for a worker's batch: an
    error raised there means a dead worker. Public: none."""
    from torch.utils.data import dataloader

    return (code.co_filename, code.co_name) == (dataloader.__file__, "_try_get_data")


# ---- tensors without values


def valueless_tensors() -> AbstractContextManager:
    """In this block tensors have shapes, dtypes, devices and storages of a size, but no values and
    no memory; autograd and autocast work on them. Public: none; the meta device has no autocast,
    and `torch.compile` traces with the same."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()
