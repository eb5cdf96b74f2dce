"""What ended a job: one line that names the rank, its peers and the reason.

A rank that fails leaves a note in the job's store, and then ends. A rank whose collective fails
because of another one looks for such a note; where there is none, for ranks of its own machine that
are dead or stopped; then for those that do not report within `GRACE`, since whoever waits for a
rank that hangs gives up at about the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist

from fastdml.errors import InputError, one_line
from fastdml.parallel import ending, processes
from fastdml.parallel.processes import RankLost

if TYPE_CHECKING:
    from fastdml.parallel.mesh import Mesh

GRACE = 2.0  # seconds in which the ranks that still live report
ANSWER = 3.0  # seconds in which a store that can be reached answers
# What errors of collectives say which torch raises as a RuntimeError.
OF_COLLECTIVES = ("gloo", "Connection closed by peer", "Timed out waiting", "NCCL")
NOTE, TOLD = "failed", "told"
TOGETHER = 0.5  # seconds in which ranks that fail alike do so
BLOCKS = count()  # of this process, which the other ranks enter too


@contextlib.contextmanager
def explained(mesh: Mesh) -> Iterator[None]:
    """In this block an error of a collective becomes RankLost. Other errors go on as they are, and
    leave a note, so that the other ranks say why they end; `line_of` has it. All ranks enter such
    blocks in the same order: each has keys of its own in the store, so that what one left says
    nothing to the next, where a script goes on after a refusal."""
    store = mesh.store
    mesh.store = dist.PrefixStore(f"block{next(BLOCKS)}", store)
    try:
        yield
    except RankLost:
        ending.failed()
        raise
    except SystemExit as stop:
        if type(stop) is SystemExit and mesh.world > 1:  # of somebody else's code, on this rank
            ending.failed()
            text = f"{describe(mesh, mesh.rank)}: sys.exit({stop.code!r})"
            within(1.0, lambda: _note(mesh.store, text))
        raise
    except Exception as error:
        if mesh.world == 1:
            raise
        ending.failed()
        if not isinstance(error, InputError) and of_collective(error):
            raise RankLost(_cause(mesh, error)) from error
        text = str(error) if isinstance(error, InputError) else one_line(error)
        if not within(2 * TOGETHER + 1, lambda: "yes" if _all_say(mesh, text) else None):
            text = f"{describe(mesh, mesh.rank)}: {text}"
        error.__dict__["line"] = text
        within(1.0, lambda: _note(mesh.store, text))
        raise
    finally:
        mesh.store = store


def line_of(error: BaseException) -> str:
    """An error that left `explained` in one line, with the rank where not all ranks raised it."""
    text = str(error) if isinstance(error, (InputError, RankLost)) else one_line(error)
    return error.__dict__.get("line", text)


def _all_say(mesh: Mesh, text: str) -> bool:
    """Whether all ranks end with the same words: then no rank is to blame."""
    mesh.store.set(f"says/{mesh.rank}", text)
    keys = [f"says/{rank}" for rank in range(mesh.world)]
    end = time.monotonic() + TOGETHER
    while not mesh.store.check(keys):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return all(said.decode() == text for said in mesh.store.multi_get(keys))


def of_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised it, and so most often because of another rank."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in OF_COLLECTIVES)


def raise_if_noted(mesh: Mesh) -> None:
    """Raises RankLost where a rank has left a note; for whoever waits for another by himself."""
    if mesh.store.check([NOTE]):
        raise RankLost(mesh.store.get(NOTE).decode())


def describe(mesh: Mesh, rank: int) -> str:
    """Such as "rank 3 (peers resnet32-2, mobilenet)"."""
    row = rank // mesh.data
    names = [name for name, at in zip(mesh.names, mesh.rows, strict=False) if at == row]
    place = mesh.whereabouts[rank]
    host = f" on {place.host}" if place.machine != mesh.whereabouts[mesh.rank].machine else ""
    noun = "peer" if len(names) == 1 else "peers"
    return f"rank {rank}{host}" + (f" ({noun} {', '.join(names)})" if names else "")


def _note(store: dist.Store, text: str) -> str:
    """Leaves a note unless there is one, and returns the one that counts."""
    return store.compare_set(NOTE, "", text).decode()


# ---- which rank it was


def _cause(mesh: Mesh, error: Exception) -> str:
    found = within(GRACE + ANSWER, lambda: _look(mesh, error))
    if found is not None:
        return found
    # The store is out of reach: it may have ended with the rank that held it, or with the agent.
    if fates := _fates(mesh):
        return _told(mesh, fates)
    own = mesh.whereabouts[mesh.rank].machine
    far = [r for r, place in enumerate(mesh.whereabouts) if place.machine != own]
    what = "no contact with the job's store"
    if far:
        what += f" nor with {_listed(mesh, far)}"
    return f"{what}: {_waited(mesh, error)}"


def _look(mesh: Mesh, error: Exception) -> str:
    """The line that all ranks agree on. Kills ranks of this machine that hang, which would else
    outlive the job by the 30 seconds that torchrun gives them."""
    others = [rank for rank in range(mesh.world) if rank != mesh.rank]
    mesh.store.set(f"reports/{mesh.rank}", "")
    end = time.monotonic() + GRACE
    while True:
        fates = _fates(mesh)
        if mesh.store.check([NOTE]):
            return mesh.store.get(NOTE).decode()
        silent = [r for r in others if not mesh.store.check([f"reports/{r}"])]
        if fates or not silent or time.monotonic() > end:
            break
        time.sleep(0.05)
    if fates:
        text = _told(mesh, fates)
        silent = [*fates]
    elif silent:
        text = f"{_listed(mesh, silent)} {_waited(mesh, error)}"
    else:
        text = f"{describe(mesh, mesh.rank)}: the ranks lost each other: {one_line(error)}"
    agreed = _note(mesh.store, text)
    if agreed == text:
        for rank in silent:
            mesh.whereabouts[rank].kill()
    return agreed


def _fates(mesh: Mesh) -> dict[int, str]:
    """What has become of other ranks that no longer run, as far as it is seen from here."""
    others = [rank for rank in range(mesh.world) if rank != mesh.rank]
    return {rank: fate for rank in others if (fate := mesh.whereabouts[rank].fate())}


def _told(mesh: Mesh, fates: dict[int, str]) -> str:
    return " and ".join(f"{describe(mesh, rank)} {fate}" for rank, fate in fates.items())


def _listed(mesh: Mesh, ranks: list[int]) -> str:
    *first, last = [describe(mesh, rank) for rank in ranks]
    return f"{', '.join(first)} and {last}" if first else last


def _waited(mesh: Mesh, error: Exception) -> str:
    late = "imed out" in str(error) or "imeout" in str(error)
    return f"did not answer within {mesh.timeout:g} s" if late else "closed the connection"


def within(seconds: float, function: Callable[[], str | None]) -> str | None:
    """What a function returns, or None where that takes longer: a store behind a link that is cut
    may never answer."""
    answers: list[str | None] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # of a store that is gone
            answers.append(function())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


# ---- processes of this machine


class Whereabouts(NamedTuple):
    """The process of a rank. machine: what processes that see each other have in common. started:
    by the kernel's clock, since numbers of processes are used again."""

    host: str
    machine: str
    pid: int
    started: str

    @classmethod
    def own(cls) -> Whereabouts:
        pid = os.getpid()
        _, started, _ = process_state(pid) or ("", "", 0)
        return cls(socket.gethostname(), _machine(), pid, started)

    def fate(self) -> str | None:
        """What has become of the process, in words; None while it runs, or where it is not seen
        from here."""
        if not self.started or self.machine != _machine():
            return None
        state, started, code = process_state(self.pid) or ("", "", 0)
        if started != self.started:
            return "is gone"
        if state in "ZX":
            number = code & 127
            if number:
                return f"was killed by {signal_name(number)}"
            return f"has ended with code {code >> 8}"
        return "is stopped, as by SIGSTOP" if state in "Tt" else None

    def kill(self) -> None:
        if self.started and self.machine == _machine():
            _, started, _ = process_state(self.pid) or ("", "", 0)
            if started == self.started:
                with contextlib.suppress(OSError):
                    os.kill(self.pid, signal.SIGKILL)


