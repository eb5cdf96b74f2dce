"""An estimate of what bounds a kernel on a GPU: bytes, instruction issue or memory latency.

Three least times for a row come of the machine code's numbers and the data sheet's:

- bytes: what must move, by the memory's bandwidth;
- issue: the warps' instructions, by the instructions that the multiprocessors' schedulers start;
- latency: the waits for memory that follow upon one another, by the programs that wait at a time
  (Little's law: bytes under way = bandwidth * latency).

The longest bounds the kernel, given so many rows that every multiprocessor is full. Nothing here is
measured: schedulers stall for other reasons too, and a kernel is slower than its bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from .occupancy import Multiprocessor


@dataclass(frozen=True)
class Architecture:
    """The product taken for an architecture. Each number's source stands beside it."""

    product: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second, from and to device memory
    issued: float  # instructions that a multiprocessor's schedulers start in a clock
    latency: float | None  # clocks from a load to its data from device memory; None: not estimated
    cached_latency: float | None  # the same from the L2 cache
    limits: Multiprocessor | None  # of programs at a time, where latency is estimated


# Schedulers: four a multiprocessor, each starts one instruction a clock (CUDA C++ Programming
# Guide, "Compute Capabilities"). Latencies: Luo et al., "Benchmarking and Dissecting the Nvidia
# Hopper GPU Architecture", arXiv 2402.13499, rounded to tens.
ARCHITECTURES = {
    "sm_80": Architecture(
        "A100 SXM 80 GB",
        multiprocessors=108, clock=1.41e9,  # NVIDIA A100 Tensor Core GPU Architecture, table 4
        bandwidth=2.039e12,  # NVIDIA A100 data sheet
        issued=4, latency=470, cached_latency=260, limits=Multiprocessor(shared=164 << 10),
    ),
    "sm_90": Architecture(
        "H100 SXM 80 GB",
        multiprocessors=132,  # NVIDIA H100 Tensor Core GPU Architecture, table 3
        clock=1.98e9,  # NVIDIA H100 data sheet: 67 TFLOP/s in float32, 256 a multiprocessor's clock
        bandwidth=3.35e12,  # NVIDIA H100 data sheet
        issued=4, latency=480, cached_latency=260, limits=Multiprocessor(),
    ),
    "sm_100": Architecture(
        "B200",
        # Chips and Cheese, "Nvidia's B200: Keeping the CUDA Juggernaut Rolling", which also has the
        # clock, as H100 SXM's
        multiprocessors=148, clock=1.98e9,
        bandwidth=8e12,  # NVIDIA HGX B200 data sheet
        issued=4, limits=Multiprocessor(),
        latency=480, cached_latency=260,  # H100's, for want of a source
    ),
    "gfx942": Architecture(
        "MI300X",
        multiprocessors=304, clock=2.1e9, bandwidth=5.3e12,  # AMD Instinct MI300X data sheet
        # Four SIMDs of 16 lanes take four clocks for a wave's vector instruction (AMD CDNA 3 white
        # paper). Scalar instructions start beside them.
        issued=1, latency=None, cached_latency=None, limits=None,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """Least times for a row of every peer, in nanoseconds, and which of them is the longest. share:
    of the data sheet's bandwidth, what the longest allows."""

    name: str
    bytes_ns: float
    issue_ns: float
    latency_ns: float | None
    share: float
    resident: int | None  # programs on a multiprocessor at a time


def estimate(
    arch: str, *, row_bytes: float, issued: float, waits: float, cached_waits: float,
    resident: int | None,
) -> Bound:  # fmt: skip
    """For a row of every peer: row_bytes to and from device memory, instructions issued by all
    warps together, and how often a program waits for device memory and for the L2 cache, where
    `resident` programs wait at a time on a multiprocessor."""
    gpu = ARCHITECTURES[arch]
    times: dict[str, float] = {
        "bytes": row_bytes / gpu.bandwidth,
        "issue": issued / (gpu.issued * gpu.multiprocessors * gpu.clock),
    }
    if gpu.latency is not None and gpu.cached_latency is not None and resident:
        clocks = waits * gpu.latency + cached_waits * gpu.cached_latency
        times["latency"] = clocks / gpu.clock / (resident * gpu.multiprocessors)
    name = max(times, key=lambda kind: times[kind])
    latency = times.get("latency")
    return Bound(
        name, times["bytes"] * 1e9, times["issue"] * 1e9,
        None if latency is None else latency * 1e9, times["bytes"] / times[name], resident,
    )  # fmt: skip
