"""What torch keeps to itself does what it is used for, on the torch at hand; and is used nowhere
else."""

from __future__ import annotations

import ast
import copy
import inspect
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fastdml_kernels import torch_private as kernels_private
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_map

from fastdml import torch_private as private

ROOT = Path(__file__).resolve().parents[1]


def tensors(*values):
    return [torch.tensor(v) for v in values]


# ---- containers of tensors


def test_tree_nodes():
    class Pair:
        def __init__(self, first, second):
            self.fields = [first, second]

    private.register_tree_node(Pair, lambda p: p.fields, lambda f: Pair(*f), "fastdml.tests.Pair")
    doubled = tree_map(lambda t: 2 * t, {"pair": Pair(*tensors(1.0, 2.0))})["pair"]
    assert type(doubled) is Pair
    assert doubled.fields == [2, 4]


# ---- several processes


def test_default_store():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        store = private.default_store()
        store.set("key", "value")
        assert store.get("key") == b"value"
    finally:
        dist.destroy_process_group()


# ---- many tensors in one launch


def test_foreach_copy():
    to, weight = torch.zeros(3), nn.Parameter(torch.zeros(2))
    with torch.no_grad():
        private.foreach_copy_([to, weight], [torch.ones(3, dtype=torch.float64), torch.ones(2)])
    assert to.tolist() == [1, 1, 1]
    assert weight.tolist() == [1, 1]


def test_foreach_mul():
    found = tensors([1.0, 2.0], [3.0])
    private.foreach_mul_(found, torch.tensor(4.0))
    assert [t.tolist() for t in found] == [[4, 8], [12]]


def test_foreach_lerp():
    found = tensors([0.0, 8.0], [4.0])
    private.foreach_lerp_(found, tensors([4.0, 8.0], [0.0]), 0.25)
    assert [t.tolist() for t in found] == [[1, 8], [3]]


# ---- loss scale and optimizers


@pytest.mark.parametrize("value", [2.0, float("inf"), float("nan")])
def test_unscale(value):
    grads, overflow = tensors([4.0], [value]), torch.zeros(())
    private.unscale_(grads, overflow, torch.tensor(0.5))
    assert overflow == (value != 2.0)
    assert grads[0] == 2
    assert overflow == 1 or grads[1] == 1


def test_update_scale():
    scale, steps = torch.tensor(8.0), torch.zeros((), dtype=torch.int32)
    for overflow, expected, count in ((0, 8, 1), (0, 16, 0), (0, 16, 1), (1, 8, 0)):
        private.update_scale_(scale, steps, torch.tensor(float(overflow)), 2.0, 0.5, 2)
        assert (scale, steps) == (expected, count)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("overflow", [0.0, 1.0])
def test_a_fused_step_is_left_out_where_the_flag_says_so(kind, overflow):
    w, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    w.grad, other.grad = torch.ones(3), torch.ones(3)
    optimizer, plain = kind([w], 0.1, fused=True), kind([other], 0.1, fused=True)
    private.step_unless(optimizer, torch.tensor(overflow))
    assert (w == 1).all() == bool(overflow)
    assert not {"found_inf", "grad_scale"} & vars(optimizer).keys()
    plain.step()
    assert overflow or torch.equal(w, other)
    optimizer.step()  # as any other afterwards
    assert (w != 1).all()


def test_step_pre_hooks():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    assert private.step_pre_hooks(optimizer) == []

    def hook(*_):
        """Of one's own."""

    handle = optimizer.register_step_pre_hook(hook)
    assert private.step_pre_hooks(optimizer) == [hook]
    handle.remove()
    assert private.step_pre_hooks(optimizer) == []


# ---- what modules hold


def test_tables_are_live():
    m = nn.BatchNorm1d(2, affine=False)
    parameters, buffers = private.parameter_table(m), private.buffer_table(m)
    children = private.child_table(m)
    assert parameters == {"weight": None, "bias": None}
    assert buffers.keys() == {"running_mean", "running_var", "num_batches_tracked"}
    m.weight, m.running_mean, m.child = nn.Parameter(torch.ones(2)), torch.ones(2), nn.ReLU()
    assert parameters["weight"] is m.weight
    assert buffers["running_mean"] is m.running_mean
    assert children == {"child": m.child}


def test_a_copy_gets_children_of_its_own():
    m = nn.Sequential(nn.ReLU())
    twin = copy.copy(m)
    private.set_child_table(twin, {"0": nn.Tanh()})
    assert type(twin[0]) is nn.Tanh
    assert type(m[0]) is nn.ReLU


def test_base_attributes():
    m = nn.Linear(1, 1)
    assert vars(m).keys() - private.base_attributes() == {"in_features", "out_features"}


