"""What must hold on every path alike: the CPU's closed form, the register kernel, the wide kernel.

The kernels run interpreted where there is no GPU. Edge cases are here; sizes, blocks and options
that concern one path are in its own file.
"""

from __future__ import annotations

import pytest
import torch
from fastdml_kernels import Options
from oracle import (
    DEVICE,
    DTYPES,
    IN_REGISTERS,
    PATHS,
    Problem,
    check,
    cpu,
    make,
    reference,
    rounding,
    within,
)


@pytest.fixture(params=PATHS.values(), ids=PATHS.keys())
def path(request):
    return request.param


@pytest.fixture(params=["register", "one_row", "wide"])
def kernel(request):
    return PATHS[request.param]


def masked(p: Problem, peers: slice | list[int], value: float, at: tuple) -> Problem:
    """The problem with some peers' logits set to a value at [rows, classes]."""
    logits = [z.clone() for z in p.logits]
    for z in logits[peers] if isinstance(peers, slice) else [logits[k] for k in peers]:
        z[at] = value
    return Problem(logits, p.labels, p.options, p.weights)


def same_but_for_compilation(path, one: torch.Tensor, two: torch.Tensor) -> None:
    """The same bits; on a GPU, where a compiler fuses as it likes for each dtype and stride, the
    same numbers but for the last roundings."""
    if DEVICE == "cpu" or path is cpu:
        assert torch.equal(one, two)
    else:
        rtol = max(4e-6, torch.finfo(one.dtype).eps)
        torch.testing.assert_close(one, two, rtol=rtol, atol=1e-7)


# ---- sizes


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("K", "N", "C"), [(2, 0, 5), (1, 3, 5), (2, 3, 1), (2, 1, 5), (1, 1, 1), (3, 5, 2), (1, 0, 1)]
)
def test_smallest_sizes(path, K, N, C, reduction):
    check(make(K, N, C, reduction=reduction), path)


@pytest.mark.parametrize("layout", ["padded", "sliced", "every_other", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(path, layout, dtype):
    check(make(2, 2, 7, layout=layout, dtype=dtype, label_stride=2), path, stats=False)


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32])
def test_labels_of_stride_0(path, label_dtype):
    p = make(2, 4, 10, label_dtype=label_dtype)
    check(Problem(p.logits, p.labels[:1].expand(4)), path)


def test_peers_in_different_dtypes(path):
    check(make(3, 4, 10, dtype=DTYPES), path)


@pytest.mark.parametrize(("need_grad", "stats"), [(False, False), (False, True), (True, False)])
def test_losses_with_and_without_gradient_and_statistics(path, need_grad, stats):
    p = make(3, 4, 10, ignored=0.3)
    check(p, path, grad=need_grad, stats=stats)
    check(make(3, 4, 10, ignored=0.3, target="ensemble"), path, grad=need_grad, stats=stats)


def test_rows_2_to_the_31_elements_apart(path):
    """64-bit offsets, in memory that is reserved but never touched between the rows."""
    device = "cpu" if path is cpu else DEVICE
    p = make(2, 2, 4, dtype=torch.bfloat16).on(device)
    far = []
    for z in p.logits:
        room = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=device)
        far.append(room.as_strided((2, 4), (2**31 + 8, 1)).copy_(z))
    with pytest.MonkeyPatch.context() as patch:  # filling it would touch it
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        own = path(Problem(far, p.labels))
    near = path(p)
    same_but_for_compilation(path, own.losses, near.losses)
    for a, b in zip(own.grads, near.grads, strict=True):
        same_but_for_compilation(path, a, b)


# ---- rows that take no part


