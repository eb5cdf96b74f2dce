from __future__ import annotations

import subprocess

import pytest
from recovery import compile_events
from warm import Warm


@pytest.fixture(scope="session")
def warm():
    """A process that forks commands."""
    with Warm() as server:
        yield server


@pytest.fixture(scope="session")
def breakable(tmp_path_factory):
    """The same, whose runs can be broken at each of their file events."""
    try:
        shared = compile_events(tmp_path_factory.mktemp("events"))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no C compiler that makes events.c a shared object: {error}")
    with Warm(shared) as server:
        yield server
