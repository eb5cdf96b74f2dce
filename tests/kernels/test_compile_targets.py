"""The kernels compile for every architecture on a machine without a GPU, within their budget.

The compiling processes run without the interpreter, under which kernels have no machine code.
"""

from __future__ import annotations

import pytest
from compiled import printed_by, run_code

CODE = """
import json, sys
from fastdml_kernels import static_report
from fastdml_kernels.options import Options
compile_kernel = static_report.compile_kernel
def compile_and_look(*arguments):
    compiled = compile_kernel(*arguments)
    about["float64"] = compiled.asm["ttir"].count("f64")
    return compiled
static_report.compile_kernel = compile_and_look
for (K, C), arch, settings in json.loads(sys.argv[1]):
    about = {}
    options = Options(**settings.pop("options", {}))
    report = static_report.report(K, C, arch=arch, options=options, **settings)
    print(json.dumps(report.as_dict() | about))
"""
CIFAR = [(2, 10), (2, 100), (3, 100), (4, 100), (8, 100)]
MARKET = [(2, 751), (4, 751)]
ARCHS = ["sm_80", "sm_90", "sm_100"]


def reports(*cases: tuple) -> list[dict]:
    """A report for each ((K, C), arch, settings of `report`)."""
    found = printed_by(CODE, cases)
    for report in found:  # JSON has no whole numbers as keys
        for name in ("load_widths", "store_widths"):
            report[name] = {int(width): count for width, count in report[name].items()}
    return found


def hold_budget(report: dict, ratio: float = 1.0) -> None:
    """Each logit read once and each gradient written once, in one launch, nothing spilled, nothing
    computed in float64, which costs a GPU up to 64 times as much."""
    assert report["float64"] == 0, report
    assert report["spills"] == 0, report
    assert report["stack_bytes"] == 0, report
    assert report["launches"] == 1, report
    assert report["ratio"] == ratio, report


MAIN = [((2, 100), arch, {}) for arch in ARCHS]
OTHERS = [(shape, "sm_90", {}) for shape in [(2, 10), (4, 100), *MARKET]]
CAPTURED = [((2, 100), "sm_90", {"tensor_weights": True, "upstream": upstream, "dtype": "fp16"})
            for upstream in (False, True)]  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> dict[tuple, dict]:
    """In one process, whose start would cost as much as a kernel."""
    cases = MAIN + OTHERS + CAPTURED
    names = [(*shape, arch, *settings.values()) for shape, arch, settings in cases]
    return dict(zip(names, reports(*cases), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_main_shape_compiles_everywhere(compiled, arch):
    plain = compiled[2, 100, arch]
    assert plain["kernel"] == "register_rows"
    hold_budget(plain)
    assert min(plain["load_widths"]) >= 8  # bytes: 4 bfloat16 logits an instruction
    assert min(plain["store_widths"]) >= 8


@pytest.mark.parametrize("shape", [shape for shape, _, _ in OTHERS])
def test_cifar_and_market_shapes_on_sm_90(compiled, shape):
    hold_budget(compiled[(*shape, "sm_90")])


@pytest.mark.parametrize("upstream", [False, True])
def test_what_a_captured_step_launches(compiled, upstream):
    """Weights as 0-d tensors; with float16 logits the losses' own gradient beside them."""
    found = compiled[2, 100, "sm_90", True, upstream, "fp16"]
    assert found["kernel"] == ("wide_rows" if upstream else "register_rows")
    hold_budget(found, ratio=1.5 if upstream else 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_cifar_and_market_shapes_everywhere(arch):
    for report in reports(*((shape, arch, {}) for shape in CIFAR + MARKET)):
        hold_budget(report)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"stats": True}, {"dtype": "fp32"}, {"gradient": False}])
@pytest.mark.parametrize("shape", [(2, 100), (8, 100), (4, 751)])
def test_statistics_float32_and_losses_alone(shape, settings):
    for report in reports((shape, "sm_90", settings)):
        hold_budget(report)


@pytest.mark.slow
def test_rows_of_padded_stride_load_vectors():
    (padded,) = reports(((2, 751), "sm_90", {"row_stride": 752}))
    assert min(padded["load_widths"]) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("shape", [(2, 32_768), (4, 32_000), (2, 128_256)])
