"""What the cost model predicts up to 1,024 devices, as docs/scaling.md shows it.

python -m bench.scaling         prints the tables

Nothing is measured here. A peer's step is a round number, 10 ms of 64 images on one device, of
which 1 ms does not shrink with the batch; its size is a ResNet-32's, 1.88 MB of gradients. Eight
devices a node, NVLink between them, 100 Gbit/s Ethernet between nodes, at the speeds that their
makers state.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from fastdml.plan import LINKS, Batch, Candidate, Layout, Line, Link, PeerCost, costs
from fastdml.plan.meshes import Plan, plan_meshes

DEVICES = (1, 2, 4, 8, 16, 64, 256, 1024)
A_NODE = 8
WHOLE, FIXED = 10e-3, 1e-3  # seconds of a step of 64 images
GRADIENTS = 1_880_016  # bytes of a ResNet-32 for 100 classes
NOTICED = 0.05  # of a step: an exchange of less is called free


def peer(name: str = "peer") -> PeerCost:
    """A third of its step is the forward pass."""
    each = (WHOLE - FIXED) / 64
    forward, backward = Line(FIXED / 3, each / 3), Line(2 * FIXED / 3, 2 * each / 3)
    return PeerCost(name, forward, backward, 0.0, GRADIENTS, GRADIENTS, GRADIENTS, Line(0.0, 0.0))


def plan(K: int, devices: int, images: int, classes: int = 100) -> Plan:
    return plan_meshes(
        [peer()] * K, devices, Batch(images, classes, 2), LINKS["nvlink"],
        nodes=max(1, devices // A_NODE), network=LINKS["ethernet100"],
    )  # fmt: skip


def of_all(found: Plan, devices: int, rows: int | None = None) -> Candidate | None:
    """The fastest mesh of all devices, or the one with so many rows."""
    chosen = [c for c in found.candidates if c.layout.devices == devices]
    return next((c for c in chosen if rows in (None, c.layout.peer)), None)


def strong(K: int = 4, images: int = 4096) -> str:
    """One batch on more and more devices."""
    lines = [f"prediction: {K} peers, one batch of {images:,} images, 100 classes, bf16", "", HEAD]
    for devices in DEVICES:
        found = plan(K, devices, images)
        best, columns = of_all(found, devices), of_all(found, devices, rows=1)
        assert best is not None
        lines.append(_line(devices, best, columns, found.single.step.seconds / devices))
    return "\n".join(lines)


def weak(K: int = 4, images: int = 64) -> str:
    """A batch that grows with the devices, `images` of it for each K of them."""
    lines = [
        f"prediction: {K} peers, {images} images times devices / {K}, 100 classes, bf16", "", HEAD
    ]  # fmt: skip
    for devices in (d for d in DEVICES if d >= K):
        whole = images * devices // K
        found = plan(K, devices, whole)
        best, columns = of_all(found, devices), of_all(found, devices, rows=1)
        assert best is not None
        lines.append(_line(devices, best, columns, found.single.step.seconds / devices))
    return "\n".join(lines)


HEAD = (
    f"{'devices':>7}  {'fastest mesh':<18}{'step ms':>9}{'waits ms':>10}{'efficiency':>12}"
    f"{'data alone ms':>15}"
)


def _line(devices: int, best: Candidate, columns: Candidate | None, ideal: float) -> str:
    step = best.step
    alone = f"{1e3 * columns.step.seconds:.2f}" if columns else "-"
    return (
        f"{devices:>7,}  {best.mesh:<18}{1e3 * step.seconds:>9.2f}"
        f"{1e3 * (step.exchange + step.reduction):>10.2f}{ideal / step.seconds:>12.0%}{alone:>15}"
    )


def exchange(images: int = 64, most: int = 1024) -> str:
    """A device a peer: from how many peers on the exchange of logits is no longer free."""
    lines = [
        f"prediction: a device a peer, {images} images, bf16: the number of peers from which the",
        f"exchange takes more than {NOTICED:.0%} of a step; in brackets with accumulate 2",
        "",
        f"{'classes':>9}{'bytes a peer':>14}"
        + "".join(f"{name:>20}" for name in ("nvlink", "pcie", "ethernet100")),
    ]
    for classes in (100, 1000, 32_000):
        cells = []
        for name in ("nvlink", "pcie", "ethernet100"):
            one, two = (first_noticed(images, classes, LINKS[name], p, most) for p in (1, 2))
            cells.append(f"{_count(one, most)} ({_count(two, most)})")
        nbytes = costs.exchange_bytes(images, classes, 2)
        lines.append(f"{classes:>9,}{nbytes:>14,}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def _count(found: int | None, most: int) -> str:
    return f"> {most:,}" if found is None else f"{found:,}"


def first_noticed(images: int, classes: int, link: Link, parts: int, most: int) -> int | None:
    """The least number of peers, a device each, whose exchange is more than `NOTICED` of a step."""

    def noticed(K: int) -> bool:
        batch = Batch(images, classes, 2, parts)
        step = costs.step([peer()] * K, Layout(tuple(range(K))), batch, link)
        return step.exchange > NOTICED * step.seconds

    if not noticed(most):
        return None
    low, high = 1, most  # a peer more never takes less
    while high - low > 1:
        middle = math.ceil((low + high) / 2)
        low, high = (low, middle) if noticed(middle) else (middle, high)
    return high


TABLES = {"scaling strong": strong, "scaling weak": weak, "scaling exchange": exchange}


def main(names: Sequence[str] = ()) -> int:
    print("\n\n".join(TABLES[name]() for name in names or TABLES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
