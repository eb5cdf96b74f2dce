"""The training step against loops written by hand, in both update modes and every precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import MovingAverageMinMaxObserver
from torch.nn.utils import parametrizations

from fastdml.cohort import Cohort
from fastdml.engine import Amp, Schedule, make_optimizer, make_step
from fastdml.engine.amp import LossScale
from fastdml.errors import InputError
from fastdml.loss import MutualLoss

C = 5
CPU = torch.device("cpu")
RATE = 0.125  # exact in float32, as the learning rate is stored


def linear_peer(seed: int, width: int = 0) -> nn.Module:
    """Linear, or with a hidden layer of `width`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if width == 0:
            return nn.Linear(6, C)
        return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, C))


def norm_peer(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, C))


def batches(steps: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(dtype)
        yield x, torch.randint(C, (16,), generator=generator)


def step_for(peers, *, momentum=0.9, weight_decay=1e-3, **options):
    cohort = Cohort(peers, C)
    optimizer = make_optimizer(cohort, lr=RATE, momentum=momentum, weight_decay=weight_decay)
    return make_step(
        cohort, MutualLoss(), optimizer, **{"amp": "off", "execution": "eager", **options}
    )


def loss_by_hand(k: int, logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """CE plus the mean KL from the other peers, as section 3 of the paper has it."""
    loss = F.cross_entropy(logits[k], labels)
    for teacher, z in enumerate(logits):
        if teacher != k:
            kl = F.kl_div(logits[k].log_softmax(1), z.detach().softmax(1), reduction="batchmean")
            loss = loss + kl / (len(logits) - 1)
    return loss


def train_by_hand(peers, steps, update, dtype):
    """One SGD optimizer and one backward a peer; every prediction recomputed for each peer."""
    optimizers = [
        torch.optim.SGD(p.parameters(), RATE, 0.9, nesterov=True, weight_decay=1e-3) for p in peers
    ]
    for x, y in batches(steps, dtype):
        logits = [p(x) for p in peers]
        for k, optimizer in enumerate(optimizers):
            if update == "sequential":
                logits = [p(x) for p in peers]
            optimizer.zero_grad()
            loss_by_hand(k, logits, y).backward()
            if update == "sequential":
                optimizer.step()
        if update == "simultaneous":
            for optimizer in optimizers:
                optimizer.step()


@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_three_steps_equal_the_loop_by_hand(update, K, dtype):
    ours = [linear_peer(k, width=3 * k).to(dtype) for k in range(K)]
    theirs = [copy.deepcopy(p).double() for p in ours]
    step = step_for(ours, update=update)
    for x, y in batches(3, dtype):
        step(x, y)
    train_by_hand(theirs, 3, update, torch.float64)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5  # the loss computes in float32 at least
    for mine, other in zip(ours, theirs, strict=True):
        for w, v in zip(mine.parameters(), other.parameters(), strict=True):
            assert w.dtype == dtype
            torch.testing.assert_close(w.double(), v, rtol=tolerance, atol=tolerance)


def test_sequential_and_simultaneous_differ():
    results = []
    for update in ("simultaneous", "sequential"):
        peers = [linear_peer(0), linear_peer(1)]
        step = step_for(peers, update=update)
        step(*next(batches(1)))
        results.append(peers)
    assert torch.equal(results[0][0].weight, results[1][0].weight)  # the first to be updated
    assert not torch.allclose(results[0][1].weight, results[1][1].weight, atol=1e-6)


def test_sequential_recomputes_in_training_mode_and_records_statistics_once():
    ours = [norm_peer(k) for k in range(3)]
    theirs = [copy.deepcopy(p) for p in ours]
    starts = [copy.deepcopy(p) for p in ours]
    step = step_for(ours, update="sequential")
    for x, y in batches(3):
        step(x, y)
    train_by_hand(theirs, 3, "sequential", torch.float32)
    for mine, other in zip(ours, theirs, strict=True):
        for w, v in zip(mine.parameters(), other.parameters(), strict=True):
            # equal only if the recomputed predictions used the batch's own statistics
            torch.testing.assert_close(w, v, rtol=1e-4, atol=1e-5)
        assert mine[1].num_batches_tracked == 3
        assert mine[1].track_running_stats

    fresh = [copy.deepcopy(p) for p in starts]
    step = step_for(fresh, update="sequential")
    x, y = next(batches(1))
    step(x, y)
    for mine, start in zip(fresh, starts, strict=True):
        start(x)  # one pass with the weights from before the update
        torch.testing.assert_close(mine[1].running_mean, start[1].running_mean)
        torch.testing.assert_close(mine[1].running_var, start[1].running_var)


class OwnNorm(nn.BatchNorm1d):
    """Records its statistics by itself, whatever track_running_stats says."""

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(x.mean(0), 0.5)
                self.num_batches_tracked += 1
        return x - self.running_mean


class Replacing(nn.Module):
    """Puts a new tensor into the place of its buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x):
        self.centre = 0.5 * self.centre + 0.5 * x.detach().mean(0)
        return x - self.centre


class Sequence(nn.Module):
    """InstanceNorm over 2 groups of 4 features."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True)

    def forward(self, x):
        return self.norm(x.view(-1, 2, 4)).flatten(1)


RECORDERS = {
    "batch norm": lambda: nn.BatchNorm1d(8),
    "batch norm of one's own": lambda: OwnNorm(8),
    "instance norm": Sequence,
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "spectral norm by hooks": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "quantiser's observer": MovingAverageMinMaxObserver,
    "replaced buffer": Replacing,
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("recorder", RECORDERS)
def test_sequential_leaves_buffers_as_one_pass_does(recorder):
    """What is recomputed for the next peer is seen by that peer alone."""
    torch.manual_seed(0)
    peers = [
        nn.Sequential(nn.Linear(6, 8), RECORDERS[recorder](), nn.Linear(8, C)) for _ in range(3)
    ]
    starts = [copy.deepcopy(p) for p in peers]
    step = step_for(peers, update="sequential")
    x, y = next(batches(1))
    step(x, y)
    for peer, start in zip(peers, starts, strict=True):
        start(x)
        for (name, found), expected in zip(peer.named_buffers(), start.buffers(), strict=True):
            assert torch.equal(found, expected), name
        assert not torch.equal(peer[0].weight, start[0].weight)
    assert all(m.track_running_stats for p in peers for m in p if hasattr(m, "track_running_stats"))


def test_sequential_steps_see_the_gradients_of_one_peer():
    peers = [linear_peer(0), linear_peer(1, width=4)]
    cohort = Cohort(peers, C)
    optimizer = make_optimizer(cohort, lr=RATE, weight_decay=0.1)
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([p[0].weight.grad is not None if k else p.weight.grad is not None
                                for k, p in enumerate(peers)])
    )  # fmt: skip
    step = make_step(
        cohort, MutualLoss(), optimizer, amp="off", update="sequential", execution="eager"
    )
    step(*next(batches(1)))
    assert seen == [[True, False], [False, True]]
    assert all(w.grad is None for w in cohort.parameters())


@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
def test_statistics_belong_to_their_peers(update):
    peers = [linear_peer(0), linear_peer(1, width=9), linear_peer(2, width=4)]
    with torch.no_grad():
        peers[1][2].weight.mul_(20)  # a peer that is confidently wrong: the largest loss by far
    before = [copy.deepcopy(p) for p in peers]
    step = step_for(peers, update=update, momentum=0.0)
    x, y = next(batches(1))
    output = step(x, y)
    for k in range(3):
        # peer k met the peers before it as they are now, if one is updated after the other
        models = [*peers[:k], *before[k:]] if update == "sequential" else before
        logits = [m(x) for m in models]
        torch.testing.assert_close(output.losses[k], loss_by_hand(k, logits, y).detach())
        torch.testing.assert_close(output.stats.ce[k], F.cross_entropy(logits[k], y).detach())
        assert output.stats.correct[k] == (logits[k].argmax(1) == y).sum()
        for teacher, z in enumerate(logits):
            kl = F.kl_div(logits[k].log_softmax(1), z.softmax(1), reduction="batchmean").detach()
            found = output.stats.pairwise_kl[teacher, k]
            torch.testing.assert_close(found, kl, atol=1e-6, rtol=1e-4)
    mean = sum(m(x).softmax(1) for m in before)
    assert output.stats.ensemble_correct == (mean.argmax(1) == y).sum()
    assert output.stats.ce.argmax() == 1


def test_frozen_peer_teaches_and_stays():
    peers = [linear_peer(0), linear_peer(1)]
    peers[0].requires_grad_(False)
    frozen, other = peers[0].weight.clone(), peers[1].weight.clone()
    for update in ("simultaneous", "sequential"):
        step_for(peers, update=update)(*next(batches(1)))
        assert torch.equal(peers[0].weight, frozen)
        assert not torch.equal(peers[1].weight, other)


def test_gradients_are_clipped_a_peer_at_a_time():
    peers = [linear_peer(0), linear_peer(1)]
    before = [copy.deepcopy(p) for p in peers]
    with torch.no_grad():
        peers[1].weight.mul_(30)
        before[1].weight.mul_(30)
    step = step_for(peers, momentum=0.0, weight_decay=0.0, grad_clip=1e-3)
    step(*next(batches(1)))
    for p, q in zip(peers, before, strict=True):
        moved = torch.cat(
            [(a - b).flatten() for a, b in zip(p.parameters(), q.parameters(), strict=True)]
        )
        assert moved.norm().item() == pytest.approx(RATE * 1e-3, rel=0.05)


@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_follows_float32(amp, update):
    results = {}
    for precision in ("off", amp):
        peers = [linear_peer(0, width=16), linear_peer(1, width=16)]
        step = step_for(peers, amp=precision, update=update)
        for x, y in batches(5):
            output = step(x, y)
            assert output.losses.dtype == torch.float32
        assert all(w.dtype == torch.float32 for p in peers for w in p.parameters())
        results[precision] = torch.cat([w.flatten() for p in peers for w in p.parameters()])
    assert not torch.equal(results[amp], results["off"])
    error = (results[amp] - results["off"]).norm() / results["off"].norm()
    assert error < (2e-2 if amp == "bf16" else 3e-3)


class TestOverflow:
    """fp16 with a scale so large that the first gradients overflow, as they do in practice."""

    def build(self, update: str, fused: bool):
        peers = [linear_peer(0), linear_peer(1, width=4)]
        cohort = Cohort(peers, C)
        scaler = LossScale(torch.device("cpu"), init=2.0**127)
        amp = Amp(torch.device("cpu"), torch.float16, scaler)
        if fused:
            optimizer = make_optimizer(cohort, lr=RATE)
        else:
            optimizer = torch.optim.SGD(cohort.parameters(), RATE, 0.9, foreach=True)
        step = make_step(cohort, MutualLoss(), optimizer, amp=amp, update=update, execution="eager")
        return cohort, scaler, optimizer, step

    @pytest.mark.parametrize("update", ["simultaneous", "sequential"])
    @pytest.mark.parametrize("fused", [True, False])
    def test_a_skipped_step_changes_nothing_but_the_scale(self, update, fused):
        cohort, scaler, optimizer, step = self.build(update, fused)
        schedule = Schedule(optimizer, torch.tensor([0.5, 0.25, 0.125]))
        before = copy.deepcopy(cohort.state_dict())
        x, y = next(batches(1))
        step(x * 1000, y)
        schedule.advance(step.update.skipped)
        assert step.update.skipped == 1
        assert schedule.updates == 0
        assert schedule.lr == 0.5
        for key, value in cohort.state_dict().items():
            assert torch.equal(value, before[key])
        assert scaler.scale < 2.0**127

    @pytest.mark.parametrize("fused", [True, False])
    def test_training_goes_on_when_the_scale_has_come_down(self, fused):
        cohort, _, optimizer, step = self.build("simultaneous", fused)
        schedule = Schedule(optimizer, torch.full((300,), 0.01))
        skipped = 0
        for x, y in batches(200):
            step(x, y)
            schedule.advance(step.update.skipped)
            skipped += int(step.update.skipped)
            if not step.update.skipped:
                break
        assert 0 < skipped < 199
        assert schedule.updates == 1
        for state in optimizer.state.values():
            # what the fused kernel makes itself on a first step that overflows is uninitialised
            assert state["momentum_buffer"].isfinite().all()
        assert all(w.isfinite().all() for w in cohort.parameters())

    @pytest.mark.parametrize("update", ["simultaneous", "sequential"])
    @pytest.mark.parametrize("kind", ["sgd", "adam", "adamw", "unfused"])
    def test_an_overflowing_peer_skips_its_own_update_alone(self, update, kind):
        """The other takes the very steps that it takes without an overflow beside it."""
        results = []
        for overflows in (False, True):
            peers = [linear_peer(0), linear_peer(1), linear_peer(2)]
            cohort = Cohort(peers, C)
            amp = Amp(CPU, torch.float16, LossScale(CPU, init=8.0))
            amp.scaler.BACKOFF = 1.0  # so that both go on with the same scale
            if kind == "unfused":
                weights = [{"params": list(p.parameters())} for p in peers]
                optimizer = torch.optim.SGD(weights, RATE, 0.9, foreach=True)
            else:
                optimizer = make_optimizer(cohort, kind, lr=0.01)
            loss = MutualLoss(kl_weight=0.0)
            step = make_step(cohort, loss, optimizer, amp=amp, update=update, execution="eager")
            count = iter(range(99))
            if overflows:
                spoil = (0, 2)
                peers[1].weight.register_hook(
                    lambda g, count=count, spoil=spoil: g * torch.inf if next(count) in spoil else g
                )
            before, seen = copy.deepcopy(peers[1].state_dict()), []
            for i, (x, y) in enumerate(batches(4)):
                step(x, y)
                seen.append(step.update.overflow.tolist())
                assert step.update.skipped == 0
                if overflows and i == 0:
                    for key, value in peers[1].state_dict().items():
                        assert torch.equal(value, before[key])
                    state = optimizer.state[peers[1].weight]
                    assert all((v == 0).all() for v in state.values())
            results.append(peers)
            middle = [1.0, 0.0, 1.0, 0.0] if overflows else [0.0] * 4
            assert seen == [[0.0, m, 0.0] for m in middle]
        for k in (0, 2):
            assert torch.equal(results[0][k].weight, results[1][k].weight)
        assert not torch.equal(results[0][1].weight, results[1][1].weight)

    def test_a_copied_update_asks_for_no_generator(self, monkeypatch):
        """Inside a capture that would be an error."""
        cohort, _, _, step = self.build("simultaneous", fused=False)

        def refuse(*_):
            raise RuntimeError("the state of a generator during a step")

        monkeypatch.setattr(torch, "get_rng_state", refuse)
        monkeypatch.setattr(torch.cuda, "get_rng_state", refuse)
        before = copy.deepcopy(cohort.state_dict())
        step(*next(batches(1)))
        assert all(torch.equal(v, before[k]) for k, v in cohort.state_dict().items())

    def test_any_overflow_brings_the_scale_down_once(self):
        for update in ("simultaneous", "sequential"):
            peers = [linear_peer(0), linear_peer(1)]
            for p in peers:
                p.weight.register_hook(lambda g: g * torch.inf)
            cohort = Cohort(peers, C)
            amp = Amp(CPU, torch.float16, LossScale(CPU, init=8.0))
            step = make_step(cohort, MutualLoss(), make_optimizer(cohort, lr=RATE), amp=amp,
                             update=update, execution="eager")  # fmt: skip
            step(*next(batches(1)))
            assert step.update.skipped == 1
            assert amp.scaler.scale == 4.0

    def test_gradients_below_fp16_are_scaled_before_they_are_rounded(self):
        peers = [linear_peer(0), linear_peer(1)]
        cohort = Cohort(peers, C)
        optimizer = make_optimizer(cohort, lr=RATE, momentum=0.0)
        loss = MutualLoss(ce_weight=1e-8, kl_weight=0.0)  # gradients of about 1e-10, fp16 has 6e-8
        step = make_step(cohort, loss, optimizer, amp="fp16", execution="eager")
        seen = []
        optimizer.register_step_pre_hook(lambda *_: seen.append(peers[0].bias.grad.clone()))
        x, y = next(batches(1))
        expected = (peers[0](x).softmax(1) - F.one_hot(y, C)).mean(0) * 1e-8
        step(x, y)
        torch.testing.assert_close(seen[0], expected.detach(), rtol=0.05, atol=1e-11)


@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
def test_a_second_list_of_groups_is_narrowed_with_the_first(update):
    """Apex's FusedAdam walks its groups beside a list of their master weights."""

    class Paired(torch.optim.SGD):
        def step(self):
            for group, master in zip(self.param_groups, self.param_groups_master, strict=True):
                assert len(group["params"]) == len(master["params"])
                seen.extend(id(w) for w in group["params"] if w.grad is not None)

    seen = []
    cohort = Cohort([linear_peer(0), linear_peer(1, width=4)], C)
    optimizer = Paired([{"params": list(p.parameters())} for p in cohort.peers], RATE)
    masters = [{"params": [None] * len(group["params"])} for group in optimizer.param_groups]
    optimizer.param_groups_master = masters
    step = make_step(cohort, MutualLoss(), optimizer, amp="off", update=update, execution="eager")
    step(*next(batches(1)))
    assert seen == [id(w) for w in cohort.parameters()]
    assert optimizer.param_groups_master is masters


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
def test_the_step_never_asks_for_a_value(monkeypatch, update, amp):
    """The methods by which Python gets at a tensor's value all fail during the steps."""
    watched = [False]

    def refuse_while_watched(name):
        original = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            assert not watched[0], f"Tensor.{name} during a step"
            return original(self, *args, **kwargs)

        return method

    class Loss(MutualLoss):
        def value_and_grad(self, logits, labels):
            # On a CPU it looks at the labels, which are at hand there; the GPU test watches CUDA.
            watched[0] = False
            found = super().value_and_grad(logits, labels)
            watched[0] = True
            return found

    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse_while_watched(name))
    cohort = Cohort([norm_peer(0), norm_peer(1)], C)
    optimizer = make_optimizer(cohort, lr=RATE)
    schedule = Schedule(optimizer, torch.full((9,), RATE))
    step = make_step(
        cohort, Loss(), optimizer, amp=amp, update=update, grad_clip=1.0, execution="eager"
    )
    data = list(batches(3))
    watched[0] = True
    for x, y in data:
        step(x, y)
        schedule.advance(step.update.skipped)
    watched[0] = False
    assert schedule.updates == 3


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
def test_no_synchronisation_on_cuda(amp, update):
    cohort = Cohort([norm_peer(0), norm_peer(1)], C).cuda()
    optimizer = make_optimizer(cohort, lr=RATE)
    schedule = Schedule(optimizer, torch.full((9,), RATE))
    step = make_step(cohort, MutualLoss(), optimizer, amp=amp, update=update, grad_clip=1.0)
    data = [(x.cuda(), y.cuda()) for x, y in batches(4)]
    step(*data[0])  # the first step may allocate and compile
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in data[1:]:
            step(x, y)
            schedule.advance(step.update.skipped)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cat([w.flatten() for w in cohort.parameters()]).isfinite().all()


@pytest.mark.slow
def test_compiled_peers_take_the_same_steps():
    results = []
    for compile in (False, True):
        peers = [norm_peer(0), norm_peer(1)]
        step = step_for(peers, compile=compile, update="sequential")
        for x, y in batches(3):
            step(x, y)
        results.append(
            torch.cat([v.flatten().double() for p in peers for v in p.state_dict().values()])
        )
        assert not any(key.startswith("_orig_mod") for p in peers for key in p.state_dict())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"execution": "warp"}, "execution 'warp' does not exist"),
        ({"update": "both"}, "update must be simultaneous or sequential, not 'both'"),
        ({"amp": "half"}, "amp must be one of auto, off, bf16, fp16, not 'half'"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        step_for([linear_peer(0)], **options)


def _use(device=None, dtype=torch.float32):
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)


