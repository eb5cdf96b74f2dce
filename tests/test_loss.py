"""`mutual_loss` and `MutualLoss` as people call them: arguments, refusals, statistics, the module.

The numbers themselves are tested in `tests/kernels`.
"""

from __future__ import annotations

import inspect
from typing import Literal, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, DTYPES, LAYOUTS, make, pairwise, reference
from torch import nn

from fastdml.linear_loss import linear_mutual_loss
from fastdml.loss import MutualLoss, MutualStats, mutual_loss, mutual_losses
from fastdml.loss_options import LossOptions

K, N, C = 3, 6, 10
EVERY_OPTION = {
    "temperature": 2.0, "ce_weight": 0.7, "kl_weight": 1.5, "target": "ensemble",
    "gate": "correct", "divergence": "jeffreys", "label_smoothing": 0.1, "ignore_index": 3,
    "mimic_ignored": True, "reduction": "none",
}  # fmt: skip


def data(K=K, N=N, C=C, **settings) -> tuple[list[torch.Tensor], torch.Tensor]:
    p = make(K, N, C, **settings)
    return [z.to(DEVICE).requires_grad_() for z in p.logits], p.labels.to(DEVICE)


def close(ours, expected, **kwargs) -> None:
    kwargs = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False, "check_device": False} | kwargs
    torch.testing.assert_close(ours, expected, **kwargs)


# ---- numbers, end to end


@pytest.mark.parametrize(
    "settings", [{}, EVERY_OPTION, {**EVERY_OPTION, "detach_targets": False, "gate": "none"}]
)
@pytest.mark.parametrize("stacked", [False, True])
def test_losses_gradients_and_statistics(settings, stacked):
    p = make(K, N, C, ignored=0.3, **settings)
    z = torch.stack(list(p.logits)) if stacked else list(p.logits)
    for x in (leaves := [z] if stacked else z):
        x.requires_grad_()
    exact = reference(p)
    losses, stats = mutual_loss(z, p.labels, return_stats=True, **settings)
    losses.sum().backward()
    close(losses, exact.losses)
    grads = leaves[0].grad.unbind() if stacked else [x.grad for x in leaves]
    close(tuple(grads), exact.grads)
    assert set(stats._fields) == set(exact.stats)
    for name, want in exact.stats.items():
        close(getattr(stats, name), want)


def test_the_paper_in_torchs_own_words():
    """L_k = cross_entropy + mean over l != k of kl_div(log_softmax(z_k), softmax(z_l))."""
    z, y = data()
    for k, loss in enumerate(mutual_loss(z, y)):
        log_p = F.log_softmax(z[k], 1)
        pairs = [F.kl_div(log_p, z[t].softmax(1), reduction="batchmean")
                 for t in range(K) if t != k]  # fmt: skip
        close(loss, F.cross_entropy(z[k], y) + sum(pairs) / (K - 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_and_dtype(layout, dtype):
    p = make(K, N, C, layout=layout, dtype=dtype)
    z, exact = [x.detach().to(DEVICE).requires_grad_() for x in p.logits], reference(p)
    losses = mutual_loss(z, p.labels.to(DEVICE))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    close(losses, exact.losses)
    eps = torch.finfo(dtype).eps
    close(tuple(x.grad for x in z), exact.grads, rtol=2 * eps, atol=2 * eps / N)


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels compute in float32")
def test_float64_on_the_cpu():
    p = make(K, N, C, dtype=torch.float64)
    close(mutual_loss(list(p.logits), p.labels), pairwise(p, torch.float64).losses,
          rtol=1e-12, atol=1e-13, check_dtype=True)  # fmt: skip


def test_one_peer_is_plain_cross_entropy():
    z, y = data(K=1)
    close(mutual_loss(z, y)[0], F.cross_entropy(z[0], y))
    close(mutual_loss(z, y, kl_weight=7.0, target="ensemble"), mutual_loss(z, y))


def test_statistics_by_hand():
    """Two peers, two rows: the first peer is right once, the second never, the ensemble once; of
    equal probabilities the first class counts."""
    z = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]], device=DEVICE)
    y = torch.tensor([0, 1], device=DEVICE)
    _, stats = mutual_loss(z, y, return_stats=True)
    assert isinstance(stats, MutualStats)
    assert stats.correct.tolist() == [1, 0]
    assert stats.ensemble_correct.item() == 1
    p = z.double().softmax(2)
    close(stats.ce, -p[:, [0, 1], y].log().mean(1))
    close(stats.entropy, -(p * p.log()).sum(2).mean(1))
    first_teaches = (p[0] * (p[0] / p[1]).log()).sum(1).mean()
    close(stats.pairwise_kl[0, 1], first_teaches)
    close(stats.kl[1], first_teaches)
    assert stats.pairwise_kl.diagonal().tolist() == [0, 0]
    assert not any(s.requires_grad for s in stats)


