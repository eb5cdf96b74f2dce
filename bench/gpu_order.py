"""What the two GPU scripts run, and in which order: what matters most comes first, for the time may
run out.

Each entry is a regular expression that is searched for in a test's id; a test belongs to the first
that fits. What fits none comes after them all.
"""

from __future__ import annotations

import re
from pathlib import Path

# Files whose tests run the kernels on a CUDA device where there is one, and otherwise under
# Triton's interpreter: they are part of the tests on a device without being marked `gpu`.
ON_DEVICE = (
    "tests/kernels/test_augment.py",
    "tests/kernels/test_counters.py",
    "tests/kernels/test_divergences.py",
    "tests/kernels/test_every_path.py",
    "tests/kernels/test_loss_op.py",
    "tests/kernels/test_pairs_of_options.py",
    "tests/kernels/test_register_options.py",
    "tests/kernels/test_register_rows.py",
    "tests/kernels/test_stats_layout.py",
    "tests/kernels/test_teachers_on_every_path.py",
    "tests/kernels/test_wide_rows.py",
    "tests/test_loss.py",
)

TESTS = (
    r"^tests/kernels/test_(register_rows|wide_rows|loss_op|augment)\.py",
    r"^tests/test_(loss|metric_losses)\.py",
    r"^tests/engine/",
    r"^tests/(bench|cohort|data|machine|metrics|train)/",
    r"^tests/kernels/",
    r"^tests/(?!parallel/)",
    r"^tests/parallel/",  # ranks of their own, which share the device
)

BENCHMARKS = (
    r"bench_loss\.py.*-2x64x100-forward_backward-",
    r"bench_loss\.py.*-bfloat16-4x8192x1000-forward_backward-",
    r"bench_loss\.py.*-distillation-forward-",
    r"bench_step\.py.*-2_resnet32-64-",
    r"bench_data\.py::test_kernel\[.*cifar",
    r"bench_step\.py.*-[14]_resnet32-64-",
    r"bench_loss\.py.*-forward_backward-",
    r"bench_end_to_end\.py",
    r"bench_data\.py::test_data\[cifar100-",
    r"bench_loss\.py",
    r"bench_data\.py::test_kernel",
    r"bench_reid\.py::test_(loss|training)",
    r"bench_reid\.py::test_retrieval",
    r"bench_data\.py",
)
# Each compiles for many seconds before it is measured: after all others, in the order above.
COMPILED = r"-cg?\]$"
# Minutes for the rivals alone, which run on the CPU.
LEFT_OUT = r"bench_reid\.py::test_retrieval\[(scores-(distances|distractors)|rerank)-"


def place(test: str, order: tuple[str, ...]) -> int:
    """The place in `order` of what a test belongs to."""
    return next((i for i, each in enumerate(order) if re.search(each, test)), len(order))


def files(root: Path) -> list[str]:
    """The files that may hold a test for a device: to read the others would take as long as many
    tests."""
    found = (root / "tests").rglob("test_*.py")
    names = [str(p.relative_to(root)) for p in found if "pytest.mark.gpu" in p.read_text()]
    return sorted({*names, *ON_DEVICE})


def chosen_tests(ids: list[str], marked: set[str]) -> list[str]:
    """The tests for a device in their order. `marked`: those that are marked `gpu`."""
    chosen = [test for test in ids if test in marked or test.split("::")[0] in ON_DEVICE]
    return sorted(chosen, key=lambda test: place(test, TESTS))


def chosen_benchmarks(ids: list[str]) -> list[str]:
    """The benchmarks for a device in their order."""
    chosen = [test for test in ids if not re.search(LEFT_OUT, test)]
    return sorted(
        chosen, key=lambda test: (bool(re.search(COMPILED, test)), place(test, BENCHMARKS))
    )
