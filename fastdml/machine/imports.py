"""Imports packages one after another, in a process of its own, and says what came of each."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from fastdml.errors import one_line


def rows(modules: Sequence[str]) -> Iterator[dict[str, Any]]:
    """{"module", "error": in one line, or None; "facts": of torch what it says of the machine}"""
    for module in modules:
        row: dict[str, Any] = {"module": module, "error": None, "facts": {}}
        try:
            importlib.import_module(module)
            if module == "torch":
                row["facts"] = torch_facts()
        except (Exception, SystemExit) as error:  # whatever a package does
            row["error"] = one_line(error)
        yield row


def torch_facts() -> dict[str, Any]:
    """The build of torch, its threads, and the devices that it reaches."""
    import torch

    facts: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "devices": [],
        "error": None,
    }
    if not (torch.version.cuda or torch.version.hip):
        return facts
    try:
        torch.cuda.init()
        for k in range(torch.cuda.device_count()):
            torch.ones(
                2, device=f"cuda:{k}"
            ).sum().item()  # fails where the build lacks the GPU's code
            free, total = torch.cuda.mem_get_info(k)
            major, minor = torch.cuda.get_device_capability(k)
            facts["devices"].append(
                {
                    "name": torch.cuda.get_device_name(k),
                    "capability": f"{major}.{minor}",
                    "free": free,
                    "memory": total,
                }
            )
    except Exception as error:  # of the driver, in many words
        facts["error"] = one_line(error)
    return facts
