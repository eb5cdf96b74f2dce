"""Every use of Triton's undocumented API: why, and what is done where it is not as expected.

A launch through `kernel[grid](...)` binds and specialises each argument anew, which takes most of
its host time. What is used here may change with any release of Triton, is used nowhere else to
launch, and is tried on the oldest and the newest Triton by tests of its own. Whatever is not as
known here is launched through `kernel[grid](...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from threading import RLock
from typing import Any

from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.language import constexpr
from triton.runtime.jit import JITFunction, MockTensor

from .row_alignment import as_aligned

# Newer than the oldest Triton: a hook that compiles kernels by other passes.
INSPECTS_STAGES = hasattr(knobs.runtime, "add_stages_inspection_hook")
_LOADING = RLock()


def launches_alone() -> bool:
    """Whether a launch does nothing but launch: no profiler waits for it (Proton's hooks), and no
    switch has been set since that compiles another kernel (debugging, instrumentation)."""
    runtime = knobs.runtime
    try:
        return not (
            runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
            or runtime.debug
            or knobs.compilation.instrumentation_mode
            or (INSPECTS_STAGES and runtime.add_stages_inspection_hook is not None)
        )
    except AttributeError:  # a hook of another kind, or switches of another release
        return False


def compiled_for(
    kernel: Any, named: Mapping[str, Any], options: Mapping[str, Any]
) -> CompiledKernel | None:
    """The kernel that a launch on the current device with these arguments runs, loaded; compiled if
    need be, not launched. Matrices for which the code for aligned ones does count as aligned: of
    tuples of pointers Triton heeds no `do_not_specialize_on_alignment`. None under the interpreter
    and for what is not known here."""
    if type(kernel) is not JITFunction:
        return None
    placed = {name: _placed(value) for name, value in named.items()}
    # A thread at a time: one that comes while another loads the kernel finds a launcher, and no
    # function to launch.
    with _LOADING:
        compiled = kernel.warmup(**placed, **options, grid=(1,))
        if type(compiled) is not CompiledKernel or compiled.metadata.target.backend != "cuda":
            return None
        # Loads it where it is not, so that its registers are known. (`compiled.run` loads once
        # only: after a failure, for want of memory say, there is a launcher without a function.)
        compiled._init_handles()
    return compiled


def _placed(value: Any) -> Any:
    """An argument as Triton is to specialise on it."""
    if type(value) is not tuple or not value or not isinstance(value[0], Tensor):
        return value
    return tuple(
        # stands for a pointer to this dtype that is a multiple of 16
        MockTensor(t.dtype) if as_aligned(t.data_ptr(), t.stride(), t.element_size()) else t
        for t in value
    )


def registers_and_shared(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers a thread, and bytes of shared memory a program, of a loaded kernel."""
    return compiled.n_regs, compiled.metadata.shared


Direct = Callable[[tuple[int, int, int], int, tuple[Any, ...]], None]


def direct_launch(
    kernel: Any,
    compiled: CompiledKernel | None,
    names: Sequence[str],  # of the run-time arguments; the kernel may have fewer
    named: Mapping[str, Any],  # all arguments of the kernel
) -> Direct | None:
    """A function (grid, stream, values) that launches a loaded kernel with other values of the
    run-time arguments, in the order of `names`: addresses for tensors. None where the values may
    ask for another kernel, or the kernel for more than its launcher does."""
    if compiled is None or not launches_alone():
        return None
    own = [p for p in kernel.params if p.name in names]
    constants = [p for p in kernel.params if p.name not in names]
    # Triton compiles other kernels for integers that are 1 or multiples of 16 unless told not to.
    specialised = any(type(named[p.name]) is int and not p.do_not_specialize for p in own)
    # Triton looks at each launch whether a global variable that the kernel was compiled with still
    # has its value; those that are declared to be constants are not given another.
    variables = [value for value, _ in kernel.used_global_vals.values()]
    if (
        specialised
        or list(kernel.params) != own + constants
        or any(isinstance(named[p.name], Tensor) for p in constants)
        or any(type(value) is not constexpr for value in variables)
        or kernel.launch_metadata is not None
        or kernel.pre_run_hooks
    ):
        return None
    pick = itemgetter(*(names.index(p.name) for p in own))
    fixed = tuple(named[p.name] for p in constants)
    run, metadata = compiled.run, compiled.packed_metadata

    def launch(grid: tuple[int, int, int], stream: int, values: tuple[Any, ...]) -> None:
        # Of `compiled`, which unloads the function when nobody holds it any more.
        function = compiled.function
        run(*grid, stream, function, metadata, None, None, None, *pick(values), *fixed)

    return launch
