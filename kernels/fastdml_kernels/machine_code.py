"""Reads a compiled kernel's machine code: its loops, what runs for a row, and in which order.

`parse_sass` and `parse_amdgcn` make `Instruction`s of a listing, whose positions are indices into
it. `loops` finds the loops, `usual_path` what a turn of one runs. Where the code branches, only
running it could tell, so that a rule decides: of the ways through a loop, the usual one has the
fewest instructions among those that make every access to the tensors that the kernel is there for.
What a branch leaves out besides, such as rows that are computed again because a number in them is
infinite, or the slow way of a division, is not on it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path as FilePath
from typing import Any

import triton

NO_RETURN = ("EXIT", "RET", "KILL", "s_endpgm", "s_setpc_b64")
FEW = 8  # instructions
BARRIERS = ("BAR", "s_barrier")


@cache
def _cuobjdump() -> str | None:
    found = sorted(FilePath(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
    return str(found[0]) if found else None


def cuobjdump(compiled: Any, *flags: str) -> str:
    """What `cuobjdump` prints of a kernel that Triton compiled for NVIDIA's GPUs. Raises
    RuntimeError where triton's wheel does not have the tool."""
    tool = _cuobjdump()
    if tool is None:
        raise RuntimeError("triton's wheel holds no cuobjdump: the report needs a Linux CUDA build")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run(
            [tool, *flags, file.name], capture_output=True, text=True, check=True
        ).stdout


@dataclass(frozen=True)
class Instruction:
    """`name` is the operation without its modifiers: LDG of LDG.E.EF.128. A branch may go on at
    position `target`; `falls`: the next instruction may follow."""

    name: str
    opcode: str
    operands: str
    guard: str = ""  # the predicate under which lanes run it, such as @!P0
    target: int | None = None
    falls: bool = True
    rarely: bool = False  # whether it hardly ever goes on at the target

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    @property
    def width(self) -> int:
        """Bytes that a thread moves: 8 for LDG.E.EF.64 and global_load_dwordx2."""
        bits = re.search(r"\.(?:[US])?(8|16|64|128)(?:\.|$)", self.opcode)
        if bits:
            return int(bits[1]) // 8
        amd = re.search(r"_(?:[us]?(byte|short)|dwordx?(\d?))(?:_d16\w*)?$", self.opcode)
        if amd:
            return {"byte": 1, "short": 2, None: 4 * int(amd[2] or 1)}[amd[1]]
        return 4

    @property
    def is_barrier(self) -> bool:
        return self.name in BARRIERS


def parse_sass(listing: str) -> list[Instruction]:
    """The instructions that `cuobjdump -sass` lists of one kernel. Raises ValueError for a branch
    whose target it does not show."""
    line = re.compile(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M
    )
    found = line.findall(listing)
    position = {int(address, 16): i for i, (address, *_) in enumerate(found)}
    code = [
        _sass_instruction(guard, opcode, operands, position)
        for _, guard, opcode, operands in found
    ]  # fmt: skip
    return [replace(step, rarely=_is_predicate(code, i)) for i, step in enumerate(code)]


def _is_predicate(code: Sequence[Instruction], i: int) -> bool:
    """Whether a branch jumps over a few instructions alone. It stands for a predicate on them: it
    is for single lanes, such as those that store a warp's sum, and the warp runs them."""
    step = code[i]
    if step.target is None or not step.falls or not 1 < step.target - i <= FEW:
        return False
    return all(code[j].target is None and code[j].falls for j in range(i + 1, step.target))


def _sass_instruction(
    guard: str, opcode: str, operands: str, position: dict[int, int]
) -> Instruction:
    name = opcode.split(".")[0]
    if name in ("BRX", "JMX"):
        raise ValueError(f"{opcode} {operands}: a branch to a computed address")
    target, falls = None, True
    if name in ("BRA", "JMP", "CALL"):
        addresses = re.findall(r"\b0x([0-9a-f]+)", operands)
        if not addresses or int(addresses[-1], 16) not in position:
            raise ValueError(f"{opcode} {operands}: a branch to no instruction of the listing")
        target = position[int(addresses[-1], 16)]
        # A branch may have its condition among the operands. ptxas also calls where it could
        # branch, and returns from other calls: what follows one may run in any case.
        falls = name == "CALL" or _conditional(guard) or "," in operands
    elif name in NO_RETURN:
        falls = _conditional(guard)
    return Instruction(name, opcode, operands, guard, target, falls)


def _conditional(guard: str) -> bool:
    return guard not in ("", "@PT", "@UPT")


