"""The command line: main.py finds the subcommand; each has a file of its name."""

from __future__ import annotations

from fastdml.cli.main import main

__all__ = ["main"]
