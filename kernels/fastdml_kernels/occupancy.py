"""How many programs of a kernel a multiprocessor holds at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

WARP = 32  # threads
# NVIDIA hands out registers to warps, 8 a thread at a time, and to 4 warps at a time; shared memory
# 128 bytes at a time, with 1 KB more a program that the system keeps (CUDA's occupancy calculator).
REGISTERS_STEP, WARPS_STEP, SHARED_STEP, SHARED_KEPT = 8, 4, 128, 1024


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor has; an H100's and a B200's by default."""

    registers: int = 65536
    threads: int = 2048
    shared: int = 228 << 10  # bytes
    programs: int = 32


def resident_programs(
    registers: int,  # a thread
    shared: int,  # bytes a program
    warps: int,  # a program
    limits: Multiprocessor = Multiprocessor(),
) -> int:
    """Programs that a multiprocessor holds at once; 0 where it does not hold one."""
    a_warp = -(-max(registers, 1) // REGISTERS_STEP) * REGISTERS_STEP * WARP
    by_registers = limits.registers // a_warp // WARPS_STEP * WARPS_STEP // warps
    by_threads = limits.threads // (WARP * warps)
    a_program = -(-(shared + SHARED_KEPT) // SHARED_STEP) * SHARED_STEP
    return min(by_registers, by_threads, limits.shared // a_program, limits.programs)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def limits_of(device: torch.device) -> Multiprocessor:
    """What each has, of an NVIDIA device: torch does not tell it of every AMD device."""
    has: Any = torch.cuda.get_device_properties(device)
    return Multiprocessor(
        has.regs_per_multiprocessor,
        has.max_threads_per_multi_processor,
        has.shared_memory_per_multiprocessor,
    )
