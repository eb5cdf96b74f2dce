"""The packages that each extra of fastdml brings, by what is written in the installed distribution,
and what of them is installed here."""

from __future__ import annotations

import re
from importlib import metadata
from typing import NamedTuple

# Extras for users, and what for; those for developers are not looked at.
EXTRAS = {
    "train": "trainers, run folders and the command's other options",
    "images": "torchvision: augmentation by its transforms",
    "timm": "timm's networks and pretrained weights",
    "onnx": "export to ONNX, checked with ONNX Runtime",
    "wandb": "logging to Weights & Biases",
    "dali": "NVIDIA's loader for images that do not fit in memory",
}
# Where the name to import is not the distribution's.
MODULES = {
    "nvidia-dali-cuda130": "nvidia.dali",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^\]]*\])?\s*(?:>=\s*([\d.]+))?")
EXTRA = re.compile(r"extra\s*==\s*[\"']([\w-]+)[\"']")


class Package(NamedTuple):
    name: str
    least: str  # the oldest version that will do; "" for any

    @property
    def module(self) -> str:
        return MODULES.get(self.name, self.name.replace("-", "_"))

    @property
    def version(self) -> str | None:
        """The installed one, None for none."""
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return None

    @property
    def too_old(self) -> bool:
        return self.version is not None and _numbers(self.version) < _numbers(self.least)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def required(extra: str | None = None) -> list[Package] | None:
    """What an extra brings, or for None what fastdml needs itself; None where the distribution is
    not installed, so that nobody says."""
    try:
        lines = metadata.requires("fastdml") or []
    except metadata.PackageNotFoundError:
        return None
    found = []
    for line in lines:
        what, _, marker = line.partition(";")
        asked = EXTRA.search(marker)
        match = REQUIREMENT.match(what.strip())
        if match and (asked and asked[1]) == extra and match[1] != "fastdml":
            found.append(Package(match[1].lower(), match[2] or ""))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, such as (2, 14) of 2.14.1+cpu for comparing, zeros at the end
    left out."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
