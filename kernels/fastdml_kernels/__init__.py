"""Fused Triton kernels for Deep Mutual Learning; needs torch and triton alone.

`mutual_loss`, `mutual_losses`, `linear_mutual_loss` and `losses_and_grads` take checked arguments;
the functions of `fastdml` check them.

A name's module is imported when the name is first asked for, so that `augment_options`, which needs
neither torch nor triton, does not import them by way of this file.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .linear_loss import linear_mutual_loss
    from .loss_op import Call, at_once, losses_and_grads, mutual_loss, students_of
    from .options import Options
    from .separate_losses import mutual_losses

__all__ = [
    "Call",
    "Options",
    "at_once",
    "linear_mutual_loss",
    "losses_and_grads",
    "mutual_loss",
    "mutual_losses",
    "students_of",
]

_MODULES = {
    "Call": "loss_op",
    "Options": "options",
    "at_once": "loss_op",
    "linear_mutual_loss": "linear_loss",
    "losses_and_grads": "loss_op",
    "mutual_loss": "loss_op",
    "mutual_losses": "separate_losses",
    "students_of": "loss_op",
}


if not TYPE_CHECKING:  # a type checker would take any name to be there

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value  # found without this function from now on
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
