"""The example notebook runs in a real kernel, and a run that is stopped there leaves it alive."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "first_hour.ipynb"

WIDGET = "application/vnd.jupyter.widget-view+json"

pytestmark = pytest.mark.docs

STOPPED = """
import os, signal
import fastdml

class Button(fastdml.train.Callback):
    def on_epoch(self, event):
        if event.epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)  # as the notebook's square button does

settings = dict(peers=("resnet8", "resnet8"), subset=64, batch_size=16, epochs=4, threads=1)
fastdml.train.digits(**settings, folder="stopped", callbacks=[Button()])
"""


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs cells in a kernel of their own, in a temporary folder."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(notebook, **options):
        client = nbclient.NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(tmp_path)}},
            **options,
        )
        client.execute()
        return [cell for cell in notebook.cells if cell.cell_type == "code"]

    return run


def outputs(cell, kind: str) -> list:
    return [out for out in cell.outputs if out.output_type == kind]


def said(cell) -> str:
    return "".join(out.text for out in outputs(cell, "stream"))


def test_the_example_is_saved_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_the_example_runs(execute, tmp_path):
    train, result, scores, live, loop, use = execute(nbformat.read(NOTEBOOK, as_version=4))
    if importlib.util.find_spec("ipywidgets") is None:
        assert "100%" in said(train)  # the bar as text
    else:
        bars = [out for out in train.outputs if WIDGET in out.get("data", {})]
        assert len(bars) == 2  # mutual and independent
        assert "100%" not in said(train)
    assert "independent epoch 3/3" in said(train)
    (shown,) = outputs(result, "execute_result")
    assert shown.data["text/html"].count("<tr>") == 4
    assert 'src="data:image/png;base64,iVBOR' in shown.data["text/html"]
    (shown,) = outputs(scores, "execute_result")
    assert "runs/first-hour" in shown.data["text/plain"]
    assert len([out for out in live.outputs if "image/png" in out.get("data", {})]) == 1
    (shown,) = outputs(loop, "execute_result")
    accuracies = [float(x) for x in shown.data["text/plain"].strip("[]").split(",")]
    assert min(accuracies) > 0.8  # chance is 0.1
    assert [out for out in use.outputs if "image/png" in out.get("data", {})]


def test_the_stop_button_saves_the_run_and_leaves_the_kernel_alive(execute, tmp_path):
    code = nbformat.v4.new_code_cell
    resume = "fastdml.train.digits(resume=True, folder='stopped')"
    notebook = nbformat.v4.new_notebook(cells=[code(STOPPED), code(resume)])
    stopped, resumed = execute(notebook, allow_errors=True)
    (error,) = outputs(stopped, "error")
    assert error.ename == "TrainingStopped"
    assert "stopped by SIGINT in epoch 3, after" in error.evalue
    assert "saved to stopped/last.ckpt: resume goes on there" in error.evalue
    assert "To exit" not in said(stopped)
    (shown,) = outputs(resumed, "execute_result")  # by the same kernel
    assert "4 epochs" in shown.data["text/html"]
    assert "epoch 2/4" not in said(resumed)
