"""The CPUs and the memory that there are for this process."""

from __future__ import annotations

import math
import os

import pytest

from fastdml import host


@pytest.fixture
def system(tmp_path):
    """Writes a /proc/self and a /sys/fs/cgroup of one's own; the former's folder."""

    def make(cgroup: str, mounts: list[tuple[str, str, str]], files: dict[str, str]):
        """mounts: (root, point, "cgroup2" or "cgroup cpu,cpuacct"); files below the points."""
        proc = tmp_path / "proc"
        proc.mkdir()
        (proc / "cgroup").write_text(cgroup)
        lines = ["22 28 0:20 / /proc rw,nosuid shared:12 - proc proc rw"]
        for root, point, kind in mounts:
            (tmp_path / point).mkdir(parents=True, exist_ok=True)
            name, _, options = kind.partition(" ")
            lines.append(f"31 22 0:28 {root} {tmp_path / point} rw - {name} none rw,{options}")
        (proc / "mountinfo").write_text("\n".join(lines) + "\n")
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return proc

    return make


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "expected"),
    [
        ("0::/\n", [("/", "sys", "cgroup2")], {"sys/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", [("/", "sys", "cgroup2")], {"sys/cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", [("/", "sys", "cgroup2")], {}, math.inf),  # the machine's own root has no file
        (  # the tightest of the group and those above it
            "0::/a/b\n",
            [("/", "sys", "cgroup2")],
            {"sys/a/b/cpu.max": "400000 100000\n", "sys/a/cpu.max": "250000 50000\n"},
            4.0,
        ),
        (
            "0::/a/b\n",
            [("/", "sys", "cgroup2")],
            {"sys/a/b/cpu.max": "max 100000\n", "sys/a/cpu.max": "50000 100000\n"},
            0.5,
        ),
        (  # a container that sees its own part of the tree and the path from outside
            "4:memory:/m\n3:cpu,cpuacct:/docker/1f\n",
            [("/docker/1f", "cpu", "cgroup cpu,cpuacct"), ("/docker/1f", "mem", "cgroup memory")],
            {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            3.0,
        ),
        (
            "3:cpu,cpuacct:/jobs/7\n",
            [("/", "cpu", "cgroup cpu,cpuacct")],
            {"cpu/jobs/7/cpu.cfs_quota_us": "-1\n", "cpu/jobs/7/cpu.cfs_period_us": "100000\n"},
            math.inf,
        ),
        (  # version 2 beside version 1, which has the CPUs
            "3:cpu:/\n0::/x\n",
            [("/", "one", "cgroup cpu"), ("/", "two", "cgroup2")],
            {"one/cpu.cfs_quota_us": "50000\n", "one/cpu.cfs_period_us": "25000\n"},
            2.0,
        ),
        (  # the namespace of another: what is mounted is all that counts
            "0::/../../other\n",
            [("/", "sys", "cgroup2")],
            {"sys/cpu.max": "200000 100000\n"},
            2.0,
        ),
        (  # damaged
            "0::/\n", [("/", "sys", "cgroup2")], {"sys/cpu.max": "much\n"}, math.inf
        ),
    ],
)  # fmt: skip
def test_quotas_of_containers(system, cgroup, mounts, files, expected):
    assert host.quota(system(cgroup, mounts, files)) == expected


def test_without_cgroups_nothing_is_limited(tmp_path):
    assert host.quota(tmp_path / "absent") == math.inf


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"),
    [(8, math.inf, 8), (8, 2.0, 2), (8, 2.01, 3), (8, 0.2, 1), (1, 6.0, 1)],
)
def test_the_tighter_of_affinity_and_quota_rounded_up(monkeypatch, affinity, quota, expected):
    monkeypatch.setattr(os, "process_cpu_count", lambda: affinity, raising=False)
    monkeypatch.setattr(host, "quota", lambda: quota)
    assert host.cpus() == expected


def test_affinity_before_python_3_13(monkeypatch):
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 4, 5}, raising=False)
    monkeypatch.setattr(host, "quota", lambda: math.inf)
    assert host.cpus() == 3


GIB = 1 << 30


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "expected"),
    [
        ("0::/\n", [("/", "sys", "cgroup2")], {}, (8 * GIB, 6 * GIB)),
        (  # no limit, in the words of both versions
            "4:memory:/m\n0::/x\n",
            [("/", "one", "cgroup memory"), ("/", "two", "cgroup2")],
            {
                "one/m/memory.limit_in_bytes": "9223372036854771712\n",
                "two/x/memory.max": "max\n",
                "two/x/memory.current": f"{7 * GIB}\n",
            },
            (8 * GIB, 6 * GIB),
        ),
        (  # cached files make way
            "0::/a/b\n",
            [("/", "sys", "cgroup2")],
            {
                "sys/a/memory.max": f"{4 * GIB}\n",
                "sys/a/memory.current": f"{3 * GIB}\n",
                "sys/a/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\n",
                "sys/a/b/memory.max": "max\n",
            },
            (4 * GIB, 3 * GIB),
        ),
        (
            "4:memory:/docker/1f\n",
            [("/docker/1f", "mem", "cgroup memory")],
            {
                "mem/memory.limit_in_bytes": f"{2 * GIB}\n",
                "mem/memory.usage_in_bytes": f"{3 * GIB}\n",  # as it may be for a moment
                "mem/memory.stat": "total_inactive_file 0\n",
            },
            (2 * GIB, 0),
        ),
    ],
)
def test_memory_of_containers(system, tmp_path, cgroup, mounts, files, expected):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        f"MemTotal: {8 << 20} kB\nMemFree: 1 kB\nMemAvailable: {6 << 20} kB\nHugePages_Total: 0\n"
    )
    assert host.memory(system(cgroup, mounts, files), meminfo) == expected


def test_memory_that_the_system_does_not_tell(tmp_path):
    assert all(map(math.isnan, host.memory(tmp_path, tmp_path / "absent")))
