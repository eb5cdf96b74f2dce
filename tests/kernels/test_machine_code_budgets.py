"""Budgets of the compiled kernels: what a row costs, and the order of what must have an order.

One process without the interpreter compiles them; everything is read from the machine code.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import triton
from compiled import printed_by

pytestmark = pytest.mark.skipif(torch.version.hip is not None, reason="reads NVIDIA's code")

CODE = """
import json, math, sys
from fastdml_kernels import static_report
from fastdml_kernels.machine_code import cuobjdump, loops, parse_sass, usual_path
from fastdml_kernels.options import Options
from fastdml_kernels.row_costs import logits_moved, row_loop

compile_kernel = static_report.compile_kernel
def compile_and_keep(*arguments):
    compiled.append(compile_kernel(*arguments))
    return compiled[-1]
static_report.compile_kernel = compile_and_keep

def event(step):
    read, written = logits_moved(step)
    return "read" if read else "write" if written else step.name

for K, C, arch, *students in json.loads(sys.argv[1]):
    compiled = []
    options = Options(students=tuple(students) or None)
    report = static_report.report(K, C, arch=arch, options=options)
    code = parse_sass(cuobjdump(compiled[-1], "-sass"))
    rows = row_loop(code, logits_moved)
    row = usual_path(code, rows, logits_moved, (math.inf, math.inf))
    labels = min(loops(code)[0].body)  # the loop that counts them
    order = {"begin": [event(step) for step in code[:labels]],
             "row": [event(step) for step in row.flat()],
             "end": [step.name for step in code[max(rows.body) + 1:]]}
    print(json.dumps(report.as_dict() | order))