def parse_amdgcn(assembly: str) -> list[Instruction]:
    """The instructions of one kernel in LLVM's assembly for AMD's GPUs. A jump over code where no
    lane is active (`s_cbranch_execz`) is taken rarely: usually one is. Raises ValueError for a
    branch to a label that is not there."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in assembly.partition(".Lfunc_end")[0].splitlines():
        text = line.partition(";")[0].rstrip()
        if label := re.match(r"([.\w$]+):", text):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s+([a-z]\w*)\s*(.*)", text):
            found.append((instruction[1], instruction[2]))
    code = []
    for opcode, operands in found:
        target, falls = None, opcode not in NO_RETURN
        if opcode.startswith(("s_branch", "s_cbranch")):
            if operands not in labels:
                raise ValueError(f"{opcode} {operands}: a branch to no label of the listing")
            target, falls = labels[operands], opcode != "s_branch"
        rarely = opcode == "s_cbranch_execz"
        code.append(Instruction(opcode, opcode, operands, "", target, falls, rarely))
    return code


@dataclass(frozen=True)
class Loop:
    """Positions of a loop's instructions, those of the loops inside it included. header: the one to
    which branches lead back, -1 for none."""

    header: int
    body: frozenset[int]
    inner: tuple[Loop, ...] = ()


def _followers(code: Sequence[Instruction], i: int) -> list[int]:
    after = [i + 1] if code[i].falls and i + 1 < len(code) else []
    target = code[i].target
    return after if target is None or target in after else [*after, target]


def _usual_followers(code: Sequence[Instruction], i: int) -> list[int]:
    return [i + 1] if code[i].rarely else _followers(code, i)


def _back_edges(code: Sequence[Instruction]) -> tuple[list[tuple[int, int]], set[int]]:
    """Branches to an instruction on the way to them from the first, and all that can be reached."""
    found: list[tuple[int, int]] = []
    on_way, left = {0}, set[int]()
    stack = [(0, iter(_followers(code, 0)))]
    while stack:
        i, followers = stack[-1]
        for j in followers:
            if j in on_way:
                found.append((i, j))
            elif j not in left:
                on_way.add(j)
                stack.append((j, iter(_followers(code, j))))
                break
        else:
            stack.pop()
            on_way.discard(i)
            left.add(i)
    return found, left


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """The outermost loops in the order of the listing, each with those inside it."""
    edges, reached = _back_edges(code)
    before: dict[int, list[int]] = {}
    for i in reached:
        for j in _followers(code, i):
            before.setdefault(j, []).append(i)
    bodies: dict[int, set[int]] = {}
    for latch, header in edges:
        body = bodies.setdefault(header, {header})
        waiting = [latch]
        while waiting:
            i = waiting.pop()
            if i not in body:
                body.add(i)
                waiting += before.get(i, ())
    return _nested({header: frozenset(body) for header, body in bodies.items()})


def _nested(bodies: dict[int, frozenset[int]]) -> list[Loop]:
    outer = [h for h, body in bodies.items() if not any(body < other for other in bodies.values())]
    found = []
    for header in sorted(outer):
        inside = {h: body for h, body in bodies.items() if body < bodies[header]}
        found.append(Loop(header, bodies[header], tuple(_nested(inside))))
    return found


def whole(code: Sequence[Instruction]) -> Loop:
    """All of a kernel as if it were the body of a loop."""
    return Loop(-1, frozenset(range(len(code))), tuple(loops(code)))


@dataclass(frozen=True)
class Path:
    """What one turn runs, in its order; each inner loop is there once, with one turn of its own."""

    steps: tuple[Instruction | Path, ...]

    @property
    def inner(self) -> list[Path]:
        return [step for step in self.steps if isinstance(step, Path)]

    @property
    def own(self) -> list[Instruction]:
        return [step for step in self.steps if isinstance(step, Instruction)]

    def flat(self) -> list[Instruction]:
        """With the inner loops' instructions between."""
        flat: list[Instruction] = []
        for step in self.steps:
            flat += step.flat() if isinstance(step, Path) else [step]
        return flat

    def total(
        self, amount: Callable[[Instruction], float], turns: Callable[[Path], float]
    ) -> float:
        """The sum of `amount` over all that runs, where `turns` says how often an inner loop
        turns."""
        return sum(map(amount, self.own)) + sum(
            turns(loop) * loop.total(amount, turns) for loop in self.inner
        )


Accesses = Callable[[Instruction], tuple[int, int]]  # bytes that a thread reads, and writes
_State = tuple[float, float, float]  # bytes in inner loops, bytes read, bytes written


