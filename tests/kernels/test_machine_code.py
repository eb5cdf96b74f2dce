"""What is read out of a listing of machine code: instructions, loops, the usual path, waits."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from fastdml_kernels.bounds import ARCHITECTURES, estimate
from fastdml_kernels.machine_code import (
    FEW,
    Instruction,
    Path,
    loops,
    memory_waits,
    parse_amdgcn,
    parse_sass,
    usual_path,
    whole,
)
from fastdml_kernels.row_costs import RowCost, logits_moved, row_loop
from fastdml_kernels.static_report import KernelReport, table
from hypothesis import given
from hypothesis import strategies as st

ANY = (math.inf, math.inf)


def listing(*lines: str) -> str:
    """As `cuobjdump -sass` prints it: addresses, and the encoding in comments."""
    text = ["\tcode for sm_90", "\t\tFunction : kernel", '\t.headerflags\t@"EF_CUDA_SM90"']
    for i, line in enumerate(lines):
        text += [f"        /*{16 * i:04x}*/      {line} ;      /* 0x000fe200078e00ff */",
                 "                                          /* 0x001fca0000000000 */"]  # fmt: skip
    return "\n".join([*text, "\t\t.........."])


def at(i: int) -> str:
    return hex(16 * i)


def names(path: Path) -> list[str]:
    return [step.name for step in path.flat()]


@pytest.mark.parametrize(("line", "parsed"), [
    ("LDC R1, c[0x0][0x28]", Instruction("LDC", "LDC", "R1, c[0x0][0x28]")),
    ("@!P0 LDG.E.EF.128 R8, desc[UR4][R6.64]",
     Instruction("LDG", "LDG.E.EF.128", "R8, desc[UR4][R6.64]", "@!P0")),
    ("@UP0 UMOV UR4, URZ", Instruction("UMOV", "UMOV", "UR4, URZ", "@UP0")),
    ("ERRBAR", Instruction("ERRBAR", "ERRBAR", "")),
    ("EXIT", Instruction("EXIT", "EXIT", "", falls=False)),
    ("@P0 EXIT", Instruction("EXIT", "EXIT", "", "@P0")),
    ("@PT EXIT", Instruction("EXIT", "EXIT", "", "@PT", falls=False)),
    ("RET.REL.NODEC R2 0x0", Instruction("RET", "RET.REL.NODEC", "R2 0x0", falls=False)),
    ("BRA 0x10", Instruction("BRA", "BRA", "0x10", "", 1, False)),
    ("@!P2 BRA 0x10", Instruction("BRA", "BRA", "0x10", "@!P2", 1)),
    ("BRA.U !UP0, 0x10", Instruction("BRA", "BRA.U", "!UP0, 0x10", "", 1)),
    ("@P4 CALL.REL.NOINC 0x10", Instruction("CALL", "CALL.REL.NOINC", "0x10", "@P4", 1)),
    ("CALL.REL.NOINC 0x10", Instruction("CALL", "CALL.REL.NOINC", "0x10", "", 1)),
])  # fmt: skip
def test_an_instruction_of_sass(line, parsed):
    assert parse_sass(listing(line, "NOP"))[0] == parsed


@pytest.mark.parametrize("line", ["BRA 0x40", "BRX R2 -0x10", "BRA `(.L_x_1)"])
def test_a_branch_that_leads_nowhere_is_told(line):
    with pytest.raises(ValueError, match="a branch to"):
        parse_sass(listing(line, "EXIT"))


@pytest.mark.parametrize(("opcode", "width"), [
    ("LDG.E", 4), ("LDG.E.EF.64", 8), ("LDG.E.EL.128", 16), ("LDG.E.U8", 1), ("LDG.E.EF.U16", 2),
    ("LDG.E.S16.CONSTANT", 2), ("LDG.E.LTC128B.64", 8), ("STG.E.EF.128", 16), ("STG.E", 4),
    ("LDGSTS.E.BYPASS.LTC128B.128", 16), ("LDGSTS.E.64", 8), ("LDG.E.64.STRONG.GPU", 8),
    ("global_load_dword", 4), ("global_load_dwordx2", 8), ("global_store_dwordx4", 16),
    ("global_load_ushort", 2), ("global_load_short_d16_hi", 2), ("global_store_short", 2),
    ("buffer_load_ubyte", 1), ("global_store_byte", 1),
])  # fmt: skip
def test_bytes_that_a_thread_moves(opcode, width):
    name = opcode.split(".")[0]
    assert Instruction(name, opcode, "").width == width


def test_a_loop_and_what_is_around_it():
    code = parse_sass(listing("S2R R0, SR_TID.X", "FADD R1, R1, R0", f"@!P0 BRA {at(1)}", "EXIT",
                              f"BRA {at(4)}", "NOP"))  # fmt: skip
    (loop,) = loops(code)  # the one behind the end, which never runs, is none
    assert (loop.header, loop.body, loop.inner) == (1, {1, 2}, ())
    assert names(usual_path(code, loop, logits_moved, ANY)) == ["FADD", "BRA"]
    assert names(usual_path(code, whole(code), logits_moved, ANY)) == ["S2R", "FADD", "BRA", "EXIT"]


NESTED = listing(
    "S2R R0, SR_TID.X",
    "LDG.E.64 R2, desc[UR4][R6.64]",  # 1: the rows, from here
    "BAR.SYNC.DEFER_BLOCKING 0x0",  # 2: the first pass over the classes
    "LDG.E.EL.128 R8, desc[UR4][R6.64]",
    "FADD R20, R8, R20",
    f"@!P0 BRA {at(2)}",
    "FMUL R20, R20, R2",
    "LDG.E.EF.128 R8, desc[UR4][R6.64]",  # 7: the second pass
    "STG.E.EF.128 desc[UR4][R6.64], R8",
    f"@!P1 BRA {at(7)}",
    f"@!P2 BRA {at(1)}",
    "STG.E desc[UR4][R4.64], R20",
    "EXIT",
)


def test_loops_within_loops():
    code = parse_sass(NESTED)
    (rows,) = loops(code)
    assert rows.body == set(range(1, 11))
    assert [(loop.header, sorted(loop.body)) for loop in rows.inner] == [
        (2, [2, 3, 4, 5]), (7, [7, 8, 9]),
    ]  # fmt: skip
    assert row_loop(code, logits_moved) == rows


def test_the_cost_of_a_row_of_several_blocks():
    """Five blocks of 512 bytes: 32 threads that move 16 by an instruction."""
    code = parse_sass(NESTED)
    path = usual_path(code, row_loop(code, logits_moved), logits_moved, ANY)
    row = RowCost(path, logits_moved, 32, block_bytes=(512, 512), class_blocks=5)
    assert row.total(lambda step: 1) == 3 + 5 * 4 + 5 * 3
    assert row.total(lambda step: step.is_barrier) == 5
    assert (row.passes(0), row.passes(1)) == (2, 1)
    assert (row.widths(0), row.widths(1)) == ({16: 2}, {16: 1})
    assert row.waits() == (1 + 5, 5)  # label and first pass from memory, second from the cache
    unrolled = RowCost(path, logits_moved, 32, block_bytes=(256, 256), class_blocks=5)
    assert unrolled.total(lambda step: step.is_barrier) == 3
    assert (unrolled.passes(0), unrolled.passes(1)) == (2, 1)


def test_copies_ahead_are_counted_in_the_loop_alone():
    """Two blocks are copied to shared memory before the loop, a third while the first is used."""
    copy = "LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR6][R2.64]"
    code = parse_sass(listing(
        copy, "LDGDEPBAR", copy, "LDGDEPBAR",
        "DEPBAR.LE SB0, 0x1", "BAR.SYNC.DEFER_BLOCKING 0x0", copy, "LDGDEPBAR", "LDS.128 R8, [R4]",
        f"@!P0 BRA {at(4)}", f"@!P1 BRA {at(0)}", "EXIT",
    ))  # fmt: skip
    path = usual_path(code, row_loop(code, logits_moved), logits_moved, ANY)
    row = RowCost(path, logits_moved, 32, block_bytes=(512, 512), class_blocks=6)
    assert (row.passes(0), row.passes(1), row.widths(0)) == (1, 0, {16: 1})
    assert row.total(lambda step: step.is_barrier) == 6
    assert row.waits() == (3, 0)  # two copies share each wait


SLOW_WAYS = listing(
    "LDG.E.EF.64 R2, desc[UR4][R6.64]",  # 0: the rows
    f"@P0 BRA {at(12)}",  # no lane inside the row: the second load is left out
    *["FADD R9, R9, R9"] * 9,
    "LDG.E.EF.64 R4, desc[UR4][R6.64+0x8]",
    "FADD R2, R2, R4",  # 12
    f"@!P1 BRA {at(24)}",  # usual: not to compute the row again
    *["FMUL R2, R2, R2"] * 10,
    "STG.E.EF.64 desc[UR4][R6.64], R2",  # 24
    f"@P2 BRA {at(28)}",  # rare: outlined behind the end
    f"@!P3 BRA {at(0)}",
    "EXIT",
    "STG.E.EF.64 desc[UR4][R6.64], R2",  # 28
    f"BRA {at(26)}",
)


def test_the_usual_path_makes_every_access_and_no_more():
    """Eight bytes more are written behind the end than a row has: no reason to go there."""
    code = parse_sass(SLOW_WAYS)
    (rows,) = loops(code)
    assert rows.body == {*range(27), 28, 29}
    path = usual_path(code, rows, logits_moved, (16, 8))
    assert names(path) == ["LDG", "BRA", *["FADD"] * 9, "LDG", "FADD", "BRA", "STG", "BRA", "BRA"]
    assert names(usual_path(code, rows, logits_moved, (8, 8))) == [
        "LDG", "BRA", "FADD", "BRA", "STG", "BRA", "BRA",
    ]  # fmt: skip
    assert names(usual_path(code, rows, logits_moved, ANY)).count("STG") == 2


def test_a_branch_for_single_lanes_is_on_the_way():
    """One lane of a warp stores its sum: the warp runs the store."""
    code = parse_sass(listing(
        "SHFL.BFLY R2, R1, 0x1, 0x1f", f"@P0 BRA {at(3)}", "STS [R4], R2",
        "BAR.SYNC.DEFER_BLOCKING 0x0", f"@!P1 BRA {at(0)}", "EXIT",
    ))  # fmt: skip
    (rows,) = loops(code)
    path = usual_path(code, rows, logits_moved, ANY)
    assert names(path) == ["SHFL", "BRA", "STS", "BAR", "BRA"]


def test_of_two_ways_with_the_same_accesses_the_shorter_is_usual():
    code = parse_sass(listing(
        "LDG.E.EF R2, desc[UR4][R6.64]", f"@P0 BRA {at(6)}",
        "FMUL R2, R2, R2", "FMUL R2, R2, R2", "STG.E.EF desc[UR4][R6.64], R2", f"BRA {at(7)}",
        "STG.E.EF desc[UR4][R6.64], R2", f"@!P1 BRA {at(0)}", "EXIT",
    ))  # fmt: skip
    (rows,) = loops(code)
    assert names(usual_path(code, rows, logits_moved, ANY)) == ["LDG", "BRA", "STG", "BRA"]


@pytest.mark.parametrize(("lines", "waits"), [
    ([], 0),
    (["LDG.E R2, desc[UR4][R6.64]", "FADD R3, R2, R2"], 1),
    # two loads under way at a time, then one for each of two
    (["LDG.E R2, desc[UR4][R6.64]", "LDG.E R3, desc[UR4][R6.64]", "FADD R2, R2, R3"], 1),
    (["LDG.E R2, desc[UR4][R6.64]", "FADD R9, R2, R9", "LDG.E R2, desc[UR4][R6.64]",
      "FADD R9, R2, R9"], 2),
    # an address that was loaded
    (["LDG.E.64 R2, desc[UR4][R6.64]", "LDG.E R5, desc[UR4][R2.64]", "FADD R9, R5, R9"], 2),
    # the last of a wide load's four registers, and the next register, which is none of them
    (["LDG.E.128 R8, desc[UR4][R6.64]", "FADD R1, R11, R1"], 1),
    (["LDG.E.128 R8, desc[UR4][R6.64]", "FADD R1, R12, R1", "LDG.E R12, desc[UR4][R6.64]",
      "FADD R1, R8, R12"], 1),
    # used in the next turn, before it is loaded anew
    (["FADD R9, R2, R9", "LDG.E R2, desc[UR4][R6.64]"], 1),
    (["STG.E desc[UR4][R6.64], R2"], 0),
])  # fmt: skip
def test_waits_for_loads(lines, waits):
    path = Path(tuple(parse_sass(listing(*lines))))
    assert memory_waits(path, lambda loop: 1) == waits


AMD = """
kernel:
.Lfunc_begin0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Loop Header: Depth=1
\tglobal_load_dwordx2 v[2:3], v[0:1], off
.Ltmp1:
\ts_and_saveexec_b64 s[4:5], vcc
\ts_cbranch_execz .LBB0_3
; %bb.2:
\tglobal_load_ushort v4, v[0:1], off
.LBB0_3:
\ts_waitcnt vmcnt(0)
\tv_add_f32_e32 v5, v2, v4
\ts_barrier
\tglobal_store_dwordx2 v[0:1], v[2:3], off
\ts_cbranch_scc0 .LBB0_1
\ts_endpgm
.Lfunc_end0:
\t.size\tkernel, .Lfunc_end0-kernel
amdhsa.kernels:
"""


def test_amd_code():
    code = parse_amdgcn(AMD)
    assert [step.name for step in code][0::10] == ["s_load_dwordx2", "s_endpgm"]
    path = usual_path(code, row_loop(code, logits_moved), logits_moved, (0, 0))
    assert len(path.flat()) == 9  # with the load that lanes without work would jump over
    assert sum(step.is_barrier for step in path.flat()) == 1
    assert memory_waits(path, lambda loop: 1) == 1
    row = RowCost(path, logits_moved, 64, block_bytes=(640, 640))
    assert (row.passes(0), row.passes(1)) == (1, 1)
    with pytest.raises(ValueError, match="no label of the listing"):
        parse_amdgcn("\ts_branch .LBB0_9\n")


BODY = st.integers(0, 4)  # instructions in a stretch of code


@st.composite
def programs(draw, depth: int = 2):
    """Lines of a program of stretches, branches and loops; and the stretches that always run."""
    lines: list[str] = []
    always = []

    def stretch(name: str) -> int:
        count = draw(BODY)
        lines.extend([name] * count)
        return count

    def block(depth: int, usual: bool) -> None:
        n = stretch("IADD3 R0, R0, 0x1, RZ")
        if usual:
            always.append(n)
        for _ in range(draw(st.integers(0, 2)) if depth else 0):
            if draw(st.booleans()):  # code that a branch leaves out, and not for single lanes
                skip = len(lines)
                lines.extend(["", *["IADD3 R2, R2, 0x1, RZ"] * FEW])
                block(depth - 1, False)
                lines[skip] = f"@P0 BRA {at(len(lines))}"
                always.append(1 if usual else 0)
            else:  # a loop, at least one instruction beside its branch
                start = len(lines)
                lines.append("IADD3 R1, R1, 0x1, RZ")
                block(depth - 1, usual)
                lines.append(f"@!P1 BRA {at(start)}")
                always.append(2 if usual else 0)

    block(depth, True)
    lines.append("EXIT")
    return lines, sum(always) + 1


@given(programs())
def test_the_shortest_way_leaves_out_what_branches_jump_over(program):
    lines, always = program
    code = parse_sass(listing(*lines))
    assert len(code) == len(lines)
    path = usual_path(code, whole(code), lambda step: (0, 0), ANY)
    assert len(path.flat()) == always
    backwards = sum("!P1" in line for line in lines)

    def count(found) -> int:
        return sum(1 + count(loop.inner) for loop in found)

    assert count(loops(code)) == backwards


@given(programs())
def test_a_path_follows_the_codes_branches(program):
    """Each step follows the one before: by falling through, or by a branch to it."""
    lines, _ = program
    code = parse_sass(listing(*lines))
    position = {id(step): i for i, step in enumerate(code)}
    assert len(position) == len(code)
    path = usual_path(code, whole(code), lambda step: (0, 0), ANY)
    taken = [position[id(step)] for step in path.flat()]
    assert taken == sorted(set(taken))  # each inner loop once, from its header to its end
    for before, after in itertools.pairwise(taken):
        assert after == before + 1 or code[before].target == after


def test_an_estimate_by_hand():
    """A row that takes 1 us by bandwidth, 2 us by issue, and 4 us where one program waits."""
    gpu = ARCHITECTURES["sm_90"]
    second = gpu.issued * gpu.multiprocessors * gpu.clock
    needs = {"row_bytes": gpu.bandwidth * 1e-6, "issued": 2e-6 * second, "cached_waits": 0}
    waits = 4e-6 * gpu.clock * gpu.multiprocessors / gpu.latency
    found = estimate("sm_90", waits=waits, resident=1, **needs)
    assert found.name == "latency"
    assert (found.bytes_ns, found.issue_ns, found.latency_ns) == pytest.approx((1e3, 2e3, 4e3))
    assert found.share == pytest.approx(1 / 4)
    found = estimate("sm_90", waits=waits, resident=4, **needs)
    assert (found.name, found.share) == ("issue", pytest.approx(1 / 2))
    needs["issued"] /= 4
    found = estimate("sm_90", waits=waits, resident=8, **needs)
    assert (found.name, found.share) == ("bytes", 1)


def test_waits_for_the_cache_are_shorter():
    gpu = ARCHITECTURES["sm_90"]
    needs = {"row_bytes": 1, "issued": 1, "resident": 2}
    memory = estimate("sm_90", waits=1e3, cached_waits=0, **needs).latency_ns
    cached = estimate("sm_90", waits=0, cached_waits=1e3, **needs).latency_ns
    assert cached / memory == pytest.approx(gpu.cached_latency / gpu.latency)


def test_latency_is_not_estimated_without_a_source():
    found = estimate("gfx942", row_bytes=1, issued=1, waits=1e9, cached_waits=0, resident=None)
    assert found.latency_ns is None
    assert found.name in ("bytes", "issue")


def test_the_report_shows_what_a_row_costs_and_that_the_bound_is_an_estimate():
    found = estimate("sm_90", row_bytes=4e3, issued=4e3, waits=1, cached_waits=0, resident=2)
    report = KernelReport(
        "register_rows", 4, 1000, "bf16", "sm_90", True, rows=1, block_c=1024, warps=4, launches=1,
        registers=100, stack_bytes=0, spills=0, shared_bytes=1024, instructions=1234, barriers=5.5,
        waits=1, bound=found,
    )  # fmt: skip
    head, row, *legend = table([report]).splitlines()
    shown = dict(zip(head.split()[-4:], row.split()[-5:-1], strict=True))
    assert shown == {"instr": "1234", "bars": "5.5", "waits": "1", "bound": found.name}
    assert f"{found.share:.0%}" == row.split()[-1]
    assert "an estimate, nothing is measured" in " ".join(legend)
    assert "H100 SXM 80 GB for sm_90" in " ".join(legend)
    assert report.as_dict()["bound"]["share"] == found.share
    assert json.loads(json.dumps(report.as_dict()))["instructions"] == 1234