"""
ARCHS = ("sm_80", "sm_90", "sm_100")
LAST_PROGRAM = [(2, 100, arch) for arch in ARCHS] + [(2, 32_768, "sm_90")]
# (K, C): at most so many instructions and barriers a row, on each architecture. Kernels that reduce
# one peer after another, load a peer's row after another's reductions, or select where they could
# multiply, have more of both.
REGISTER_ROWS = {
    (2, 100): (145, 1),
    (3, 100): (210, 1),
    (4, 100): (270, 1.5),
    (8, 100): (510, 2.25),
    (2, 751): (760, 9),
    (4, 751): (1400, 12),
    (2, 1000): (720, 9),
    (4, 1000): (1400, 12),
    (8, 1000): (1950, 20),
    (4, 2048): (1400, 12),
}
# How often a turn waits for memory, where it is not once: triton 3.6 asks for the next label before
# the next rows, and moves some of these to other registers as soon as they are there.
WAITS = {(2, 1000, "sm_90"): 3, (4, 1000, "sm_80"): 2}
# Wide rows, of whole rows: barriers and waits. Kernels that reduce every block of classes, or that
# wait for each before they ask for the next, have several times as many.
WIDE_ROWS = {(2, 32_768): (155, 28), (8, 32_768): (950, 50), (2, 128_256): (560, 60)}
ON_SM_90 = [(*shape, "sm_90") for shape in REGISTER_ROWS]
HELD = [*ON_SM_90, (4, 1000, "sm_80"), (4, 1000, "sm_100"), (2, 100, "sm_80"), (2, 100, "sm_100")]
WIDE = [(*shape, "sm_90") for shape in WIDE_ROWS]
# (K, C, architecture, students): most instructions of a row of plain distillation, whose teacher
# costs no gradient
TAUGHT = {(2, 100, "sm_90", 0): 135, (2, 1000, "sm_90", 0): 680, (2, 32_768, "sm_90", 0): None}
CASES = list(dict.fromkeys([*LAST_PROGRAM, *HELD, *WIDE, *TAUGHT]))


def name(case: tuple) -> str:
    return "-".join(map(str, case))


@pytest.fixture(scope="module")
def compiled() -> dict[tuple, dict]:
    """A report for each of CASES, with the order of what a row does, and of what comes after."""
    return dict(zip(CASES, printed_by(CODE, CASES), strict=True))


def order(names: list[str], of: set[str]) -> list[str]:
    """Those of `names` that are in `of`, each run of the same one once."""
    return [name for name, _ in itertools.groupby(n for n in names if n in of)]


@pytest.mark.parametrize("case", HELD, ids=name)
def test_instructions_and_barriers_of_a_row_in_registers(compiled, case):
    report = compiled[case]
    instructions, barriers = REGISTER_ROWS[case[:2]]
    assert report["kernel"] == "register_rows"
    assert report["instructions"] <= instructions
    assert report["barriers"] <= barriers
    assert report["spills"] == report["stack_bytes"] == 0
    assert report["ratio"] == 1


@pytest.mark.parametrize("case", HELD, ids=name)
def test_all_rows_are_on_their_way_before_the_first_barrier(compiled, case):
    """And those of the first turn before the labels are counted. A turn waits for memory once."""
    report = compiled[case]
    assert report["begin"].count("read") == report["row"].count("read")
    assert order(report["row"], {"read", "BAR"}) == ["read", "BAR"]
    assert report["waits"] <= WAITS.get(case, 1)


@pytest.mark.parametrize("case", TAUGHT, ids=name)
def test_a_teacher_costs_no_write_and_no_gradient(compiled, case):
    """K C logits are read and S C gradients written, for S students of K peers."""
    taught, both = compiled[case], compiled[case[:3]]
    K, C, size = 2, case[1], 2
    passes = 2 if taught["kernel"] == "wide_rows" else 1
    assert taught["least_bytes"] == (K + 1) * C * size
    assert taught["bytes_per_row"] == (passes * K + 1) * C * size
    assert both["bytes_per_row"] == (passes * K + K) * C * size
    assert sum(taught["store_widths"].values()) * 2 == sum(both["store_widths"].values())
    assert taught["load_widths"] == both["load_widths"]
    assert taught["instructions"] <= min(both["instructions"], TAUGHT[case] or math.inf)
    assert taught["barriers"] <= both["barriers"]
    assert taught["spills"] == taught["stack_bytes"] == 0


@pytest.mark.parametrize("case", WIDE, ids=name)
def test_barriers_and_waits_of_a_wide_row(compiled, case):
    report = compiled[case]
    barriers, waits = WIDE_ROWS[case[:2]]
    assert report["kernel"] == "wide_rows"
    assert report["barriers"] <= barriers
    assert report["waits"] <= waits
    assert report["spills"] == report["stack_bytes"] == 0
    assert (report["reads"], report["writes"]) == (2, 1)


@pytest.mark.parametrize("case", LAST_PROGRAM, ids=name)
def test_the_last_program_reads_what_the_others_have_written(compiled, case):
    """A program's sums are stored by all its threads (BAR), and seen by all programs (MEMBAR),
    before it counts as done (ATOMG); that count comes before all threads (BAR) read the other
    programs' sums, past what a nearer cache may hold of them (CCTL)."""
    end = order(compiled[case]["end"], {"STG", "BAR", "MEMBAR", "ATOMG", "CCTL", "LDG"})
    assert end[:7] == ["STG", "BAR", "MEMBAR", "ATOMG", "CCTL", "BAR", "LDG"]
    assert end.count("ATOMG") == 1


# ---- the tables of kernels/README.md

VERSION = ".".join(triton.__version__.split(".")[:2])
TABLE = Path(__file__).resolve().parents[2] / f"bench/results/kernels-triton-{VERSION}.json"
TABLED = pytest.mark.skipif(not TABLE.exists(), reason="no table is kept for this triton")
ALL = """
import json
from fastdml_kernels.static_report import reports
for report in reports(archs=["sm_90"]):
    print(json.dumps(report.as_dict()))
"""


def stored() -> dict[tuple, dict]:
    kept = json.loads(TABLE.read_text())
    return {(r["kernel"], r["K"], r["C"], r["options"]): r for r in kept}


@TABLED
def test_the_tables_are_of_the_code_as_it_is(compiled):
    """Else: `fastdml kernels --archs sm_90 --json`, as kernels/README.md says, and `make docs`."""
    rows, seen = stored(), 0
    for (K, C, arch, *_), report in compiled.items():
        key = (report["kernel"], K, C, report["options"])
        if arch == "sm_90" and key in rows:
            kept = rows[key]
            assert {name: report[name] for name in kept} == kept
            seen += 1
    assert seen >= len(REGISTER_ROWS) + len(TAUGHT)


@TABLED
@pytest.mark.slow
def test_every_row_of_the_tables_is_of_the_code_as_it_is():
    assert printed_by(ALL) == list(stored().values())