def test_wide_rows_read_twice_and_write_once(shape, gradient):
    """Without gradient one read is all."""
    (wide,) = reports((shape, "sm_90", {"gradient": gradient}))
    assert wide["kernel"] == "wide_rows"
    hold_budget(wide, ratio=1.5 if gradient else 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_wide_rows_are_loaded_ahead_where_they_are_aligned(arch):
    """Blocks of 4 KB for each of two peers lie in shared memory; rows of 21,841 have none. The
    first pass has no barrier for a reduction: with them a block took twelve or more."""
    aligned, odd = reports(((2, 32_768), arch, {}), ((2, 21_841), arch, {}))
    assert 16_384 <= aligned["shared_bytes"] < 3 * 8192
    assert odd["shared_bytes"] < 4096
    for report, C in ((aligned, 32_768), (odd, 21_841)):
        hold_budget(report, ratio=1.5)
        assert report["barriers"] <= 10 * -(-C // 2048)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"stats": True}, {"gradient": False},
                                      {"stats": True, "gradient": False}])  # fmt: skip
@pytest.mark.parametrize("K", [4, 8, 16])
def test_wide_rows_of_many_peers_never_spill(K, settings):
    (report,) = reports(((K, 32_768), "sm_90", settings))
    assert report["spills"] == report["stack_bytes"] == 0, report


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"options": {"target": "ensemble"}}, {"stats": True}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", [(2, 4096), (4, 2048), (8, 1000)], ids=str)
def test_the_widest_rows_in_registers_never_spill(shape, settings):
    (report,) = reports((shape, "sm_90", settings))
    assert report["kernel"] == "register_rows"
    assert report["spills"] == report["stack_bytes"] == 0, report


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"divergence": "jeffreys"}, {"detach_targets": False}, {"target": "ensemble_logits"},
    {"gate": "best"}, {"divergence": "jeffreys", "detach_targets": False, "target": "ensemble"},
])  # fmt: skip
def test_every_kind_of_option_compiles_without_spills(options):
    for report in reports(((2, 100), "sm_90", {"options": options, "stats": True})):
        assert report["spills"] == 0, report


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*ARCHS, "gfx942"])
@pytest.mark.parametrize("K_C", [(2, 100), (2, 1000), (2, 32_768)], ids=str)
def test_distillation_compiles_everywhere(K_C, arch):
    """One student, every divergence, the softer gates, weights of rows."""
    settings = [{"divergence": name} for name in ("forward", "reverse", "jeffreys", "jsd")]
    settings += [{"gate": "confidence"}, {"gate": "entropy"}]
    cases = [(K_C, arch, {"options": {"students": (0,)} | each, "sample_weight": weighed})
             for each in settings for weighed in (False, True)]  # fmt: skip
    for report in reports(*cases):
        assert report["float64"] == 0, report
        assert report["spills"] <= 4, report  # on sm_100 and gfx942, of a few options
        if report["kernel"] == "register_rows" and arch != "gfx942":
            assert report["ratio"] == 1.0, report


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["reverse", "jeffreys", "jsd"])
def test_divergences_of_more_peers_spill_nothing(divergence):
    for report in reports(*(((K, C), "sm_90", {"options": {"divergence": divergence}})
                            for K, C in ((3, 1000), (4, 100), (4, 1000), (2, 4096)))):  # fmt: skip
        assert report["kernel"] == "register_rows"
        assert report["spills"] <= 4, report


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"divergence": "reverse"}, {"divergence": "jeffreys", "gate": "confidence"},
    {"divergence": "jsd", "gate": "entropy"}, {"divergence": "jsd", "jsd_beta": 0.2},
    {"divergence": "jsd", "detach_targets": False, "target": "ensemble", "gate": "confidence"},
], ids=str)  # fmt: skip
def test_wide_rows_of_every_divergence_and_gate_never_spill(options):
    settings = {"options": options, "stats": True, "sample_weight": True}
    (report,) = reports(((4, 32_768), "sm_90", settings))
    assert report["spills"] == report["stack_bytes"] == report["float64"] == 0, report


@pytest.mark.slow
def test_distillation_of_a_vocabulary_reads_twice_whatever_the_direction():
    """And writes the student's gradient alone. The reverse divergence needs no more instructions
    and barriers than the forward one; the Jensen-Shannon divergence one more read."""
    shape, student = (2, 151_936), {"students": [0]}
    forward, reverse, jsd = reports(
        *((shape, "sm_90", {"options": student | {"divergence": divergence}})
          for divergence in ("forward", "reverse", "jsd"))
    )  # fmt: skip
    hold_budget(forward, ratio=5 / 3)
    hold_budget(reverse, ratio=5 / 3)
    hold_budget(jsd, ratio=7 / 3)
    assert reverse["instructions"] <= forward["instructions"]
    assert reverse["barriers"] <= forward["barriers"]


@pytest.mark.slow
def test_the_kernels_compile_for_amd():
    for report in reports(((2, 100), "gfx942", {}), ((2, 32_768), "gfx942", {})):
        assert report["spills"] == 0, report


def test_a_report_under_the_interpreter_says_what_is_wrong():
    done = run_code(CODE, [((2, 100), "sm_90", {})], interpret=True)
    assert "imported under TRITON_INTERPRET=1" in done.stderr
