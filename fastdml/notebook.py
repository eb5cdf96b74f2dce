"""Jupyter's notebooks: whether the code runs in one, and a progress bar that fits there."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from fastdml.errors import require


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")  # which a kernel has imported
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


def progress_bar(*, show: bool, **options: Any) -> Any:
    """tqdm's bar with these options; in a notebook it is shown in any case, as a widget where
    ipywidgets is installed. show: whether to show it elsewhere. Raises MissingExtra without
    tqdm."""
    kind = require("tqdm", "train").tqdm
    notebook = in_notebook()
    if notebook:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that ipywidgets is missing
            widgets = require("tqdm.notebook", "train")
        if widgets.IProgress is not None:
            kind = widgets.tqdm
    return kind(**options, dynamic_ncols=True, disable=not (show or notebook))


def without_advice_to_exit() -> None:
    """After a SystemExit IPython advises how to leave it, by a warning. A run that was stopped by
    the notebook's button has left the kernel as it was, and nobody wants to leave."""
    if in_notebook():
        warnings.filterwarnings("ignore", "To exit: use", module="IPython")
