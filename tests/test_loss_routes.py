"""The loss of tensors that are no plain memory, and under tracers, fakes, dispatch modes and other
defaults. Each is right, or refused in one line."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastdml import MutualLoss, linear_mutual_loss, mutual_loss

K, N, C = 3, 6, 10
OPTIONS = [
    {},
    {"temperature": 2.0, "label_smoothing": 0.1},
    {"reduction": "none", "gate": "best", "mimic_ignored": True},
    {"target": "ensemble_logits", "divergence": "jeffreys", "detach_targets": False,
     "gate": "correct"},
    {"target": "ensemble", "class_weight": torch.linspace(0.5, 1.5, C), "label_smoothing": 0.2},
    {"kl_weight": torch.tensor(0.7), "temperature": torch.tensor(2.0), "reduction": "sum"},
    {"divergence": "jsd", "jsd_beta": 0.3, "gate": "entropy", "temperature": 2.0},
]  # fmt: skip
IDS = ["plain", "smoothed", "rows", "symmetric", "weighted", "tensors", "divergent"]


def data(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = [(3 * torch.randn(N, C, generator=g)).to(dtype).requires_grad_() for _ in range(K)]
    y = torch.randint(0, C, (N,), generator=g)
    y[2] = -100
    return z, y


def with_gradients(z: list[Tensor], y: Tensor, **options) -> list[Tensor]:
    losses, stats = mutual_loss(z, y, return_stats=True, **options)
    return [losses.detach(), *stats, *torch.autograd.grad(losses.sum(), z)]


def same(one, two, **tolerances) -> None:
    tolerances = tolerances or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(list(one), list(two), **tolerances)


# ---- other defaults


@contextlib.contextmanager
def default_device(device: str):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "with meta": lambda: torch.device("meta"),
    "meta": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("surroundings", DEFAULTS.values(), ids=DEFAULTS.keys())
def test_defaults_and_autocast_change_nothing(monkeypatch, surroundings, options, native):
    if not native:
        monkeypatch.setattr("fastdml_kernels.cpu_rows.library", lambda: None)
    for dtype in (torch.float32, torch.float16, torch.float64):
        z, y = data(dtype=dtype)
        expected = with_gradients(z, y, **options)
        none = mutual_loss([x[:0] for x in z], y[:0], **options)
        with surroundings():
            same(with_gradients(z, y, **options), expected)
            same([mutual_loss([x[:0] for x in z], y[:0], **options)], [none], equal_nan=True,
                 rtol=0, atol=0)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"class_weight": torch.rand(C), "mimic_ignored": True}])
@pytest.mark.parametrize("surroundings", DEFAULTS.values(), ids=DEFAULTS.keys())
def test_defaults_and_autocast_change_nothing_of_fused_layers(surroundings, options):
    hidden = [torch.randn(N, 4 + k, requires_grad=True) for k in range(K)]
    weight = [torch.randn(C, 4 + k, requires_grad=True) for k in range(K)]
    y = data()[1]

    def run() -> list[Tensor]:
        losses = linear_mutual_loss(hidden, weight, y, chunk_rows=4, **options)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), [*hidden, *weight])]

    expected = run()
    with surroundings():
        same(run(), expected)


def test_label_smoothing_with_class_weights_is_float32_under_autocast():
    g = torch.Generator().manual_seed(1)
    z = [3 * torch.randn(64, 1000, generator=g) for _ in range(2)]
    y, weight = torch.randint(0, 1000, (64,), generator=g), torch.rand(1000, generator=g)
    options = {"label_smoothing": 0.5, "class_weight": weight}
    exact = mutual_loss([x.double() for x in z], y, **options)
    with torch.autocast("cpu", torch.bfloat16):
        losses = mutual_loss(z, y, **options)
    assert (losses - exact).abs().max() < 1e-5


# ---- fakes and tracers


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_fake_tensors_have_the_real_ones_shapes_and_dtypes(options):
    for dtype in (torch.float32, torch.float16, torch.float64):
        z, y = data(dtype=dtype)
        real = with_gradients(z, y, **options)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) for x in (*z, y)]
            given = {
                k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in options.items()
            }
            found = with_gradients(fakes[:K], fakes[K], **given)
            losses, stats, grads = MutualLoss(**given).value_and_grad(fakes[:K], fakes[K])
        for fake, want in zip(found, real, strict=True):
            assert (fake.shape, fake.dtype, fake.device) == (want.shape, want.dtype, want.device)
        assert [losses.shape, *(s.shape for s in stats), *(g.shape for g in grads)] == [
            x.shape for x in real
        ]


def test_fake_rows_of_unknown_number():
    with FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False) as mode:
        z = [mode.from_tensor(torch.randn(N, C)) for _ in range(2)]
        losses = mutual_loss(z, mode.from_tensor(torch.zeros(N, dtype=torch.int64)))
        rows = mutual_loss(z, mode.from_tensor(torch.zeros(N, dtype=torch.int64)), reduction="none")
    assert losses.shape == (2,)
    assert rows.shape[1] == z[0].shape[0]


def test_fake_layers():
    with FakeTensorMode():
        hidden = [torch.randn(N, 4, requires_grad=True) for _ in range(2)]
        weight = [torch.randn(C, 4, requires_grad=True) for _ in range(2)]
        losses = linear_mutual_loss(hidden, weight, torch.zeros(N, dtype=torch.int64))
        losses.sum().backward()
    assert losses.shape == (2,)
    assert [t.grad.shape for t in (*hidden, *weight)] == [(N, 4)] * 2 + [(C, 4)] * 2


def calls_of(graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "fastdml" in str(node.target)]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_make_fx_records_the_operator(options, mode):
    (z, y), (other, labels) = data(), data(seed=1)
    traced = make_fx(lambda z, y: mutual_loss(z, y, **options), tracing_mode=mode,
                     _allow_non_fake_inputs=True)(z, y)  # fmt: skip
    assert calls_of(traced.graph) == ["fastdml.mutual_loss.default"]
    same([traced(other, labels)], [mutual_loss(other, labels, **options)])


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_make_fx_records_the_gradient(options):
    (z, y), (other, labels) = data(), data(seed=1)
    traced = make_fx(lambda z, y: with_gradients(z, y, **options))(z, y)
    same(traced(other, labels), with_gradients(other, labels, **options), rtol=1e-6, atol=1e-7)


def test_make_fx_records_values_and_gradients_and_fused_layers():
    (z, y), (other, labels) = data(), data(seed=1)
    module = MutualLoss()
    traced = make_fx(lambda z, y: module.value_and_grad(z, y)[::2])(z, y)
    (losses, grads), want = traced(other, labels), module.value_and_grad(other, labels)
    same([losses, *grads], [want[0], *want[2]])
    weight = torch.randn(4, C)  # logits as hidden: (N, C) -> 4 classes
    y, labels = y.clamp(max=3), labels.clamp(max=3)
    fused = make_fx(lambda z, y: linear_mutual_loss(z, [weight] * K, y))(z, y)
    same([fused(other, labels)], [linear_mutual_loss(other, [weight] * K, labels)])


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_records_the_operator(options):
    (z, y), (other, labels) = data(), data(seed=1)

    def losses(a, b, c, y):
        return mutual_loss([a, b, c], y, **options)

    traced = torch.jit.trace(losses, (*(x.detach() for x in z), y), check_trace=False)
    assert "fastdml::mutual_loss" in str(traced.graph)
    fixed = [x.detach() for x in other]
    same([traced(*fixed, labels)], [losses(*fixed, labels)])
    traced = torch.jit.trace(losses, (*z, y), check_trace=False)
    value, want = traced(*other, labels), losses(*other, labels)
    same([value], [want])
    same(torch.autograd.grad(value.sum(), other), torch.autograd.grad(want.sum(), other),
         rtol=1e-6, atol=1e-7)  # fmt: skip


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_of_stacked_logits_and_of_fused_layers():
    (z, y), (other, labels) = data(), data(seed=1)
    one, two = torch.stack(z).detach(), torch.stack(other).detach()
    traced = torch.jit.trace(mutual_loss, (one, y), check_trace=False)
    same([traced(two, labels)], [mutual_loss(two, labels)])
    y, labels, weight = y.clamp(max=3), labels.clamp(max=3), torch.randn(K, 4, C)
    traced = torch.jit.trace(linear_mutual_loss, (one, weight, y), check_trace=False)
    same([traced(two, weight, labels)], [linear_mutual_loss(two, weight, labels)])


def test_export_records_the_operator():
    (z, y), (other, labels) = data(), data(seed=1)

    class Both(nn.Module):
        def forward(self, a, b, y):
            return mutual_loss([a, b], y)

    program = torch.export.export(Both(), (z[0].detach(), z[1].detach(), y))
    assert calls_of(program.graph) == ["fastdml.mutual_loss.default"]
    same([program.module()(other[0], other[1], labels)], [mutual_loss(other[:2], labels).detach()])


# ---- dispatch modes


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("make", [Watch, lambda: FlopCounterMode(display=False)])
def test_dispatch_modes_see_one_operator(make, options):
    z, y = data()
    with make() as mode:
        losses = mutual_loss(z, y, **options)
        if isinstance(mode, Watch):
            assert [name for name in mode.seen if name != "aten.detach.default"] == [
                "fastdml.mutual_loss.default"
            ]
        grads = torch.autograd.grad(losses.sum(), z)
    expected = mutual_loss(z, y, **options)
    same([losses], [expected])
    same(grads, torch.autograd.grad(expected.sum(), z), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"detach_targets": False}])
def test_second_derivatives_are_refused_there_too(settings):
    z, y = data()
    with Watch():
        losses = mutual_loss(z, y, **settings)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(losses.sum(), z, create_graph=True)
        fused = linear_mutual_loss(z, [torch.randn(C, C)] * K, y)
        with pytest.raises(RuntimeError, match="linear_mutual_loss has no second derivative"):
            torch.autograd.grad(fused.sum(), z, create_graph=True)


# ---- tensors that are more, or less, than their memory


class Named(Tensor):
    """A subclass as people write it."""


def negated(x: Tensor) -> Tensor:
    """The same values, with the bit that says that memory holds their negatives."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