@pytest.fixture
def other_defaults():
    """Sets torch's default device and dtype for a test alone."""
    yield _use
    _use()


@pytest.mark.parametrize("defaults", [{"device": "meta"}, {"dtype": torch.float64}])
@pytest.mark.parametrize(
    "options",
    [
        {"execution": "stacked", "amp": "off"},
        {"execution": "stacked", "amp": "fp16"},
        {"execution": "threads", "amp": "off"},
        {"execution": "auto", "amp": "off"},
        {"execution": "eager", "amp": "fp16"},
        {"execution": "eager", "amp": "fp16", "update": "sequential"},
        {"execution": "eager", "amp": "off", "accumulate": 2},
    ],
)
def test_torchs_defaults_for_new_tensors_change_nothing(other_defaults, options, defaults):
    torch.manual_seed(0)
    results = []
    first = [
        nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)) for _ in "ab"
    ]
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 4, 2])
    for given in ({}, defaults):
        other_defaults()
        cohort = Cohort(copy.deepcopy(first), 5)
        optimizer = make_optimizer(cohort, "sgd", lr=0.1)
        other_defaults(**given)
        step = make_step(cohort, MutualLoss(), optimizer, **options)
        losses = [step(images, labels).losses for _ in range(3)]
        results.append([*losses, *(w.detach() for w in cohort.parameters())])
    for a, b in zip(*results, strict=True):
        assert (b.device, b.dtype) == (a.device, a.dtype)
        torch.testing.assert_close(b, a)


