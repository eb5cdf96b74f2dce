"""The optimizer over all peers, and the learning rates that it takes from the device."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdml.cohort import Cohort
from fastdml.engine import Schedule, apex, learning_rates, make_optimizer
from fastdml.errors import InputError


@pytest.fixture
def cohort():
    return Cohort([nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))], 2)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_group_a_peer_and_one_learning_rate(cohort, name):
    optimizer = make_optimizer(cohort, name, lr=0.5, weight_decay=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
    Schedule(optimizer, torch.tensor([0.25]))
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert first is second
    assert first == 0.25
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_updates_equal_torchs_plain_ones(cohort, name):
    """Against the same optimizer, not fused, with a float for its learning rate."""
    twins = [nn.Parameter(w.detach().clone().double()) for w in cohort.parameters()]
    optimizer = make_optimizer(cohort, name, lr=0.125, momentum=0.5, weight_decay=0.25)
    if name == "sgd":
        plain = torch.optim.SGD(twins, 0.125, 0.5, weight_decay=0.25, nesterov=True)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
        plain = kind(twins, 0.125, (0.5, 0.999), weight_decay=0.25)
    for _ in range(3):
        for w, v in zip(cohort.parameters(), twins, strict=True):
            w.grad = torch.randn_like(w)
            v.grad = w.grad.double()
        optimizer.step()
        plain.step()
    for w, v in zip(cohort.parameters(), twins, strict=True):
        torch.testing.assert_close(w.double(), v.detach(), rtol=1e-5, atol=1e-5)


def test_frozen_parameters_are_left_out(cohort):
    cohort.peers[1].requires_grad_(False)
    optimizer = make_optimizer(cohort, lr=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0]
    cohort.requires_grad_(False)
    with pytest.raises(InputError, match="no peer has a parameter to train"):
        make_optimizer(cohort, lr=0.1)


def test_unknown_optimizer(cohort):
    known = "sgd, adam, adamw, apex_sgd, apex_adam, apex_lamb"
    with pytest.raises(InputError, match=f"{known}, not 'lion'"):
        make_optimizer(cohort, "lion", lr=0.1)


KINDS = ("FusedSGD", "FusedAdam", "FusedLAMB")
FUSED = """
import torch
class Kind(torch.optim.SGD):
    def __init__(self, groups, **settings):
        self.settings = settings
        super().__init__(groups, settings["lr"])
""" + "\n".join(f"class {kind}(Kind): pass" for kind in KINDS)  # fmt: skip
NVIDIA = {"apex/multi_tensor_apply/__init__.py": "", "apex/optimizers/__init__.py": FUSED}
PYPI = {"apex/__init__.py": "from a_web_framework import Configurator", "apex/forms.py": ""}


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Puts packages in front of all others: {path: text}; none of apex's where none is given."""
    real = importlib.util.find_spec

    def install(files):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        for name in [m for m in sys.modules if m.split(".")[0] in ("apex", "amp_C")]:
            monkeypatch.delitem(sys.modules, name)
        if not files:
            monkeypatch.setattr(
                importlib.util, "find_spec", lambda n, *a: None if n == "apex" else real(n, *a)
            )

    yield install
    for name in [m for m in sys.modules if m.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {},
            "optimizer 'apex_sgd' needs NVIDIA Apex: build it from https://github.com/NVIDIA/apex",
        ),
        (PYPI, "apex\\) is not NVIDIA's but PyPI's of the same name; uninstall it and build"),
        (NVIDIA, "Apex is installed without working CUDA extensions .*No module named 'amp_C'"),
        (
            {**NVIDIA, "amp_C.py": "raise ImportError('undefined symbol\\nand more')"},
            "without working CUDA extensions .undefined symbol.: build it",
        ),
        ({**NVIDIA, "amp_C.py": ""}, "needs a CUDA device"),
    ],
)
def test_apex_that_is_not_there_is_one_clear_line(install, cohort, files, message):
    install(files)
    with pytest.raises(InputError, match=message) as caught:
        make_optimizer(cohort, "apex_sgd", lr=0.1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["apex_sgd", "apex_adam", "apex_lamb"])
