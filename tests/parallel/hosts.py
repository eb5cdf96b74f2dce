"""Two "hosts" on one machine: network namespaces of Linux, joined by a link that can be cut."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

CLONE_NEWNET = 0x40000000


class Host(NamedTuple):
    name: str  # of the namespace
    link: str  # of its end of the link
    address: str


def possible() -> bool:
    """Whether this user may make network namespaces."""
    if os.geteuid() or not shutil.which("ip"):
        return False
    name = f"fdml{os.getpid()}t"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        _ip("netns", "del", name)
    return made


@contextmanager
def two_hosts(number: int = 0) -> Iterator[tuple[Host, Host]]:
    """number: tells pairs of one process apart."""
    tag = f"{os.getpid() % 100000}{number}"
    hosts = (
        Host(f"fdml{tag}a", f"fd{tag}a", "10.77.0.1"),
        Host(f"fdml{tag}b", f"fd{tag}b", "10.77.0.2"),
    )
    made = []
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            made.append(host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        first, second = hosts
        _ip("link", "add", first.link, "netns", first.name, "type", "veth",
            "peer", "name", second.link, "netns", second.name)  # fmt: skip
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.link)
            _ip("-n", host.name, "link", "set", host.link, "up")
        yield hosts
    finally:
        for name in made:
            _ip("netns", "del", name)


def cut(host: Host) -> None:
    """Takes the link between the hosts away: packets are lost, and no connection is closed."""
    _ip("-n", host.name, "link", "set", host.link, "down")


def move_to(host: Host, master: Host) -> None:
    """Puts this process on a host, as a rank of a job whose rank 0 is on `master`."""
    descriptor = os.open(f"/run/netns/{host.name}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(descriptor)
    os.environ.update(variables(host), MASTER_ADDR=master.address, MASTER_PORT="29500")
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # rank 0 holds the store


def variables(host: Host) -> dict[str, str]:
    return {"GLOO_SOCKET_IFNAME": host.link}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
