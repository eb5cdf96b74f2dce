"""A rank that dies, hangs, is stopped or raises ends the others within the timeout, with one line
that names the rank, its peers and the reason."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from fastdml import Cohort
from fastdml.errors import InputError
from fastdml.parallel import RankLost, failure, make_mesh
from fastdml.parallel.failure import Whereabouts, explained, line_of, process_state

TIMEOUT, LOST = 1.0, 2
NAMES = ["resnet8-1", "resnet8-2", "mobilenet"]


def fail(how: str) -> tuple[str, str, float]:
    """Three rows in a loop of broadcasts, as peers' logits travel, in which rank 2 fails: what the
    others raise, its line, and the seconds until then."""
    failure.GRACE = failure.ANSWER = 0.5
    mesh = make_mesh(3, 1, timeout=TIMEOUT)
    mesh.distribute(Cohort(["resnet8", "resnet8", "mobilenet"], 10))
    start = time.monotonic()
    try:
        with explained(mesh):
            for step in range(5):
                if step == 2:
                    start = time.monotonic()
                    if mesh.rank == LOST or how == "all":
                        end(how)
                for k in range(3):
                    dist.broadcast(torch.zeros(5), mesh.owner(k), group=mesh.peer_group_of(k))
    except (Exception, SystemExit) as error:
        return type(error).__name__, line_of(error), time.monotonic() - start
    raise AssertionError("nothing failed")


def end(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hang":
        time.sleep(1000)
    if how == "raise":
        raise ValueError("no such\nimage")
    if how == "exit":
        sys.exit(0)
    raise InputError("labels must be below 10")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("kill", "(was killed by SIGKILL|is gone)"),  # until or after its parent has taken note
        ("stop", "is stopped, as by SIGSTOP"),
        ("hang", "did not answer within 1 s"),
    ],
)
def test_a_rank_that_is_lost(how, reason):
    *found, none = run_ranks(3, fail, how, lost=[LOST])
    assert none is None
    for kind, line, seconds in found:
        assert kind == "RankLost"
        assert re.fullmatch(rf"rank 2 \(peer mobilenet\) {reason}", line)
        assert seconds < TIMEOUT + 5  # that it ends at all: a busy machine takes its time


def test_a_rank_that_raises():
    *others, (kind, line, _) = run_ranks(3, fail, "raise")
    assert kind == "ValueError"
    assert line.startswith("rank 2 (peer mobilenet): ValueError: no such image (test_failure.py")
    assert [other[:2] for other in others] == [("RankLost", line)] * 2


def test_an_input_that_one_rank_refuses():
    *others, (kind, line, _) = run_ranks(3, fail, "refuse")
    assert (kind, line) == ("InputError", "rank 2 (peer mobilenet): labels must be below 10")
    assert [other[:2] for other in others] == [("RankLost", line)] * 2


def test_a_rank_whose_code_exits():
    *others, (kind, _, _) = run_ranks(3, fail, "exit")
    assert kind == "SystemExit"
    line = "rank 2 (peer mobilenet): sys.exit(0)"
    assert [other[:2] for other in others] == [("RankLost", line)] * 2


def test_a_rank_that_took_the_store_with_it():
    """As rank 0 does where no agent holds the store."""

    class Gone:
        def set(self, *_):
            raise dist.DistNetworkError("no store")

    gone = Whereabouts.own()._replace(started="0")
    mesh = SimpleNamespace(
        world=2, rank=1, data=1, names=("a", "b"), rows=(0, 1), store=Gone(), timeout=1.0,
        whereabouts=[gone, Whereabouts.own()],
    )  # fmt: skip
    error = RuntimeError("[gloo] Connection closed by peer")
    assert failure._cause(mesh, error) == "rank 0 (peer a) is gone"


def test_what_all_ranks_refuse_blames_none():
    found = run_ranks(3, fail, "all")
    assert [f[:2] for f in found] == [("InputError", "labels must be below 10")] * 3


def test_one_rank_keeps_its_own_errors():
    mesh = make_mesh()
    with pytest.raises(ValueError, match="as it is") as caught, explained(mesh):
        raise ValueError("as it is")
    assert not isinstance(caught.value, RankLost)
    assert line_of(caught.value).startswith("ValueError: as it is")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "was killed by SIGKILL"),
        (signal.SIGTERM, "was killed by SIGTERM"),
        (40, "was killed by signal 40"),  # a real-time one, which Python has no name for
        (signal.SIGSTOP, "is stopped, as by SIGSTOP"),
        (None, "has ended with code 3"),
    ],
)
def test_what_has_become_of_a_process(number, words):
    code = "import sys; print(flush=True); sys.stdin.read(); sys.exit(3)"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child.stdout.readline()
    try:
        place = Whereabouts.own()._replace(pid=child.pid, started=process_state(child.pid)[1])
        assert place.fate() is None
        if number:
            child.send_signal(number)
        else:
            child.stdin.close()
        while (fate := place.fate()) is None:
            time.sleep(0.01)
        assert fate == words
        place.kill()
        assert place._replace(machine="another").fate() is None
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert place.fate() == "is gone"
    assert Whereabouts.own()._replace(started="0").fate() == "is gone"  # the number is another's