UNUSUAL = {
    "Parameter": nn.Parameter,
    "Buffer": nn.Buffer,
    "subclass": lambda x: x.as_subclass(Named),
    "Parameter of a subclass": lambda x: nn.Parameter(x.as_subclass(Named)),
    "negative": negated,
    "wrapper": lambda x: TwoTensor(x, x.clone()),
    "functional": torch._to_functional_tensor,
    "expanded": lambda x: x[:1].clone().expand(N, C),
    "inside another": lambda x: torch.stack([x, x], 2)[:, :, 0],
}


def plain(x: Tensor) -> Tensor:
    if isinstance(x, TwoTensor):
        return x.a
    return torch._from_functional_tensor(x) if torch._is_functional_tensor(x) else x.detach()


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_unusual_logits(make, options):
    z, y = data()
    given = [make(x.detach()) for x in z]
    clean = [plain(x).resolve_neg().clone().as_subclass(Tensor) for x in given]
    same([plain(mutual_loss(given, y, **options)).as_subclass(Tensor)],
         [mutual_loss(clean, y, **options)])  # fmt: skip
    module = MutualLoss(**options)
    losses, _, grads = module.value_and_grad(given, y)
    want = module.value_and_grad(clean, y)
    same([plain(x).as_subclass(Tensor) for x in (losses, *grads)], [want[0], *want[2]])


