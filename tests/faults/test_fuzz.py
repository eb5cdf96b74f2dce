"""Every parser against inputs that are nearly right; `make fuzz` takes as many as time allows."""

from __future__ import annotations

import pytest
from fuzz_targets import TARGETS
from fuzzing import run

SEED = 0
INPUTS = {
    "training_options": 100,
    "model_name": 100,
    "cohort_description": 150,
    "weights_file": 150,
    "damaged_run": 25,
    "own_images": 60,
    "label_lists": 150,
    "report_page": 60,
}


@pytest.mark.parametrize("target", TARGETS)
def test_works_or_is_refused_in_one_line(warm, tmp_path, target):
    found = run(warm, tmp_path / target, target, SEED, INPUTS.get(target, 300))
    assert found is None, found
