"""A launch by its plan is the launch that Triton's own call would be: kernel, grid, arguments.

Triton's real compiler and launcher run on a stand-in for the driver (`bench/stand_in`). A hook on
launches, as a profiler sets it, sends the same calls through Triton's own call.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fastdml_kernels import Call, Options, losses_and_grads
from fastdml_kernels.augment_options import Augment
from fastdml_kernels.loss_op import flatten
from on_stand_in import scenarios_of

from fastdml import MutualLoss, mutual_loss


@pytest.fixture(scope="module")
def seen():
    return scenarios_of("test_launch_plan")


@contextmanager
def profiled():
    """Launches as under a profiler, which has a hook before and after each."""
    from triton import knobs

    hook = lambda metadata: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)


@contextmanager
def no_plans(plans: Any):
    """As if nothing had been launched before."""
    known = dict(plans.known)
    plans.known.clear()
    try:
        yield
    finally:
        plans.known.clear()
        plans.known.update(known)


def shown(launch: Any, results: tuple[str, ...]) -> dict[str, Any]:
    """All there is to see of a launch, but for where its results are, which must be aligned."""
    arguments = dict(launch.arguments)
    for name in results:
        value = arguments.pop(name, None)
        assert value is None or value % 16 == 0, name
    # Of rows elsewhere, a plan may take the kernel of aligned ones: `test_stand_in_alignment`.
    rows = (*arguments.get("logits", ()), *arguments.get("grads", ()))
    function = launch.function if all(row % 16 == 0 for row in rows) else None
    return {
        "kernel": launch.kernel, "function": function, "grid": list(launch.grid),
        "threads": launch.threads, "stream": launch.stream, "arguments": repr(arguments),
    }  # fmt: skip


def both_ways(gpu: Any, calls: dict[str, Callable], *results: str) -> list[dict[str, Any]]:
    """Each call by its plan, made and made use of, and by Triton's own call."""
    from fastdml_kernels import augment, label_counts, launch, scale_grads

    cases = []
    for turn in ("the plan is made", "the plan is used"):
        for name, call in calls.items():
            gpu.clear()
            call()
            by_plan = [shown(launch, results) for launch in gpu.launches()]
            gpu.clear()
            with profiled(), no_plans(launch._PLANS):
                call()
            by_jit = [shown(launch, results) for launch in gpu.launches()]
            cases.append({"case": f"{name}, {turn}", "plan": by_plan, "jit": by_jit})
    planned = (augment._augment_batch, label_counts._count_labels, scale_grads._scale_rows)
    known = [{key[-1]: direct} for each in planned for key, direct in each.plans.known.items()]
    known += [{key[-1]: plan.direct} for key, plan in launch._PLANS.known.items()]
    for each in known:  # every plan launches by itself but for those under the hook
        for alone, direct in each.items():
            assert (direct is not None) == alone
    return cases


def holds(cases: list[dict[str, Any]]) -> None:
    assert cases
    for case in cases:
        assert case["plan"], case["case"]
        assert case["plan"] == case["jit"], case["case"]


# ---- the loss


PLAIN = Options()
RESULTS = ("losses", "stats", "partials", "scratch", "counts")


def rows(K: int, N: int, C: int, dtype=torch.float32, width: int = 0, first: int = 0):
    """K logits (N, C), rows `width` apart, the first at number `first` of its memory."""
    width = width or C
    memory = [torch.randn(first + N * width).to(dtype) for _ in range(K)]
    return [m[first:].view(N, width)[:, :C] for m in memory]


def labels_of(N: int, C: int = 10, **like: Any) -> torch.Tensor:
    return torch.randint(C, (N,)).to(**like)


def loss_call(logits, labels, options=PLAIN, need_grad=True, grads=None, upstream=None, **rest):
    """A call of the launcher, to gradients of its own."""
    from fastdml_kernels.launch import launch

    N, C = logits[0].shape
    grads = grads or ([torch.empty(N, C, dtype=z.dtype) for z in logits] if need_grad else [])
    return lambda: launch(logits, labels, options, grads=grads, upstream=upstream, **rest)


