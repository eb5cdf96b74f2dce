"""A number of the loss that follows a schedule: its values against formulas, in place, resumed."""

from __future__ import annotations

import math

import pytest
import torch

from fastdml import MutualLoss, ScalarSchedule, mutual_loss
from fastdml.errors import InputError


def walk(scheduled: ScalarSchedule, steps: int) -> list[float]:
    values = []
    for _ in range(steps):
        values.append(float(scheduled.value))
        scheduled.advance()
    return values


def test_linear_and_cosine_reach_both_ends_and_stay():
    for kind in ("linear", "cosine"):
        found = walk(ScalarSchedule(4.0, 1.0, steps=7, kind=kind), 9)
        assert [found[0], found[3], *found[6:]] == [4.0, 2.5, 1.0, 1.0, 1.0]
    assert found[1] == pytest.approx(1 + 3 * (1 + math.cos(math.pi / 6)) / 2)
    assert walk(ScalarSchedule(0.0, 1.0, steps=5), 5) == [0, 0.25, 0.5, 0.75, 1]


def test_warm_up_comes_first():
    found = walk(ScalarSchedule(2.0, 0.0, steps=8, warmup=4), 8)
    assert found == pytest.approx([0.5, 1, 1.5, 2, 2, 4 / 3, 2 / 3, 0])
    constant = ScalarSchedule(4.0, steps=6, kind="constant", warmup=3, warmup_from=1.0)
    assert walk(constant, 7) == [2, 3, 4, 4, 4, 4, 4]
    assert walk(ScalarSchedule(0.5, steps=1, kind="constant"), 3) == [0.5, 0.5, 0.5]


def test_the_tensor_stays_the_same_object_and_the_loss_takes_it():
    scheduled = ScalarSchedule(0.0, 1.0, steps=4)
    loss = MutualLoss(kl_weight=scheduled.value)
    logits = [torch.randn(8, 5) for _ in range(2)]
    labels = torch.arange(8) % 5
    memory = scheduled.value.data_ptr()
    for weight in (0.0, 1 / 3, 2 / 3, 1.0):
        expected = mutual_loss(logits, labels, kl_weight=weight)
        torch.testing.assert_close(loss(logits, labels), expected)
        scheduled.advance()
        assert loss.kl_weight is scheduled.value
        assert scheduled.value.data_ptr() == memory
        assert scheduled.last() == pytest.approx(weight)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_code_follows_without_compiling_anew():
    torch._dynamo.reset()
    temperature = ScalarSchedule(4.0, 2.0, steps=3)
    loss = MutualLoss(temperature=temperature.value)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logits, labels = [torch.randn(8, 5) for _ in range(2)], torch.arange(8) % 5
    for value in (4.0, 3.0, 2.0):
        expected = mutual_loss(logits, labels, temperature=value)
        torch.testing.assert_close(compiled(logits, labels), expected)
        temperature.advance()


def test_a_skipped_step_does_not_count():
    scheduled = ScalarSchedule(0.0, 1.0, steps=5)
    for skipped in (0, 1, 1, 0):
        scheduled.advance(torch.tensor(float(skipped)))
    assert scheduled.value == 0.5


def test_it_goes_on_where_it_was():
    scheduled, again = (ScalarSchedule(0.0, 1.0, steps=5) for _ in range(2))
    walk(scheduled, 3)
    again.load_state_dict(scheduled.state_dict())
    assert walk(again, 4) == walk(scheduled, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"end": 1.0, "kind": "square"}, "kind 'square': give one of constant, linear, cosine"),
        ({"kind": "linear"}, "of kind linear needs an end"),
        ({"end": 1.0, "kind": "constant"}, "of kind constant takes no end"),
        ({"end": 1.0, "steps": 0}, "0 steps with a warm-up of 0"),
        ({"end": 1.0, "warmup": 6}, "5 steps with a warm-up of 6"),
        ({"end": math.inf}, "give finite numbers"),
    ],
)
def test_mistakes_are_one_line(given, message):
    with pytest.raises(InputError, match=message):
        ScalarSchedule(0.0, **{"steps": 5, **given})
