"""Registers, spills, memory traffic, instructions and barriers of the compiled kernels, read from
the machine code: no GPU needed.

For a (kernel, K, C, dtype, architecture): launches, registers, stack and spills, shared memory,
widths of the loads and stores of logits and gradients, how often each logit is read and each
gradient written, what a row costs (`row_costs`), and an estimate of what bounds the kernel
(`bounds`). The same for the augmentation and its images.

The kernels must not have been imported under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypedDict

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import augment
from .augment_options import Augment, bytes_moved
from .bounds import ARCHITECTURES, Bound, estimate
from .launch import arguments
from .machine_code import (
    Instruction,
    cuobjdump,
    parse_amdgcn,
    parse_sass,
    usual_path,
    whole,
)
from .occupancy import resident_programs
from .options import Options
from .row_costs import RowCost, issued, logits_moved, pixels_moved, row_loop
from .tiles import (
    Regime,
    Tile,
    choose,
    compiler_options,
    programs_per_sm,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
AUGMENTED = {  # how images are stored (H, W, ch), and what becomes of them in training
    "cifar": ((32, 32, 3), Augment(32, 32, 4, True, True)),
    "market": ((128, 64, 3), Augment(256, 128, 10, False, True, 0.5)),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_POINTER = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip


@dataclass(frozen=True)
class KernelReport:
    """One compiled kernel. Widths are bytes a thread moves by one instruction, with their counts;
    reads and writes are how often a logit is read and a student's gradient written, and
    bytes_per_row what that makes for a row of every peer against least_bytes, each once. "augment"
    has no K and C, and images for rows.
    """

    kernel: str
    K: int | None
    C: int | None
    dtype: str
    arch: str
    gradient: bool
    rows: int
    block_c: int
    warps: int
    launches: int
    registers: int
    stack_bytes: int
    spills: int  # instructions that move a register to or from local memory
    shared_bytes: int
    instructions: float  # that each warp runs for a row of every peer: see `machine_code`
    barriers: float  # of which each joins all of the program's warps
    waits: float  # for memory, one after another, for the rows that a program takes at a time
    bound: Bound  # an estimate
    load_widths: dict[int, int] = field(default_factory=dict)
    store_widths: dict[int, int] = field(default_factory=dict)
    reads: int | None = None  # None where the machine code does not tell them apart
    writes: int | None = None
    bytes_per_row: int | None = None
    least_bytes: int = 0
    ratio: float | None = None
    options: str = ""  # that are not as by default

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Usage(TypedDict):
    """The fields of a `KernelReport` for what a program takes up."""

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int


class _Cost(TypedDict):
    """Those for what a row costs."""

    instructions: float
    barriers: float
    waits: float
    bound: Bound


def compile_kernel(
    kernel: Any, named: dict[str, Any], options: dict[str, Any], target: GPUTarget
) -> Any:
    """`triton.compile` of a launch's arguments with its compiler options. Triton specialises
    kernels on 16-byte alignment; tensors are taken as aligned so, as torch's allocators make them.
    Raises RuntimeError under TRITON_INTERPRET=1."""
    if not hasattr(kernel, "arg_names") or not hasattr(kernel, "params"):
        raise RuntimeError("the kernels were imported under TRITON_INTERPRET=1: unset it")
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, named[parameter.name]
        if parameter.is_constexpr or value is None or value == ():
            signature[name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, tuple):  # of tensors
            signature[name] = tuple(_POINTER[t.dtype] for t in value)
            attributes |= {(position, k): aligned for k in range(len(value))}
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTER[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(position,)] = aligned
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def report(
    K: int, C: int, dtype: str = "bf16", arch: str = "sm_90", *, gradient: bool = True,
    stats: bool = False, options: Options = Options(),  # noqa: B008
    regime: Regime | None = None, row_stride: int | None = None, tile: Tile | None = None,
    tensor_weights: bool = False, upstream: bool = False, sample_weight: bool = False,
) -> KernelReport:  # fmt: skip
    """Compiles the kernel that a launch of this shape would use, and reads its machine code.

    dtype: "bf16", "fp16", "fp32". arch: one of `TARGETS`. row_stride: elements between rows, C
    unless given. gradient: of the options' students, all peers unless given. tensor_weights:
    temperature and the terms' weights are 0-d tensors, as in a captured step. upstream: the losses'
    own gradient comes in, as where logits are float16. sample_weight: rows have weights.
    Raises RuntimeError under TRITON_INTERPRET=1 and where triton's wheel has no cuobjdump, and
    ValueError for a regime that does not fit.
    """
    N, stride = 64, row_stride or C
    one = torch.ones((), dtype=torch.float32, device="cpu")  # nothing runs
    make = lambda: one.new_empty(N, stride, dtype=DTYPES[dtype])[:, :C]  # noqa: E731
    logits = [make() for _ in range(K)]
    students = range(K) if options.students is None else options.students
    grads = [make() if k in students else None for k in range(K)] if gradient else []
    own = one.new_ones(K) if upstream else None
    weight = one if tensor_weights else 1.0
    regime, tile = choose(
        K, C, options, gradient=gradient, stats=stats, upstream=own, regime=regime, tile=tile,
        size=DTYPES[dtype].itemsize, arch=arch,
    )  # fmt: skip
    kernel, named, warps = arguments(
        logits, torch.zeros(N, dtype=torch.int64, device="cpu"), options, grads=grads,
        want_stats=stats, regime=regime, tile=tile, upstream=own,
        temperature=weight, ce_weight=weight, kl_weight=weight,
        sample_weight=one.new_empty(N) if sample_weight else None,
    )  # fmt: skip
    nvidia = not arch.startswith("gfx")
    compiled = compile_kernel(kernel, named, compiler_options(warps, nvidia), TARGETS[arch])
    code = _code(compiled)
    # Every access runs once for each row block (register rows) or class block (wide rows), in
    # which each of the program's threads moves `width` bytes an instruction. A pass over the rows
    # covers at most the block: the compiler leaves out what lies past the last class altogether.
    size, S = DTYPES[dtype].itemsize, len(students) if gradient else 0
    threads = TARGETS[arch].warp_size * warps
    needed = tile.rows * min(C, tile.block_c) * size / threads  # bytes of one peer
    block = tile.rows * tile.block_c * size
    row = RowCost(
        usual_path(code, row_loop(code, logits_moved), logits_moved, (K * needed, S * needed)),
        logits_moved, threads, (K * block, S * block), math.ceil(C / tile.block_c),
    )  # fmt: skip
    least = C * size * (K + S)
    known = partial(
        KernelReport, kernel=kernel.__name__, K=K, C=C, dtype=dtype, arch=arch, gradient=gradient,
        rows=tile.rows, block_c=tile.block_c, warps=warps, launches=1, least_bytes=least,
        options=_told(options),
    )  # fmt: skip
    usage = _usage(compiled, code)
    at_once = _resident(arch, usage, warps)
    programs = at_once and programs_per_sm(regime, tile, K * C * size, at_once)
    ran = _cost(arch, row, warps, least, programs, share=1 / tile.rows)
    if not nvidia:
        return known(**usage, **ran)
    reads, writes = row.passes(0), row.passes(1) if S else 0
    moved = (K * reads + S * writes) * C * size
    return known(
        **usage, **ran, load_widths=row.widths(0), store_widths=row.widths(1),
        reads=reads, writes=writes, bytes_per_row=moved, ratio=moved / least,
    )  # fmt: skip


def _told(options: Options) -> str:
    """The options that are not as by default."""
    plain = asdict(Options())
    given = {name: value for name, value in asdict(options).items() if value != plain[name]}
    return ", ".join(f"{name}={value}" for name, value in given.items())


def _resident(arch: str, usage: _Usage, warps: int) -> int | None:
    """Programs that a multiprocessor holds at once, where its limits are known."""
    limits = ARCHITECTURES[arch].limits
    if limits is None:
        return None
    return resident_programs(usage["registers"], usage["shared_bytes"], warps, limits)


def _cost(
    arch: str, rows: RowCost, warps: int, row_bytes: int, resident: int | None, share: float
) -> _Cost:
    """What runs for one row, which is `share` of what a program does on the path, and an estimate
    of what bounds it. resident: programs on a multiprocessor at a time."""
    waits, cached = rows.waits()
    return {
        "instructions": rows.total(lambda step: 1) * share,
        "barriers": rows.total(lambda step: step.is_barrier) * share,
        "waits": waits + cached,
        "bound": estimate(
            arch, row_bytes=row_bytes, issued=rows.total(issued) * warps * share,
            waits=waits * share, cached_waits=cached * share, resident=resident,
        ),
    }  # fmt: skip


def augment_report(name: str, dtype: str = "bf16", arch: str = "sm_90") -> KernelReport:
    """The same for the augmentation of one of `AUGMENTED`, as a loader launches it.

    Of the bytes that a resize reads again, most come from the L1 cache: see the kernel.
    """
    stored, what = AUGMENTED[name]
    index = torch.zeros(4, dtype=torch.int64, device="cpu")
    statistics = torch.zeros(stored[2], dtype=torch.float32, device="cpu")
    images = torch.empty(4, *stored, dtype=torch.uint8, device="cpu")
    kernel, named, built_with = augment.arguments(
        images, index, index, statistics, statistics, what, seed=0, epoch=index[:1],
        dtype=DTYPES[dtype],
    )  # fmt: skip
    compiled = compile_kernel(kernel, named, built_with, TARGETS[arch])
    code = _code(compiled)
    warps, tile = built_with["num_warps"], named["ROWS"] * named["COLUMNS"]
    threads = TARGETS[arch].warp_size * warps
    path = usual_path(code, whole(code), pixels_moved, (math.inf, math.inf))
    rows = RowCost(path, pixels_moved, threads, block_bytes=(tile, tile))
    least = bytes_moved(stored, what, DTYPES[dtype].itemsize)
    known = partial(
        KernelReport, kernel=f"augment {name}", K=None, C=None, dtype=dtype, arch=arch,
        gradient=False, rows=named["ROWS"], block_c=named["COLUMNS"], warps=warps, launches=1,
        least_bytes=least,
    )  # fmt: skip
    usage = _usage(compiled, code)
    programs = math.ceil(what.height / named["ROWS"])  # of an image
    ran = _cost(arch, rows, warps, least, _resident(arch, usage, warps), share=programs)
    if arch.startswith("gfx"):
        return known(**usage, **ran)
    loads, stores = rows.widths(0), rows.widths(1)
    stores = dict(Counter(stores) - Counter({8: 1}))  # the label
    size, image = DTYPES[dtype].itemsize, what.height * what.width * stored[2]

    pixels = named["ROWS"] * what.width * stored[2]  # of a tile, whose other lanes are masked

    def passes(widths: dict[int, int], each: int, expected: int) -> int:
        """How often the instructions move a tile's pixels, of `each` bytes. Masked lanes leave this
        uncertain: `expected` is returned where the bytes moved allow it."""
        covered = sum(width * count for width, count in widths.items()) * 32 * warps // each
        fits = expected * pixels <= covered <= expected * tile
        return expected if fits else math.ceil(covered / pixels)

    resized = (what.height, what.width) != stored[:2]
    reads = passes(loads, 1, 4 if resized else 1) * image // math.prod(stored)
    writes = passes(stores, size, 1)
    moved = reads * math.prod(stored) + writes * image * size
    return known(
        **usage, **ran, load_widths=loads, store_widths=stores,
        reads=reads, writes=writes, bytes_per_row=moved, ratio=moved / least,
    )  # fmt: skip


def _code(compiled: Any) -> list[Instruction]:
    if "amdgcn" in compiled.asm:
        return parse_amdgcn(compiled.asm["amdgcn"])
    return parse_sass(cuobjdump(compiled, "-sass"))


def _usage(compiled: Any, code: Sequence[Instruction]) -> _Usage:
    if "amdgcn" in compiled.asm:
        return _amdgcn_usage(compiled)
    printed = cuobjdump(compiled, "-res-usage")
    return {
        "registers": _number(r"REG:(\d+)", printed),
        "stack_bytes": _number(r"STACK:(\d+)", printed),
        "spills": sum(step.name in ("LDL", "STL") for step in code),
        "shared_bytes": compiled.metadata.shared,
    }


def _amdgcn_usage(compiled: Any) -> _Usage:
    def number(key: str) -> int:
        return _number(rf"\.{key}:\s*(\d+)", compiled.asm["amdgcn"])

    return {
        "registers": number("vgpr_count"),
        "stack_bytes": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "shared_bytes": compiled.metadata.shared,
    }


def _number(pattern: str, text: str) -> int:
    """The number that the pattern's group matches first."""
    return int(re.findall(pattern, text)[0])


