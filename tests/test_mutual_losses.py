"""`mutual_losses`, K losses with a node each, and `mutual_loss`, in the loops that people have,
beside the same in plain torch."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import get_type_hints

import pytest
import torch
import torch.nn.functional as F
from fastdml_kernels import separate_losses
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from fastdml import MutualStats, mutual_loss, mutual_losses
from fastdml.loss_options import LossOptions

K, N, C = 3, 6, 10
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum", "temperature": 3.0, "label_smoothing": 0.1},
    "rows": {"reduction": "none", "gate": "correct"},
    "symmetric": {"symmetric": True, "target": "ensemble_logits"},
    "weighted": {"class_weight": torch.linspace(0.5, 1.5, C), "peer_weights": torch.ones(K, K)},
    "tensors": {"kl_weight": torch.tensor(0.7), "temperature": torch.tensor(2.0)},
    "divergent": {"divergence": "jsd", "jsd_beta": 0.3, "sample_weight": torch.linspace(0, 2, N)},
}


def data(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = [(3 * torch.randn(N, C, generator=g)).to(dtype).requires_grad_() for _ in range(K)]
    y = torch.randint(0, C, (N,), generator=g)
    y[2] = -100
    return z, y


def same(one, two, rtol: float = 0, atol: float = 0) -> None:
    torch.testing.assert_close(list(one), list(two), rtol=rtol, atol=atol)


# ---- the loops of public trainers, in float64 beside plain torch


def net(width: int) -> nn.Module:
    """No bias before the normalisation: its gradient is nothing but rounding."""
    hidden = nn.Linear(8, width, bias=False)
    return nn.Sequential(hidden, nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 5))


def of_torch(logits: list[Tensor], labels: Tensor) -> list[Tensor]:
    """As those trainers spell it."""
    losses = []
    for k, z in enumerate(logits):
        kl = sum(
            F.kl_div(F.log_softmax(z, 1), F.softmax(other.detach(), 1), reduction="batchmean")
            for j, other in enumerate(logits)
            if j != k
        )
        losses.append(F.cross_entropy(z, labels) + kl / (len(logits) - 1))
    return losses


def summed(peers, optimizers, losses) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    sum(losses).backward()
    for optimizer in optimizers:
        optimizer.step()


def each_its_own(peers, optimizers, losses) -> None:
    for k in range(len(peers)):
        optimizers[k].zero_grad()
        losses[k].backward()
        optimizers[k].step()


def each_its_scaler(scalers, peers, optimizers, losses) -> None:
    for k in range(len(peers)):
        optimizers[k].zero_grad(set_to_none=True)
        scalers[k].scale(losses[k]).backward()
        scalers[k].unscale_(optimizers[k])
        nn.utils.clip_grad_norm_(peers[k].parameters(), 0.5)
        scalers[k].step(optimizers[k])
        scalers[k].update()


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize(("loss", "loop"), [
    (mutual_loss, "summed"), (mutual_losses, "summed"), (mutual_losses, "own"),
    (mutual_losses, "scaler"),
])  # fmt: skip
def test_the_loops_of_public_trainers(loss, loop, make, count):
    torch.manual_seed(0)
    ours = [net(6 + k).double() for k in range(count)]
    theirs = copy.deepcopy(ours)
    history = []
    for peers, losses_of in ((ours, loss), (theirs, of_torch)):
        g = torch.Generator().manual_seed(1)
        optimizers = [make(peer.parameters()) for peer in peers]
        scalers = [torch.amp.GradScaler("cpu", growth_interval=2) for _ in peers]
        run = {"summed": summed, "own": each_its_own,
               "scaler": partial(each_its_scaler, scalers)}[loop]  # fmt: skip
        seen = []
        for _ in range(6):
            x = torch.randn(16, 8, dtype=torch.float64, generator=g)
            y = torch.randint(0, 5, (16,), generator=g)
            with torch.autocast("cpu", torch.bfloat16, enabled=loop == "scaler"):
                losses = losses_of([peer(x) for peer in peers], y)
            run(peers, optimizers, losses)
            seen += [value.detach().clone() for value in losses]
        history.append(seen)
    same(*history, rtol=1e-12, atol=1e-12)
    for one, two in zip(ours, theirs, strict=True):
        same(one.state_dict().values(), two.state_dict().values(), rtol=1e-12, atol=1e-12)


def test_a_scaler_per_peer_skips_that_peer_alone():
    """With float16 logits of which one peer's gradient overflows."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 8), torch.randint(0, 5, (16,))
    peers = [nn.Linear(8, 5) for _ in range(2)]
    before = [peer.weight.detach().clone() for peer in peers]
    optimizers = [torch.optim.SGD(peer.parameters(), 0.1) for peer in peers]
    scalers = [torch.amp.GradScaler("cpu", init_scale=s) for s in (2.0**10, 2.0**40)]
    losses = mutual_losses([peer(x).half() for peer in peers], y)
    for k in range(2):
        scalers[k].scale(losses[k]).backward()
        scalers[k].step(optimizers[k])
        scalers[k].update()
    moved = [not torch.equal(w, peer.weight) for w, peer in zip(before, peers, strict=True)]
    assert moved == [True, False]
    assert [scaler.get_scale() for scaler in scalers] == [2.0**10, 2.0**39]