def loss_calls() -> dict[str, Callable]:
    z, y = rows(2, 12, 10), labels_of(12)
    number = lambda first: torch.ones(9)[first]  # noqa: E731
    calls = {
        "plain": loss_call(z, y),
        "other options": loss_call(z, y, Options(label_smoothing=0.1, ignore_index=3)),
        "statistics": loss_call(z, y, want_stats=True),
        "no gradient": loss_call(z, y, need_grad=False),
        "bfloat16": loss_call(rows(2, 12, 10, torch.bfloat16), y),
        "two dtypes": loss_call([z[0], z[1].bfloat16()], y),
        "gradients of another dtype": loss_call(z, y, grads=[z[0].bfloat16(), z[1].clone()]),
        "int32 labels": loss_call(z, y.int()),
        "scalars": loss_call(z, y, temperature=2, ce_weight=3, kl_weight=0.5),
        "T = 1 as an int": loss_call(z, y, temperature=1),
        "pointers": loss_call(z, y, temperature=number(0), ce_weight=number(4)),
        "a pointer not aligned": loss_call(z, y, temperature=number(1), ce_weight=number(4)),
        "a bfloat16 pointer": loss_call(z, y, kl_weight=number(0).bfloat16()),
        "peer weights": loss_call(z, y, peer_weights=torch.ones(2, 2)),
        "class weights": loss_call(z, y, class_weight=torch.ones(10)),
        "class weights not aligned": loss_call(z, y, class_weight=torch.ones(11)[1:]),
        "losses by row": loss_call(z, y, Options(reduction="none")),
        "upstream": loss_call(z, y, upstream=torch.ones(2)),
        "upstream of one number": loss_call(z, y, upstream=torch.ones(()).expand(2)),
        "upstream by row": loss_call(z, y, Options(reduction="none"), upstream=torch.ones(2, 12)),
        "coupled": loss_call(z, y, Options(detach_targets=False), upstream=torch.ones(2)),
        "a tile": loss_call(z, y, regime="wide", max_programs=2),
        "the first learns": loss_call(z, y, grads=[z[0].clone(), None]),
        "the second learns": loss_call(z, y, grads=[None, z[1].clone()]),
        "the second learns, wide": loss_call(z, y, grads=[None, z[1].clone()], regime="wide"),
        "nobody learns": loss_call(z, y, grads=[None, None]),
        "row weights": loss_call(z, y, sample_weight=torch.ones(12)),
        "row weights not aligned": loss_call(z, y, sample_weight=torch.ones(13)[1:]),
        "row weights in bfloat16": loss_call(z, y, sample_weight=torch.ones(12).bfloat16()),
        "jsd 0.2": loss_call(z, y, Options(divergence="jsd", jsd_beta=0.2)),
    }
    for divergence in ("reverse", "jeffreys", "jsd"):
        calls[divergence] = loss_call(z, y, Options(divergence=divergence))
    for gate in ("confidence", "entropy"):  # wide rows have a scratch for their edges
        calls[gate] = loss_call(z, y, Options(gate=gate))
        calls[f"{gate}, wide"] = loss_call(z, y, Options(gate=gate), regime="wide")
    for N in (1, 7, 700, 0):
        calls[f"N = {N}"] = loss_call(rows(2, N, 10), labels_of(N))
        mutual = Options(divergence="jeffreys", reduction="sum")
        calls[f"coupled, N = {N}"] = loss_call(rows(2, N, 10), labels_of(N), mutual)
    for first in (0, 1, 2, 4):
        apart = rows(2, 12, 10, first=first)
        calls[f"rows at {first}"] = loss_call(apart, y)
        calls[f"one at {first}"] = loss_call([z[0], apart[1]], y)
        calls[f"gradients at {first}"] = loss_call(z, y, grads=apart)
        calls[f"labels at {first}"] = loss_call(z, labels_of(20)[first : first + 12])
    for width in (11, 16, 24):  # what may be read behind a row depends on the storage
        inside = rows(2, 14, 10, width=width)
        calls[f"rows {width} apart"] = loss_call(inside, labels_of(14))
        calls[f"rows {width} apart, a class less"] = loss_call([z[:12, :9] for z in inside], y % 9)
        calls[f"rows {width} apart, fewer"] = loss_call([z[1:13] for z in inside], y)
        at_end = [torch.randn(13 * width)[: 11 * width + 10] for _ in range(2)]
        ends = [m.clone().as_strided((12, 10), (width, 1)) for m in at_end]
        calls[f"rows {width} apart to the end"] = loss_call(ends, y)
    for step in (2, 5):
        calls[f"every {step}th label"] = loss_call(z, labels_of(12 * step)[::step])
    many = 2**31 + 5
    endless = [torch.randn(1, 10).expand(many, 10) for _ in range(2)]
    no_end = torch.zeros(1).long().expand(many)
    calls["rows beyond int32"] = loss_call(endless, no_end, need_grad=False)
    some = [z[:12] for z in endless], no_end[:12]
    calls["the same rows, fewer"] = loss_call(*some, need_grad=False)
    calls["columns apart"] = loss_call([torch.randn(10, 12).t() for _ in range(2)], y)
    calls["one peer"] = loss_call(z[:1], y)
    calls["three peers"] = loss_call(rows(3, 12, 10), y)
    calls["other classes"] = loss_call(rows(2, 12, 24), y)
    calls["stacked"] = loss_call(list(torch.randn(2, 13, 10).unbind()), labels_of(13))
    calls["labels counted before"] = loss_call(rows(2, 5000, 10), labels_of(5000))
    calls["one more"] = loss_call(rows(2, 5001, 10), labels_of(5001))
    weight = torch.ones(5000)
    calls["weights counted before"] = loss_call(rows(2, 5000, 10), labels_of(5000),
                                                sample_weight=weight)  # fmt: skip
    calls["counted by row"] = loss_call(
        rows(2, 5000, 10), labels_of(5000), Options(reduction="sum")
    )
    return calls