def test_attributes_are_as_they_were():
    m = nn.Linear(1, 1)
    before = private.attributes(m)
    assert before == private.attributes(m)
    m.register_forward_hook(lambda *_: None)
    m.child = nn.ReLU()
    after = private.attributes(m)
    assert before.keys() == after.keys()
    assert {n for n in after if before[n] != after[n]} == {"_forward_hooks", "_modules"}


REGISTER = [
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook",
]  # fmt: skip


@pytest.mark.parametrize("register", REGISTER)
def test_hooks_of_a_module(register):
    m = nn.Linear(1, 1)
    assert not private.has_hooks(m)
    handle = getattr(m, register)(lambda *_: None)
    assert private.has_hooks(m)
    handle.remove()
    assert not private.has_hooks(m)


@pytest.mark.parametrize("register", REGISTER)
def test_hooks_on_all_modules(register):
    assert not private.hooks_on_all_modules()
    name = register.replace("register_", "register_module_")
    handle = getattr(nn.modules.module, name)(lambda *_: None)
    try:
        assert private.hooks_on_all_modules()
    finally:
        handle.remove()
    assert not private.hooks_on_all_modules()


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_tensors(register):
    w, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    assert not private.any_tensor_has_hooks([w, other])
    handle = getattr(w, register)(lambda _: None)
    assert private.any_tensor_has_hooks([other, w])
    assert not private.any_tensor_has_hooks([other])
    handle.remove()
    assert not private.any_tensor_has_hooks([w, other])


def test_compiled_modules():
    m = nn.Linear(1, 1)
    assert not private.is_compiled(m)
    assert not private.wraps_compiled(m)
    wrapper = torch.compile(m)
    assert private.is_compiled(wrapper)
    assert private.wraps_compiled(wrapper)
    assert not private.is_compiled(m)
    m.compile()
    assert private.is_compiled(m)
    assert not private.wraps_compiled(m)


# ---- what autograd and the dispatcher know


def test_a_dispatch_mode_sees_operations():
    seen = []

    class Mode(private.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.namespace)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Mode():
        x.sum()
    x.sum()
    assert seen == ["aten"]


def test_tensor_version():
    t = torch.zeros(2)
    before = private.tensor_version(t)
    t.sum()
    assert private.tensor_version(t) == before
    t.add_(1)
    assert private.tensor_version(t) > before
    with torch.inference_mode():
        t = torch.zeros(2)
    assert private.tensor_version(t) == -1


def test_a_held_accumulator_is_found():
    w = nn.Parameter(torch.ones(1))
    assert not any(t is w for t in private.tensors_with_held_accumulators())
    node = w.view_as(w).grad_fn.next_functions[0][0]
    assert any(t is w for t in private.tensors_with_held_accumulators())
    del node
    assert not any(t is w for t in private.tensors_with_held_accumulators())


# ---- CUDA


def test_what_ends_a_capture_is_there():
    """The calls themselves need a device, and a capture that breaks off: `engine/test_graph`."""
    if not torch.cuda.is_available():
        names = ("_cuda_endAllocateToPool", "_cuda_releasePool")
        assert all(hasattr(torch._C, n) for n in names) == torch.backends.cuda.is_built()
        return
    with pytest.raises(RuntimeError):
        private.end_allocation_to_pool(0, torch.cuda.graph_pool_handle())


# ---- profiler and data loader


def test_events_of_the_profiler():
    with profile(activities=[ProfilerActivity.CPU]) as recorder, record_function("a range"):
        torch.ones(3).sum()
    events = {e.name: e for e in recorder.events()}
    assert private.is_annotation(events["a range"])
    assert not private.is_annotation(events["aten::sum"])
    assert isinstance(private.stream_of(events["aten::sum"]), int)


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise AssertionError("never asked for")


def test_waiting_for_a_worker_is_recognised():
    loader = iter(torch.utils.data.DataLoader(Broken(), num_workers=1))
    code = type(loader)._try_get_data.__code__
    assert private.fetches_from_worker(code)
    assert not private.fetches_from_worker(threading.Thread.run.__code__)
    loader._shutdown_workers()


# ---- fastdml_kernels


def test_function_transforms_are_seen():
    seen = []

    def f(x):
        seen.append(kernels_private.function_transforms_active([x]))
        return (x * x).sum()

    f(torch.ones(2))
    torch.func.grad(f)(torch.ones(2))
    torch.func.vmap(f)(torch.ones(2, 2))
    assert seen == [False, True, True]


