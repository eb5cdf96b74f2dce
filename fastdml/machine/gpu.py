"""NVIDIA's GPUs and their driver as the system reports them, without torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

DRIVER = Path("/proc/driver/nvidia/version")


class Gpus(NamedTuple):
    names: list[str]
    driver: str  # its version; "" where nothing tells
    failure: str  # what nvidia-smi says where it fails


def gpus(driver: Path = DRIVER) -> Gpus | None:
    """None where there is no trace of an NVIDIA GPU or driver."""
    command = shutil.which("nvidia-smi")
    if command is not None:
        query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Gpus([], _version(driver), f"nvidia-smi: {type(error).__name__}")
        found = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line]
        if done.returncode == 0 and found:
            return Gpus([name for name, _, _ in found], found[0][2].strip(), "")
        said = (done.stdout + done.stderr).strip().splitlines()
        return Gpus([], _version(driver), said[0] if said else "nvidia-smi fails")
    version = _version(driver)
    return Gpus([], version, "") if version else None


def _version(driver: Path) -> str:
    """From a line such as "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue ..."."""
    try:
        words = driver.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")