def losses(gpu):
    return both_ways(gpu, loss_calls(), *RESULTS)


def test_every_kind_of_call_of_the_loss(seen):
    holds(seen(losses))


def new_sizes(gpu):
    """Batches of other lengths and other values, after the first."""
    from fastdml_kernels import launch

    labels = labels_of(900)
    loss_call(rows(2, 64, 10), labels[:64])()
    plans, kernels = len(launch._PLANS.known), len(gpu.kernels)
    gpu.clear()
    for i, N in enumerate((1, 5, 63, 65, 128, 900)):
        loss_call(rows(2, N, 10), labels[:N], kl_weight=float(i))()
    return {
        "plans": len(launch._PLANS.known) - plans, "kernels": len(gpu.kernels) - kernels,
        "N": [each.arguments["N"] for each in gpu.launches()],
        "kl_weight": [each.arguments["kl_weight"] for each in gpu.launches()],
    }  # fmt: skip


def test_other_batches_need_no_other_plan(seen):
    was = seen(new_sizes)
    assert was == {"plans": 0, "kernels": 0, "N": [1, 5, 63, 65, 128, 900],
                   "kl_weight": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}  # fmt: skip


# ---- the other kernels


def scales(gpu):
    from fastdml_kernels.scale_grads import launch_scale

    def scale(grads, upstream):
        return lambda: launch_scale(grads, upstream)

    ones = torch.ones(3, 400)
    calls = {
        f"{N} rows at {first}, {dtype}, {name}": scale(rows(2, N, 10, dtype, first=first), u)
        for N in (1, 300)
        for first in (0, 1)
        for dtype in (torch.float32, torch.bfloat16)
        for name, u in {
            "aligned": ones[:2, 0], "not aligned": ones[0, 1:3], "one": ones[0, 0].expand(2),
            "by row": ones[:2, :N], "bfloat16": ones[0, :2].bfloat16(),
        }.items()
    }  # fmt: skip
    calls["fewer classes"] = scale([g[:, :6] for g in rows(2, 300, 10)], ones[:2, 0])
    (one,) = rows(1, 300, 10)
    calls["the first one alone"] = scale([one, None], ones[:2, 0])
    calls["the second one alone"] = scale([None, one], ones[:2, 0])
    return both_ways(gpu, calls)


def test_scale_rows(seen):
    holds(seen(scales))