Shape = tuple[int, int] | tuple[int, int, Options] | str
STUDENT = Options(students=(0,))  # plain distillation, where there is one other peer
SHAPES: tuple[Shape, ...] = (
    (2, 10), (2, 100), (3, 100), (4, 100), (8, 100), (2, 751), (4, 751), (2, 1000), (4, 1000),
    (8, 1000), (4, 2048), (2, 21841), (2, 32768), (4, 32768), (8, 32768), (2, 128256),
    (2, 100, STUDENT), (2, 1000, STUDENT), (2, 32768, STUDENT), (2, 128256, STUDENT),
    *((2, 1000, Options(divergence=name)) for name in ("reverse", "jeffreys", "jsd")),
    (2, 32768, Options(divergence="reverse")), (2, 32768, Options(divergence="jsd")),
    "cifar", "market",
)  # fmt: skip


def reports(
    shapes: Sequence[Shape] = SHAPES,
    dtypes: Sequence[str] = ("bf16",),
    archs: Sequence[str] = tuple(TARGETS),
) -> list[KernelReport]:
    """Reports for every combination; a shape is (K, C) of a loss with gradient, with options where
    there are some, or a name among `AUGMENTED`."""
    return [
        augment_report(shape, dtype, arch) if isinstance(shape, str)
        else report(shape[0], shape[1], dtype, arch, options=(*shape, Options())[2])
        for shape in shapes for dtype in dtypes for arch in archs
    ]  # fmt: skip


