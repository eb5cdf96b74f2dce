"""Runs functions on the stand-in for the CUDA driver, in a process of its own.

A test file's scenarios are functions of the stand-in that return what they saw, as JSON can say it;
its tests look at that. One process runs them all, since it takes seconds to start.
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from compiled import printed_by

CODE = """
import importlib, json, sys
from bench import stand_in
gpu = stand_in.start()
import on_stand_in
module = importlib.import_module(json.loads(sys.argv[1]))
print(json.dumps(on_stand_in.run(module.SCENARIOS, gpu)))
"""


def run(scenarios: list[Callable], gpu: Any) -> dict[str, Any]:
    """What each scenario returns, by its name, or the text of the error that it raised."""
    seen = {}
    for scenario in scenarios:
        gpu.clear()
        try:
            seen[scenario.__name__] = {"seen": scenario(gpu)}
        except Exception:
            seen[scenario.__name__] = {"error": traceback.format_exc()}
    return seen


def scenarios_of(module: str) -> Callable[[Callable], Any]:
    """A function from a scenario of a test file to what it saw."""
    from bench.stand_in import c_compiler

    if shutil.which(c_compiler() or "") is None:
        pytest.skip("the stand-in for the CUDA driver needs a C compiler, gcc or clang")
    (results,) = printed_by(CODE, module)

    def seen(scenario: Callable) -> Any:
        result = results[scenario.__name__]
        assert "error" not in result, result["error"]
        return result["seen"]

    return seen


def launched(gpu: Any, call: Callable[[], Any]) -> list[str]:
    """The kernels that a call launches, in order."""
    gpu.clear()
    call()
    return [launch.kernel for launch in gpu.launches()]


def loaded(gpu: Any, calls: Iterable[Callable[[], Any]]) -> list[list[str]]:
    """The kernels that each call makes Triton compile."""
    found = []
    for call in calls:
        before = len(gpu.kernels)
        call()
        found.append(gpu.kernels[before:])
    return found