# ---- the same bits as the sum's backward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_the_bits_of_the_sums_backward(options, dtype, scale):
    z, y = data(dtype)
    expected = torch.autograd.grad((scale * mutual_loss(z, y, **options)).sum(), z)
    losses, stats = mutual_losses(z, y, return_stats=True, **options)
    assert isinstance(losses, tuple)
    assert all(loss.shape == ((N,) if "gate" in options else ()) for loss in losses)
    same(losses, mutual_loss(z, y, **options).unbind(), rtol=1e-6, atol=1e-6)
    want = mutual_loss(z, y, return_stats=True, **options)[1]
    assert isinstance(stats, MutualStats)
    same(stats, want, rtol=1e-5, atol=1e-6)
    assert not any(s.requires_grad for s in stats)
    for k in (1, 0, 2):  # in any order
        (scale * losses[k]).sum().backward()
    same([x.grad for x in z], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_gradient_of_the_losses(dtype):
    z, y = data(dtype)
    upstream = torch.linspace(-2, 3, K * N).view(K, N)
    expected = torch.autograd.grad((mutual_loss(z, y, reduction="none") * upstream).sum(), z)
    for k, loss in enumerate(mutual_losses(z, y, reduction="none")):
        loss.backward(upstream[k].to(loss.dtype))
    eps = torch.finfo(dtype).eps
    same([x.grad for x in z], expected, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_call_computes_all(monkeypatch, dtype):
    calls = []
    compute = separate_losses.compute
    monkeypatch.setattr(separate_losses, "compute", lambda *a: calls.append(1) or compute(*a))
    z, y = data(dtype)
    for loss in mutual_losses(z, y):
        loss.backward()
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loss_is_about_its_own_peer(dtype):
    """None for the others, where zeros would let weight decay and momentum move them."""
    z, y = data(dtype)
    mutual_losses([x * 1 for x in z], y)[1].backward()
    assert [x.grad is None for x in z] == [True, False, True]


def test_a_loss_scale_comes_before_the_rounding_to_float16():
    """Half of these gradients lie below 3e-8, where float16 has nothing."""
    g = torch.Generator().manual_seed(0)
    z = [(4 * torch.randn(64, 500, generator=g)).half().requires_grad_() for _ in range(2)]
    y = torch.randint(0, 500, (64,), generator=g)
    exact = [x.detach().float().requires_grad_() for x in z]
    want = torch.autograd.grad(mutual_loss(exact, y).sum(), exact)
    for loss in mutual_losses(z, y):
        (loss * 2.0**16).backward()
    for x, g in zip(z, want, strict=True):
        torch.testing.assert_close(x.grad.float() / 2**16, g, rtol=1e-3, atol=1e-11)


# ---- graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_second_backward_of_a_retained_graph(dtype):
    z, y = data(dtype)
    h = [x * 1 for x in z]
    losses = mutual_losses(h, y)
    (first,) = torch.autograd.grad(losses[0], z[0], retain_graph=True)
    kept = first.clone()
    first.zero_()  # what is handed out belongs to the caller
    same(torch.autograd.grad(losses[0], z[0], retain_graph=True), [kept])
    with torch.no_grad():
        h[2].add_(1)  # a teacher of peer 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(losses[0], z[0])
    torch.autograd.grad(losses[1], z[1])  # whose gradient is there


@pytest.mark.parametrize("changed", ["labels", "temperature"])
def test_labels_and_weights_changed_before_a_second_backward_are_noticed(changed):
    z, y = data()
    temperature = torch.tensor(2.0)
    losses = mutual_losses(z, y, temperature=temperature)
    losses[0].backward(retain_graph=True)
    {"labels": y, "temperature": temperature}[changed].fill_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[0].backward()


def test_a_second_backward_without_retaining_is_torchs_own_error():
    z, y = data()
    losses = mutual_losses([x * 1 for x in z], y)
    losses[0].backward()
    with pytest.raises(RuntimeError, match="second time"):
        losses[0].backward()
    losses[1].backward()


def test_losses_may_be_changed_in_place():
    z, y = data()
    extra = torch.ones((), requires_grad=True)
    losses = mutual_losses(z, y)
    want = losses[1].detach().clone()
    for k, loss in enumerate(losses):
        if k == 0:
            loss /= 2
            loss += extra
    losses[0].backward()
    assert extra.grad == 1
    same([losses[1]], [want])
    same([2 * z[0].grad], torch.autograd.grad(mutual_loss(z, y)[0], z[0]))


def test_gradients_accumulate():
    z, y = data()
    for _ in range(2):
        for loss in mutual_losses(z, y):
            loss.backward()
    expected = torch.autograd.grad(mutual_loss(z, y).sum(), z)
    same([x.grad for x in z], [2 * g for g in expected])


def test_frozen_peers_and_no_graph_without_need():
    z, y = data()
    fixed = [z[0], z[1].detach(), z[2]]
    losses = mutual_losses(fixed, y)
    assert [loss.requires_grad for loss in losses] == [True, False, True]
    losses[2].backward()
    with torch.no_grad():
        quiet = mutual_losses(z, y)
    assert not any(loss.requires_grad for loss in quiet)
    same(quiet, losses, rtol=1e-6)
    with torch.inference_mode():
        same(mutual_losses(z, y), quiet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_teacher_from_inference_mode(dtype):
    z, y = data(dtype)
    with torch.inference_mode():
        teachers = [x.detach().clone() for x in z[1:]]
    losses = mutual_losses([z[0], *teachers], y)
    expected = torch.autograd.grad(mutual_losses(z, y)[0], z[0])
    for _ in range(2):
        same(torch.autograd.grad(losses[0], z[0], retain_graph=True), expected)


# ---- compiled and traced


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled_whole(backend, dtype):
    torch._dynamo.reset()
    step = torch.compile(
        partial(mutual_losses, return_stats=True), fullgraph=True, backend=backend, dynamic=True
    )
    z, y = data(dtype)
    losses, stats = step(z, y)
    want, want_stats = mutual_losses(z, y, return_stats=True)
    same([*losses, *stats], [*want, *want_stats], rtol=1e-6, atol=1e-6)
    eps = torch.finfo(dtype).eps
    grads, expected = (torch.autograd.grad(2.0**10 * sum(of), z) for of in (losses, want))
    same(grads, expected, rtol=4 * eps, atol=2.0**10 * 1e-7)
    with torch.no_grad():
        same(step(z, y)[0], want, rtol=1e-6, atol=1e-6)


def test_a_compiled_region_has_one_backward_and_torch_says_so():
    """Nothing of it is wrong in silence; compiled peers with the loss outside are what to do."""
    torch._dynamo.reset()
    z, y = data()
    losses = torch.compile(mutual_losses, fullgraph=True, backend="aot_eager")(z, y)
    losses[0].backward()
    with pytest.raises(RuntimeError, match="second time"):
        losses[1].backward()


def test_compiled_peers_in_a_loop_of_their_own():
    torch.manual_seed(0)
    torch._dynamo.reset()
    x, y = torch.randn(16, 8), torch.randint(0, 5, (16,))
    peers = [net(6 + k) for k in range(2)]
    fast = [torch.compile(peer, backend="aot_eager") for peer in copy.deepcopy(peers)]
    for networks in (peers, fast):
        losses = mutual_losses([network(x) for network in networks], y)
        losses[0].backward()
        assert all(p.grad is None for p in networks[1].parameters())
        losses[1].backward()
    for one, two in zip(peers, fast, strict=True):
        same([p.grad for p in one.parameters()], [p.grad for p in two.parameters()],
             rtol=1e-5, atol=1e-6)  # fmt: skip


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced():
    (z, y), (other, labels) = data(), data(seed=1)
    want = mutual_losses(other, labels)
    expected = [torch.autograd.grad(loss, x)[0] for loss, x in zip(want, other, strict=True)]
    apart_of = lambda a, b, c, y: mutual_losses([a, b, c], y)  # noqa: E731
    script = torch.jit.trace(apart_of, (*z, y), check_trace=False)
    graph = make_fx(apart_of)(*z, y)
    for traced in (script, graph):
        losses = traced(*other, labels)
        same(losses, want, rtol=1e-6)
        if traced is script:
            grads = [torch.autograd.grad(a, x)[0] for a, x in zip(losses, other, strict=True)]
            same(grads, expected, rtol=1e-6, atol=1e-8)


# ---- refusals


def test_what_cannot_be_apart_is_refused_in_one_line():
    z, y = data()
    with pytest.raises(ValueError, match=r"one tensor \(3, 6, 10\).*list of K.*mutual_loss\("):
        mutual_losses(torch.stack(z), y)
    with pytest.raises(ValueError, match=r"detach_targets=False: .*use mutual_loss\("):
        mutual_losses(z, y, detach_targets=False)
    with pytest.raises(ValueError, match="target='all'"):
        mutual_losses(z, y, target="all")
    with pytest.raises(ValueError, match="logits of shapes"):
        mutual_losses([z[0], z[1][:, :3]], y)


def test_derivatives_that_there_are_not_are_refused_by_name():
    z, y = data()
    with pytest.raises(RuntimeError, match="mutual_losses has no second derivative"):
        torch.autograd.grad(mutual_losses(z, y)[0], z[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"mutual_losses does not run under torch\.func"):
        torch.func.grad(lambda a: mutual_losses([a, z[1]], y)[0])(z[0])
    loss = mutual_losses(z, y)[0]
    with pytest.raises(RuntimeError, match="is_grads_batched"):
        torch.autograd.grad(loss, z[0], torch.ones(2), is_grads_batched=True)
    with forward_ad.dual_level():
        moving = forward_ad.make_dual(z[0].detach(), torch.ones_like(z[0]))
        with pytest.raises(RuntimeError, match="mutual_losses has no forward-mode"):
            mutual_losses([moving, z[1].detach()], y)


def test_options_are_those_of_mutual_loss():
    assert _options(mutual_losses) == _options(mutual_loss)
    assert {p.name: p.annotation for p in _options(mutual_losses)} == {
        **get_type_hints(LossOptions),
        "return_stats": bool,
    }


def _options(function) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind is p.KEYWORD_ONLY]
