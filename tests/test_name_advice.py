"""Names as people write them, and what they are told."""

from __future__ import annotations

import dataclasses

from fastdml.names import OTHER_NAMES, advice
from fastdml.train import ReidConfig

KNOWN = [field.name for field in dataclasses.fields(ReidConfig)]


def test_every_other_name_leads_to_a_setting():
    for other, own in OTHER_NAMES.items():
        assert other not in KNOWN
        assert own in KNOWN
        for name in (other, other.replace("_", "-"), other.upper()):
            assert advice(name, KNOWN) == f"did you mean {own}?"
        option = f"--{own.replace('_', '-')}"
        assert advice(f"--{other}", [option, "--x"]) == f"did you mean {option}?"


def test_other_names_of_what_there_is_not_lead_nowhere():
    assert advice("--bnneck", ["--lr", "--peers"]) == "there is --lr, --peers"
    assert advice("bnneck", ["lr"], others="see {}") == "see lr"


def test_slips_of_the_hand():
    for name, known, near in (
        ("epoch", KNOWN, "epochs"),
        ("LR", KNOWN, "lr"),
        ("lernin-rate", KNOWN, "lr"),
        ("kl-weigth", KNOWN, "kl_weight"),
        ("--no-flop", ["--flip", "--no-flip"], "--no-flip"),
        ("--flop", ["--flip", "--no-flip"], "--flip"),
        ("trian", ["train", "evaluate"], "train"),
    ):
        assert advice(name, known) == f"did you mean {near}?"
    for name in ("", "--", "xyzzy", "?", "--no-"):
        assert advice(name, ["train", "lr"]) == "there is train, lr"
