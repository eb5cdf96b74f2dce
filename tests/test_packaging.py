"""The distribution: one wheel, two import names, the command, the licence; no machine's paths."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastdml.machine.packages import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
NATIVE = [path.name for path in (ROOT / "kernels" / "fastdml_kernels").glob("cpu_*.[ch]")]
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"]
PARTS = [
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "LICENSE",
    *PAGES,
    "docs",
    "fastdml",
    "kernels",
]


def build(hook: str, tmp_path: Path) -> Path:
    """A distribution of a copy of the sources, by what is installed: no network, nothing left
    here."""
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="needs setuptools >= 77")
    source, out = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    out.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("*.so"))
            (source / part / "of_another_system.so").touch()
        else:
            shutil.copy(ROOT / part, source / part)
    code = f"from setuptools import build_meta as b; b.{hook}({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"setuptools {setuptools.__version__}:\n{done.stderr}"
    (built,) = out.iterdir()
    return built


def test_the_wheel_holds_both_import_names_and_nothing_else(tmp_path):
    built = build("build_wheel", tmp_path)
    assert "-cp310-abi3-" in built.name  # for every Python
    wheel = zipfile.ZipFile(built)
    names = set(wheel.namelist())
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "fastdml").rglob("*.py")}
    expected |= {str(p.relative_to(ROOT / "kernels")) for p in (ROOT / "kernels").glob("*/**/*.py")}
    assert {"fastdml/__init__.py", "fastdml_kernels/__init__.py"} <= expected
    info = next(n.split("/")[0] for n in names if ".dist-info/" in n)
    expected |= {f"fastdml_kernels/{name}" for name in ("tile_table.json", *NATIVE)}
    expected |= {"fastdml/py.typed", "fastdml_kernels/py.typed"}
    templates = (ROOT / "fastdml" / "report" / "html" / "templates").iterdir()
    expected |= {str(path.relative_to(ROOT)) for path in templates}
    if shutil.which("gcc") or shutil.which("clang"):
        expected.add("fastdml_kernels/_cpu_rows.abi3.so")
        code = wheel.read("fastdml_kernels/_cpu_rows.abi3.so")
        assert b".debug_info" not in code  # five times the size
    assert {n for n in names if not n.startswith(info)} == expected
    assert f"{info}/licenses/LICENSE" in names
    entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "fastdml = fastdml.cli:main" in entry_points
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "Project-URL: Paper, https://arxiv.org/abs/1706.00384" in metadata
    assert "Requires-Dist: triton>=3.6" in metadata  # imported by the CPU's loss too
    for extra in ("train", "dev", "bench", "onnx", "reid", "timm", "images", "all"):
        assert f"Provides-Extra: {extra}" in metadata

    # Away from the sources, the wheel alone must do.
    wheel.extractall(tmp_path / "site")
    code = "import fastdml, fastdml_kernels, fastdml.cli; print(fastdml.__file__)"
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "site")


def test_every_public_name_is_there_without_any_extra(tmp_path):
    """What needs an extra says so in one line. `make smoke` shows it in empty environments."""
    code = (
        "import sys\n"
        "import package_checks as checks\n"
        "sys.modules.update(dict.fromkeys(checks.EXTRAS))\n"  # as if they were not installed
        "checks.public_names()\n"
        "checks.one_line_for_each_missing_extra()\n"
    )
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_without_a_c_compiler_the_wheel_has_python_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    names = zipfile.ZipFile(build("build_wheel", tmp_path)).namelist()
    assert "fastdml_kernels/cpu_rows.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_the_source_distribution_can_be_built_and_read(tmp_path):
    with tarfile.open(build("build_sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "fastdml/py.typed", "kernels/README.md", *PAGES} <= names
    documents = [
        path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".svg", ".png")
    ]
    assert {str(path.relative_to(ROOT)) for path in documents} <= names
    assert {f"kernels/fastdml_kernels/{n}" for n in ("loss_op.py", "py.typed", *NATIVE)} <= names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.slow
def test_an_editable_install_finds_both_import_names(tmp_path):
    wheel = zipfile.ZipFile(build("build_editable", tmp_path))
    finders = "".join(
        wheel.read(n).decode() for n in wheel.namelist() if n.endswith((".py", ".pth"))
    )
    source = tmp_path / "source"
    for name, folder in (("fastdml", source), ("fastdml_kernels", source / "kernels")):
        assert str(folder / name) in finders or f"{folder}\n" in finders, name


def sources() -> list[Path]:
    kept = [ROOT / n for n in ("Makefile", "pyproject.toml", "setup.py", ".ci/run", *PAGES)]
    kept += [ROOT / ".pre-commit-config.yaml", *(ROOT / ".github").rglob("*.yml")]
    for folder in ("fastdml", "kernels", "bench", "docs", "tests"):
        suffixes = (".py", ".md", ".sh", ".svg")
        kept += [p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    return kept


def test_sources_name_no_folder_of_one_machine():
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home|Users|mnt|scratch)/\w+")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_every_source_file_says_what_it_is():
    bare = [
        str(path.relative_to(ROOT))
        for folder in ("fastdml", "kernels", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if not path.read_text().startswith('"""')
    ]
    assert not bare, f"no docstring at the top of {', '.join(bare)}"


def test_licence_is_the_whole_apache_text():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text) > 11_000


def test_the_version_is_the_same_everywhere():
    import fastdml

    assert f"\nversion: {fastdml.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## \[(.+)\] - (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == fastdml.__version__
    assert f'date-released: "{newest[2]}"' in (ROOT / "CITATION.cff").read_text()


def test_all_brings_what_every_extra_for_users_brings():
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = dict(re.findall(r"^(\w+) = \[(.*?)\]$", section, re.MULTILINE | re.DOTALL))
    assert set(EXTRAS) <= set(extras)  # what fastdml doctor looks at
    brought = re.findall(r"fastdml\[([\w,]+)\]", extras["all"])
    assert {name for names in brought for name in names.split(",")} == set(EXTRAS)
    assert extras["reid"] == extras["timm"]