def test_statistics_count_labelled_rows_only():
    z, y = data(ignored=0.4, seed=2)
    labelled = y != -100
    assert 0 < labelled.sum() < N
    _, some = mutual_loss(z, y, return_stats=True)
    _, alone = mutual_loss([x[labelled] for x in z], y[labelled], return_stats=True)
    close(tuple(some), tuple(alone))


# ---- refusals: the value is named, and what to give instead


def z_of(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


Y = torch.zeros(4, dtype=torch.int64, device=DEVICE)
PAIR = [z_of(4, 5), z_of(4, 5)]


@pytest.mark.parametrize(
    ("logits", "labels", "options", "error", "message"),
    [
        (z_of(4, 5), Y, {}, ValueError, r"shape \(4, 5\).*\(K, N, C\)"),
        ([], Y, {}, ValueError, "at least one tensor"),
        ([z_of(4)], Y, {}, ValueError, r"\(4,\).*\(N, C\)"),
        (["z"], Y, {}, ValueError, "str"),
        ([z_of(4, 5), z_of(4, 6)], Y, {}, ValueError, r"\(4, 5\), \(4, 6\).*same rows and classes"),
        (z_of(0, 4, 5), Y, {}, ValueError, "K = 0"),
        (z_of(2, 4, 0), Y, {}, ValueError, "C = 0"),
        (z_of(2, 4, 5, dtype=torch.int64), Y, {}, TypeError, "int64.*cast"),
        ([z_of(4, 5), z_of(4, 5, dtype=torch.complex64)], Y, {}, TypeError, "complex64"),
        (PAIR, Y[:3], {}, ValueError, r"\(3,\).*N = 4"),
        (PAIR, Y[:, None], {}, ValueError, r"\(4, 1\)"),
        (PAIR, z_of(4), {}, TypeError, "float32.*int64 or int32"),
        (PAIR, Y.bool(), {}, TypeError, "bool"),
        (PAIR, [0, 1, 2, 3], {}, TypeError, r"labels of type list.*\(4,\)"),
        (PAIR, Y, {"temperature": float("inf")}, ValueError, "temperature=inf.*finite"),
        (PAIR, Y, {"temperature": "2"}, TypeError, "temperature='2'.*a number"),
        (PAIR, Y, {"ce_weight": None}, TypeError, "ce_weight=None.*a number"),
        (PAIR, Y, {"ignore_index": None}, TypeError, "ignore_index=None.*whole number"),
        (PAIR, Y, {"peer_weights": [[0, 1], [1, 0]]}, TypeError, r"peer_weights.*list.*\(2, 2\)"),
        (PAIR, Y, {"class_weight": [1.0] * 5}, TypeError, r"class_weight.*list.*\(5,\)"),
        (PAIR, Y, {"temperature": 0.0}, ValueError, r"temperature=0\.0.*above 0"),
        (PAIR, Y, {"temperature": -1.0}, ValueError, r"temperature=-1\.0"),
        (PAIR, Y, {"kl_weight": -1}, ValueError, r"kl_weight=-1: below 0 .* give 0 or more"),
        (PAIR, Y, {"ce_weight": -0.5}, ValueError, r"ce_weight=-0\.5: below 0"),
        (PAIR, Y, {"kl_weight": float("nan")}, ValueError, r"kl_weight=nan.*a finite number"),
        (PAIR, Y, {"ce_weight": float("inf")}, ValueError, r"ce_weight=inf.*a finite number"),
        (PAIR, Y, {"temperature": 1e308}, ValueError, r"temperature=1e\+308.*1e-18 to 1e\+18"),
        (PAIR, Y, {"temperature": 10**30}, ValueError, "its square is a float32"),
        (PAIR, Y, {"temperature": 1e-300}, ValueError, "its square is a float32"),
        (PAIR, Y, {"temperature": float("nan")}, ValueError, "temperature=nan"),
        (PAIR, Y, {"kl_weight": z_of(1)}, ValueError, r"kl_weight.*\(1,\).*0-d"),
        (PAIR, Y, {"ce_weight": z_of().requires_grad_()}, ValueError, "ce_weight.*gradient"),
        (PAIR, Y, {"target": "all"}, ValueError, "target='all'.*'ensemble'"),
        (PAIR, Y, {"gate": "wrong"}, ValueError, "gate='wrong'.*'best'"),
        (PAIR, Y, {"reduction": "avg"}, ValueError, "reduction='avg'.*'mean'"),
        (PAIR, Y, {"label_smoothing": 1.5}, ValueError, r"label_smoothing=1\.5"),
        (PAIR, Y, {"label_smoothing": -0.1}, ValueError, r"label_smoothing=-0\.1"),
        (PAIR, Y, {"peer_weights": z_of(3, 3)}, ValueError, r"peer_weights.*\(3, 3\).*\(2, 2\)"),
        (PAIR, Y, {"class_weight": z_of(4)}, ValueError, r"class_weight.*\(4,\).*\(5,\)"),
        (PAIR, Y, {"class_weight": z_of(5).requires_grad_()}, ValueError, "class_weight.*gradient"),
    ],
)
def test_what_does_not_fit_is_refused(logits, labels, options, error, message):
    with pytest.raises(error, match=message):
        mutual_loss(logits, labels, **options)


@pytest.mark.parametrize("name", ["meta", *(["cpu"] if DEVICE == "cuda" else [])])
def test_tensors_on_other_devices_are_refused(name):
    away = torch.zeros(4, 5, device=name)
    with pytest.raises(ValueError, match=f"{DEVICE}.* and {name}"):
        mutual_loss([PAIR[0], away], Y)
    with pytest.raises(ValueError, match=f"labels on {name}"):
        mutual_loss(PAIR, Y.to(name))
    for option in ({"kl_weight": torch.zeros((), device=name)},
                   {"class_weight": torch.ones(5, device=name)},
                   {"peer_weights": torch.ones(2, 2, device=name)}):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(option))}.*{name}"):
            mutual_loss(PAIR, Y, **option)


