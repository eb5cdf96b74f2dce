"""How many programs a multiprocessor holds: the answers of CUDA's occupancy calculator."""

import pytest
from fastdml_kernels.occupancy import Multiprocessor, resident_programs

ADA = Multiprocessor(threads=1536, shared=100 << 10, programs=24)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "limits", "programs"),
    [
        (32, 0, 4, Multiprocessor(), 16),  # by threads: 2048 / 128
        (40, 0, 4, Multiprocessor(), 12),  # by registers: 48 warps of 51 by fours
        (64, 0, 4, Multiprocessor(), 8),
        (65, 0, 4, Multiprocessor(), 7),  # 72 a thread: 28 warps
        (128, 0, 4, Multiprocessor(), 4),
        (255, 0, 8, Multiprocessor(), 1),
        (16, 0, 1, Multiprocessor(), 32),  # by programs
        (32, 0, 4, ADA, 12),
        (32, 48 << 10, 4, Multiprocessor(), 4),  # by shared memory: 49 KB of 228
        (32, 48 << 10, 4, ADA, 2),
        (255, 0, 32, Multiprocessor(), 0),  # more registers than there are
    ],
)
def test_the_resource_that_runs_out_first_decides(registers, shared, warps, limits, programs):
    assert resident_programs(registers, shared, warps, limits) == programs