def table(rows: Sequence[KernelReport]) -> str:
    """Fixed columns, one kernel a line."""

    def widths(counts: dict[int, int]) -> str:
        return ",".join(f"{width}Bx{count}" for width, count in counts.items()) or "-"

    def known(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    lines = [
        f"{'kernel':14}{'K':>3}{'C':>8} {'dtype':6}{'arch':8}{'tile':>12}{'warps':>6}"
        f"{'regs':>6}{'stack':>6}{'spills':>7}{'shared':>7}  {'loads':14}{'stores':14}"
        f"{'reads':>6}{'writes':>7}{'ratio':>6}{'instr':>9}{'bars':>8}{'waits':>6}  bound"
    ]
    for r in rows:
        tile = f"{r.rows}x{r.block_c}"
        lines.append(
            f"{r.kernel:14}{known(r.K):>3}{r.C or '-':>8} {r.dtype:6}{r.arch:8}{tile:>12}"
            f"{r.warps:>6}{r.registers:>6}{r.stack_bytes:>6}{r.spills:>7}{r.shared_bytes:>7}  "
            f"{widths(r.load_widths):14}{widths(r.store_widths):14}"
            f"{known(r.reads):>6}{known(r.writes):>7}{known(r.ratio):>6}"
            f"{r.instructions:>9.0f}{r.barriers:>8.4g}{r.waits:>6.3g}  "
            f"{r.bound.name} {r.bound.share:.0%}" + (f"  {r.options}" if r.options else "")
        )
    products = (f"{ARCHITECTURES[arch].product} for {arch}" for arch in {r.arch: 0 for r in rows})
    return "\n".join([*lines, "", LEGEND.format(products=", ".join(products))])


LEGEND = """\
instr, bars: instructions that each warp runs for a row of every peer, and barriers among them
waits: for memory, one after another, for the rows that a program takes at a time
bound: an estimate, nothing is measured: what takes longest of bytes, instruction issue and memory
latency by data sheets, and the share of the memory's bandwidth that it allows, on
{products}"""