class OfParts(nn.Module):
    """Takes its images in a container, as a tokenizer's batch is one."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 5)

    def forward(self, parts):
        first, second = parts.values() if isinstance(parts, dict) else parts
        return self.head(first + second)


@pytest.mark.parametrize(
    "options",
    [
        {"execution": "eager"},
        {"execution": "eager", "update": "sequential"},
        {"execution": "threads"},
        {"execution": "auto"},
        {"execution": "auto", "threads": 1},
    ],
)
@pytest.mark.parametrize(
    "container", [list, tuple, lambda pair: dict(zip("ab", pair, strict=True))]
)
def test_images_in_a_container_go_to_the_peers_as_they_are(options, container):
    torch.manual_seed(0)
    cohort = Cohort([OfParts(), OfParts()], 5)
    pair, labels = torch.randn(2, 6, 4), torch.tensor([0, 1, 4, 2, 3, 3])
    losses = MutualLoss()([peer(tuple(pair)) for peer in cohort.peers], labels)
    expected = torch.autograd.grad(losses.sum(), [peer.head.weight for peer in cohort.peers])
    if options.get("update") == "sequential":
        expected = expected[:1]
    before = [peer.head.weight.detach().clone() for peer in cohort.peers]
    optimizer = make_optimizer(cohort, "sgd", lr=1.0, momentum=0.0, weight_decay=0.0)
    make_step(cohort, MutualLoss(), optimizer, amp="off", **options)(container([*pair]), labels)
    for peer, was, grad in zip(cohort.peers, before, expected, strict=False):
        torch.testing.assert_close(was - peer.head.weight, grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"execution": "stacked"}, "does not know images of type list"),
        ({"execution": "eager", "accumulate": 2}, "splits images that are one tensor, not list"),
    ],
)
def test_images_in_a_container_are_one_line_where_a_tensor_is_needed(options, message):
    cohort = Cohort([OfParts(), OfParts()], 5)
    step = make_step(
        cohort, MutualLoss(), make_optimizer(cohort, "sgd", lr=0.1), amp="off", **options
    )
    with pytest.raises(InputError, match=message):
        step([torch.randn(4, 4), torch.randn(4, 4)], torch.tensor([0, 1, 4, 2]))