def batches(gpu):
    from fastdml_kernels.augment import augment

    images, labels = torch.zeros(50, 8, 8, 3, dtype=torch.uint8), torch.zeros(50).long()
    mean = scale = torch.ones(3)
    plain, erasing = Augment(8, 8), Augment(8, 8, pad=1, flip=True, erase=0.5)

    def batch(what=plain, B=4, seed=1, epoch: Any = 1, first=0, **rest):
        samples = torch.arange(B + first)[first:]
        return lambda: augment(
            images, labels, samples, mean, scale, what, seed=seed, epoch=epoch, **rest
        )

    calls = {
        "plain": batch(), "more": batch(B=7), "erasing": batch(erasing),
        "resized": batch(Augment(16, 12)), "bfloat16": batch(dtype=torch.bfloat16),
        "samples not aligned": batch(first=1),
        "repetitions": batch(repetitions=torch.zeros(4).long()),
        "an epoch on the device": batch(epoch=torch.ones(1).long()),
    }  # fmt: skip
    for number in (0, 16, 2**31 - 1, 2**31, 2**40, 2**63 - 1):
        calls[f"seed {number}"] = batch(seed=number)
        calls[f"epoch {number}"] = batch(epoch=number)
    return both_ways(gpu, calls, "out", "out_labels")


def test_augment(seen):
    holds(seen(batches))


# ---- what a plan must not hold on to, and what it must notice


def let_go(gpu):
    """Tensors that a call was given, and what it returned."""
    logits, labels = [z.requires_grad_() for z in rows(2, 12, 10)], labels_of(12)
    weight = torch.ones(10)
    losses, stats = mutual_loss(logits, labels, class_weight=weight, return_stats=True)
    losses.sum().backward()
    alive = [weakref.ref(t) for t in (*logits, labels, weight, losses, stats.packed)]
    del logits, labels, weight, losses, stats
    gc.collect()
    return [ref() is None for ref in alive]


def test_plans_keep_no_tensor(seen):
    assert all(seen(let_go))


def few_plans(gpu):
    from fastdml_kernels import launch, launch_plan

    most, launch_plan.MOST = launch_plan.MOST, 3
    try:
        launch._PLANS.known.clear()
        sizes = []
        for C in (3, 4, 5, 6, 7, 3, 4):
            gpu.clear()
            loss_call(rows(2, 4, C), labels_of(4, C))()
            sizes.append([len(launch._PLANS.known), gpu.launches()[0].arguments["C"]])
        return sizes
    finally:
        launch_plan.MOST = most


def test_plans_are_a_limited_number(seen):
    assert seen(few_plans) == [[1, 3], [2, 4], [3, 5], [3, 6], [3, 7], [3, 3], [3, 4]]


def streams(gpu):
    call = loss_call(rows(2, 12, 10), labels_of(12))
    call()
    gpu.clear()
    for stream in (7, 0, 9):
        with gpu.on_stream(stream):
            call()
    return [[each.stream, each.arguments["counter"]] for each in gpu.launches()]


def test_the_stream_is_that_of_the_call(seen):
    was = seen(streams)
    assert [stream for stream, _ in was] == [7, 0, 9]
    assert len({counter for _, counter in was}) == 3


def other_device(gpu):
    """Tensors on a device that is not the current one."""
    current, was = [0], []
    cuda, before = torch.cuda, (torch.cuda.current_device, torch.cuda._exchange_device)
    set_before, raw = torch.cuda._maybe_exchange_device, torch._C._cuda_getCurrentRawStream

    def exchange(index: int) -> int:
        index, current[0] = current[0], index if index >= 0 else current[0]
        return index

    def stream(index: int) -> int:
        was.append(current[0])
        return raw(index)

    call = loss_call(rows(2, 12, 10), labels_of(12))
    call()
    gpu.clear()
    cuda.current_device, cuda._exchange_device = lambda: current[0], exchange
    cuda._maybe_exchange_device, torch._C._cuda_getCurrentRawStream = exchange, stream
    try:
        call()
        current[0] = 1
        call()
        return {"launched on": was, "current again": current[0], "launches": len(gpu.launches())}
    finally:
        cuda.current_device, cuda._exchange_device = before
        cuda._maybe_exchange_device, torch._C._cuda_getCurrentRawStream = set_before, raw


def test_the_tensors_device_is_made_current(seen):
    assert seen(other_device) == {"launched on": [0, 0], "current again": 1, "launches": 2}


def hooks(gpu):
    from triton import knobs

    called: list[str] = []
    runtime, call = knobs.runtime, loss_call(rows(2, 12, 10), labels_of(12))
    call()
    enter, leave = (lambda m: called.append("enter")), (lambda m: called.append("exit"))
    for chain, hook in ((runtime.launch_enter_hook, enter), (runtime.launch_exit_hook, leave)):
        chain.add(hook)
        call()
        chain.remove(hook)
        call()
    return called


