"""What a record says: sentences that its intervals choose."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up import record, row

from fastdml.reproduce.outcome import outcome, single_seeds
from fastdml.reproduce.record import Side
from fastdml.reproduce.statistics import difference
from fastdml.reproduce.tables import difference_text, legend

BASELINE = Side("independent", None, (60.0, 61.0, 59.5))
GAIN = row("up", ours=Side("mutual", None, (62.0, 62.5, 61.5)))
LOSS = row("down", ours=Side("mutual", None, (58.0, 58.5, 57.5)))
OPEN = row("open", ours=Side("mutual", None, (61.0, 60.0, 59.7)))
SAME = row("same", ours=Side("mutual", None, BASELINE.values))
T3 = 4.302652729911275 / 3**0.5  # half of an interval of 3 seeds, in standard deviations
BY_A_HAIR = {"above": 0.999, "around": 1.001}  # half of the interval


def ours(half):
    gaps = (1 - half / T3, 1.0, 1 + half / T3)
    values = tuple(b + g for b, g in zip(BASELINE.values, gaps, strict=True))
    return Side("mutual", None, values)


def test_each_row_is_in_the_sentence_that_its_interval_chooses():
    first, *texts = outcome(record(GAIN, LOSS, OPEN, SAME))
    assert first == "Mutual against independent, 3 seeds."
    gain, loss, undecided, same, seeds = texts
    found = difference(GAIN.baseline.values, GAIN.ours.values)
    assert gain == f"A gain: up (+1.83 points, {found.low:+.2f} to {found.high:+.2f})."
    assert loss.startswith("A loss: down (-2.17 points, ")
    assert undecided.startswith("No difference that 3 seeds can show: open (+0.07 points, -")
    assert same == "The same in every seed: same."
    assert seeds.startswith("Single seeds: ")


@pytest.mark.parametrize(
    ("better", "word"), [("higher", "A gain"), ("lower", "A loss"), ("", "A difference")]
)
def test_more_is_what_the_number_makes_of_it(better, word):
    assert outcome(record(replace(GAIN, better=better)))[1].startswith(f"{word}: up (+1.83")


def test_nats_are_no_points():
    (_, text, _) = outcome(record(replace(GAIN, unit="nats", better="lower")))
    assert text.startswith("A loss: up (+1.8333 nats, ")


def test_one_difference_in_every_seed_has_no_interval():
    shifted = row("shifted", ours=Side("mutual", None, (61.0, 62.0, 60.5)))
    assert outcome(record(shifted))[1] == "One difference in every seed: shifted (+1.00 points)."


def test_one_seed_says_nothing_of_others():
    one = replace(
        GAIN, baseline=Side("independent", None, (60.0,)), ours=Side("mutual", None, (61.0,))
    )
    assert outcome(record(one, seeds=(0,))) == [
        "Mutual against independent, 1 seed.",
        "Of one seed, which says nothing of others: up (+1.00 points).",
    ]


def test_trainings_that_failed_have_no_figure():
    lost = row("lost", ours=Side("mutual", None, (None,) * 3))
    assert outcome(record(lost))[1:] == ["No figure: lost."]


def test_nothing_to_compare_says_nothing():
    assert outcome(record(row(baseline=None))) == []


def test_what_single_seeds_could_have_said():
    noisy = row("noisy", ours=Side("mutual", None, (63.0, 60.5, 59.0)))  # +3, -0.5, -0.5
    assert single_seeds(record(noisy, GAIN)) == [
        "Single seeds: within one row from -0.50 to +3.00 points; 2 of 6 differences have another "
        "sign than the mean of their row."
    ]
    assert single_seeds(record(SAME)) == []


def test_where_rows_compare_other_things_each_says_which():
    other = replace(GAIN, label="b|c", baseline=replace(BASELINE, name="one_way"))
    first, gain, *_ = outcome(record(GAIN, other))
    assert first == "3 seeds."
    assert "up (mutual against independent) (+1.83 points, " in gain
    assert r"b\|c (mutual against one\_way) (+1.83 points, " in gain


def test_a_bound_that_rounds_to_nothing_says_on_which_side_of_it_the_interval_is():
    gain, nothing = (row(label, ours=ours(gaps)) for label, gaps in BY_A_HAIR.items())
    first, second = (outcome(record(one)) for one in (gain, nothing))
    assert first[1] == "A gain: above (+1.00 points, +0.00 to +2.00)."
    assert second[1] == (
        "No difference that 3 seeds can show: around (+1.00 points, -0.00 to +2.00)."
    )


def test_a_difference_says_of_how_many_seeds_it_is_where_one_is_missing():
    baseline = Side("independent", None, (60.0, None, 59.5))
    lost = row(baseline=baseline, ours=Side("mutual", None, (62.0, 62.0, 61.5)))
    said = "One difference in every seed: ResNet-8 x2: peer 1 (+2.00 points, 2 of 3 seeds)."
    assert outcome(record(lost))[1] == said
    assert difference_text(lost) == "+2.00 in every seed, 2 of 3 seeds"
    spread = row(baseline=baseline, ours=Side("mutual", None, (62.0, 62.0, 61.0)))
    assert difference_text(spread) == "+1.75 (-1.43 to +4.93), 2 of 3 seeds"
    assert "-1.43 to +4.93, 2 of 3 seeds)." in outcome(record(spread))[1]


def test_several_intervals_are_no_single_one():
    """Under a table of several stands what that does to a gain."""
    several = [row(f"row {i}", ours=ours(0.5)) for i in range(3)]
    said = "Each of the 3 intervals is judged by itself: where nothing differs, one in twenty"
    assert said in " ".join(legend(record(*several)))
    assert "judged by itself" not in " ".join(legend(record(several[0])))
