"""How many CPUs there are for this process."""

from __future__ import annotations

import math
import os

import pytest
import torch

from fastdml.engine import cpus


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
    assert cpus.quota(system(cgroup, mounts, files)) == expected


def test_without_cgroups_nothing_is_limited(tmp_path):
    assert cpus.quota(tmp_path / "absent") == math.inf


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"),
    [(8, math.inf, 8), (8, 2.0, 2), (8, 2.01, 3), (8, 0.2, 1), (1, 6.0, 1)],
)
def test_the_tighter_of_affinity_and_quota_rounded_up(monkeypatch, affinity, quota, expected):
    monkeypatch.setattr(os, "process_cpu_count", lambda: affinity, raising=False)
    monkeypatch.setattr(cpus, "quota", lambda: quota)
    assert cpus.available() == expected


def test_affinity_before_python_3_13(monkeypatch):
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 4, 5}, raising=False)
    monkeypatch.setattr(cpus, "quota", lambda: math.inf)
    assert cpus.available() == 3


def test_a_caller_may_have_lowered_torchs_threads(monkeypatch):
    monkeypatch.setattr(cpus, "available", lambda: 4)
    with cpus.threads(2):
        assert cpus.most() == 2
    with cpus.threads(9):
        assert cpus.most() == 4


@pytest.mark.parametrize(
    ("text", "explicit"),
    [("3", True), ("2,1", True), (" 1 ", True), ("", False), ("0", False), ("many", False)],
)
def test_an_explicit_choice_by_environment(monkeypatch, text, explicit):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert cpus.asked() == (torch.get_num_threads() if explicit else None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cpus.asked() is None


def test_threads_are_the_callers_again():
    before = torch.get_num_threads()

    def fails():
        with cpus.threads(before + 2):
            assert torch.get_num_threads() == before + 2
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.get_num_threads() == before
    with cpus.threads(None):
        assert torch.get_num_threads() == before
