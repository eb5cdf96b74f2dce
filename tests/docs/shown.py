"""The blocks of code of a page, and what runs them: one namespace of Python and one folder a page,
from top to bottom.

    python   run in the page's namespace
    sh       commands, one a line; those of fastdml are run in this process
    console  the same after `$ `, each followed by what it prints, whose form is compared
    yaml     written to the file that its first line names: # settings.yaml
    text     nothing to run: a drawing, or the output of a block above
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdml import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*.md")])
FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GENERATED = re.compile(r"<!-- generated: .*?<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: str  # README.md, docs/loss.md
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    text: str
    output: tuple[str, ...] = ()  # the lines that the page shows below it

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are not generated."""
    text = GENERATED.sub(lambda found: re.sub("[^\n]", "", found[0]), page.read_text())
    return [
        Block(name(page), text.count("\n", 0, found.start()) + 1, found[1].strip(), found[2])
        for found in FENCED.finditer(text)
    ]


def commands(block: Block) -> list[Command]:
    """The commands of a block of kind sh or console."""
    text = block.text.replace("\\\n", " ")
    if block.kind == "sh":
        lines = (line.strip() for line in text.splitlines())
        return [Command(line) for line in lines if line and not line.startswith("#")]
    before, *shown = re.split(r"^\$ ", text, flags=re.MULTILINE)
    assert not before.strip(), f"{block}: a console block begins with a command"
    found = []
    for part in shown:
        command, *output = part.splitlines()
        found.append(Command(command, tuple(line for line in output if line.strip())))
    return found


def form(line: str) -> str:
    """A line of output without what differs from run to run: its numbers, widths and devices."""
    line = re.sub(r"^\S.*?, \d+ threads?;", "DEVICE;", line)
    line = re.sub(r"(?<![\w-])-(?![\w-])", "0", line)  # a figure that a short run has not
    line = re.sub(r"\d[\d,.]*( ?(?:ms|s|min|h)\b)?", "0", line)
    return re.sub(r"(-|\s|0 )\1+", r"\1", line).strip()


def run_python(block: Block, names: dict[str, Any], text: str) -> None:
    exec(compile("\n" * block.line + text, block.page, "exec"), names)


def run_command(text: str) -> int:
    """Runs a command line and returns its exit code: `fastdml` in this process; anything else, what
    goes to a file or another command, and what Triton compiles for, in a shell."""
    words = shlex.split(text, comments=True)
    if words[0] == "fastdml" and not {"|", ">", "&&"} & set(words) and words[1] != "kernels":
        return cli.main(words[1:])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    shell = f'fastdml() {{ "{sys.executable}" -m fastdml "$@"; }}; set -eo pipefail; {text}'
    return subprocess.run(["bash", "-c", shell], env=environment).returncode
