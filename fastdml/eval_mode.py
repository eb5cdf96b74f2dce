"""Evaluation mode within a block, after which each module is in the mode it was in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within it, `module` and all modules below it are in evaluation mode. Afterwards each gets its
    own flag back, so that a layer kept in evaluation mode during training stays so."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training
