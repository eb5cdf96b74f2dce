"""README and docs/: what is generated is up to date, links lead somewhere, what they show works."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import fastdml
from docs import generate, pictures
from fastdml.cli.main import COMMANDS
from fastdml.train import from_command_line

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("", "docs/", "kernels/", "results/")
PAGES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}*.md"))
LINK = re.compile(r"(?:\]\(|<img src=\")([^)\s\"]+)")
CODE = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, kind: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == kind]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = BLOCK.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_generated_parts_are_up_to_date():
    for page in generate.PAGES:
        text = (ROOT / page).read_text()
        assert "<!-- generated: " in text
        assert generate.page(text) == text, f"{page} is out of date: run make docs"


def test_every_setting_is_in_the_documentation():
    text = (ROOT / "docs" / "settings.md").read_text()
    for kind in (fastdml.train.TrainConfig, fastdml.train.ReidConfig):
        names = [field.name for field in dataclasses.fields(kind)]
        missing = [n for n in names if f"| `{n}` |" not in text]
        assert not missing, missing


def test_every_option_of_the_loss_is_in_the_documentation():
    page = (ROOT / "docs" / "loss.md").read_text()
    lines = page.partition("\n## Options\n")[2].partition("\n## ")[0].splitlines()
    rows = [line.split("|")[1:] for line in lines if line.startswith("| `")]
    defaults = {
        option: default.strip()
        for names, default, *_ in rows
        for option in re.findall(r"`(\w+)`", names)
    }
    options = inspect.signature(fastdml.mutual_loss).parameters.values()
    options = {o.name: o.default for o in options if o.kind is o.KEYWORD_ONLY}
    assert sorted(defaults) == sorted(options)
    for option, default in options.items():
        if isinstance(default, (str, bool)):
            shown = f'"{default}"' if isinstance(default, str) else default
            assert defaults[option] == f"`{shown}`", option


def test_every_execution_is_in_the_documentation():
    page = (ROOT / "docs" / "performance.md").read_text()
    kinds = [torch.device(kind) for kind in ("cpu", "cuda")]
    for execution in {name for kind in kinds for name in fastdml.engine.executions(kind)}:
        assert f"\n| `{execution}` | " in page, execution


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    for link in LINK.findall(BLOCK.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = unquote(link).partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{name(page)}: {link}"
        if anchor:
            assert anchor in anchors(path), f"{name(page)}: {link}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_and_folders_that_are_named_exist(page):
    text = BLOCK.sub("", (ROOT / page).read_text())
    paths = [c for c in CODE.findall(text) if re.fullmatch(r"[\w.-]+/[\w./-]*", c)]
    assert len(paths) >= 10
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing, missing


def test_a_reader_finds_things():
    """Every question of the reader's test has an answer: files or folders, and they exist."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (.+\?) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) >= 20
    for question, answer in rows:
        paths = [code for code in CODE.findall(answer) if "/" in code]
        assert paths, question
        assert all((ROOT / path).exists() for path in paths), f"{question} {answer}"


def test_every_folder_of_the_library_is_in_the_plan_of_the_house():
    text = (ROOT / "docs" / "architecture.md").read_text()
    plan = next(block for _, block in BLOCK.findall(text) if "fastdml/ " in block)
    for folder in {path.parent for path in (ROOT / "fastdml").rglob("*.py")}:
        assert f"{folder.name}/ " in plan or f"{folder.name}/\n" in plan, folder.name


def test_the_front_page_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_pictures_are_small():
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 200_000, picture.name


def test_the_curves_shown_are_of_the_command_that_draws_them():
    assert f"fastdml train {pictures.CURVES}\n" in (
        (ROOT / "docs" / "results.md").read_text().replace("--root data ", "")
    )


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## \[(\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert newest[1] == fastdml.__version__
    assert f"\nversion: {newest[1]}\n" in citation
    assert f'\ndate-released: "{newest[2]}"\n' in citation


@pytest.mark.parametrize("page", ["README.md", "docs/loss.md"])
def test_the_loss_as_shown(page):
    shown = [t for t in blocks(ROOT / page, "python") if re.search(r"\bmutual_loss", t)]
    assert shown
    for text in shown:
        *peers, student, teacher = [torch.nn.Linear(4, 3) for _ in range(4)]
        values = {
            "peers": peers,
            "student": student,
            "teacher": teacher,
            "images": torch.randn(8, 4),
            "labels": torch.randint(3, (8,)),
            "optimizers": [torch.optim.SGD(peer.parameters(), 0.1) for peer in peers],
        }
        exec(text, values)
        assert all(peer.weight.grad.any() for peer in (peers if "peers" in text else [student]))
        assert teacher.weight.grad is None


def test_training_as_shown(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    (text,) = [text for text in blocks(ROOT / "README.md", "python") if "train.digits" in text]
    exec(text, {})
    assert "top-1 %" in capsys.readouterr().out


def test_training_commands_as_shown(tmp_path, monkeypatch):
    """Every `fastdml train` line is one that the command takes."""
    pytest.importorskip("tyro")
    monkeypatch.chdir(tmp_path)
    seen = 0
    for page in PAGES:
        text = "\n".join(text for _, text in BLOCK.findall(page.read_text()))
        for line in re.findall(r"^(?:\$ )?(?:\w+=\S+ )?fastdml train (.+)$", text, re.MULTILINE):
            data, *options = shlex.split(line, comments=True)
            if "--config" in options:
                Path(options[options.index("--config") + 1]).write_text("lr: 0.05\n")
            # there is no run to go on with
            assert from_command_line(data, [o for o in options if o != "--resume"]).data == data
            seen += 1
    assert seen >= 5


# The changelog tells of names that were.
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name)
def test_names_in_python_are_there(page):
    """Whatever the pages call by its whole name, such as fastdml.train.fit."""
    for whole in set(
        re.findall(r"(?<![\w/.])fastdml(?:_kernels)?(?:\.[A-Za-z]\w*)+", page.read_text())
    ):
        assert pkgutil.resolve_name(whole) is not None


def test_every_subcommand_is_shown_and_is_one():
    text = "\n".join(b for page in PAGES for _, b in BLOCK.findall(page.read_text()))
    assert set(re.findall(r"^(?:\$ )?fastdml (\w+)", text, re.MULTILINE)) == set(COMMANDS)


def test_every_target_that_is_told_of_is_one():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split())
    texts = [page.read_text() for page in PAGES]
    code = [
        c for text in texts for c in (*CODE.findall(text), *(b for _, b in BLOCK.findall(text)))
    ]
    told = {t for c in code for t in re.findall(r"^make ([\w-]+)", c, re.MULTILINE)}
    assert told <= targets
    assert told > {"demo", "test", "lint", "docs", "clean", "distclean"}


def test_clean_leaves_the_venvs_and_distclean_takes_them():
    if not shutil.which("make"):
        pytest.skip("needs make")
    commands = {
        target: subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        for target in ("clean", "distclean")
    }
    for venv in (".venv", ".venv-oldest"):
        assert venv not in commands["clean"]
        assert venv in commands["distclean"]


def test_continuous_integration_runs_what_anybody_can_run():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


def test_hooks_run_what_make_lint_runs():
    """Before a commit: the tools of the venv that `make lint` uses, so never another version."""
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    makefile = (ROOT / "Makefile").read_text()
    lint = makefile[makefile.index("\nlint:") :].split("\n\n")[0]
    linters = re.findall(r"\$\(BIN\)/(\w+(?: \w+)?)", lint)
    assert linters
    for linter in linters:
        assert any(hook.startswith(f".venv/bin/{linter}") for hook in hooks), linter