def test_batches_of_gradients_are_seen():
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(kernels_private.function_transforms_active([grad]))
            return 2 * grad

    x = torch.ones(2, requires_grad=True)
    for grad, batched in ((torch.ones(2), False), (torch.eye(2), True)):
        torch.autograd.grad(Double.apply(x), x, grad, is_grads_batched=batched)
    assert seen == [False, True]


def test_tangents_are_seen():
    x = torch.ones(2)
    assert not kernels_private.has_tangents([x])
    with forward_ad.dual_level():
        assert not kernels_private.has_tangents([x])
        assert kernels_private.has_tangents([x, forward_ad.make_dual(x, torch.ones(2))])


def test_plain_tensors():
    class Own(torch.Tensor):
        pass

    x = torch.ones(2)
    assert kernels_private.is_plain(x)
    assert kernels_private.is_plain(nn.Parameter(x))
    for t in (
        torch.ones(2).as_subclass(Own),
        torch.view_as_complex(torch.ones(2, 2)).conj().imag,  # stands for its negative
        torch._efficientzerotensor(2),
        torch._to_functional_tensor(x),
    ):
        assert not kernels_private.is_plain(t)


def test_ordinary_tensors():
    class Own(torch.Tensor):
        pass

    x = torch.ones(2)
    for _ in range(2):  # looked at, and known
        assert kernels_private.ordinary([x, nn.Parameter(x), torch.ones(2, 3).bfloat16(), x.int()])
        assert kernels_private.ordinary([torch.ones(4, requires_grad=True)[::2] * 2])
    with torch.inference_mode():
        of_inference = torch.ones(2)
    unusual = [
        torch.ones(2).as_subclass(Own),
        torch.view_as_complex(torch.ones(2, 2)).conj().imag,
        torch._efficientzerotensor(2),
        torch._to_functional_tensor(x),
        torch.ones(2).to_sparse(),
        torch.nested.nested_tensor([x, x]),
        of_inference,
    ]
    seen = []
    torch.vmap(lambda t: seen.append(kernels_private.ordinary([t])) or t)(torch.ones(2, 2))
    torch.func.grad(lambda t: seen.append(kernels_private.ordinary([t])) or t.sum())(x)
    for t in unusual:
        seen.append(kernels_private.ordinary([x, t]))
    assert not any(seen)


def test_what_watches_operations_or_changes_derivatives_is_seen():
    seen = [kernels_private.watched()]

    def look(t):
        seen.append(kernels_private.watched())
        return t + 1

    torch.vmap(look)(torch.ones(2, 2))
    torch.func.grad(lambda t: look(t).sum())(torch.ones(2))
    with forward_ad.dual_level():
        look(torch.ones(2))
    make_fx(look)(torch.ones(2))
    torch.jit.trace(look, torch.ones(2), check_trace=False)
    look(torch.ones(2))
    assert seen == [False, True, True, True, True, True, False]


def test_apply_of_ordinary_tensors_is_apply():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x * factor

        @staticmethod
        def backward(ctx, upstream):
            return upstream * ctx.factor, None

    x = torch.ones(3, requires_grad=True)
    for apply in (Doubled.apply, kernels_private.ordinary_apply(Doubled)):
        result = apply(x, 2.0)
        (grad,) = torch.autograd.grad(result.sum(), x)
        assert result.tolist() == grad.tolist() == [2.0] * 3
        assert type(result.grad_fn).__name__ == "DoubledBackward"


@pytest.mark.gpu
def test_the_current_stream():
    stream = torch.cuda.Stream()
    assert kernels_private.current_stream(0) == torch.cuda.current_stream(0).cuda_stream
    with torch.cuda.stream(stream):
        assert kernels_private.current_stream(0) == stream.cuda_stream


def test_dispatch_modes_are_seen():
    seen = []

    def f(x):
        seen.append(kernels_private.dispatch_mode_active())
        return x + 1

    f(torch.ones(2))
    make_fx(f)(torch.ones(2))
    assert seen == [False, True]


# ---- tensors without values


def test_valueless_tensors():
    with private.valueless_tensors():
        weight = nn.Parameter(torch.zeros(2**40, 3))
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, tuple)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            out = nn.functional.linear(torch.zeros(2, 3), weight)
        assert (out.shape, out.dtype) == ((2, 2**40), torch.bfloat16)
        assert [t.untyped_storage().nbytes() for t in saved] == [2 * 3 * 2]  # what is cast
        assert weight[1:].untyped_storage() is weight.untyped_storage()