@pytest.mark.parametrize("mimic_ignored", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_has_a_label(path, reduction, mimic_ignored):
    """As torch: the mean of nothing is NaN, its gradient zero."""
    p = make(2, 3, 5, ignored=1.1, reduction=reduction, mimic_ignored=mimic_ignored)
    own = check(p, path)
    if not mimic_ignored:
        assert own.losses.isnan().all() if reduction == "mean" else (own.losses == 0).all()
        assert all((g == 0).all() for g in own.grads)


@pytest.mark.parametrize("ignore_index", [-100, 2, 2**40, -(2**40)])
def test_ignored_rows_send_no_gradient(path, ignore_index):
    p = make(2, 4, 5, ignored=0.5, ignore_index=ignore_index, seed=3)
    own = check(p, path)
    out = (p.labels == ignore_index).to(own.grads[0].device)
    assert out.any()
    assert all((g[out] == 0).all() and (g[~out] != 0).any() for g in own.grads)


def test_weight_zero_for_every_class_that_occurs(path):
    """0 / 0 in the mean, as torch; the KL term still trains."""
    p = make(2, 3, 5)
    weight = torch.ones(5)
    weight[p.labels] = 0
    own = path(Problem(p.logits, p.labels, p.options, {"class_weight": weight}))
    alone = reference(Problem(p.logits, p.labels, p.options, {"ce_weight": 0.0}))
    assert own.losses.isnan().all()
    for k in range(2):
        within("grads", own.grads[k], alone.grads[k], None, torch.tensor(1e-6))


# ---- exactness


@pytest.mark.parametrize(
    ("dtype", "temperature"), [*((d, 1.0) for d in DTYPES), (torch.float32, 3.0)]
)
@pytest.mark.parametrize("K", range(2, 9))
def test_identical_peers_have_no_kl_at_all(path, K, dtype, temperature):
    same = make(1, 1, 5, dtype=dtype, seed=K).logits * K
    weights = {"temperature": temperature, "ce_weight": 0.0}
    own = path(Problem(same, torch.tensor([3]), weights=weights), stats=False)
    assert (own.losses == 0).all()
    assert all((g == 0).all() for g in own.grads)


@pytest.mark.parametrize("target", ["peers", "ensemble", "ensemble_logits"])
def test_identical_peers_in_the_statistics_and_in_mixtures(path, target):
    if path in IN_REGISTERS and target == "ensemble_logits":
        pytest.skip("the wide kernel's option")
    for K in (2, 3, 4, 7, 8) if path is cpu else (2, 3):
        p = make(1, 2, 10, target=target, spread=5.0)
        stats = path(Problem(p.logits * K, p.labels, p.options)).stats
        assert (stats["kl"] == 0).all(), (target, K, stats["kl"])
        assert (stats["pairwise_kl"] == 0).all(), (target, K)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_anything_else(path, half):
    """The same losses as of the widened logits, and their gradients rounded once."""
    p = make(3, 4, 10, dtype=half, spread=20.0)
    narrow, full = path(p), path(Problem([z.float() for z in p.logits], p.labels))
    same_but_for_compilation(path, narrow.losses, full.losses)
    for g, exact in zip(narrow.grads, full.grads, strict=True):
        within("grads", g, exact.cpu(), None, rounding(exact.cpu().double(), half))


@pytest.mark.parametrize("temperature", [1.0, 0.25, 8.0])
def test_logits_far_below_zero(path, temperature):
    """Lanes past the last class count as -inf after every transform, not as 0."""
    p = make(2, 3, 9, temperature=temperature)
    check(Problem([z - 5000 for z in p.logits], p.labels, p.options, p.weights), path)


def test_probabilities_that_underflow_in_both_peers(path):
    p = make(3, 3, 10, spread=300.0)
    own = check(p, path)
    assert own.losses.isfinite().all()
    assert all(g.isfinite().all() for g in own.grads)


def test_numbers_and_tensors_weigh_alike(path):
    p = make(2, 4, 10, temperature=2.5, ce_weight=0.3, kl_weight=1.7)
    as_tensors = {k: torch.tensor(v) for k, v in p.weights.items()}
    one, two = path(p), path(Problem(p.logits, p.labels, p.options, as_tensors))
    torch.testing.assert_close(one.losses, two.losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(one.grads, two.grads, rtol=1e-5, atol=1e-8)


def test_the_same_bits_every_time(path):
    p = make(3, 8, 10, ignored=0.2)
    first = path(p)
    for _ in range(1 if DEVICE == "cpu" else 50):
        again = path(p)
        assert torch.equal(first.losses, again.losses)
        assert all(torch.equal(a, b) for a, b in zip(first.grads, again.grads, strict=True))
        assert all(torch.equal(first.stats[n], again.stats[n]) for n in first.stats)


# ---- classes ruled out, values that are not finite


def kl_gradient(p: Problem) -> list[torch.Tensor]:
    """(softmax - onehot + q_k - mean of the others' q) / N: the closed form, finite where a
    probability is 0 and autograd's is not."""
    K, N, _ = p.shape
    q = [torch.softmax(z.double(), 1) for z in p.logits]
    y = torch.nn.functional.one_hot(p.labels, p.shape[2])
    return [(q[k] - y + q[k] - (sum(q) - q[k]) / (K - 1)) / N for k in range(K)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_class_that_every_peer_rules_out(path, dtype):
    """It contributes 0, never 0 * inf or inf - inf."""
    p = make(3, 4, 10, dtype=dtype)
    p.labels[p.labels == 6] = 5
    q = masked(p, slice(None), -torch.inf, (slice(None), 6))
    own = path(q)
    within("losses", own.losses, reference(q, grad=False).losses, None, torch.tensor(2e-5))
    for g, want in zip(own.grads, kl_gradient(q), strict=True):
        within("grads", g, want, None, 2e-6 + rounding(want, dtype))
        assert (g[:, 6] == 0).all()
    for name, want in reference(q, grad=False).stats.items():
        within(name, own.stats[name], want, None, torch.tensor(2e-5))


def test_a_class_that_one_peer_rules_out(path):
    """KL(p_l || p_k) is infinite for that student, and finite the other way; gradients stay so."""
    p = make(3, 4, 10)
    p.labels[p.labels == 6] = 5
    q = masked(p, [1], -torch.inf, (2, 6))
    own = path(q)
    exact = reference(q, grad=False)
    assert exact.losses.isinf().tolist() == [False, True, False]
    within("losses", own.losses, exact.losses, None, torch.tensor(2e-5))
    within("pairwise", own.stats["pairwise_kl"], exact.stats["pairwise_kl"], None,
           torch.tensor(2e-5))  # fmt: skip
    for g, want in zip(own.grads, kl_gradient(q), strict=True):
        within("grads", g, want, None, torch.tensor(2e-6))


def test_a_label_that_its_peer_rules_out_costs_infinity(path):
    p = make(2, 3, 5)
    q = masked(p, slice(None), -torch.inf, (1, p.labels[1].item()))
    own = path(q)
    assert own.losses.isinf().all()
    assert all(g.isfinite().all() for g in own.grads)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_broken_row_is_seen_and_stays_alone(path, value, reduction):
    """Its own losses and gradients are NaN; other rows are as if it were not there."""
    clean = make(2, 3, 5, reduction=reduction)
    whole_row = slice(None) if value == -torch.inf else 4
    broken = path(masked(clean, [1], value, (1, whole_row)), stats=False)
    fine = path(clean, stats=False)
    assert broken.losses[1].isnan().any()
    assert broken.grads[1][1].isnan().all()
    others = [0, 2]
    for got, want in zip(broken.grads, fine.grads, strict=True):
        torch.testing.assert_close(got[others], want[others], rtol=1e-5, atol=1e-7)
    if reduction == "none":
        assert broken.losses[:, 1].isnan().all()
        torch.testing.assert_close(broken.losses[:, others], fine.losses[:, others])


# ---- a peer that has diverged, and the others, who do not learn from it


def diverge(p: Problem) -> Problem:
    """Peer 1 of 3: a row of NaN, and infinite logits in others."""
    return masked(masked(p, [1], torch.nan, (1, slice(None))), [1], torch.inf, (slice(2, None), 3))


def others_of(answer):
    return [answer.losses[[0, 2]], answer.grads[0], answer.grads[2]]


def all_finite(answer) -> bool:
    return all(bool(x.isfinite().all()) for x in others_of(answer))


@pytest.mark.parametrize(("settings", "as_tensor"), [
    ({}, False), ({}, True), ({"temperature": 2.0, "stats": True}, True),
    ({"reduction": "none", "mimic_ignored": True}, False),
    ({"target": "ensemble", "reduction": "sum"}, True), ({"gate": "best"}, False),
    ({"peer_weights": True}, True), ({"divergence": "jeffreys"}, False),
    ({"detach_targets": False, "target": "ensemble_logits"}, True),
    ({"detach_targets": False, "divergence": "jeffreys", "target": "ensemble"}, False),
], ids=str)  # fmt: skip
def test_without_the_kl_term_peers_are_independent(path, settings, as_tensor):
    settings = dict(settings)
    stats = settings.pop("stats", False)
    if path in IN_REGISTERS and "detach_targets" in settings:
        pytest.skip("the wide kernel's option")
    zero = torch.tensor(0.0, device="cpu" if path is cpu else DEVICE) if as_tensor else 0.0
    p = make(3, 4, 5, ignored=0.2, seed=2, **settings, kl_weight=zero)
    broken, fine = (path(q, stats=stats) for q in (diverge(p), p))
    assert all_finite(broken)
    for got, want in zip(others_of(broken), others_of(fine), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert broken.losses[1].isnan().any()


@pytest.mark.parametrize("settings", [
    {}, {"target": "ensemble", "temperature": 2.0, "reduction": "none"},
    {"target": "ensemble_logits"}, {"divergence": "jeffreys"},
    {"divergence": "jeffreys", "target": "ensemble"},
    {"divergence": "jeffreys", "target": "ensemble_logits"},
], ids=str)  # fmt: skip
def test_edges_that_leave_a_peer_out_leave_its_values_out(path, settings):
    if path in IN_REGISTERS and settings.get("target") == "ensemble_logits":
        pytest.skip("the wide kernel's option")
    p = make(3, 4, 5, seed=2, **settings)
    own = [0, 0, 0] if "divergence" in settings else [0.6, 0, 0]  # learns from nobody, or from one
    p.weights["peer_weights"] = torch.tensor([[0, 0, 0.7], [1, 0, 1], own])
    broken, fine = (path(q, stats=False) for q in (diverge(p), p))
    assert all_finite(broken)
    for got, want in zip(others_of(broken), others_of(fine), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gate", ["correct", "best"])
def test_a_peer_that_has_diverged_passes_no_gate(path, gate):
    """It is as one that is wrong on those rows; argmax and argmin take a NaN for the extreme."""
    p = make(3, 4, 5, gate=gate, seed=2)
    p.labels[1:3] = 0
    wrong = [z.clone() for z in p.logits]
    rows = torch.arange(1, 4)
    wrong[1][rows, p.labels[rows]] = -50.0
    broken, fine = path(diverge(p)), path(Problem(wrong, p.labels, p.options))
    assert all_finite(broken)
    for got, want in zip(others_of(broken), others_of(fine), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert broken.stats["correct"][1] <= 1  # of the first row


def test_without_the_cross_entropy_a_label_ruled_out_costs_nothing(path):
    p = make(2, 3, 5)
    q = masked(p, slice(None), -torch.inf, (1, p.labels[1].item()))
    for zero in (0.0, torch.tensor(0.0, device="cpu" if path is cpu else DEVICE)):
        for reduction in ("mean", "none"):
            options = Options(reduction=reduction)
            own = path(Problem(q.logits, q.labels, options, {"ce_weight": zero}))
            exact = reference(Problem(q.logits, q.labels, options, {"ce_weight": 0.0}), grad=False)
            within("losses", own.losses, exact.losses, None, torch.tensor(2e-5))
            assert own.losses.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3}, {"kl_weight": 0.0}])
def test_the_mean_over_class_weights_that_are_all_zero_is_torchs(path, options):
    """NaN, with label smoothing too, which alone would be a number over 0."""
    p = make(2, 3, 5, **options)
    weight = torch.ones(5)
    weight[p.labels] = 0
    own = path(Problem(p.logits, p.labels, p.options, p.weights | {"class_weight": weight}))
    theirs = torch.nn.functional.cross_entropy(
        p.logits[0], p.labels, weight, label_smoothing=p.options.label_smoothing
    )
    assert theirs.isnan()
    assert own.losses.isnan().all()
    assert own.stats["ce"].isnan().all()
    assert all(g.isfinite().all() for g in own.grads)


# ---- labels that are no class


@pytest.mark.parametrize("label", [10, -1, 2**20])
def test_the_cpu_refuses_a_label_that_is_no_class(label):
    p = make(2, 5, 10)
    p.labels[2] = label
    with pytest.raises(ValueError, match=f"{label}, which is no class of logits with C = 10"):
        cpu(p)


@pytest.mark.parametrize("options", [{}, {"class_weight": True, "label_smoothing": 0.1}])
@pytest.mark.parametrize("label", [5, -1, 2**40, -(2**40)])
def test_a_kernel_turns_a_label_that_is_no_class_into_nan(kernel, label, options):
    """In its own row alone, and without reading at such an address (it would crash here)."""
    clean = make(2, 3, 5, reduction="none", **options)
    labels = clean.labels.clone()
    labels[1] = label
    got = kernel(Problem(clean.logits, labels, clean.options, clean.weights), stats=False)
    fine, others = kernel(clean, stats=False), [0, 2]
    assert got.losses[:, 1].isnan().all()
    assert all(g[1].isnan().all() for g in got.grads)
    assert torch.equal(got.losses[:, others], fine.losses[:, others])
    for a, b in zip(got.grads, fine.grads, strict=True):
        assert torch.equal(a[others], b[others])


def test_a_label_that_is_no_class_shows_in_the_mean(kernel):
    p = make(2, 5, 10)
    p.labels[2] = 10
    assert kernel(p).losses.isnan().all()