def process_state(pid: int) -> tuple[str, str, int] | None:
    """A process's state as one letter, when it started, and the status with which it ended, from
    Linux's /proc; None where there is no such process, or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19], int(fields[49])


def signal_name(number: int) -> str:
    """Also of real-time signals, for most of which Python has no name."""
    names = {int(known): known.name for known in signal.Signals}
    return names.get(number, f"signal {number}")


def _machine() -> str:
    """Of one machine, one container and one network: what a link that is cut does not divide."""
    parts = []
    for name in ("/proc/self/ns/pid", "/proc/self/ns/net"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(name))
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    return " ".join([socket.gethostname(), *parts])


# ---- the last word of a rank


def tell(line: str) -> bool:
    """Whether this rank is to print the line that ends it: the first of its machine is. It goes
    into torchrun's report too, which the agent prints when all have ended."""
    _into_report(line)
    node = os.environ.get("GROUP_RANK", "0")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = os.environ.get("RANK", "0")

    def first() -> str:
        store = processes.reachable_store()
        if store is None:
            return own
        return store.compare_set(f"{TOLD}/{node}/{attempt}", "", own).decode()

    teller = within(ANSWER, first)
    if teller is None:  # the store is out of reach
        return os.environ.get("LOCAL_RANK", "0") == "0"
    return teller == own


def _into_report(line: str) -> None:
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"timestamp": str(int(time.time())), "py_callstack": line}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}))