@pytest.mark.parametrize("name", ["subclass", "negative", "wrapper", "inside another"])
@pytest.mark.parametrize("settings", [{}, {"detach_targets": False}])
def test_unusual_logits_hand_gradients_on(name, settings):
    z, y = data()
    given = [UNUSUAL[name](x) for x in z]
    leaves = z
    if name == "wrapper":  # of which autograd knows nothing inside
        leaves = given = [x.detach().requires_grad_() for x in given]
    grads = torch.autograd.grad(mutual_loss(given, y, **settings).sum(), leaves)
    expected = torch.autograd.grad(mutual_loss(z, y, **settings).sum(), z)
    same([plain(g).as_subclass(Tensor) for g in grads], expected, rtol=1e-6, atol=1e-7)


def test_logits_of_nothing_but_zeros():
    zero = torch._efficientzerotensor((N, C))
    z, y = data()
    same([mutual_loss([z[0].detach(), zero], y)],
         [mutual_loss([z[0].detach(), torch.zeros(N, C)], y)])  # fmt: skip


def test_a_weight_that_is_stored_negated():
    z, y = data()
    weight = torch.linspace(0.5, 1.5, C)
    same(with_gradients(z, y, class_weight=negated(weight)),
         with_gradients(z, y, class_weight=weight))  # fmt: skip


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.to_mkldnn])
def test_tensors_of_other_layouts_are_refused(make):
    z, y = data()
    other = make(z[0].detach())
    with pytest.raises(TypeError, match=r"logits: a (sparse|_mkldnn)\S* tensor: give a dense one"):
        mutual_loss([other, z[1]], y)
    with pytest.raises(TypeError, match=r"hidden: a .* tensor: give a dense one"):
        linear_mutual_loss([other], [torch.randn(4, C)], y)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused(layout):
    nested = torch.nested.nested_tensor([torch.randn(3, C), torch.randn(2, C)], layout=layout)
    with pytest.raises(TypeError, match="logits: a nested tensor: give a dense one"):
        mutual_loss(nested, data()[1])


def test_quantised_logits_are_refused():
    z = torch.quantize_per_tensor(torch.randn(N, C), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"logits of torch\.qint8: cast"):
        mutual_loss([z, z], data()[1])


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1)])
def test_distributed_tensors_are_refused(mesh, placement):
    z, y = data()
    spread = [distribute_tensor(x.detach(), mesh, [placement]) for x in z]
    weight = distribute_tensor(torch.ones(C), mesh, [Replicate()])
    for name, call in {
        "logits": lambda: mutual_loss(spread, y),
        "labels": lambda: mutual_loss(z, distribute_tensor(y, mesh, [Replicate()])),
        "class_weight": lambda: mutual_loss(z, y, class_weight=weight),
        "kl_weight": lambda: mutual_loss(z, y, kl_weight=weight.sum()),
        "weight": lambda: linear_mutual_loss(z, spread, y),
        "bias": lambda: linear_mutual_loss(z, [torch.randn(C, C)] * K, y, [None, weight, None]),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}: a DTensor.*to_local\(\).*full_tensor\(\)"):
            call()
    same([mutual_loss([x.to_local() for x in spread], y)], [mutual_loss(z, y).detach()])