def test_a_device_without_kernels_is_refused():
    with pytest.raises(ValueError, match=r"meta.*CPU and CUDA"):
        mutual_loss(torch.zeros(2, 4, 5, device="meta"), Y.to("meta"))


@pytest.mark.skipif(DEVICE == "cuda", reason="the host never waits for a label there")
@pytest.mark.parametrize("label", [5, -1, -101])
def test_a_label_that_is_no_class_is_refused_on_the_cpu(label):
    with pytest.raises(ValueError, match=f"{label}, which is no class.*C = 5.*ignore_index=-100"):
        mutual_loss(PAIR, torch.tensor([0, 1, label, 2]))


@pytest.mark.gpu
def test_a_label_that_is_no_class_is_nan_in_its_row_on_cuda():
    losses = mutual_loss(PAIR, torch.tensor([0, 1, 5, 2], device=DEVICE), reduction="none")
    assert losses.isnan().all(0).tolist() == [False, False, True, False]


@pytest.mark.gpu
def test_float64_is_refused_on_cuda():
    with pytest.raises(TypeError, match="float64"):
        mutual_loss(z_of(2, 4, 5, dtype=torch.float64), Y)


def test_the_module_and_separate_losses_refuse_weights_below_0():
    for run in (
        lambda: MutualLoss(kl_weight=-1)(PAIR, Y),
        lambda: MutualLoss(kl_weight=-1).value_and_grad(PAIR, Y),
        lambda: mutual_losses(PAIR, Y, kl_weight=-1),
        lambda: linear_mutual_loss(
            torch.zeros(2, 4, 3, device=DEVICE), torch.zeros(2, 5, 3, device=DEVICE), Y,
            kl_weight=-1,
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="kl_weight=-1: below 0"):
            run()
    mutual_loss(PAIR, Y, kl_weight=0, ce_weight=-0.0)


def test_options_are_given_by_name():
    with pytest.raises(TypeError):
        mutual_loss(PAIR, Y, 2.0)
    with pytest.raises(TypeError, match="temprature"):
        mutual_loss(PAIR, Y, temprature=2.0)


@pytest.mark.parametrize("function", [mutual_loss, MutualLoss])
def test_type_checkers_know_every_option(function):
    shown = inspect.signature(function).parameters
    options = {p.name: p.annotation for p in shown.values() if p.kind is p.KEYWORD_ONLY}
    assert options.pop("return_stats") is bool
    assert get_type_hints(LossOptions) == options
    assert shown["target"].annotation == Literal["peers", "ensemble", "ensemble_logits"]
    assert shown["target"].default == "peers"


# ---- the module


@pytest.mark.parametrize("settings", [{}, EVERY_OPTION])
def test_the_module_is_the_function(settings):
    z, y = data()
    close(MutualLoss(**settings)(z, y), mutual_loss(z, y, **settings), rtol=0, atol=0)
    losses, stats = MutualLoss(return_stats=True, **settings)(z, y)
    close(losses, mutual_loss(z, y, **settings))
    assert isinstance(stats, MutualStats)


@pytest.mark.parametrize("settings", [
    {}, {"reduction": "sum", "temperature": 3.0}, {"reduction": "none"}, {"detach_targets": False},
])  # fmt: skip
@pytest.mark.parametrize("stacked", [False, True])
def test_value_and_grad_is_autograd_without_its_graph(settings, stacked):
    z, y = data(ignored=0.3)
    given = torch.stack(z).detach().requires_grad_() if stacked else z
    leaves = [given] if stacked else z
    module = MutualLoss(**settings)
    losses, stats, grads = module.value_and_grad(given, y)
    assert not losses.requires_grad
    assert isinstance(stats, MutualStats)
    assert [g.shape for g in grads] == [x.shape for x in leaves]
    expected = module(given, y)
    close(losses, expected.detach(), rtol=1e-6)
    close(tuple(grads), torch.autograd.grad(expected.sum(), leaves), rtol=1e-6, atol=1e-8)
    torch.autograd.backward(leaves, grads)
    close(tuple(x.grad for x in leaves), tuple(grads), rtol=0, atol=0)


def test_the_modules_tensors_move_with_it_and_stay_out_of_checkpoints():
    module = MutualLoss(peer_weights=torch.ones(2, 2), class_weight=torch.ones(5))
    assert {name for name, _ in module.named_buffers()} == {"peer_weights", "class_weight"}
    assert module.state_dict() == {}
    module.to("meta")
    assert module.class_weight.device.type == module.peer_weights.device.type == "meta"
    assert list(MutualLoss().parameters()) == []


def test_a_schedule_assigns_weights_or_fills_them():
    z, y = data()
    module = MutualLoss()
    module.kl_weight, module.temperature = 0.5, 3.0
    close(module(z, y), mutual_loss(z, y, kl_weight=0.5, temperature=3.0))
    module.kl_weight = torch.tensor(0.5, device=DEVICE)
    module.kl_weight.fill_(2.0)
    close(module(z, y), mutual_loss(z, y, kl_weight=2.0, temperature=3.0))


def test_the_module_says_what_it_does():
    shown = repr(MutualLoss(temperature=4.0, target="ensemble"))
    assert "temperature=4.0" in shown
    assert "target='ensemble'" in shown


def test_a_wrong_option_is_refused_when_the_module_is_made():
    with pytest.raises(ValueError, match="gate='wrong'"):
        MutualLoss(gate="wrong")


# ---- inside other people's code


def test_autocast_and_peers_of_different_dtypes():
    x, y = torch.randn(N, 8, device=DEVICE), data()[1]
    peers = nn.ModuleList(nn.Linear(8, C) for _ in range(2)).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        z = [peers[0](x), peers[1](x).float()]
        losses = mutual_loss(z, y)
    assert [a.dtype for a in z] == [torch.bfloat16, torch.float32]
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for p in peers.parameters())


