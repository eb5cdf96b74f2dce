"""Steps of a cohort with teachers: every execution against a loop in plain torch, and what a step
leaves as it was."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer, make_step
from fastdml.engine.graph import GraphStep
from fastdml.engine.streams import StreamsStep
from fastdml.errors import InputError
from fastdml.loss import MutualLoss

from .small_runs import DirectCapture, plain_batch, plain_peer

C, T, RATE = 4, 2.0, 0.05


def teachers(n=2):
    """Networks whose BatchNorm has seen other images than the peers'."""
    found = [plain_peer(100 + i, 5 + i).double() for i in range(n)]
    for i, net in enumerate(found):
        net(batch(50 + i)[0] * 3 + 1)
    return found


def cohort_of(K=2, n=2):
    return Cohort([plain_peer(k, 6).double() for k in range(K)], C, teachers=teachers(n)).train()


def batch(i):
    x, y = plain_batch(i)
    return x.double(), y


class FakeStream:
    waits: list = []  # noqa: RUF012

    def __init__(self, *_):
        pass

    def wait_stream(self, other):
        self.waits.append((self, other))


def step_of(kind, cohort, **options):
    optimizer = make_optimizer(cohort, "sgd", lr=RATE, momentum=0.9, weight_decay=1e-3)
    name, _, graph = kind.partition(" in a ")
    if name == "sequential":
        name, options["update"] = "eager", "sequential"
    if name == "streams":
        made = make_step(cohort, MutualLoss(temperature=T), optimizer, amp="off", execution="eager")
        step = StreamsStep(cohort, made.loss, optimizer, made.amp, made.options)
    else:
        options = {"execution": name, "amp": "off", **options}
        step = make_step(cohort, MutualLoss(temperature=T), optimizer, **options)
    return GraphStep(step, DirectCapture) if graph else step


def kl(teacher, z):
    return F.kl_div(
        F.log_softmax(z / T, 1), F.softmax(teacher.detach() / T, 1), reduction="batchmean"
    )


def loop(peers, nets, steps, sequential):
    """Distillation and mutual learning as everybody writes them; losses (steps, K), divergences
    from the teachers (steps, M, K)."""
    optimizers = [
        torch.optim.SGD(p.parameters(), RATE, 0.9, nesterov=True, weight_decay=1e-3) for p in peers
    ]
    losses, apart = [], []
    for i in range(steps):
        x, y = batch(i)
        with torch.no_grad():
            taught = [net(x) for net in nets]
        zs = [p(x) for p in peers]
        found = []
        for k, (p, optimizer) in enumerate(zip(peers, optimizers, strict=True)):
            others = [z for j, z in enumerate(zs) if j != k] + taught
            found.append(
                F.cross_entropy(zs[k], y) + T**2 * sum(kl(z, zs[k]) for z in others) / len(others)
            )
            apart.append(torch.stack([T**2 * kl(z, zs[k]).detach() for z in taught]))
            if sequential:
                optimizer.zero_grad()
                found[k].backward()
                optimizer.step()
                again = copy.deepcopy(p)  # whose statistics nobody keeps
                with torch.no_grad():
                    zs[k] = again(x)
        if not sequential:
            for optimizer in optimizers:
                optimizer.zero_grad()
            sum(found).backward()
            for optimizer in optimizers:
                optimizer.step()
        losses.append(torch.stack(found).detach())
    K = len(peers)
    return torch.stack(losses), torch.stack(apart).view(steps, K, -1).transpose(1, 2)


