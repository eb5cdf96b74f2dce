"""Links between devices: what their makers state, and what one who measured his own gives instead.

A stated speed is a line rate. What a collective reaches is less: measure it (NVIDIA's nccl-tests
print it as bus bandwidth) and give it as `bandwidth`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from fastdml.errors import InputError
from fastdml.names import advice

NCCL = (
    "hop and start: constants of NCCL's own cost model for rings under its Simple protocol "
    "(github.com/NVIDIA/nccl, src/graph/tuning.cc, commit 01afd20)"
)
H100 = "NVIDIA H100's data sheet (nvidia.com/en-us/data-center/h100)"


@dataclass(frozen=True)
class Link:
    """What carries data between two devices.

    bandwidth: bytes a second, in one direction. hop: seconds from a device to the next.
    start: seconds that a collective takes before anything moves.
    """

    name: str
    bandwidth: float
    hop: float = 0.0
    start: float = 0.0
    source: str = "given"

    def __post_init__(self) -> None:
        for name, least in (("bandwidth", "above 0"), ("hop", "0 or more"), ("start", "0 or more")):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0) or (name == "bandwidth" and not value):
                raise InputError(f"the link's {name} must be {least}, not {value!r}")

    def shared(self, groups: int) -> Link:
        """What one of so many groups has that send over it at the same time."""
        return dataclasses.replace(self, bandwidth=self.bandwidth / groups)


LINKS = {
    link.name: link
    for link in (
        Link(
            "nvlink", 450e9, 3.4e-6, 8.4e-6,
            f"900 GB/s in both directions together, {H100}; {NCCL}, NVLINK",
        ),
        Link(
            "pcie", 64e9, 5.7e-6, 8.4e-6,
            f"PCIe 5.0 x16, 128 GB/s in both directions together, {H100}; {NCCL}, PCI",
        ),
        Link(
            "ethernet100", 12.5e9, 9.6e-6, 8.4e-6,
            f"100 Gbit/s in each direction (IEEE 802.3ba and its successors); {NCCL}, NET",
        ),
    )
}  # fmt: skip


def find_link(name: str, *, bandwidth: float | None = None, latency: float | None = None) -> Link:
    """The link of that name, with what was measured in place of what is stated.

    bandwidth: GB (1e9 bytes) a second in one direction, as one collective reaches it.
    latency: microseconds a hop.

    Raises InputError for an unknown name and for values that no link has.
    """
    if name not in LINKS:
        raise InputError(f"no link is called {name!r}; {advice(name, LINKS)}")
    link = LINKS[name]
    if bandwidth is None and latency is None:
        return link
    said = [f"{bandwidth:g} GB/s"] if bandwidth is not None else []
    said += [f"{latency:g} us a hop"] if latency is not None else []
    return dataclasses.replace(
        link,
        bandwidth=link.bandwidth if bandwidth is None else 1e9 * bandwidth,
        hop=link.hop if latency is None else 1e-6 * latency,
        source=f"given: {', '.join(said)}; else {link.source}",
    )
