"""Every block of code of README and docs/ runs, a page from top to bottom, in a folder of its own.

What is changed before it runs, so that it ends in seconds, and what is not run, stands in the
tables here and nowhere else.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from shown import PAGES, ROOT, Block, blocks, commands, form, name, run_command, run_python
from workplace import SOURCES, write_cifar, write_market, write_people, write_photos

import fastdml

# Options that are added to a command whose beginning is this.
SMALLER_COMMANDS = {
    "fastdml train digits": "--epochs 1 --subset 128",
    "fastdml train digits --groups": "--subset 0",
    "fastdml train cifar100": "--epochs 1 --subset 64 --batch-size 16 --no-tensorboard",
    "fastdml train cifar100 --root data --labelled": "--subset 200 --labelled 100",
    "fastdml train market1501": "--iterations 2 --batch-size 8 --no-tensorboard --execution eager",
    "fastdml train market1501 --root data --recipe strong": (
        "--no-pretrained --height 32 --width 16"
    ),
    "fastdml train reid_folder": (
        "--iterations 1 --batch-size 8 --no-tensorboard --execution eager --height 32 --width 16 "
        "--lr 1e-6"
    ),
    "fastdml train folder": (
        "--epochs 1 --batch-size 8 --size 16 --no-tensorboard --execution eager --threads 1"
    ),
    "torchrun --nproc-per-node 2 -m fastdml train digits": "--epochs 1 --subset 128",
    "fastdml bench": "--seconds 1",
    "fastdml kernels": "--shapes 2x100 --archs sm_90",
}
# What is replaced in a page's code: page, as shown, as run.
SMALLER_CODE: list[tuple[str, str, str]] = [
    ("docs/settings.md", "nesterov=False", "nesterov=False, epochs=1, subset=256"),
    ("docs/training.md", 'root="data", epochs=200', 'root="data", epochs=1, subset=64'),
    ("docs/own_images.md", "validation=0.1", "validation=0.1, epochs=1, batch_size=8, size=16"),
    ("docs/faq.md", "digits(epochs=3", "digits(epochs=1, subset=128"),
]
# Commands that are not run, by the beginning of a line, and why.
NOT_RUN = {
    "fastdml reproduce": "trains for minutes to months; tests/reproduce has smaller ones",
    "make demo": "installs; its command is that of the next block",
    "make test": "these are the tests",
    "make help": "needs no environment; a test compares it with the targets",
    "pip install": "installs",
    "source completion.bash": "of the shell that the reader types in",
    "python3 -m venv": "makes an environment",
    "fastdml train cifar100 --root data --seed 0 --device cuda:0": "needs a GPU",
    "fastdml train cifar100 --root data --seed 1 --device cuda:1": "needs two GPUs",
    "fastdml train folder --root photos --validation 0.1 --peers timm:": "fetches weights",
    "torchrun --nnodes 2": "needs two machines",
    "sbatch examples/train.sbatch": "needs Slurm; test_mesh_example.py has stand-ins",
    "python -m bench.mesh": "measures for minutes",
    "pre-commit install": "changes the clone",
    "bash bench/gpu-tests.sh": "needs a GPU; tests/bench runs it with --dry-run",
    "bash bench/gpu-bench.sh": "needs a GPU; tests/bench runs it with --dry-run",
    "git worktree add": "needs the history",
    "python -m pytest bench/bench_reid.py": "measures for minutes",
    "python -m bench.host_time": "measures for minutes; needs the command above it",
    "python -m bench.linear": "measures for minutes",
    "python -m bench.time_to_accuracy": "measures for minutes",
}
# Blocks of kind text, by their beginning, and what they are.
NOT_CODE = {
    ("docs/tutorial.md", "photos/"): "drawing of the folders, which the test makes",
    ("docs/architecture.md", "fastdml/ "): "drawing of the folders",
    ("docs/architecture.md", "cli  ->"): "drawing of the imports",
    ("docs/own_images.md", "photos/"): "drawing of the folders",
}
CHEAP = ("docs/loss.md",)  # in the default run


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> Path:
    pytest.importorskip("PIL", reason="images of one's own need Pillow, which is absent")
    root = tmp_path_factory.mktemp("originals")
    for source in SOURCES.values():
        write_cifar(source, root / "data")
    write_market(root / "data")
    write_photos(root / "photos")
    write_people(root / "people")
    shutil.copytree(ROOT / "examples", root / "examples")
    return root


@pytest.fixture
def workplace(originals, scans, tmp_path, monkeypatch) -> Path:
    """The folder that a page's code runs in."""
    from fastdml.data.sets import cifar

    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.path_importer_cache.pop("exported", None)  # a folder that an earlier page imported from
    for source, small in SOURCES.items():
        monkeypatch.setattr(cifar, source, small)
    return tmp_path


