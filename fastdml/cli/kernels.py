"""`fastdml kernels`: what the compiled Triton kernels are made of, and what bounds them."""

from __future__ import annotations

import json

from fastdml.cli.parsing import Parser
from fastdml.errors import InputError
from fastdml.names import advice


def kernels(args: list[str]) -> None:
    """what the compiler made of the kernels: registers, bytes moved, instructions; no GPU needed"""
    parser = Parser("kernels", kernels)
    parser.add_argument(
        "--shapes", nargs="+", metavar="KxC",
        help="peers x classes, such as 2x100 (default: CIFAR to a language model's vocabulary)",
    )  # fmt: skip
    parser.add_argument(
        "--dtypes", nargs="+", default=["bf16"], choices=("bf16", "fp16", "fp32"),
        help="of logits and gradients (default: bf16)",
    )  # fmt: skip
    parser.add_argument(
        "--archs", nargs="+", metavar="ARCH", help="of sm_80 sm_90 sm_100 gfx942 (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as a JSON list")
    options = parser.parse(args)

    from fastdml_kernels import static_report, tiles
    from triton import knobs

    if knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET is set, so that nothing is compiled: unset it")
    archs = options.archs or list(static_report.TARGETS)
    unknown = [arch for arch in archs if arch not in static_report.TARGETS]
    if unknown:
        near = advice(unknown[0], static_report.TARGETS)
        raise InputError(f"no report for {unknown[0]!r}; {near}")
    shapes = [shape(text) for text in options.shapes or ()] or static_report.SHAPES
    try:
        tiles.table()
    except ValueError as error:
        raise InputError(str(error)) from None
    found = static_report.reports(shapes, options.dtypes, archs)
    if options.json:
        print(json.dumps([row.as_dict() for row in found], indent=1))
    else:
        print(static_report.table(found))


def shape(text: str) -> tuple[int, int]:
    """Peers and classes, from text such as 2x100. Raises InputError for any other."""
    try:
        K, C = (int(part) for part in text.lower().split("x"))
    except ValueError:
        K = C = 0
    if K < 1 or C < 1:
        raise InputError(f"--shapes {text!r}: give peers x classes, such as 2x100")
    return K, C
