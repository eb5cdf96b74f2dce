"""A callback that says whom each peer learns from, epoch by epoch."""

from __future__ import annotations

import pytest
import torch
from runs import crashing, logged, same_weights
from tiny_runs import make_cohort, make_loaders

from fastdml.engine import make_optimizer, make_step
from fastdml.errors import InputError
from fastdml.loss import MutualLoss
from fastdml.train import Callback, fit

pytestmark = pytest.mark.usefixtures("_no_pictures")
WIDTHS = (4, 7, 5)


def ring(epoch: int, K: int = 3) -> torch.Tensor:
    weights = torch.zeros(K, K)
    for k in range(K):
        weights[k, (k + 1 + epoch % (K - 1)) % K] = 1.0
    return weights


class Ring(Callback):
    def __init__(self):
        self.called = []

    def on_epoch_start(self, event):
        assert event.networks == 3
        self.called.append((event.run, event.epoch, event.losses))
        event.set_peer_weights(ring(event.epoch))


class Best(Callback):
    """All learn from the peer of the lowest cross-entropy in the epoch before."""

    def on_epoch_start(self, event):
        if event.losses:
            best = min(range(3), key=event.losses["ce"].__getitem__)
            event.set_peer_weights(torch.eye(3)[best].repeat(3, 1).tolist())


def quiet_cohort():
    cohort = make_cohort(widths=WIDTHS)
    for peer in cohort.peers:
        peer.drop.p = 0.0
    return cohort


def test_each_epoch_has_the_weights_that_were_set_at_its_start(settings):
    plain = {"lr": 0.125, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    cohort, policy = quiet_cohort(), Ring()
    train, test = make_loaders()
    result = fit(cohort, train, test, settings(**plain), callbacks=[policy])
    assert [(run, epoch) for run, epoch, _ in policy.called] == [("mutual", e) for e in range(3)]
    assert policy.called[0][2] is None
    assert policy.called[2][2]["kl"] == result.history[1]["kl"]

    other = quiet_cohort()
    other.to(memory_format=torch.channels_last)
    loss = MutualLoss(peer_weights=ring(0))
    optimizer = make_optimizer(other, "sgd", lr=0.125, momentum=0.0)
    step = make_step(other, loss, optimizer, execution="eager", amp="off")
    for epoch in range(3):
        loss.peer_weights = ring(epoch)
        for batch in train.epoch(epoch):
            step(*batch)
    for a, b in zip(cohort.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("policy", "execution"), [(Ring, "eager"), (Best, "threads")], ids=["ring", "best"]
)
def test_a_run_goes_on_with_them_in_the_middle_of_an_epoch(settings, tmp_path, policy, execution):
    options = {"save_every_steps": 2, "execution": execution}
    whole, again = quiet_cohort(), quiet_cohort()
    unbroken = fit(whole, *make_loaders(), settings(**options), callbacks=[policy()])
    config = settings(**options, folder=str(tmp_path / "broken"))
    for at in (7, 4):  # within the second epoch, and at the end of it
        broken = config.replace(resume=(tmp_path / "broken").exists())
        with crashing(at):
            fit(quiet_cohort(), *make_loaders(), broken, callbacks=[policy()])
    resumed = fit(again, *make_loaders(), config.replace(resume=True), callbacks=[policy()])
    assert same_weights(whole, again)
    assert logged(resumed.folder) == logged(unbroken.folder)


@pytest.mark.parametrize(
    "weights",
    [torch.ones(2, 2), -torch.ones(3, 3), torch.full((3, 3), float("nan")), [[0, 1], [1]], None],
    ids=str,
)
def test_others_are_refused(settings, weights):
    class Wrong(Callback):
        def on_epoch_start(self, event):
            event.set_peer_weights(weights)

    with pytest.raises(InputError, match=r"peer weights.*: give a matrix \(3, 3\) of numbers"):
        fit(quiet_cohort(), *make_loaders(), settings(), callbacks=[Wrong()])


def test_the_start_of_an_epoch_stops_nothing(settings):
    class Stops(Callback):
        def on_epoch_start(self, event):
            return "enough"

    with pytest.raises(InputError, match=r"on_epoch_start returned 'enough': return nothing"):
        fit(quiet_cohort(), *make_loaders(), settings(), callbacks=[Stops()])


def test_an_object_of_before_lacks_the_method(settings):
    class Older:
        def on_epoch(self, event):
            return None

        on_evaluation = on_end = on_epoch

    fit(quiet_cohort(), *make_loaders(), settings(epochs=1), callbacks=[Older()])