KINDS = ["eager", "threads", "auto", "streams", "stacked", "sequential", "eager in a graph",
         "streams in a graph", "stacked in a graph", "sequential in a graph"]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "K"), [(kind, K) for kind in KINDS for K in (1, 2) if K == 2 or "stacked" not in kind]
)
def test_each_execution_takes_the_steps_of_a_plain_loop(kind, K, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    cohort = cohort_of(K)
    peers, nets = copy.deepcopy(list(cohort.peers)), [t.network for t in cohort.teachers]
    before = copy.deepcopy([net.state_dict() for net in nets])
    step = step_of(kind, cohort)
    cohort.train()
    for net in nets:
        net.train()  # as an owner might; the step does not heed it
    outputs = [step(*batch(i)) for i in range(5)]
    assert not any(m.training for net in nets for m in net.modules())
    losses, apart = loop(peers, nets, 5, kind.startswith("sequential"))
    torch.testing.assert_close(torch.stack([o.losses for o in outputs]), losses)
    torch.testing.assert_close(torch.stack([o.teacher_kl for o in outputs]), apart)
    for own, plain in zip(cohort.peers, peers, strict=True):
        torch.testing.assert_close(own.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-9)
    assert outputs[-1].stats.K == K
    for net, was in zip(nets, before, strict=True):
        assert all(torch.equal(t, was[key]) for key, t in net.state_dict().items())
        assert not any(w.requires_grad or w.grad is not None for w in net.parameters())
    if isinstance(step, GraphStep):
        assert step.failure is None
        assert step.captured.calls == 5


def test_statistics_are_of_the_peers_alone():
    """The ensemble's hits too; the teachers are right on every row and would change them."""
    cohort = cohort_of(3, 0)
    x, y = batch(0)

    class Oracle(nn.Module):
        def forward(self, images):
            return 100 * F.one_hot(y, C).double()

    cohort.teachers = [Oracle()]
    cohort.train()
    zs = [copy.deepcopy(p)(x).detach() for p in cohort.peers]
    alone = MutualLoss().value_and_grad(zs, y)[1]
    stats = step_of("eager", cohort)(x, y).stats
    for field in ("ce", "correct", "ensemble_correct", "entropy"):
        torch.testing.assert_close(getattr(stats, field), getattr(alone, field))
    assert stats.packed.shape == alone.packed.shape
    assert int(stats.ensemble_correct) < len(y)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_add_up(parts):
    """Without BatchNorm in training, which sees the parts."""
    found = []
    for n in (1, parts):
        cohort = cohort_of(2).eval()
        step = step_of("eager", cohort, accumulate=n)
        outputs = [step(*batch(i)) for i in range(3)]
        found.append([*cohort.parameters(), *(t for o in outputs for t in (o.losses, o.teacher_kl)),
                      *(t for o in outputs for t in o.stats)])  # fmt: skip
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize(
    "kind", ["eager", "threads", "stacked", "sequential", "eager in a graph", "stacked in a graph"]
)
def test_logits_that_are_known_take_the_place_of_the_teachers(kind, options, monkeypatch):
    if options and kind == "sequential":
        options = {"grad_clip": 0.5}  # parts do not go with it
    found = []
    for known in (False, True):
        cohort = cohort_of(2, 2)
        tables = [torch.stack([t(batch(i)[0]) for i in range(5)]) for t in cohort.teachers]
        taught = {"taught": lambda i, tables=tables: [table[i[0]] for table in tables]}
        step = step_of(kind, cohort, **options, **(taught if known else {}))
        calls = [t.network.register_forward_hook(fail) for t in cohort.teachers if known]
        keys = [(torch.full((8,), i),) if known else () for i in range(5)]
        if kind == "threads" and known:  # with hooks it is another step
            for hook in calls:
                hook.remove()
        outputs = [step(*batch(i), *key) for i, key in enumerate(keys)]
        found.append([*cohort.parameters(), *(o.losses for o in outputs),
                      *(o.teacher_kl for o in outputs)])  # fmt: skip
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def fail(*_):
    raise AssertionError("a teacher ran")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_teachers_run_under_the_peers_autocast(amp):
    seen = []
    teacher = plain_peer(7, 8)
    teacher[0].register_forward_hook(lambda m, x, out: seen.append(out.dtype))
    cohort = Cohort([plain_peer(0, 6)], C, teachers=[teacher]).train()
    optimizer = make_optimizer(cohort, lr=0.01)
    step = make_step(cohort, MutualLoss(), optimizer, execution="eager", amp=amp)
    output = step(*plain_batch(0))
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]]
    assert output.losses.isfinite().all()
    assert output.teacher_kl.shape == (1, 1)


def test_a_teacher_keeps_nothing_for_a_backward_pass():
    kept = []
    cohort = cohort_of(1, 1)
    (teacher,) = cohort.teachers
    x = batch(0)[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        out = teacher(x)
        assert not kept
        cohort.peers[0](x)
        assert kept
    assert not out.requires_grad


def test_auto_measures_a_peer_beside_its_teacher_and_shares_the_teacher():
    """Candidates on copies: of the peer, not of the teacher."""
    cohort = cohort_of(1, 1)
    step = make_step(cohort, MutualLoss(), make_optimizer(cohort, lr=RATE), amp="off")
    assert {"eager", "threads"} <= {*step.names}
    made = step.copies()("eager")
    assert made.cohort.peers[0] is not cohort.peers[0]
    assert made.cohort.teachers[0] is cohort.teachers[0]
    before = copy.deepcopy(cohort.state_dict())
    x, y = batch(0)
    made(x, y)
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())
    step(x, y)
    assert step.choice.execution in step.names


def test_other_teachers_need_another_step():
    for kind in ("eager", "eager in a graph"):
        cohort = cohort_of(1, 1)
        step = step_of(kind, cohort)
        step(*batch(0))
        cohort.teachers = ()
        with pytest.raises(InputError, match="other teachers than when the step was made"):
            step(*batch(1))


def test_a_graph_of_a_teacher_that_has_moved_is_captured_anew():
    cohort = cohort_of(1, 1)
    step = step_of("eager in a graph", cohort)
    step(*batch(0))
    first = step.captured
    net = cohort.teachers[0].network
    net[0].weight = nn.Parameter(net[0].weight.detach().clone() + 1, requires_grad=False)
    step(*batch(1))
    assert step.captured is not first
    assert step.failure is None


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: nn.Flatten(), r"teacher Flatten must return logits \(N, 4\), and for 8 images"),
        (lambda: plain_peer(0, 4).append(nn.Linear(4, 9)), r"returned \(8, 9\)"),
    ],
)
def test_what_gives_no_logits_is_named(teacher, message):
    cohort = Cohort([plain_peer(0, 6)], C, teachers=[teacher()]).train()
    with pytest.raises(InputError, match=message):
        make_step(cohort, MutualLoss(), make_optimizer(cohort, lr=0.1), execution="eager")(
            *plain_batch(0)
        )


@pytest.mark.parametrize("kind", ["eager", "stacked", "sequential"])
def test_gradients_are_computed_for_who_learns_alone(kind, monkeypatch):
    """Of peers in their turn, and never of a teacher."""
    import fastdml.loss as module

    asked = []
    inner = module.losses_and_grads

    def asking(logits, call, students, **options):
        found = inner(logits, call, students, **options)
        asked.append(tuple(students))
        assert [k for k, g in enumerate(found[2]) if g is not None] == [*students]
        return found

    monkeypatch.setattr(module, "losses_and_grads", asking)
    step_of(kind, cohort_of(2, 2))(*batch(0))
    assert asked == ([(0,), (1,)] if kind == "sequential" else [(0, 1)])


def test_a_loss_with_students_of_its_own_is_refused():
    cohort = cohort_of(2, 0)
    with pytest.raises(InputError, match="leave students out of the loss"):
        make_step(cohort, MutualLoss(students=[0]), make_optimizer(cohort, lr=0.1))
