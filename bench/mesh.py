"""Steps on a mesh of two and four processes, beside what the cost model says of them.

python -m bench.mesh [--json FILE] [--only NAME ...]      measures (as root, on Linux) and prints
python -m bench.mesh --table FILE                         prints what a file holds

All processes share the CPUs of one machine, on gloo. Where their number would decide, peers sleep
in place of computing: their passes take a time that no other process changes. Each rank has a
network namespace of its own, with a device that counts what it sends; a bridge joins them. Links
are as fast as the machine makes them, or slowed down by the kernel's token bucket filter (tc-tbf).
What the model is given, and a file holds, is measured without a mesh: each peer's passes in one
process, and between the ranks how long a small broadcast takes and, of the fast link, a large one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench import report
from fastdml import Cohort, MutualLoss, parallel
from fastdml.engine import make_optimizer, make_step
from fastdml.plan import Batch, Layout, Line, Link, PeerCost, costs, measure

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 4
WARM, STEPS = 4, 12
TRIES = 10  # a second each, of which the fastest counts: others use the CPUs too
SMALL, LARGE = 4, 8 << 20  # bytes of the two broadcasts from which a link is known
SLOW = 25e6  # bytes a second that a rank sends over the slow link
# $1: ranks, $2: what slows down each one's device, then the command that each runs.
NETWORK = """
set -e; ranks=$1; slow=$2; shift 2
mount -t tmpfs tmpfs /run; mkdir /run/netns
ip link add bridge type bridge; ip link set bridge up
for r in $(seq $ranks); do
  ip netns add rank$r; ip link add to$r type veth peer name eth0 netns rank$r
  ip link set to$r mtu 9000 master bridge up
  ip -n rank$r link set lo up; ip -n rank$r addr add 10.0.0.$r/24 dev eth0
  ip -n rank$r link set eth0 mtu 9000 up
  [ -z "$slow" ] || tc -n rank$r qdisc add dev eth0 root tbf $slow
done
for r in $(seq $ranks); do
  RANK=$((r - 1)) WORLD_SIZE=$ranks LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=10.0.0.1 \
    MASTER_PORT=29500 GLOO_SOCKET_IFNAME=eth0 ip netns exec rank$r "$@" & running="$running $!"