# ---- several processes


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_the_next_backward_pass_communicates(alone):
    replica = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    sums = []

    def hook(state, bucket):
        sums.append(bucket.buffer().numel())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    replica.register_comm_hook(None, hook)
    with replica.no_sync():
        first, second = replica(torch.ones(1, 3)), replica(torch.ones(1, 3))
        first.sum().backward()
    assert sums == []
    private.sum_in_next_backward(replica)
    second.sum().backward()
    assert sums == [8]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batch_norm_sums(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    x, dy = (
        torch.randn(5, 4, 3, 2, generator=generator).to(dtype, memory_format=layout)
        for _ in range(2)
    )
    kind = torch.promote_types(dtype, torch.float32)
    mean, invstd = torch.arange(4, dtype=kind), torch.tensor([1, 2, 0.5, 3], dtype=kind)
    plain, away = private.batch_norm_sums(dy, x, mean, invstd)
    assert plain.dtype == away.dtype == kind
    wide_x, wide_dy = x.double(), dy.double()
    away_from = (wide_x - mean.view(-1, 1, 1)) * invstd.view(-1, 1, 1)
    close = {"rtol": 1e-5, "atol": 1e-5} if kind == torch.float32 else {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(plain.double(), wide_dy.sum((0, 2, 3)), **close)
    torch.testing.assert_close(away.double(), (wide_dy * away_from).sum((0, 2, 3)), **close)


def test_batch_norm_on_cuda_passes_what_the_kernels_take(monkeypatch):
    """They run on CUDA alone: here their place is taken by what they are to compute."""

    def stats(x, eps):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean, torch.where(var + eps == 0, 0.0, (var + eps).rsqrt())

    def elements(dy, x, mean, invstd, weight, sum_dy, sum_dy_away, counts):
        assert counts.dtype == torch.int32
        n, wide = counts.sum(), lambda t: t.view(-1, 1, 1)
        away = (x - wide(mean)) * wide(invstd.square() * sum_dy_away / n)
        return (dy - wide(sum_dy / n) - away) * wide(invstd * weight)

    monkeypatch.setattr(torch, "batch_norm_stats", stats)
    monkeypatch.setattr(torch, "batch_norm_backward_elemt", elements)
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x[:, 2] = 7.0  # of no variance
    mean, var = private.batch_norm_stats(x.detach())
    torch.testing.assert_close(var, x.detach().var((0, 2, 3), correction=0))
    assert var[2] == 0
    weight, dy = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.randn(5, 4, 3, 2).double()
    nn.functional.batch_norm(x, None, None, weight, None, True).backward(dy)
    invstd = (var + 1e-5).rsqrt()
    plain, away = private.batch_norm_sums(dy, x.detach(), mean, invstd)
    counts = torch.tensor([10.0, 20.0])  # of two processes: 30 values of each channel
    dx = private.batch_norm_input_gradient(
        dy, x.detach(), weight, mean, invstd, plain, away / invstd, counts
    )
    torch.testing.assert_close(dx, x.grad)


def test_the_kernels_of_batch_norm_on_cuda_take_these_arguments():
    for name, arguments in (
        ("batch_norm_stats", ["input", "eps"]),
        (
            "batch_norm_backward_elemt",
            [
                "grad_out", "input", "mean", "invstd", "weight", "sum_dy", "sum_dy_xmu", "count",
            ],
        ),
    ):  # fmt: skip
        schema = getattr(torch.ops.aten, name).default._schema
        assert [argument.name for argument in schema.arguments] == arguments


# ---- and nowhere else


@pytest.mark.parametrize("module", [private, kernels_private])
def test_each_use_says_why_and_what_replaces_it(module):
    for name, function in vars(module).items():
        if getattr(function, "__module__", None) == module.__name__:
            text = inspect.getdoc(function) or ""
            assert "Public: " in " ".join(text.split()), name


def of_torch(path: Path) -> list[str]:
    """Private names of torch in a file: modules and attributes that begin with an underscore."""
    tree = ast.parse(path.read_text())
    stored = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    tuples = {"_replace", "_fields", "_make", "_asdict"}  # of named tuples
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private_name(node.attr):
            others = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os")
            if not others and node.attr not in stored | own | tuples:
                found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*(node.module or "").split("."), *(a.name for a in node.names)]
            found += [name for name in names if private_name(name)]
        elif isinstance(node, ast.Constant) and node.value in NAMES:
            found.append(node.value)
    return found


def private_name(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


NAMES = {*private.HOOKS, *private.TABLES, "_orig_mod", "_try_get_data", "grad_scale", "found_inf"}


def test_nothing_else_uses_what_torch_keeps_to_itself():
    files = [*ROOT.glob("fastdml/**/*.py"), *ROOT.glob("kernels/fastdml_kernels/**/*.py")]
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        if path.name not in ("torch_private.py", "triton_private.py")
        for name in of_torch(path)
    }
    assert found == set()
    assert of_torch(ROOT / "fastdml" / "torch_private.py")