def test_apex_optimizers_get_a_group_a_peer_and_the_settings(install, cohort, name):
    cohort.peers[0].requires_grad_(False)
    install({**NVIDIA, "amp_C.py": ""})
    groups = [{"params": list(cohort.peers[1].parameters())}]
    optimizer = apex.make_apex_optimizer(
        name, groups, lr=0.5, momentum=0.75, nesterov=True, weight_decay=0.25,
        device=torch.device("cuda"),
    )  # fmt: skip
    assert type(optimizer).__name__ == apex.NAMES[name]
    assert (optimizer.settings["lr"], optimizer.settings["weight_decay"]) == (0.5, 0.25)
    expected = {
        "apex_sgd": {"momentum": 0.75, "nesterov": True},
        "apex_adam": {"betas": (0.75, 0.999), "capturable": True},
        "apex_lamb": {"betas": (0.75, 0.999)},
    }
    assert expected[name].items() <= optimizer.settings.items()
    assert len(optimizer.param_groups) == 1


def test_a_rate_that_has_to_be_a_number_follows_the_same_table(cohort):
    kind = type("FusedSGD", (torch.optim.SGD,), {"__module__": "apex.optimizers.fused_sgd"})
    optimizer = kind(cohort.parameters(), 0.5)
    schedule = Schedule(optimizer, torch.tensor([4.0, 2.0, 1.0]))
    seen = []
    for _ in range(5):
        seen.append(optimizer.param_groups[0]["lr"])
        schedule.advance(torch.tensor(1.0))  # what a device skipped the host does not know
    assert seen == [4.0, 2.0, 1.0, 1.0, 1.0]
    assert all(type(rate) is float for rate in seen)
    schedule.load(torch.tensor(1))
    assert optimizer.param_groups[0]["lr"] == 2.0


def test_the_papers_schedule():
    rates = learning_rates(lr=0.1, epochs=200, steps=781)
    assert rates.shape == (200 * 781,)
    for epoch, lr in [(0, 0.1), (59, 0.1), (60, 0.01), (119, 0.01), (120, 1e-3), (180, 1e-4)]:
        at = rates[epoch * 781 : (epoch + 1) * 781]
        torch.testing.assert_close(at, torch.full((781,), lr))


@settings(deadline=None)
@given(
    epochs=st.integers(1, 30),
    steps=st.integers(1, 40),
    warmup=st.floats(0, 1),
    schedule=st.sampled_from(["step", "cosine"]),
)
def test_rates_rise_in_the_warm_up_and_never_afterwards(epochs, steps, warmup, schedule):
    rates = learning_rates(
        lr=0.5,
        epochs=epochs,
        steps=steps,
        schedule=schedule,
        drop_every=7,
        warmup_epochs=warmup * epochs,
    )
    assert rates.shape == (epochs * steps,)
    assert ((rates > 0) | (schedule == "cosine")).all()
    assert (rates <= 0.5 + 1e-7).all()
    count = min(round(warmup * epochs * steps), epochs * steps)
    assert (rates[count:].diff() <= 1e-8).all()
    if count and schedule == "cosine":
        torch.testing.assert_close(rates[0].item(), 0.5 / count, rtol=1e-5, atol=0.0)
        assert (rates[:count].diff() > 0).all()
    if schedule == "cosine" and count < len(rates):
        half = rates[(count + len(rates)) // 2].item()
        place = ((count + len(rates)) // 2 - count) / (len(rates) - count)
        assert half == pytest.approx(0.25 * (1 + math.cos(math.pi * place)), abs=1e-6)


def test_the_schedule_moves_by_updates_and_ends_at_the_last_rate(cohort):
    optimizer = make_optimizer(cohort, lr=0.1)
    schedule = Schedule(optimizer, torch.tensor([4.0, 2.0, 1.0]))
    seen = []
    for skipped in (None, torch.tensor(1.0), torch.tensor(0.0), None, None):
        seen.append(optimizer.param_groups[0]["lr"].item())
        schedule.advance(skipped)
    assert seen == [4.0, 2.0, 2.0, 1.0, 1.0]
    assert schedule.updates == 4


def test_the_schedule_survives_the_optimizers_own_loading(cohort):
    """load_state_dict puts copies of the learning rate into the groups."""
    optimizer = make_optimizer(cohort, lr=0.1)
    schedule = Schedule(optimizer, torch.tensor([4.0, 2.0, 1.0]))
    saved = optimizer.state_dict()
    schedule.advance()
    updates = schedule.updates.clone()
    optimizer.load_state_dict(saved)
    schedule.load(updates)
    assert all(group["lr"] is schedule.lr for group in optimizer.param_groups)
    assert schedule.lr == 2.0
    schedule.advance()
    assert optimizer.param_groups[1]["lr"] == 1.0
