"""Teachers of `linear_mutual_loss` whose predictions are given, and what it says of each row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastdml_kernels import Call, Options, linear_loss
from fastdml_kernels.given_teachers import GivenTeachers
from fastdml_kernels.loss_op import flatten
from fastdml_kernels.row_values import write_row_values

from fastdml import LinearRows, linear_mutual_loss, mutual_loss

K, N, C, D = 2, 11, 13, 4


def layers(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (
        [torch.randn(n, D, generator=g).to(dtype).requires_grad_() for _ in range(K)]
        for n in (N, C)
    )
    labels = torch.randint(0, C, (N,), generator=g)
    labels[4] = -100
    return hidden, weight, labels, torch.randn(2, N, C, generator=g)


def top(logits, k):
    return logits.log_softmax(1).topk(k, dim=1)


def with_grads(losses, tensors):
    return [losses.detach(), *torch.autograd.grad(losses.sum(), tensors)]


def same(ours, theirs):
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_every_way_to_give_logits(tmp_path):
    hidden, weight, labels, teachers = layers()
    wanted = [*hidden, *weight]
    logits = [F.linear(h, w) for h, w in zip(hidden, weight, strict=True)]
    expected = with_grads(mutual_loss([*logits, *teachers], labels, students=[0, 1])[:K], wanted)
    mapped = np.lib.format.open_memmap(tmp_path / "t.npy", "w+", np.float32, (2, N, C))
    mapped[:] = teachers.numpy()
    mapped.flush()
    cached = torch.from_numpy(np.load(tmp_path / "t.npy", mmap_mode="r+"))
    for given in (teachers, list(teachers), cached, [teachers[0].double().float(), cached[1]]):
        same(
            with_grads(
                linear_mutual_loss(hidden, weight, labels, teacher_logits=given, chunk_rows=3),
                wanted,
            ),
            expected,
        )
    one = linear_mutual_loss(hidden, weight, labels, teacher_logits=teachers[0])
    same([one], [mutual_loss([*logits, teachers[0]], labels)[:K]])
    assert torch.equal(one, linear_mutual_loss(hidden, weight, labels, teacher_logits=teachers[:1]))


def test_half_precision_teachers_beside_float32_peers():
    hidden, weight, labels, teachers = layers()
    half = teachers.bfloat16()
    same(
        [linear_mutual_loss(hidden, weight, labels, teacher_logits=half, chunk_rows=4)],
        [linear_mutual_loss(hidden, weight, labels, teacher_logits=half.float())],
    )


def test_given_logits_get_no_gradient():
    hidden, weight, labels, teachers = layers()
    teachers.requires_grad_()
    linear_mutual_loss(hidden, weight, labels, teacher_logits=teachers).sum().backward()
    assert teachers.grad is None
    assert weight[0].grad is not None


@pytest.mark.parametrize("divergence", ["forward", "jsd"])
@pytest.mark.parametrize("gate", ["none", "best", "confidence"])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_top_k_is_the_teacher_with_all_else_at_minus_infinity(divergence, gate, index_dtype):
    hidden, weight, labels, teachers = layers()
    wanted = [*hidden, *weight]
    values, indices = top(teachers[0], 5)
    full = torch.full((N, C), -torch.inf).scatter(1, indices, values)
    options = {"divergence": divergence, "temperature": 2.0, "gate": gate}
    expected = linear_mutual_loss(
        hidden, weight, labels, teacher_logits=[teachers[1], full], **options
    )
    ours = linear_mutual_loss(
        hidden, weight, labels, teacher_logits=teachers[1], chunk_rows=4,
        teacher_topk=(values, indices.to(index_dtype)), **options,
    )  # fmt: skip
    assert ours.isfinite().all()
    same(with_grads(ours, wanted), with_grads(expected, wanted))


def test_a_lone_teacher_that_gives_the_label_nothing_is_trusted_on_no_row():
    """With the gate "confidence"; whatever else it says then has no weight."""
    hidden, weight, labels, _ = layers()
    labels.fill_(3)
    topk = torch.zeros(N, 2), torch.tensor([[1, 2]] * N)
    losses = linear_mutual_loss(
        hidden[:1], weight[:1], labels, teacher_topk=topk, gate="confidence"
    )
    alone = linear_mutual_loss(hidden[:1], weight[:1], labels)
    torch.testing.assert_close(losses, alone)


def test_all_classes_as_top_k_are_the_logits():
    hidden, weight, labels, teachers = layers()
    same(
        [linear_mutual_loss(hidden, weight, labels, teacher_topk=top(teachers[0], C))],
        [linear_mutual_loss(hidden, weight, labels, teacher_logits=teachers[0])],
    )


def test_a_chunk_of_a_top_k_teacher_is_all_that_exists(monkeypatch):
    hidden, weight, labels, teachers = layers()
    seen, compute = [], linear_loss.compute

    def watched(z, *rest):
        seen.append([len(t) for t in z])
        return compute(z, *rest)

    monkeypatch.setattr(linear_loss, "compute", watched)
    linear_mutual_loss(hidden, weight, labels, teacher_topk=top(teachers[0], 3), chunk_rows=4)
    assert seen == [[4] * 3, [4] * 3, [3] * 3]


def test_a_class_that_is_none_is_nan_where_nobody_looks():
    """On a device the host does not wait to see the indices."""
    values, indices = torch.tensor([[0.0, -1.0], [0.0, -1.0]]), torch.tensor([[1, 2], [1, 3]])
    (logits,) = GivenTeachers((), values, indices).chunk(
        slice(0, 2), 3, torch.device("cpu"), torch.float32, "none"
    )
    assert logits[0].softmax(0).tolist() == [0.0, *torch.tensor([0.0, -1.0]).softmax(0)]
    assert logits[1].log_softmax(0).isnan().all()


BAD = [
    ({"teacher_logits": torch.zeros(N, C + 1)}, ValueError, r"teacher_logits of shape \(11, 14\)"),
    ({"teacher_logits": [torch.zeros(1, N, C)]}, ValueError, r"of T .*; flatten\(0, -2\) makes"),
    ({"teacher_logits": [np.zeros((N, C))]}, TypeError, "torch.from_numpy"),
    ({"teacher_logits": torch.zeros(N, C).int()}, TypeError, "teacher_logits of torch.int32: give"),
    ({"teacher_logits": torch.zeros(N, C, device="meta")}, ValueError, "on meta, hidden on cpu"),
    ({"teacher_topk": torch.zeros(N, 2)}, TypeError, r"give \(log_probs, indices\)"),
    ({"teacher_topk": (torch.zeros(N, 2), torch.zeros(N, 3).long())}, ValueError, "of shapes"),
    ({"teacher_topk": (torch.zeros(N, 0), torch.zeros(N, 0).long())}, ValueError, "give 1 to 13"),
    ({"teacher_topk": (torch.zeros(N, 2), torch.zeros(N, 2))}, TypeError, "int64 or int32"),
    ({"teacher_topk": (torch.zeros(N, 1), torch.full((N, 1), C))}, ValueError, "hold 13, which is"),
    ({"teacher_topk": (torch.zeros(N, 1), torch.full((N, 1), -1))}, ValueError, "hold -1, which"),
    ({"teacher_logits": torch.zeros(N, C), "students": [2]}, ValueError, "students hold 2 with"),
    ({"teacher_logits": torch.zeros(N, C), "students": [True] * 3}, ValueError, "mask of 3"),
    ({"teacher_logits": torch.zeros(N, C), "peer_weights": torch.ones(2, 2)}, ValueError,
     r"give \(3, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_what_does_not_fit_is_named(arguments, error, message):
    hidden, weight, labels, _ = layers()
    with pytest.raises(error, match=message):
        linear_mutual_loss(hidden, weight, labels, **arguments)


@pytest.mark.parametrize(
    "options",
    [{"divergence": "reverse"}, {"symmetric": True}, {"divergence": "jsd", "jsd_beta": 1.0}],
)
def test_what_would_be_infinite_of_top_k_is_refused(options):
    hidden, weight, labels, teachers = layers()
    with pytest.raises(ValueError, match="use 'forward', or 'jsd' with jsd_beta below 1"):
        linear_mutual_loss(hidden, weight, labels, teacher_topk=top(teachers[0], 3), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_rows_have_the_labels_log_probability_and_the_entropy(dtype, chunk_rows):
    hidden, weight, labels, _ = layers(dtype)
    losses, rows = linear_mutual_loss(
        hidden, weight, labels, chunk_rows=chunk_rows, temperature=3.0, return_rows=True
    )
    assert isinstance(rows, LinearRows)
    assert not rows.log_prob.requires_grad
    assert rows.entropy.dtype == losses.dtype
    logits = torch.stack([F.linear(h, w) for h, w in zip(hidden, weight, strict=True)]).double()
    log_p = logits.detach().log_softmax(2)
    of_label = log_p.gather(2, labels.clamp(0).expand(K, N)[..., None])[..., 0]
    tight = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(
        rows.log_prob.double(), torch.where(labels == -100, 0.0, of_label), **tight
    )
    torch.testing.assert_close(rows.entropy.double(), -(log_p.exp() * log_p).sum(2), **tight)
    alone = linear_mutual_loss(hidden, weight, labels, chunk_rows=chunk_rows, temperature=3.0)
    assert torch.equal(losses, alone)
    losses.sum().backward()
    assert weight[0].grad is not None


def test_rows_of_logits_that_are_not_finite():
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [torch.nan, 0.0, 1.0], [1.0, 2.0, 3.0]])
    log_prob, entropy = torch.empty(2, 1, 3)
    write_row_values([logits], torch.tensor([1, 0, 7]), -100, log_prob, entropy)
    assert log_prob[0, 0] == -torch.inf
    assert entropy[0, 0].item() == pytest.approx(np.log(2))
    assert log_prob[0, 1:].isnan().all()  # 7 is no class: on a device nobody has looked
    assert entropy[0, 1].isnan()


def test_negative_log_probabilities_are_the_cross_entropy():
    hidden, weight, labels, _ = layers()
    losses, rows = linear_mutual_loss(hidden, weight, labels, kl_weight=0.0, return_rows=True)
    torch.testing.assert_close(-rows.log_prob.sum(1) / (labels != -100).sum(), losses.detach())


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_whole_with_teachers_students_and_rows():
    torch._dynamo.reset()

    def step(hidden, weight, labels, teachers, log_probs, indices, sample_weight):
        losses, rows = linear_mutual_loss(
            hidden, weight, labels, teacher_logits=teachers, teacher_topk=(log_probs, indices),
            sample_weight=sample_weight, return_rows=True, students=[1], divergence="jsd",
            gate="entropy", chunk_rows=4,
        )  # fmt: skip
        return losses, *rows

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    hidden, weight, labels, teachers = layers()
    for n in (N, 7):
        hidden = [h[:n].detach().requires_grad_() for h in hidden]
        more = labels[:n].clone(), [t[:n].clone() for t in teachers], *top(teachers[0][:n], 3)
        wanted = [hidden[1], weight[1]]
        results = []
        for call in (compiled, step):
            found = call(hidden, weight, *more, torch.linspace(0.5, 1.0, n))
            results.append([*found, *torch.autograd.grad((2 * found[0]).sum(), wanted)])
        same(*results)
        assert found[0].requires_grad
        assert not found[1].requires_grad


def test_opcheck_with_teachers_and_rows():
    hidden, weight, labels, teachers = layers()
    call = Call(labels, Options(), 1.0, 1.0, 1.0, None, None, None, False)
    arguments = ([h.detach() for h in hidden], [w.detach() for w in weight], [], [0, 0],
                 list(teachers), *top(teachers[0], 3), 4, [1, 0] * 2 + [0] * 2, True,
                 *flatten(call))  # fmt: skip
    torch.library.opcheck(torch.ops.fastdml.linear_mutual_loss.default, arguments)


def test_float16_with_a_loss_scale_and_a_given_teacher():
    hidden, weight, labels, teachers = layers(torch.float16)
    losses = linear_mutual_loss(hidden, weight, labels, teacher_logits=teachers, chunk_rows=4)
    grads = torch.autograd.grad(losses.sum() * 2.0**10, weight)
    exact = [[t.detach().double().requires_grad_() for t in ts] for ts in (hidden, weight)]
    losses = linear_mutual_loss(*exact, labels, teacher_logits=teachers.double())
    for ours, theirs in zip(
        grads, torch.autograd.grad(losses.sum() * 2.0**10, exact[1]), strict=True
    ):
        assert (ours.double() - theirs).norm() < 3e-3 * theirs.norm()


def test_one_backward_with_rows():
    hidden, weight, labels, _ = layers()
    losses, _ = linear_mutual_loss(hidden, weight, labels, return_rows=True)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        losses.sum().backward()
