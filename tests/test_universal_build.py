"""`fastdml_kernels` as Hugging Face's `kernels` loads it from a folder: beside the installed one,
under operators of its own, with the same numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import fastdml_kernels
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    script = ROOT / "kernels" / "build_universal.py"
    spec = importlib.util.spec_from_file_location("build_universal", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("hub")
    first = module.build(folder)
    left = first / "fastdml_kernels" / "of_an_older_build.py"
    left.touch()
    assert module.build(folder) == first
    assert not left.exists()
    return folder


@pytest.fixture(scope="module")
def kernel(folder):
    return pytest.importorskip("kernels").get_local_kernel(folder)


def test_it_holds_the_package_and_nothing_that_was_compiled(folder):
    package = folder / "build" / "torch-universal" / "fastdml_kernels"
    ours = {p.name for p in Path(fastdml_kernels.__file__).parent.glob("*.py")}
    assert {p.name for p in package.iterdir()} - {"__pycache__"} == {
        *ours, "py.typed", "tile_table.json",
    }  # fmt: skip
    for path in package.glob("*.py"):
        text = path.read_text()
        assert "fastdml::" not in text
        assert "torch.ops.fastdml." not in text
        assert "import fastdml" not in text
        assert "from fastdml" not in text  # by its path alone, relative to itself


def compute(package, logits, labels, compiled: bool):
    logits = [z.clone().requires_grad_() for z in logits]
    values = dict.fromkeys(package.Call._fields) | {
        "labels": labels, "options": package.Options(label_smoothing=0.1),
        "temperature": 2.0, "ce_weight": 0.5, "kl_weight": 1.5, "want_stats": False,
    }  # fmt: skip

    def loss(logits):
        return package.mutual_loss(logits, package.Call(**values), False)[0]

    if compiled:
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    losses = loss(logits)
    return losses.detach(), *torch.autograd.grad(losses.sum(), logits)


@pytest.mark.parametrize("compiled", [False, True])
def test_it_has_our_numbers_beside_the_installed_one(kernel, compiled):
    assert kernel is not fastdml_kernels
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(6, 10, generator=generator) for _ in range(3)]
    labels = torch.randint(10, (6,), generator=generator)
    theirs = compute(kernel, logits, labels, compiled)
    ours = compute(fastdml_kernels, logits, labels, compiled)  # native code where that is built
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


def test_its_operators_are_its_own(kernel):
    assert kernel.__name__.startswith("_fastdml_kernels_universal_")
    for name in ("mutual_loss", "mutual_losses", "linear_mutual_loss"):
        getattr(kernel, name)  # imports, and so registers
        getattr(fastdml_kernels, name)
    ours, theirs = (
        {x.partition("::")[2] for x in torch._C._dispatch_get_all_op_names() if x.startswith(space)}
        for space in ("fastdml::", f"{kernel.__name__}::")
    )
    assert theirs == ours
    assert theirs >= {"mutual_loss", "own_loss", "linear_mutual_loss"}