done
for one in $running; do wait $one; done
"""


@dataclass(frozen=True)
class Case:
    """A cohort on a mesh. peers: names of networks, or (forward ms, MB of weights) of a peer that
    sleeps so long for 64 images, in proportion for fewer, and twice as long in its backward
    pass."""

    name: str
    peers: tuple[Any, ...]
    peer: int
    data: int
    classes: int = 100
    batch: int = 64
    parts: int = 1
    slow: bool = False

    @property
    def world(self) -> int:
        return self.peer * self.data

    @property
    def computes(self) -> bool:
        return isinstance(self.peers[0], str)


def _cases() -> list[Case]:
    found = []
    sleeping, three = ((30.0, 4.0),) * 2, ((30.0, 4.0), (20.0, 2.0), (40.0, 4.0))
    for slow in (False, True):
        link = "slow link" if slow else "fast link"
        for classes in (100, 10_000):
            found += [
                Case(f"2 peers, C {classes:,}, {link}", sleeping, 2, 1, classes, slow=slow),
                Case(
                    f"2 peers, C {classes:,}, accumulate 2, {link}",
                    sleeping, 2, 1, classes, parts=2, slow=slow,
                ),
            ]  # fmt: skip
        found += [
            Case(f"2 columns, {link}", sleeping, 1, 2, slow=slow),
            Case(f"2 columns, accumulate 2, {link}", sleeping, 1, 2, parts=2, slow=slow),
            Case(f"3 unequal peers on 2 rows, C 10,000, {link}", three, 2, 1, 10_000, slow=slow),
            Case(f"4 peers, C 10,000, {link}", sleeping * 2, 4, 1, 10_000, slow=slow),
            Case(f"4 columns, {link}", sleeping, 1, 4, slow=slow),
            Case(f"2 x 2, C 10,000, {link}", sleeping, 2, 2, 10_000, slow=slow),
        ]
    networks = ("resnet20", "resnet20")
    return [
        *found,
        Case("2 resnet20, one a process, fast link", networks, 2, 1),
        Case("2 resnet20, two columns, fast link", networks, 1, 2),
    ]


# --- peers that sleep ---


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,) = ctx.saved_tensors
        time.sleep(2 * ctx.seconds)
        return grads[0], torch.full_like(weight, 1e-9), None


class Sleeper(nn.Module):
    """Logits (N, C) that do not depend on the images, after layers that sleep."""

    def __init__(self, ms: float, megabytes: float, classes: int, seed: int) -> None:
        super().__init__()
        self.seconds = ms / 1e3 / 64 / LAYERS  # an image and layer
        count = int(megabytes * 1e6 / 4 / LAYERS)
        self.layers = nn.ParameterList(torch.zeros(count) for _ in range(LAYERS))
        self.bias = nn.Parameter(torch.full((1,), 1e-3 * (1 + seed)))
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        z = self.bias
        for layer in self.layers:
            z = _Sleep.apply(z, layer, self.seconds * len(x))
        return z.expand(len(x), self.classes)


def cohort_of(case: Case) -> Cohort:
    peers = [
        p if isinstance(p, str) else Sleeper(*p, case.classes, k) for k, p in enumerate(case.peers)
    ]
    return Cohort(peers, case.classes).to(memory_format=torch.channels_last)


def images_of(case: Case, rows: int) -> tuple[Tensor, Tensor]:
    side = 32 if case.computes else 1
    images = torch.randn(rows, 3, side, side).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(rows) % case.classes


# --- what the model is given ---


def single(case: Case) -> tuple[list[PeerCost], Line]:
    """Each peer's costs and the loss's, measured in this process alone."""
    torch.set_num_threads(1)
    share = case.batch // case.data // case.parts
    sizes = list(dict.fromkeys((case.batch, share)))
    found = []
    cohort = cohort_of(case)
    for name, peer in zip(cohort.names, cohort.peers, strict=True):
        alone = Cohort([peer], case.classes)
        nbytes = sum(w.nbytes for w in peer.parameters())
        batches = [images_of(case, n)[0] for n in sizes]
        rounds = []
        for _ in range(TRIES if case.computes else 1):
            times = measure.lines(alone, batches, "off", "sgd")
            rounds.append(PeerCost(name, *times, nbytes, nbytes, nbytes, Line(0.0, 0.0)))
        found.append(min(rounds, key=lambda cost: sum(map(cost.seconds, sizes))))
    K = len(case.peers)
    return found, measure.loss_seconds(K, case.classes, sizes, torch.device("cpu"))


def link_of(found: dict[str, Any], case: Case) -> Link:
    """As measured between the ranks; of the slow one the rate that was set."""
    return Link("measured", SLOW if case.slow else found["bandwidth"], 0.0, found["small"])


# --- on the ranks ---


def job(file: str, out: str) -> None:
    """All cases of a file on the ranks that were started; rank 0 writes what was measured."""
    torch.set_num_threads(1)
    found = {}
    for fields in json.loads(Path(file).read_text()):
        case = Case(**{**fields, "peers": tuple(_hashable(p) for p in fields["peers"])})
        found[case.name] = _measured(case)
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _hashable(peer: Any) -> Any:
    return peer if isinstance(peer, str) else tuple(peer)


def _measured(case: Case) -> dict[str, Any]:
    mesh = parallel.make_mesh(peer=case.peer, data=case.data, device="cpu")
    small, bandwidth = _link()
    cohort = cohort_of(case)
    mesh.distribute(cohort)
    optimizer = make_optimizer(cohort, "sgd", lr=1e-3)
    step = make_step(
        cohort, MutualLoss(), optimizer, execution="eager", amp="off", accumulate=case.parts,
        mesh=mesh,
    )  # fmt: skip
    batch = images_of(case, case.batch // case.data)
    for _ in range(WARM):
        step(*batch)
    dist.barrier()
    logits, wire = step.exchange.sent, _carried()
    dist.barrier()
    times = []
    steps = 4 * STEPS if case.computes else STEPS
    for _ in range(steps):
        start = time.perf_counter()
        step(*batch)
        times.append(time.perf_counter() - start)
    logits = step.exchange.sent - logits
    dist.barrier()
    wire = _carried() - wire
    sent = torch.tensor([logits, wire])
    dist.all_reduce(sent)
    return {
        "small": small, "bandwidth": bandwidth, "rows": list(mesh.rows),
        "median": statistics.median(times), "fastest": min(times),
        "logits": sent[0].item() / steps, "wire": sent[1].item() / steps,
    }  # fmt: skip


def _link() -> tuple[float, float]:
    """Seconds of a broadcast of next to nothing, and bytes a second of a large one."""
    times = {}
    for nbytes in (SMALL, LARGE):
        tensor, rounds = torch.zeros(nbytes // 4), []
        for _ in range(7 if nbytes == SMALL else 3):
            dist.barrier()
            start = time.perf_counter()
            dist.broadcast(tensor, 0)
            dist.barrier()
            rounds.append(time.perf_counter() - start)
        times[nbytes] = min(rounds)
    empty = []
    for _ in range(7):
        dist.barrier()
        start = time.perf_counter()
        dist.barrier()
        empty.append(time.perf_counter() - start)
    small = torch.tensor([max(times[SMALL] - min(empty), 1e-6)])
    large = torch.tensor([times[LARGE] - times[SMALL]])
    dist.broadcast(small, 0)
    dist.broadcast(large, 0)
    return small.item(), LARGE / max(large.item(), 1e-6)


def _carried() -> int:
    """Bytes that the device of this rank has sent."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if "eth0:" in line)


