"""Arguments of a kind that is not meant: one line that names the argument, for every public
function, whatever is wrong with it."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from toy_networks import images, small_conv

from fastdml import analysis
from fastdml.errors import InputError
from fastdml.report.predictions import Predictions

N, C = 12, 4
LABELS = np.arange(N, dtype=np.int32) % C


def predictions(seed):
    rng = np.random.default_rng(seed)
    rows = rng.random((3, N)).astype(np.float32)
    return Predictions(
        peers=("a", "b"), classes=(), num_classes=C, weights="last", label=LABELS,
        top=rng.integers(0, C, (3, N)).astype(np.int32), confidence=rows, label_log=-rows,
        disagreement=rows[0], pictured=np.zeros(0, int),
        pictures=np.zeros((0, 8, 8, 3), np.uint8), true_colours=True,
    )  # fmt: skip


MODELS, BATCHES = [small_conv(0), small_conv(1)], images(rows=8, batch=8)
ALONE, MUTUAL = predictions(0), predictions(1)
LOGITS = np.random.default_rng(2).standard_normal((N, C))
RIGHT = ALONE.top[:2] == LABELS
NUMBER = [None, "x", b"x", [], [1], {}, object(), float("nan")]
WHOLE = [*NUMBER, -1, 2.5, "1"]
COUNT = [*WHOLE, 0, True]
LIST = [1, 0.1, True, "x", b"x", {"x": 1}, object(), np.float64(0.5)]
ARRAY = [None, "x", ["x"], [[1, 2], [3]], {}, object()]
FOLDER = [None, 1, 0.1, True, b"x", [], object()]
ONE_OF = [None, 1, "x", [], object()]
RUN = "the folder of a finished run"

CASES = {
    "flat_minima": (
        (MODELS, BATCHES),
        {
            "models": [*LIST, None, []],
            "batches": [None, 1, "x", object(), [], [1], (np.zeros((3, 2)), np.zeros(2, int))],
            "scales": [*LIST, None, [], ["x"], [None], [0], [0.1, float("inf")]],
            "draws": COUNT,
            "noise": ONE_OF,
            "noised": ONE_OF,
            "seed": WHOLE,
        },
    ),
    "posterior": ((MODELS, BATCHES), {"ranks": COUNT}),
    "kernel_alignment": (
        (MODELS, BATCHES),
        {"layers": [*LIST, [], [1], ["5", None], [["5", 1]], [["5"]]]},
    ),
    "linear_cka": ((LOGITS, LOGITS[::-1]), {"x": ARRAY, "y": ARRAY}),
    "loss_section": (
        (MODELS, BATCHES),
        {"peers": [*LIST, [None], [0.5]], "points": [*COUNT, 1], "beyond": [*NUMBER, -1]},
    ),
    "loss_plane": ((MODELS, BATCHES), {"reach": [*NUMBER, 0], "seed": WHOLE, "batch_norm": ONE_OF}),
    "reliability": (
        (ALONE.confidence[0], RIGHT[0]),
        {"confidence": [*ARRAY, 1.0, [1]], "right": [*ARRAY, [True]], "bins": COUNT},
    ),
    "calibration_scores": (
        (LOGITS, LABELS),
        {"logits": ARRAY, "labels": [*ARRAY, LABELS + 0.5], "bins": COUNT},
    ),
    "fit_temperature": ((LOGITS, LABELS), {"logits": ARRAY, "labels": ARRAY}),
    "temperature_scaling": (
        (LOGITS, LABELS),
        {"fit": [1, "xy", (LOGITS,), (LOGITS, None), object()], "seed": WHOLE[1:]},
    ),
    "peers_temperature_scaling": (
        ([LOGITS, LOGITS], LABELS, ["a", "b"]),
        {"logits": [*LIST, [], [LOGITS]], "names": [*LIST, ["a"]]},
    ),
    "peer_agreement": (
        (ALONE.top[:2], LABELS, ["a", "b"]),
        {"predicted": ARRAY, "labels": ARRAY, "names": [*LIST, "ab"], "disagreement": [1, "x"]},
    ),
    "agreement_of": ((ALONE,), {"found": [None, "runs/x", {}]}),
    "analyse_predictions": ((MUTUAL, ALONE), {"found": ["runs/x", 1], "alone": ["runs/x", 1]}),
    "gains_by_group": (
        (RIGHT, RIGHT, LABELS, list("abcd")),
        {"before": ARRAY, "after": ARRAY, "group": ARRAY, "names": [*LIST, "abcd"]},
    ),
    "gains_by_class": ((ALONE, MUTUAL), {"alone": [None, "x"], "mutual": [None, "x"]}),
    "gains_by_confidence": ((ALONE, MUTUAL), {"bins": COUNT}),
    "gains_by_noise": ((ALONE, MUTUAL, LABELS > 1), {"noisy": [*ARRAY, 1, LABELS]}),
    "gains_by_noise_level": (
        ({0.1: (ALONE, MUTUAL)},),
        {"runs": [None, [], {}, {"x": (ALONE, MUTUAL)}, {0.1: ALONE}, {0.1: (ALONE,)}]},
    ),
    "confusion_matrix": (
        (LABELS, LABELS, C),
        {"num_classes": COUNT, "classes": [*LIST, "abcd"], "pairs": WHOLE, "predicted": ARRAY},
    ),
    "pairwise_kl": ((RUN,), {"folder": FOLDER}),
    "peers_of_run": (
        (RUN,),
        {"run": FOLDER, "phase": ONE_OF, "weights": ONE_OF[1:], "root": FOLDER[1:],
         "device": [None, 0.5, "x", []]},
    ),
    "posterior_of_run": ((RUN,), {"images": WHOLE, "images_of": ONE_OF}),
    "flat_minima_of_run": ((RUN,), {"scales": LIST, "phase": ONE_OF}),
    "analyse": ((RUN,), {"what": [*LIST, [None], [["x"]]], "images": WHOLE, "seed": WHOLE}),
    "current_analyses": ((RUN,), {"folder": FOLDER}),
}  # fmt: skip


def test_every_public_function_is_asked():
    plots = {name for name in analysis.__all__ if name.startswith("plot_")}
    found = {name for name in analysis.__all__ if inspect.isfunction(getattr(analysis, name))}
    assert found == CASES.keys() | plots


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_meant_is_refused_in_one_line(name, request):
    function = getattr(analysis, name)
    right, wrong = CASES[name]
    if right[0] is RUN:
        right = (str(request.getfixturevalue("finished_run")),)
    for argument, values in wrong.items():
        for value in values:
            given = inspect.signature(function).bind(*right)
            given.arguments[argument] = value
            with pytest.raises(InputError) as refused:
                function(*given.args, **given.kwargs)
            assert "\n" not in str(refused.value), (argument, value)


def test_the_line_names_the_argument_and_what_to_give():
    for call, line in (
        (lambda: analysis.flat_minima(MODELS, BATCHES, scales=0.1),
         "scales must be a list of numbers, such as [0.1], not 0.1"),
        (lambda: analysis.posterior(MODELS, BATCHES, ranks=True),
         "ranks must be a whole number of at least 1, not True"),
        (lambda: analysis.gains_by_class(None, MUTUAL),
         "alone must be what fastdml.report.predictions.read_predictions(folder of a run) gives, "
         "not None"),
        (lambda: analysis.linear_cka("x", LOGITS), "x must be an array of numbers, not 'x'"),
        (lambda: analysis.current_analyses(3), "a path is text or a Path, not 3"),
        (lambda: analysis.kernel_alignment(MODELS, BATCHES, layers="5"),
         "layers must be a list of names of modules, not '5'"),
    ):  # fmt: skip
        with pytest.raises(InputError) as refused:
            call()
        assert str(refused.value) == line


def test_numbers_of_others_are_numbers():
    """Those of numpy and torch, and arrays of dtypes that numpy lacks."""
    found = analysis.posterior(MODELS, BATCHES, ranks=np.int64(2))
    assert found.ranked.shape == (3, 2)
    assert analysis.flat_minima(MODELS[0], BATCHES, scales=torch.tensor([0.5]), draws=1).draws == 1
    x = torch.randn(6, 3).bfloat16()
    assert analysis.linear_cka(x, 2 * x) == pytest.approx(1)


@pytest.mark.parametrize("name", [n for n in analysis.__all__ if n.startswith("plot_")])
def test_a_plot_of_something_else_is_refused(name, tmp_path):
    """What analysis.json holds, say, or of pairwise_kl one result in place of several by label."""
    for value in (None, {"peers": ["a"]}, [1]):
        with pytest.raises(InputError, match="found must be"):
            getattr(analysis, name)(value, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