def names() -> dict[str, object]:
    """What pages take to be there: peers and a batch."""
    peers = [torch.nn.Linear(4, 3) for _ in range(2)]
    return {
        "__name__": "__main__",
        "peers": peers,
        "teacher": torch.nn.Linear(4, 3),
        "student": torch.nn.Linear(4, 3),
        "images": torch.randn(8, 4),
        "labels": torch.randint(3, (8,)),
        "optimizers": [torch.optim.SGD(peer.parameters(), 0.1) for peer in peers],
    }


def smaller(command: str) -> str:
    """The command as it is run: without its comment and the number of threads, and smaller."""
    command = re.sub(r"^OMP_NUM_THREADS=\d+ |\s+#.*", "", command)
    added = [more for start, more in SMALLER_COMMANDS.items() if command.startswith(start)]
    return " ".join([command, *added])


def listed(command: str) -> bool:
    return any(command.startswith(start) for start in NOT_RUN)


def python_of(block: Block) -> str:
    text = block.text
    for page, shown, run in SMALLER_CODE:
        if page == block.page:
            text = text.replace(shown, run)
    return text


def run(block: Block, values: dict[str, object], capfd) -> None:
    if block.kind == "python":
        run_python(block, values, python_of(block))
    elif block.kind == "yaml":
        Path(re.match(r"# (\S+)", block.text)[1]).write_text(block.text)
    elif block.kind in ("sh", "console"):
        for command in commands(block):
            if listed(command.text):
                continue
            capfd.readouterr()
            code = run_command(smaller(command.text))
            told = capfd.readouterr()
            assert code == 0, f"{block}: {command.text}\n{told.err}"
            printed = {form(line) for line in (told.out + told.err).splitlines()}
            for line in command.output:
                assert form(line) in printed, f"{block}: {line}\nis not printed:\n{told.out}"


def plain_torch_agrees(values: dict[str, object]) -> None:
    """What the tutorial computes without fastdml is what fastdml computes."""
    peer = fastdml.load("exported/01-resnet32.safetensors")
    expected = peer(peer.preprocess("photos/cat/001.jpg")[None])
    torch.testing.assert_close(values["plain"], expected, rtol=1e-5, atol=1e-6)


def processes_have_learnt(values: dict[str, object]) -> None:
    """The peers that two processes trained together on digits are far better than chance, 0.1."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[1437:], dtype=torch.float32)[:, None] / 16
    with torch.inference_mode():
        logits = fastdml.Cohort.load("trained")(images)
    labels = torch.tensor(digits.target[1437:])
    assert all((z.argmax(1) == labels).float().mean() > 0.6 for z in logits)


CHECKS = {  # after a page has run
    "docs/tutorial.md": plain_torch_agrees,
    "docs/multi-gpu.md": processes_have_learnt,
}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=() if name(p) in CHEAP else pytest.mark.docs)
        for p in PAGES
        if blocks(p)
    ],
    ids=name,
)
def test_a_page_runs_from_top_to_bottom(page, workplace, capfd):
    values = names()
    for block in blocks(page):
        run(block, values, capfd)
    CHECKS.get(name(page), lambda values: None)(values)


def test_every_block_is_run_or_listed():
    """Of a kind that is run; what the tables above leave out is there, and nothing else is."""
    found = [block for page in PAGES for block in blocks(page)]
    assert {b.kind for b in found} <= {"python", "sh", "console", "yaml", "text"}, [
        str(b) for b in found if b.kind not in ("python", "sh", "console", "yaml", "text")
    ]
    texts = [b for b in found if b.kind == "text"]
    missing = [
        str(b)
        for b in texts
        if not any(b.page == page and b.text.startswith(start) for page, start in NOT_CODE)
    ]
    assert not missing, f"neither run nor listed: {missing}"
    for page, start in NOT_CODE:
        assert any(b.page == page and b.text.startswith(start) for b in texts), (page, start)


def test_the_tables_name_what_is_shown():
    shell = [b for page in PAGES for b in blocks(page) if b.kind in ("sh", "console")]
    lines = [command.text for block in shell for command in commands(block)]
    for start in (*NOT_RUN, *SMALLER_COMMANDS):
        assert any(line.startswith(start) for line in lines), start
    for page, shown, _ in SMALLER_CODE:
        assert any(shown in b.text for p in PAGES if name(p) == page for b in blocks(p)), shown