def test_training_with_it_lowers_it():
    torch.manual_seed(0)
    x, y = torch.randn(64, 8, device=DEVICE), torch.randint(0, 4, (64,), device=DEVICE)
    peers = nn.ModuleList(nn.Linear(8, 4) for _ in range(2)).to(DEVICE)
    optimizer = torch.optim.SGD(peers.parameters(), lr=0.5)
    history = []
    for _ in range(30):
        losses = mutual_loss([peer(x) for peer in peers], y)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        history.append(losses.sum().item())
    assert history[-1] < 0.9 * history[0]


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0, device=DEVICE)], ids=["0", "tensor"])
@pytest.mark.parametrize("loss", ["together", "apart", "value_and_grad", "compiled"])
def test_independent_peers_train_as_if_alone_beside_one_that_diverges(loss, zero):
    """Its logits turn infinite after a few steps."""

    def run(diverging: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        x, y = torch.randn(32, 8, device=DEVICE), torch.randint(0, 4, (32,), device=DEVICE)
        peers = nn.ModuleList(nn.Linear(8, 4) for _ in range(3)).to(DEVICE)
        optimizer = torch.optim.SGD(peers.parameters(), lr=0.5, momentum=0.9)
        module = MutualLoss(kl_weight=zero)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for at in range(6):
            if diverging and at == 2:
                with torch.no_grad():
                    peers[1].weight.fill_(torch.inf)
            optimizer.zero_grad()
            z = [peer(x) for peer in peers]
            if loss == "value_and_grad":
                torch.autograd.backward(z, module.value_and_grad([a.detach() for a in z], y)[2])
            elif loss == "apart":
                for own in mutual_losses(z, y, kl_weight=zero):
                    own.backward()
            else:
                (module if loss == "together" else compiled)(z, y).sum().backward()
            optimizer.step()
        assert peers[1].weight.isnan().any() == diverging
        return [p.detach() for k in (0, 2) for p in peers[k].parameters()]

    close(tuple(run(True)), tuple(run(False)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("stacked", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_whole_with_its_checks(backend, stacked):
    """One compilation for every batch size, statistics included."""
    torch._dynamo.reset()
    step = torch.compile(
        MutualLoss(return_stats=True), fullgraph=True, dynamic=True, backend=backend
    )
    for rows in (8, 5, 33):
        z, y = data(N=rows)
        given = torch.stack(z).detach().requires_grad_() if stacked else z
        leaves = [given] if stacked else z
        losses, stats = step(given, y)
        expected, expected_stats = mutual_loss(given, y, return_stats=True)
        close(losses, expected)
        close(tuple(stats), tuple(expected_stats))
        close(torch.autograd.grad(losses.sum(), leaves),
              torch.autograd.grad(expected.sum(), leaves))  # fmt: skip


def test_second_derivatives_and_function_transforms_are_refused():
    z, y = data()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(mutual_loss(z, y).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda a: mutual_loss([a, z[1]], y).sum())(z[0])