# --- all of it ---


def run(cases: list[Case]) -> dict[str, Any]:
    rows = []
    for slow in (False, True):
        for world in (2, 4):
            chosen = [c for c in cases if (c.slow, c.world) == (slow, world)]
            if not chosen:
                continue
            given = [single(case) for case in chosen]
            measured = _on_ranks(chosen, world, slow)
            rows += [
                _row(case, *own, measured[case.name])
                for case, own in zip(chosen, given, strict=True)
            ]
    where = report.machine(torch.device("cpu"))
    return {"rows": rows, "where": f"{where}, {os.cpu_count()} CPUs", "commit": report.commit()}


def _on_ranks(cases: list[Case], world: int, slow: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder, "cases.json"), Path(folder, "out.json")
        file.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
        slowed = f"rate {8 * SLOW:.0f}bit burst 128kb latency 10s" if slow else ""
        ranks = [sys.executable, "-m", "bench.mesh", "--job", str(file), str(out)]
        subprocess.run(
            ["unshare", "-n", "-m", "sh", "-c", NETWORK, "sh", str(world), slowed, *ranks],
            cwd=ROOT, check=True,
        )  # fmt: skip
        return json.loads(out.read_text())


def _row(case: Case, peers: list[PeerCost], loss: Line, found: dict[str, Any]) -> dict[str, Any]:
    """What was measured of a case, and what the model is given."""
    return {
        **dataclasses.asdict(case),
        "rows": found["rows"],
        "seconds": found["fastest" if case.computes else "median"],
        "logits": found["logits"],
        "wire": found["wire"],
        "costs": [dataclasses.asdict(peer) for peer in peers],
        "loss": loss,
        "link": dataclasses.asdict(link_of(found, case)),
    }


class Predicted(NamedTuple):
    one_device: float  # seconds of a step of all peers on one device, in as many parts
    step: costs.Step
    wire: float  # bytes that all ranks send in a step


def predicted(row: dict[str, Any]) -> Predicted:
    """What the cost model says of a case, from what was measured without a mesh."""
    lines = ("forward", "backward", "activations")
    peers = [
        PeerCost(**{**each, **{name: Line(*each[name]) for name in lines}}) for each in row["costs"]
    ]
    loss, (P, D) = Line(*row["loss"]), (row["peer"], row["data"])
    batch = Batch(row["batch"], row["classes"], 4, row["parts"])
    layout = Layout(tuple(row["rows"]), D)
    step = costs.step(peers, layout, batch, Link(**row["link"]), loss=loss)
    images, parts = row["batch"] / row["parts"], row["parts"]
    alone = sum(p.forward(images) + p.backward(images) for p in peers) + loss(images)
    logits = costs.exchange_bytes(row["batch"], row["classes"], 4)
    gradients = sum(D * costs.all_reduce_bytes(peer.gradients, D) for peer in peers)
    return Predicted(
        parts * alone + sum(p.update for p in peers),
        step,
        (P - 1) * len(peers) * logits + gradients,
    )


def table(rows: list[dict[str, Any]], where: str, commit: str) -> str:
    lines = [
        f"{where}; commit {commit}",
        "ms a step; wire: bytes that all ranks together send in a step, as predicted, as counted",
        "",
        f"{'':<49}{'mesh':<16}{'one device':>11}{'predicted':>10}{'measured':>10}{'ratio':>7}"
        f"{'wire MB':>9}{'counted':>9}",
    ]
    for row in rows:
        said, mesh = predicted(row), f"peer={row['peer']},data={row['data']}"
        lines.append(
            f"{row['name']:<49}{mesh:<16}{1e3 * said.one_device:>11.1f}"
            f"{1e3 * said.step.seconds:>10.1f}{1e3 * row['seconds']:>10.1f}"
            f"{row['seconds'] / said.step.seconds:>7.2f}{said.wire / 1e6:>9.2f}"
            f"{row['wire'] / 1e6:>9.2f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.mesh", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a stored file, no more")
    parser.add_argument("--only", nargs="+", default=[], help="cases with one of these in the name")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job(*arguments.job)
        return 0
    report.check_writable(parser, arguments.json)
    if arguments.table:
        found = json.loads(arguments.table.read_text())
    else:
        cases = [
            case for case in _cases()
            if not arguments.only or any(part in case.name for part in arguments.only)
        ]  # fmt: skip
        found = run(cases)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    print(table(**found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