def test_hooks_set_after_the_first_call_are_called(seen):
    assert seen(hooks) == ["enter", "exit"]


def switches(gpu):
    from fastdml_kernels.triton_private import launches_alone
    from triton import knobs

    was = [launches_alone()]
    runtime = knobs.runtime
    chain = runtime.launch_enter_hook
    for owner, name, value in (
        (runtime, "debug", True), (knobs.compilation, "instrumentation_mode", "consan"),
        (runtime, "launch_enter_hook", print),
    ):  # fmt: skip
        before = getattr(owner, name)
        setattr(owner, name, value)
        was.append(launches_alone())
        setattr(owner, name, before)
    assert runtime.launch_enter_hook is chain
    return [*was, launches_alone()]


def test_switches_and_hooks_of_another_kind_are_noticed(seen):
    assert seen(switches) == [True, False, False, False, True]


def from_threads(gpu):
    """Eight threads, a shape each, the same call ten times."""
    shapes = {N: (rows(2, N, 10), labels_of(N)) for N in range(20, 28)}
    calls = [loss_call(z, y) for z, y in shapes.values()]
    threads = [threading.Thread(target=lambda c=c: [c() for _ in range(10)]) for c in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    was = [each.arguments for each in gpu.launches()]
    right = [
        list(each["logits"]) == [z.data_ptr() for z in shapes[each["N"]][0]]
        and each["labels"] == shapes[each["N"]][1].data_ptr()
        for each in was
    ]
    return [len(was), all(right)]


def test_threads_share_plans(seen):
    assert seen(from_threads) == [80, True]


def refused(gpu):
    """Kernels whose values ask for another kernel, or which need more than their launcher."""
    import triton
    from fastdml_kernels.scale_grads import constants, scale_rows
    from fastdml_kernels.triton_private import compiled_for, direct_launch

    numbers = {"N": 4, "g_stride_k": 1, "g_stride_n": 0}
    values = {"grads": tuple(rows(1, 4, 10)), "upstream": torch.ones(1)} | numbers
    named = values | constants(10, (10,))
    compiled = compiled_for(scale_rows, named, {})
    ask = lambda kernel, names=tuple(values): (  # noqa: E731
        direct_launch(kernel, compiled, names, named) is not None
    )
    was = {"as it is": ask(scale_rows), "not compiled": direct_launch(
        scale_rows, None, tuple(values), named) is not None}  # fmt: skip
    specialised = triton.jit(scale_rows.fn)
    was["specialised on integers"] = ask(specialised)
    was["a tensor that stays"] = ask(scale_rows, tuple(numbers))
    scale_rows.add_pre_run_hook(print)
    was["a hook of its own"] = ask(scale_rows)
    scale_rows.pre_run_hooks.clear()
    scale_rows.used_global_vals["name", 0] = 5, {"name": 5}
    was["a global variable"] = ask(scale_rows)
    scale_rows.used_global_vals["name", 0] = triton.language.constexpr(5), {}
    was["a global constant"] = not ask(scale_rows)
    scale_rows.used_global_vals.clear()
    was["an interpreter's"] = compiled_for(object(), named, {}) is not None
    return was


def test_what_a_plan_cannot_promise_is_refused(seen):
    was = seen(refused)
    assert was.pop("as it is")
    assert not any(was.values()), was


def forgotten(gpu):
    """Triton unloads a kernel that nobody holds; its own cache is not the only one who does."""
    from fastdml_kernels.register_rows import register_rows

    call, caches = loss_call(rows(2, 12, 10), labels_of(12)), register_rows.device_caches
    call()
    kernels = [weakref.ref(kernel) for kernel in caches[0][0].values()]
    caches.clear()
    gc.collect()
    call()
    return [kernel() is not None for kernel in kernels]


def test_a_plan_holds_its_kernel(seen):
    assert any(seen(forgotten))


# ---- results in one allocation


def results(gpu):
    """What users do with losses: change them in place, keep them."""
    logits, labels = [z.requires_grad_() for z in rows(2, 12, 10)], labels_of(12)
    penalty = torch.ones((), requires_grad=True)
    losses, stats = mutual_loss(logits, labels, return_stats=True)
    versions = losses._version, stats.packed._version
    views = [losses._is_view(), stats.packed._is_view()]
    shapes = [list(losses.shape), list(losses.stride()), list(stats.packed.shape)]
    losses += penalty
    losses[1] *= 2
    apart = versions[1] == stats.packed._version and versions[0] != losses._version
    stats.packed.add_(1)
    losses.sum().backward()
    by_row = mutual_loss(logits, labels, reduction="none")
    by_row *= 2
    by_row.sum().backward()
    with torch.inference_mode():
        kept, more = mutual_loss([z.detach() for z in logits], labels, return_stats=True)
        kept += more.kl
    long = mutual_loss(rows(2, 4000, 10), labels_of(4000))
    call = Call(labels, Options(), 1.0, 1.0, 1.0, None, None, None, True)
    operators = torch.ops.fastdml.mutual_loss(logits, None, [0, 1], True, *flatten(call))
    return {
        "views": views, "shapes": shapes, "versions apart": apart,
        "grads": [z.grad is not None for z in logits], "penalty": penalty.grad.item(),
        "kept": [t.untyped_storage().nbytes() for t in (losses, long)],
        "operator's": len({t.untyped_storage().data_ptr() for t in operators[:2]}),
        "value_and_grad": [g.requires_grad for g in MutualLoss().value_and_grad(logits, labels)[2]],
    }  # fmt: skip


def test_losses_and_statistics_are_tensors_like_any(seen):
    was = seen(results)
    assert was["views"] == [False, False]
    assert was["shapes"] == [[2], [1], [16]]
    assert was["versions apart"]
    assert was["grads"] == [True, True]
    assert was["penalty"] == 3.0
    assert max(was["kept"]) <= 4096
    assert was["operator's"] == 2  # pieces of memory
    assert was["value_and_grad"] == [False, False]


def allocations(gpu):
    """Tensors that a call makes."""
    from fastdml_kernels import launch

    made, empty = [], torch.empty
    call = loss_call(rows(2, 12, 10), labels_of(12), want_stats=True)
    call()
    torch.empty = lambda *a, **k: made.append(1) or empty(*a, **k)
    try:
        call()
    finally:
        torch.empty = empty
    assert launch.torch is torch
    return len(made)


def test_one_allocation_for_losses_statistics_and_partial_sums(seen):
    assert seen(allocations) == 1


# ---- the grid


def grids(gpu):
    from fastdml_kernels import launch

    before, was = launch.registers_and_shared, []
    try:
        for registers in (32, 40, 64, 255):
            launch._PLANS.known.clear()
            launch.registers_and_shared = lambda compiled, r=registers: (r, 0)
            gpu.clear()
            loss_call(rows(2, 40_000, 10), labels_of(40_000), Options(reduction="sum"))()
            (each,) = gpu.launches()
            was.append([each.grid[0], each.threads, each.arguments["ROWS"]])
        return was
    finally:
        launch.registers_and_shared = before
        launch._PLANS.known.clear()


def test_the_grid_is_what_is_resident(seen):
    from fastdml_kernels.occupancy import resident_programs

    was = seen(grids)
    for registers, (programs, threads, rows) in zip((32, 40, 64, 255), was, strict=True):
        resident = resident_programs(registers, 0, threads // 32)
        assert programs == min(132 * resident, -(-40_000 // rows)), registers


def captured(gpu):
    """A call inside a capture, by the plan of the warm-up."""
    logits, labels = rows(2, 12, 10), labels_of(12)
    call = Call(labels, Options(), 1.0, 1.0, 1.0, None, None, None, want_stats=False)
    losses_and_grads(logits, call, range(len(logits)))
    kernels = len(gpu.kernels)
    gpu.clear()
    with gpu.capture():
        losses_and_grads(logits, call, range(len(logits)))
    return [len(gpu.launches()), len(gpu.kernels) - kernels]


def test_a_captured_call_is_one_launch_and_compiles_nothing(seen):
    assert seen(captured) == [1, 0]


SCENARIOS = [
    losses, new_sizes, scales, batches, let_go, few_plans, streams, other_device, hooks, switches,
    from_threads, refused, forgotten, results, allocations, grids, captured,
]  # fmt: skip
