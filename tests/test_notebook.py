"""What a notebook gets, with stand-ins for Jupyter; tests/docs has real kernels."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from types import SimpleNamespace

import pytest

from fastdml import notebook
from fastdml.train import stopping


@pytest.fixture
def kernel(monkeypatch):
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


@pytest.fixture
def terminal(monkeypatch):
    shell = SimpleNamespace(config={"TerminalIPythonApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def test_a_terminal_is_no_notebook(terminal):
    assert not notebook.in_notebook()
    assert notebook.progress_bar(show=False, total=3).disable


def test_nor_is_a_script_or_one_that_has_imported_ipython(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not notebook.in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not notebook.in_notebook()


def test_without_widgets_a_notebook_has_the_bar_of_text_and_no_advice(kernel, monkeypatch):
    import tqdm.notebook

    monkeypatch.setattr(tqdm.notebook, "IProgress", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bar = notebook.progress_bar(show=False, total=3)
    assert type(bar) is tqdm.tqdm
    assert not bar.disable
    bar.close()


def test_with_widgets_it_has_tqdms_for_notebooks(kernel, monkeypatch):
    import tqdm.notebook

    class Widget:
        def __init__(self, **options):
            self.options = options

    monkeypatch.setattr(tqdm.notebook, "IProgress", object)
    monkeypatch.setattr(tqdm.notebook, "tqdm", Widget)
    bar = notebook.progress_bar(show=False, total=3)
    assert type(bar) is Widget
    assert bar.options == {"total": 3, "dynamic_ncols": True, "disable": False}


def test_a_stopped_run_does_not_say_how_to_leave_the_notebook(kernel):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with stopping.listening() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(stopping.TrainingStopped, match="stopped by SIGINT here"):
                stop.leave_if_asked(lambda: "here")
        advice = ("To exit: use 'exit', 'quit', or Ctrl-D.", UserWarning, "interactiveshell.py", 1)
        warnings.warn_explicit(*advice, module="IPython.core.interactiveshell")
        warnings.warn_explicit(*advice, module="another")
    assert len(caught) == 1
