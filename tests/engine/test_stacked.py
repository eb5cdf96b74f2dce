"""Peers of one architecture as one network, against the peers themselves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import make_optimizer, make_step
from fastdml.engine.stack import Stack
from fastdml.engine.stack_proof import prove
from fastdml.engine.stackable import Unstackable
from fastdml.errors import InputError
from fastdml.loss import MutualLoss

C = 5
# name, image side: small maps keep these fast; every kind of layer of the models is in them
MODELS = [
    ("resnet8", 8), ("resnet14", 12), ("wrn_10_1", 8), ("wrn_10_2", 8), ("mobilenet", 8),
    ("googlenet", 8),
]  # fmt: skip


def cohort_of(name, K=2, dtype=torch.float64, channels=3):
    cohort = Cohort([name] * K, C, in_channels=channels, seed=3).to(dtype)
    return cohort.to(memory_format=torch.channels_last).train()


def batches(steps, side, n=8, dtype=torch.float64, channels=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(n, channels, side, side, generator=generator, dtype=torch.float64)
        labels = torch.randint(C, (n,), generator=generator)
        yield x.to(dtype).to(memory_format=torch.channels_last), labels


def train(cohort, execution, data, **options):
    optimizer = make_optimizer(cohort, lr=0.01, weight_decay=5e-4)
    step = make_step(cohort, MutualLoss(), optimizer, execution=execution, amp="off", **options)
    outputs = [step(*batch) for batch in data]
    return step, optimizer, outputs


@pytest.mark.parametrize(("name", "side"), MODELS)
def test_every_model_stacks_exactly(name, side):
    """In float64, so that what differs by rounding is far from what differs by mistake."""
    steps = 2 if name in ("mobilenet", "googlenet") else 4
    eager, stacked = cohort_of(name), cohort_of(name)
    _, o, a = train(eager, "eager", batches(steps, side))
    _, p, b = train(stacked, "stacked", batches(steps, side))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(y.losses, x.losses, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(y.stats.pairwise_kl, x.stats.pairwise_kl, rtol=1e-6, atol=1e-6)
    one, two = eager.state_dict(), stacked.state_dict()
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-6, atol=1e-8, msg=key)
    for v, w in zip(eager.parameters(), stacked.parameters(), strict=True):
        x, y = o.state[v]["momentum_buffer"], p.state[w]["momentum_buffer"]
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("K", [1, 3])
def test_fifty_steps_of_a_residual_network(K):
    """Images of one channel; 50 steps magnify a difference by many orders, hence float64."""
    results = []
    for execution in ("eager", "stacked"):
        cohort = cohort_of("resnet8", K, channels=1)
        data = batches(50, 8, channels=1)
        train(cohort, execution, data)
        results.append(cohort.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-5, atol=1e-7, msg=key)


class TestPeersStayOrdinary:
    def test_weights_are_current_and_state_dicts_ordinary(self, tmp_path):
        cohort = cohort_of("resnet8", dtype=torch.float32)
        keys = list(cohort.state_dict())
        before = copy.deepcopy(cohort.state_dict())
        step, _, _ = train(cohort, "stacked", batches(2, 8, dtype=torch.float32))
        assert list(cohort.state_dict()) == keys
        assert all(type(p) is type(cohort.peers[0]) for p in cohort.peers)
        assert not torch.equal(cohort.state_dict()[keys[0]], before[keys[0]])
        assert cohort.peers[1].bn1.num_batches_tracked == 2
        assert all(w.grad is None for w in cohort.parameters())
        # the peers by themselves give what the stack gives
        x = next(batches(1, 8, dtype=torch.float32))[0]
        cohort.eval()
        step.stack.eval()
        with torch.no_grad():
            torch.testing.assert_close(step.stack(x), torch.stack(cohort(x)), rtol=1e-4, atol=1e-5)
        cohort.save(tmp_path)
        loaded = Cohort.load(tmp_path)
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, cohort.state_dict()[key])
        # a deep copy is free of the stack
        twin = copy.deepcopy(cohort.peers[0])
        with torch.no_grad():
            twin.conv1.weight.zero_()
        assert cohort.peers[0].conv1.weight.abs().sum() > 0

    def test_loading_weights_reaches_the_stack(self):
        cohort, other = cohort_of("resnet8"), cohort_of("resnet8")
        step, _, _ = train(cohort, "stacked", batches(2, 8))
        cohort.load_state_dict(other.state_dict())
        x = next(batches(1, 8))[0]
        step.stack.eval()
        with torch.no_grad():
            torch.testing.assert_close(step.stack(x), torch.stack(other.eval()(x)))

    def test_a_frozen_peer_teaches_and_stays(self):
        cohort = cohort_of("resnet8")
        cohort.peers[0].requires_grad_(False)
        before = copy.deepcopy(dict(cohort.peers[0].named_parameters()))
        other = cohort.peers[1].conv1.weight.clone()
        train(cohort, "stacked", batches(2, 8))
        assert all(torch.equal(w, before[k]) for k, w in cohort.peers[0].named_parameters())
        assert not torch.equal(cohort.peers[1].conv1.weight, other)


class Mixing(nn.Module):
    """Uses its channels in a way that no layer tells."""

    num_classes = C

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, C)

    def forward(self, x):
        return self.head(F.softmax(self.conv(x).mean((2, 3)), dim=1))


class Scaled(nn.Module):
    num_classes = C

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(3, C)

    def forward(self, x):
        return self.head(x.mean((2, 3)) * self.scale)


def hooked():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, C))
    model.register_forward_hook(lambda *_: None)
    return model


def dense(**options):
    return nn.Sequential(nn.Conv2d(3, 4, 3, **options), nn.Flatten(), nn.Linear(144, C))


@pytest.mark.parametrize(
    ("peers", "message"),
    [
        (["resnet8", "resnet14"], "peers of one architecture: peers 0 and 1 have different layers"),
        (["wrn_10_1", "wrn_10_2"], "different layers|differs between peers 0 and 1"),
        ([dense, lambda: dense(dilation=1, bias=False)], "0 differs between peers 0 and 1"),
        ([Mixing, Mixing], "does not know the way that Mixing combines its layers"),
        (
            [Scaled, Scaled],
            r"type Scaled with weights of its own \(Scaled\); use another execution",
        ),
        ([hooked, hooked], "does not know a module with hooks"),
        (
            [lambda: dense(padding_mode="circular", padding=0)] * 2,
            "a convolution with padding_mode='circular'",
        ),
        (
            [lambda: nn.Sequential(nn.BatchNorm2d(3, momentum=None), dense())] * 2,
            "BatchNorm with momentum=None",
        ),
    ],
)
def test_peers_that_do_not_stack_are_refused(peers, message):
    cohort = Cohort([p if isinstance(p, str) else p() for p in peers], C)
    before = copy.deepcopy(cohort.state_dict())
    with pytest.raises(InputError, match=message) as caught:
        train(cohort, "stacked", batches(1, 8, dtype=torch.float32))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())


def test_the_proof_leaves_the_peers_as_they_were():
    cohort = cohort_of("resnet8")
    for peer in cohort.peers:
        peer.bn1.eval()
    modes = [m.training for m in cohort.modules()]
    before = copy.deepcopy(cohort.state_dict())
    generator = torch.get_rng_state()
    prove(Stack, list(cohort.peers), next(batches(1, 8))[0])
    assert [m.training for m in cohort.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())


def small(seed, dropout=0.5):
    torch.manual_seed(seed)
    return Small(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2),
        nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout),
        nn.Linear(4, C),
    )  # fmt: skip


class Small(nn.Sequential):
    scale = 1.0

    def forward(self, x):
        return self.scale * super().forward(x)


def each(change):
    """The same change in all peers."""

    def do(cohort):
        for k, peer in enumerate(cohort.peers):
            change(peer, k)

    return do


def modes(*layers, training=False):
    return each(lambda p, k: [p[i].train(training) for i in layers or range(len(p))])


def setting(layer, **values):
    return each(lambda p, k: [setattr(p[layer], name, v) for name, v in values.items()])


def new_head(peer, k):
    torch.manual_seed(10 + k)
    peer[8] = nn.Linear(4, C).double()


def assigned(peer, k):
    for layer in peer[4], peer[8]:
        state = {name: 1.5 * t if t.dim() else t for name, t in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)


def other_memory(peer, k):
    peer[3].weight.data = 0.5 * peer[3].weight.data


def other_statistics(peer, k):
    peer[4].running_mean = torch.ones_like(peer[4].running_mean)


def gradients(peer, k):
    for i, w in enumerate(peer.parameters()):
        if (i + k) % 2:
            w.grad = torch.full_like(w, 0.1)


CHANGES = {
    "frozen BatchNorm": modes(1, 4),
    "one frozen BatchNorm": modes(4),
    "all in eval": modes(),
    "dropout in eval": modes(7),
    "momentum": setting(1, momentum=0.5),
    "eps": setting(4, eps=0.1),
    "no statistics": setting(1, track_running_stats=False),
    "rate of dropout": setting(7, p=0.9),
    "attribute": each(lambda p, k: setattr(p, "scale", 2.0 + k * 0)),
    "one frozen layer": each(lambda p, k: p[0].requires_grad_(False)),
    "one frozen peer": lambda cohort: cohort.peers[1].requires_grad_(False),
    "frozen by turns": each(lambda p, k: p[8 * k].requires_grad_(False)),
    "another layer": each(lambda p, k: p.__setitem__(2, nn.Tanh())),
    "new head": each(new_head),
    "assigned state": each(assigned),
    "memory of one layer": each(other_memory),
    "memory of one peer": lambda cohort: other_memory(cohort.peers[1], 1),
    "statistics of one layer": each(other_statistics),
    "layout": lambda cohort: cohort.to(memory_format=torch.channels_last),
    "gradients of others": each(gradients),
    "values": each(lambda p, k: p[8].weight.data.mul_(2)),
}


@pytest.mark.parametrize(
    ("name", "accumulate"),
    [*((name, 1) for name in CHANGES), ("gradients of others", 2), ("one frozen layer", 2)],
)
@pytest.mark.filterwarnings("ignore:.*(no group of the optimizer|belong to no peer)")
def test_what_changes_after_the_step_was_made_is_what_eager_makes_of_it(name, accumulate):
    """Before the first step, between steps, and back again where that is a mode."""
    for at in (0, 2):
        states = []
        for execution in ("eager", "stacked"):
            cohort = Cohort([small(k).double() for k in range(2)], C).train()
            optimizer = torch.optim.SGD(cohort.parameters(), 0.05, 0.9, weight_decay=0.1)
            step = make_step(
                cohort, MutualLoss(), optimizer, execution=execution, amp="off",
                accumulate=accumulate,
            )  # fmt: skip
            torch.manual_seed(0)
            losses = []
            for i, (x, y) in enumerate(batches(5, 8)):
                if i == at:
                    CHANGES[name](cohort)
                if i == 4:
                    cohort.train().requires_grad_(True)
                losses.append(step(x.contiguous(), y).losses)
            grads = [torch.zeros(1) if w.grad is None else w.grad for w in cohort.parameters()]
            states.append([*losses, *cohort.state_dict().values(), *grads])
        for a, b in zip(*states, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "change", [lambda p: p.eval(), lambda p: p[1].eval(), lambda p: p[7].eval()]
)
@pytest.mark.parametrize("steps", [0, 1])
def test_peers_in_different_modes_are_refused_at_a_step(change, steps):
    cohort = Cohort([small(k).double() for k in range(2)], C).train()
    if not steps:
        change(cohort.peers[0])  # is no matter before
    optimizer = make_optimizer(cohort, lr=0.1)
    step = make_step(cohort, MutualLoss(), optimizer, execution="stacked", amp="off")
    cohort.train()
    for batch in batches(steps, 8):
        step(*batch)
    change(cohort.peers[1])
    with pytest.raises(Unstackable, match=r"peers in one mode: of .*, peers 0 and 1 differ in tr"):
        step(*next(batches(1, 8)))
    cohort.train()
    step(*next(batches(1, 8)))


def test_modes_that_were_proved_are_not_proved_again(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "fastdml.engine.stacked.prove", lambda *a: calls.append(a[2].shape[1:]) or prove(*a)
    )
    cohort = Cohort([small(k).double() for k in range(2)], C)
    optimizer = make_optimizer(cohort, lr=0.1)
    step = make_step(cohort, MutualLoss(), optimizer, execution="stacked", amp="off")
    for i in range(6):
        cohort.train(i % 2 == 0)
        step(*next(batches(1, 8)))
    assert len(calls) == 2
    step(*next(batches(1, 9)))  # images of another size
    assert len(calls) == 3
    setting(1, eps=0.1)(cohort)
    step(*next(batches(1, 8)))
    step(*next(batches(1, 8)))
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("build", "stacks"),
    [
        (lambda tv, timm: tv.resnet.ResNet(tv.resnet.Bottleneck, [1] * 4, C, True, 8, 8), True),
        (lambda tv, timm: tv.mobilenet_v2(num_classes=C, width_mult=0.1), True),
        (lambda tv, timm: timm.create_model("resnet18", num_classes=C, channels=(8,) * 4), True),
        (lambda tv, timm: timm.create_model("resnet10t", num_classes=C, channels=(8,) * 4), True),
        (lambda tv, timm: tv.squeezenet1_1(num_classes=C), False),  # joins channels
        (lambda tv, timm: tv.shufflenet_v2_x0_5(num_classes=C), False),  # shuffles them
        (lambda tv, timm: tv.densenet.DenseNet(4, (1, 1), 8, num_classes=C), False),
        (lambda tv, timm: timm.create_model("convnext_atto", num_classes=C), False),
        (lambda tv, timm: timm.create_model("vit_tiny_patch16_224", num_classes=C), False),
    ],
)
def test_networks_of_others_are_stacked_exactly_or_refused(build, stacks):
    tv, timm = pytest.importorskip("torchvision.models"), pytest.importorskip("timm")
    states = []
    for execution in ("eager", "stacked"):
        peers = []
        for k in range(2):
            torch.manual_seed(k)
            peers.append(build(tv, timm).double())
        cohort = Cohort(peers, C).train()
        torch.manual_seed(0)
        if not stacks:
            before = [t.data_ptr() for t in (*cohort.parameters(), *cohort.buffers())]
            with pytest.raises(Unstackable):
                train(cohort, "stacked", batches(1, 32, n=4))
            assert before == [t.data_ptr() for t in (*cohort.parameters(), *cohort.buffers())]
            return
        _, _, outputs = train(cohort, execution, batches(2, 32, n=4))
        states.append([*cohort.state_dict().values(), *(o.losses for o in outputs)])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_vectors_and_images_that_all_peers_see():
    """Linear and BatchNorm layers directly on the input, and a layer that is used twice."""

    def build(seed):
        torch.manual_seed(seed)
        shared = nn.Linear(6, 6)
        return nn.Sequential(
            nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(),
            shared, nn.Tanh(), shared, nn.Linear(6, C),
        )  # fmt: skip

    results = []
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(16, 6, generator=generator), torch.randint(C, (16,), generator=generator))
        for _ in range(10)
    ]
    for execution in ("eager", "stacked"):
        cohort = Cohort([build(k) for k in range(3)], C).train()
        train(cohort, execution, data)
        results.append(cohort.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("channels_last", [True, False])
def test_dropout_of_maps_draws_the_masks_of_the_peers(channels_last):
    results = []
    for execution in ("eager", "stacked"):
        torch.manual_seed(0)
        layers = [
            [
                nn.Conv2d(3, 4, 3),
                nn.Dropout(0.5),
                nn.Conv2d(4, 2, 3),
                nn.Flatten(),
                nn.Linear(32, C),
            ]
            for _ in range(2)
        ]
        cohort = Cohort([nn.Sequential(*own) for own in layers], C).double().train()
        data = list(batches(3, 8))
        if channels_last:
            cohort.to(memory_format=torch.channels_last)
        else:
            data = [(x.contiguous(), y) for x, y in data]
        _, _, outputs = train(cohort, execution, data)
        results.append([*cohort.state_dict().values(), *(o.losses for o in outputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_compiled_stacks_take_the_same_steps():
    results = []
    for compile in (False, True):
        cohort = cohort_of("resnet8", dtype=torch.float32)
        train(cohort, "stacked", batches(3, 8, dtype=torch.float32), compile=compile)
        results.append(cohort.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-3, atol=1e-4, msg=key)