def usual_path(
    code: Sequence[Instruction], loop: Loop, accesses: Accesses, needed: tuple[float, float]
) -> Path:
    """The fewest instructions from the loop's header back to it (or to the kernel's end, for
    `whole`) that have all `accesses`, and every inner loop with some. needed: bytes that a thread
    reads and writes in a turn, beyond which further accesses are no reason to take a way;
    `math.inf` where that is not known."""
    start = max(loop.header, 0)
    inner = {i: child for child in loop.inner for i in child.body}
    inside = {child.header: usual_path(code, child, accesses, needed) for child in loop.inner}
    bytes_inside = {
        header: sum(sum(accesses(step)) for step in path.flat()) for header, path in inside.items()
    }

    def place(i: int) -> int:
        return inner[i].header if i in inner else i

    def after(i: int) -> set[int]:
        positions = inner[i].body if i in inner else (i,)
        followers = {j for p in positions for j in _usual_followers(code, p)}
        return {place(j) for j in followers & loop.body if j != loop.header} - {i}

    def ends(i: int) -> bool:
        positions = inner[i].body if i in inner else (i,)
        followers = [j for p in positions for j in _followers(code, p)]
        return loop.header in followers or not followers

    best: dict[int, dict[_State, tuple[int, int | None, _State]]] = {}
    for i in _last_first(place(start), after):
        ways: dict[_State, tuple[int, int | None, _State]] = {}
        if ends(i):
            ways[0, 0, 0] = (0, None, (0, 0, 0))
        for j in after(i):
            for state, (count, *_) in best[j].items():
                if state not in ways or count < ways[state][0]:
                    ways[state] = (count, j, state)
        best[i] = {}
        own = (bytes_inside[i], 0, 0) if i in inside else (0, *accesses(code[i]))
        for state, (count, following, rest) in ways.items():
            inner_bytes, read, written = (a + b for a, b in zip(own, state, strict=True))
            new = (inner_bytes, min(read, needed[0]), min(written, needed[1]))
            if new not in best[i] or count + 1 < best[i][new][0]:
                best[i][new] = (count + 1, following, rest)
    return Path(tuple(
        inside[i] if i in inside else code[i] for i in _walk(best, place(start))
    ))  # fmt: skip


def _last_first(start: int, after: Callable[[int], set[int]]) -> list[int]:
    """What follows comes before what it follows."""
    order: list[int] = []
    seen = {start}
    stack = [(start, iter(after(start)))]
    while stack:
        i, followers = stack[-1]
        for j in followers:
            if j not in seen:
                seen.add(j)
                stack.append((j, iter(after(j))))
                break
        else:
            stack.pop()
            order.append(i)
    return order


def _walk(
    best: dict[int, dict[_State, tuple[int, int | None, _State]]], start: int
) -> Iterable[int]:
    state = max(best[start], key=lambda s: (sum(s), -best[start][s][0]))
    i: int | None = start
    while i is not None:
        yield i
        _, i, state = best[i][state]


def memory_waits(path: Path, turns: Callable[[Path], float]) -> float:
    """How often a program waits for loads from global memory in a turn of the loop: each wait costs
    the memory's latency once, for all loads that are under way. With several copies under way to
    shared memory (cp.async), a wait counts as the share of the latency that it takes on average.

    A load's registers are taken as first used where an instruction names one of them; the second of
    two turns is counted, so that loads ahead for the next turn show.
    """
    waits = sum(turns(inner) * memory_waits(inner, turns) for inner in path.inner)
    pending: set[str] = set()
    loading = False  # AMD: whether a load came since the last wait
    for turn in range(2):
        for step in path.own:
            waited = 0.0
            if step.name == "DEPBAR":
                under_way = re.search(r"SB\w+, 0x([0-9a-f]+)", step.operands)
                if under_way and "LDGSTS" in pending:
                    waited = 1 / (1 + int(under_way[1], 16))
            elif pending.intersection(re.findall(r"\bR\d+\b", step.operands)):
                waited, pending = 1.0, pending & {"LDGSTS"}
            if step.name == "LDG":
                pending |= _destinations(step)
            elif step.name == "LDGSTS":
                pending.add("LDGSTS")
            elif step.name.startswith(("global_load", "buffer_load")):
                loading = True
            elif step.name == "s_waitcnt" and "vmcnt" in step.operands:
                waited, loading = float(loading), False
            waits += waited * turn
    return waits


def _destinations(load: Instruction) -> set[str]:
    first = re.search(r"\bR(\d+)\b", load.operands)
    assert first, load
    return {f"R{int(first[1]) + i}" for i in range(max(1, load.width // 4))}
