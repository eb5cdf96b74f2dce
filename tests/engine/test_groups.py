"""Weights unfrozen, groups added, layers replaced between steps, against a plain loop."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import Amp, make_optimizer, make_step
from fastdml.engine.amp import LossScale
from fastdml.errors import InputError
from fastdml.loss import MutualLoss

C, RATE = 3, 0.25
CPU = torch.device("cpu")


def peers_of(K: int = 2) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, C)).double()
        for _ in range(K)
    ]


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(8, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(C, (8,), generator=generator)


def loss_of(k: int, logits: list[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(logits[k], y)
    for teacher, z in enumerate(logits):
        if teacher != k:
            kl = F.kl_div(logits[k].log_softmax(1), z.detach().softmax(1), reduction="batchmean")
            loss = loss + kl / (len(logits) - 1)
    return loss


class Plain:
    """A step as everybody writes it."""

    def __init__(self, peers, optimizer, update="simultaneous", grad_clip=None):
        self.peers, self.optimizer = peers, optimizer
        self.update, self.grad_clip = update, grad_clip

    def __call__(self, x, y):
        K = len(self.peers)
        for ks in [[k] for k in range(K)] if self.update == "sequential" else [range(K)]:
            logits = [p(x) for p in self.peers]
            for k in ks:
                if logits[k].requires_grad:
                    loss_of(k, logits, y).backward()
                if self.grad_clip:
                    nn.utils.clip_grad_norm_(self.peers[k].parameters(), self.grad_clip)
            self.optimizer.step()
            for p in self.peers:
                p.zero_grad()


def groups_of(peers, wanted=lambda w: w.requires_grad) -> list[dict]:
    return [{"params": [w for w in p.parameters() if wanted(w)]} for p in peers]


def freeze(peers):
    for p in peers:
        p[:2].requires_grad_(False)


class Unfrozen:
    """The body joins after two steps, in a group of its own."""

    def start(self, peers):
        freeze(peers)

    def change(self, peers, optimizer):
        for p in peers:
            p[:2].requires_grad_(True)
        optimizer.add_param_group({"params": [w for p in peers for w in p[:2].parameters()]})


class UnfrozenInAPlace(Unfrozen):
    """The body joins the group of its peer."""

    def change(self, peers, optimizer):
        for p, group in zip(peers, optimizer.param_groups, strict=True):
            p[:2].requires_grad_(True)
            group["params"].extend(p[:2].parameters())


class HeldWhileFrozen(Unfrozen):
    """The optimizer has all weights from the start."""

    held = True

    def change(self, peers, optimizer):
        for p in peers:
            p[:2].requires_grad_(True)


class Frozen:
    def start(self, peers):
        pass

    def change(self, peers, optimizer):
        freeze(peers)


class OnePeerFrozen(Frozen):
    def change(self, peers, optimizer):
        peers[0].requires_grad_(False)


class HeadReplaced(Frozen):
    """A new layer in place of the old, whose weights the group takes over."""

    def change(self, peers, optimizer):
        for k, (p, group) in enumerate(zip(peers, optimizer.param_groups, strict=True)):
            torch.manual_seed(7 + k)
            old, p[3] = [id(w) for w in p[3].parameters()], nn.Linear(6, C).double()
            kept = [w for w in group["params"] if id(w) not in old]
            group["params"] = [*kept, *p[3].parameters()]


class GroupRemoved(Frozen):
    """Nothing holds the second peer any more."""

    def change(self, peers, optimizer):
        del optimizer.param_groups[1]
        peers[1].requires_grad_(False)


class SettingsChanged(Frozen):
    def change(self, peers, optimizer):
        optimizer.param_groups[0].update(momentum=0.25, weight_decay=0.1)
        optimizer.param_groups[1]["lr"] = 0.5


CHANGES = [Unfrozen, UnfrozenInAPlace, HeldWhileFrozen, Frozen, OnePeerFrozen, HeadReplaced,
           GroupRemoved, SettingsChanged]  # fmt: skip


def run(change, peers, optimizer, step):
    for i in range(6):
        if i == 2:
            change.change(peers, optimizer)
        step(*batch(i))
        assert all(w.grad is None for p in peers for w in p.parameters())


def optimizer_for(change, cohort, name):
    wanted = (lambda w: True) if getattr(change, "held", False) else lambda w: w.requires_grad
    if name == "own":
        return torch.optim.SGD(groups_of(cohort.peers, wanted), RATE, 0.9, nesterov=True)
    if getattr(change, "held", False):
        cohort.requires_grad_(True)
    optimizer = make_optimizer(cohort, name, lr=RATE)
    change.start(cohort.peers)
    return optimizer


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("sgd", {"execution": "eager"}),
        ("own", {"execution": "eager", "grad_clip": 0.05}),
        ("sgd", {"execution": "threads"}),
        ("sgd", {"execution": "eager", "update": "sequential"}),
    ],
    ids=str,
)
def test_the_step_takes_groups_and_weights_as_they_are(change, optimizer, options):
    change = change()
    ours, theirs = peers_of(), peers_of()
    change.start(ours)
    change.start(theirs)
    cohort = Cohort(ours, C)
    made = optimizer_for(change, cohort, optimizer)
    held = (lambda w: True) if getattr(change, "held", False) else lambda w: w.requires_grad
    plain = torch.optim.SGD(groups_of(theirs, held), RATE, 0.9, nesterov=True)
    run(change, ours, made, make_step(cohort, MutualLoss(), made, amp="off", **options))
    options = {k: v for k, v in options.items() if k != "execution"}
    run(change, theirs, plain, Plain(theirs, plain, **options))
    start = peers_of()
    for p, q, was in zip(ours, theirs, start, strict=True):
        for w, v in zip(p.parameters(), q.parameters(), strict=True):
            torch.testing.assert_close(w, v, rtol=1e-6, atol=1e-7)
        assert not torch.equal(p[3].weight, was[3].weight)


OPTIMIZERS = {
    "SGD": {"lr": RATE, "momentum": 0.9, "dampening": 0.5},
    "SGD fused": {"lr": RATE, "momentum": 0.9, "dampening": 0.5, "fused": True},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW fused": {"lr": 0.01, "fused": True},
    **{name: {} for name in ("Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD")},
    **{name: {} for name in ("NAdam", "RAdam", "RMSprop", "Rprop")},
}


@pytest.mark.parametrize("groups", ["one", "a peer", "a kind of weight"])
@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_of_torch_steps_as_in_a_plain_loop(name, update, groups):
    def made(peers):
        weights = [w for p in peers for w in p.parameters()]
        kinds = [[w for w in weights if (w.dim() > 1) == large] for large in (True, False)]
        given = {
            "one": weights,
            "a peer": groups_of(peers),
            "a kind of weight": [{"params": kind} for kind in kinds],
        }[groups]
        return getattr(torch.optim, name.split()[0])(given, **OPTIMIZERS[name])

    ours, theirs = peers_of(), peers_of()
    cohort = Cohort(ours, C)
    step = make_step(cohort, MutualLoss(), made(ours), amp="off", update=update,
                     execution="eager")  # fmt: skip
    plain = Plain(theirs, made(theirs), update)
    for i in range(3):
        step(*batch(i))
        plain(*batch(i))
    for p, q, was in zip(ours, theirs, peers_of(), strict=True):
        for w, v in zip(p.parameters(), q.parameters(), strict=True):
            torch.testing.assert_close(w, v, rtol=1e-9, atol=1e-11)
        assert not torch.equal(p[0].weight, was[0].weight)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("amp", ["fp16", "bf16"])
@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
def test_unfrozen_weights_train_in_mixed_precision(name, amp, update):
    peers = [p.float() for p in peers_of()]
    freeze(peers)
    cohort = Cohort(peers, C)
    optimizer = make_optimizer(cohort, name, lr=0.01)
    step = make_step(cohort, MutualLoss(), optimizer, amp=amp, execution="eager", update=update)
    x, y = batch(0)
    step(x.float(), y)
    Unfrozen().change(peers, optimizer)
    before = [w.detach().clone() for w in cohort.parameters()]
    step(x.float(), y)
    assert all(not torch.equal(w, b) for w, b in zip(cohort.parameters(), before, strict=True))
    assert all(w.isfinite().all() for w in cohort.parameters())
    assert all(w.grad is None for w in cohort.parameters())


class TestWeightsThatNothingHolds:
    """They stay, their gradients go, and one line says so."""

    def steps(self, cohort, optimizer, **options):
        step = make_step(cohort, MutualLoss(), optimizer, amp="off", execution="eager", **options)
        for i in range(3):
            step(*batch(i))
        assert all(w.grad is None for w in cohort.parameters())

    def test_from_the_start(self):
        cohort = Cohort(peers_of(), C)
        optimizer = torch.optim.SGD(cohort.peers[0].parameters(), RATE)
        before = cohort.peers[1][0].weight.detach().clone()
        message = "peer Sequential-2 has 6 weights with gradients that no group of the optimizer"
        with pytest.warns(UserWarning, match=message) as caught:
            self.steps(cohort, optimizer)
        assert len(caught) == 1
        assert "\n" not in str(caught[0].message)
        assert torch.equal(cohort.peers[1][0].weight, before)

    def test_unfrozen_and_forgotten(self):
        cohort = Cohort(peers_of(), C)
        freeze(cohort.peers)
        optimizer = make_optimizer(cohort, lr=RATE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.steps(cohort, optimizer)
        step = make_step(cohort, MutualLoss(), optimizer, amp="off", execution="eager")
        cohort.peers[0].requires_grad_(True)
        with pytest.warns(UserWarning, match="peer Sequential-1 has 4 weights"):
            step(*batch(0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            step(*batch(1))
        assert all(w.grad is None for w in cohort.parameters())

    def test_a_layer_replaced_and_forgotten(self):
        cohort = Cohort(peers_of(), C)
        optimizer = make_optimizer(cohort, lr=RATE)
        step = make_step(cohort, MutualLoss(), optimizer, amp="off", execution="eager")
        step(*batch(0))
        cohort.peers[1][3] = nn.Linear(6, C).double()
        with pytest.warns(UserWarning, match="weights") as caught:
            step(*batch(1))
        texts = sorted(str(w.message) for w in caught)
        assert texts[0].startswith("peer Sequential-2 has 2 weights with gradients that no group")
        assert texts[1].startswith("the optimizer holds 2 weights that belong to no peer")
        assert len(texts) == 2

    def test_peers_that_replace_their_buffers_are_warned_of_once(self):
        class Replacing(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net
                self.register_buffer("seen", torch.zeros(()))

            def forward(self, x):
                self.seen = self.seen + 1
                return self.net(x)

        cohort = Cohort([Replacing(p) for p in peers_of()], C)
        optimizer = torch.optim.SGD(cohort.peers[0].parameters(), RATE)
        with pytest.warns(UserWarning, match="Replacing-2 has 6 weights") as caught:
            self.steps(cohort, optimizer)
        assert len(caught) == 1


@pytest.mark.parametrize("how", ["replaced", "added", "swapped"])
def test_other_peers_need_another_step(how):
    cohort = Cohort(peers_of(), C)
    step = make_step(cohort, MutualLoss(), make_optimizer(cohort, lr=RATE), amp="off",
                     execution="eager")  # fmt: skip
    step(*batch(0))
    first, second = cohort.peers
    if how == "replaced":
        cohort.peers[1] = nn.Sequential(second)
    elif how == "added":
        cohort.peers.append(peers_of(1)[0])
        cohort.names.append("third")
    else:
        cohort.peers = nn.ModuleList([second, first])
    before = [w.detach().clone() for w in cohort.parameters()]
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the third's weights
            with pytest.raises(InputError, match="other peers than when the step was made: make a"):
                step(*batch(1))
    assert all(torch.equal(w, b) for w, b in zip(cohort.parameters(), before, strict=True))


def test_a_part_of_a_group_that_counts_is_refused():
    class Counting(torch.optim.SGD):
        def step(self):
            super().step()
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1

    cohort = Cohort(peers_of(), C)
    for groups, update in ((1, "simultaneous"), (2, "sequential"), (1, "sequential")):
        weights = groups_of(cohort.peers) if groups == 2 else cohort.parameters()
        optimizer = Counting(weights, RATE)
        step = make_step(cohort, MutualLoss(), optimizer, amp="off", update=update,
                         execution="eager")  # fmt: skip
        if (groups, update) == (1, "sequential"):
            with pytest.raises(InputError, match=r"Counting keeps k in its groups, "):
                step(*batch(0))
        else:
            step(*batch(0))
            assert [group["k"] for group in optimizer.param_groups] == [1] * groups


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("when", ["before the first step", "between steps", "state loaded"])
def test_the_state_follows_weights_into_another_layout(name, when):
    """Fused kernels walk weights and state side by side, whatever the strides say."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        nets = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, C)) for _ in range(2)]
        cohort = Cohort(nets, C)
        optimizer = make_optimizer(cohort, name, lr=0.05)
        step = make_step(cohort, MutualLoss(), optimizer, amp="off", execution="eager")
        generator = torch.Generator().manual_seed(1)
        for i in range(6):
            if i == (0 if when == "before the first step" else 3):
                saved = optimizer.state_dict()
                cohort.to(memory_format=layout)
                if when == "state loaded":
                    optimizer.load_state_dict(saved)
            x = torch.randn(8, 3, 4, 4, generator=generator)
            step(x, torch.randint(C, (8,), generator=generator))
        for net in nets:
            for t in optimizer.state[net[0].weight].values():
                assert t.dim() == 0 or t.stride() == net[0].weight.stride()
        results.append([w.detach().clone() for w in cohort.parameters()])
    for w, v in zip(*results, strict=True):
        torch.testing.assert_close(w, v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("when", [0, 2], ids=["before the first step", "between steps"])
def test_the_state_follows_weights_into_another_dtype(name, when):
    cohort = Cohort([p.float() for p in peers_of()], C)
    optimizer = make_optimizer(cohort, name, lr=0.05)
    step = make_step(cohort, MutualLoss(), optimizer, amp="off", execution="eager")
    for i in range(4):
        if i == when:
            cohort.double()
        x, y = batch(i)
        step(x.double() if i >= when else x.float(), y)
    for w in cohort.parameters():
        moments = {n: t for n, t in optimizer.state[w].items() if n != "step"}
        assert moments
        assert all(t.dtype == torch.float64 and (t != 0).any() for t in moments.values())
        assert optimizer.state[w].get("step", torch.tensor(4.0)) == 4


class Failing(nn.Module):
    """Runs out of memory at some of its calls."""

    def __init__(self, net, at):
        super().__init__()
        self.net, self.at, self.calls = net, at, 0

    def forward(self, x):
        self.calls += 1
        if self.calls in self.at:
            raise torch.OutOfMemoryError("no more")
        return self.net(x)


@pytest.mark.parametrize(
    "options",
    [{"accumulate": 2}, {"update": "sequential"}, {"execution": "threads", "accumulate": 2}],
    ids=str,
)
def test_a_step_that_broke_off_leaves_no_gradient_to_the_next(options):
    options = {"execution": "eager", "amp": "off", **options}
    found = []
    for at in ((), (2,)):
        peers = peers_of()
        cohort = Cohort([Failing(peers[0], at), peers[1]], C)
        optimizer = make_optimizer(cohort, lr=RATE)
        step = make_step(cohort, MutualLoss(), optimizer, **options)
        if at:
            before = [w.detach().clone() for w in cohort.parameters()]
            with pytest.raises(torch.OutOfMemoryError):
                step(*batch(0))
            assert all(w.grad is None for w in cohort.parameters())
            with torch.no_grad():
                for w, value in zip(cohort.parameters(), before, strict=True):
                    w.copy_(value)
            optimizer.state.clear()
        step(*batch(1))
        found.append([w.detach().clone() for w in cohort.parameters()])
    for w, v in zip(*found, strict=True):
        assert torch.equal(w, v)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_weights_unfrozen_in_a_step_that_overflows_start_from_clean_moments(name):
    peers = [p.float() for p in peers_of()]
    freeze(peers)
    cohort = Cohort(peers, C)
    optimizer = make_optimizer(cohort, name, lr=0.01)
    amp = Amp(CPU, torch.float16, LossScale(CPU, init=2.0**10))
    step = make_step(cohort, MutualLoss(), optimizer, amp=amp, execution="eager")
    x, y = batch(0)
    step(x.float(), y)
    Unfrozen().change(peers, optimizer)
    before = [w.detach().clone() for w in cohort.parameters()]
    amp.scaler.scale.fill_(2.0**127)
    step(x.float() * 100, y)
    assert step.update.overflow.tolist() == [1.0, 1.0]
    assert all(torch.equal(w, b) for w, b in zip(cohort.parameters(), before, strict=True))
    amp.scaler.scale.fill_(2.0**10)
    step(x.float(), y)
    assert step.update.skipped == 0
    for w, b in zip(cohort.parameters(), before, strict=True):
        assert w.isfinite().all()
        assert not torch.equal(w, b)
