"""`fastdml doctor`: what it says of machines that have everything, or miss or break something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastdml import cli, host
from fastdml.machine import checks, child, packages
from fastdml.machine.checks import Check, Imported
from fastdml.machine.compiler import Compiler
from fastdml.machine.gpu import Gpus
from fastdml.machine.packages import Package

ROOT = Path(__file__).resolve().parents[2]
CPU_BUILD = {"cuda": None, "hip": None, "threads": 2, "devices": [], "error": None}
CUDA_BUILD = {**CPU_BUILD, "cuda": "13.0"}
H100 = {"name": "NVIDIA H100", "capability": "9.0", "free": 8e9, "memory": 8e10}


def on_path(folder: Path, files: dict[str, str], requires: tuple[str, ...] = ()) -> dict[str, str]:
    """An environment in which these files, and a distribution of fastdml that requires no more than
    this, come before everything else."""
    info = folder / "fastdml-9.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", "Name: fastdml", "Version: 9"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels")))
    usual = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**usual, "PYTHONPATH": path}


def diagnosed(env: dict[str, str], cwd: Path, code: int) -> dict[str, dict]:
    """The checks by name, of the command in a process of its own that ends with `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "fastdml", "doctor", "--json"],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stderr or done.stdout
    assert done.stderr == ""
    report = json.loads(done.stdout)
    found = {check["name"]: check for check in report["checks"]}
    broken = [check for check in report["checks"] if check["status"] == "broken"]
    assert report["broken"] == len(broken)
    assert all(check["remedy"] for check in broken)
    return found


def test_a_machine_with_what_the_loss_needs(tmp_path):
    needed = ("numpy", "torch>=2.11", "triton>=3.6", 'absent-package>=2; extra == "train"')
    found = diagnosed(on_path(tmp_path / "path", {}, needed), tmp_path, 0)
    for name in ("python", "fastdml", "torch", "triton", "numpy", "loss, torch", "memory", "disk"):
        assert found[name]["status"] == "ok", found[name]
    assert found["native loss"]["status"] in ("ok", "note")
    assert ("loss, native C" in found) == (found["native loss"]["status"] == "ok")
    assert found["[train]"]["status"] == "note"
    assert found["[train]"]["text"].startswith("absent-package not installed")
    assert found["[train]"]["remedy"] == "pip install 'fastdml[train]'"


def test_without_torch(tmp_path):
    """The command itself must not need what it looks for."""
    hidden = "import sys\nsys.modules['torch'] = None\n"
    found = diagnosed(on_path(tmp_path / "path", {"sitecustomize.py": hidden}), tmp_path, 1)
    assert found["torch"]["status"] == "broken"
    assert "self-test" in found
    assert found["numpy"]["status"] == "ok"


def test_packages_that_break_or_crash_when_they_are_imported(tmp_path):
    files = {
        "triton/__init__.py": "raise OSError('libcuda.so.1: no such file')\n",
        "ends/__init__.py": "import os\nos.kill(os.getpid(), 11)\n",
        "leaves/__init__.py": "import sys\nprint('Bye')\nsys.exit(3)\n",
        "fine/__init__.py": "print('hello, which is no row')\n",
        "apex/__init__.py": "import pyramid\n",
    }
    requires = [f'{name}; extra == "train"' for name in ("ends", "leaves", "fine")]
    for name in ("ends", "leaves", "fine"):
        files[f"{name}-1.0.dist-info/METADATA"] = f"Name: {name}\nVersion: 1.0\n"
    found = diagnosed(on_path(tmp_path / "path", files, tuple(requires)), tmp_path, 1)
    assert found["triton"]["status"] == "broken"
    assert "OSError: libcuda.so.1: no such file" in found["triton"]["text"]
    assert found["[train]"]["status"] == "broken"
    assert "ends 1.0 cannot be imported: killed by SIGSEGV" in found["[train]"]["text"]
    assert "leaves 1.0 cannot be imported: SystemExit: 3" in found["[train]"]["text"]
    assert "fine" not in found["[train]"]["text"]
    assert found["apex"]["status"] == "broken"
    assert found["apex"]["remedy"] == "pip uninstall apex"


def test_the_text_has_a_line_a_check_and_the_remedy_below(monkeypatch, capfd):
    some = [Check("one", "ok", "fine"), Check("two", "note", "absent", "get it")]
    monkeypatch.setattr(checks, "checks", lambda: iter(some))
    assert cli.main(["doctor"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].split() == ["ok", "one", "fine"]
    assert out[1].split() == ["note", "two", "absent"]
    assert out[2].split() == ["->", "get", "it"]
    assert out[-1] == "nothing is broken"
    some.append(Check("three", "broken", "bad", "repair it"))
    assert cli.main(["doctor"]) == 1
    assert capfd.readouterr().out.splitlines()[-1] == "1 broken: three"


@pytest.mark.parametrize(
    ("visible", "torch", "status", "pattern"),
    [
        (None, CPU_BUILD, "ok", "none: everything runs on the CPU"),
        (None, {**CUDA_BUILD, "error": "no driver"}, "ok", "none"),
        (Gpus(["H100"], "580.1", ""), {**CUDA_BUILD, "devices": [H100]}, "ok",
         "NVIDIA H100 (capability 9.0, 8.0 GB of 80.0 GB free), driver 580.1"),
        (Gpus(["H100"], "580.1", ""), CPU_BUILD, "broken", "torch is a build for CPUs"),
        (Gpus(["H100"], "450.2", ""), {**CUDA_BUILD, "error": "driver too old"}, "broken",
         "H100, driver 450.2, but torch cannot use it: driver too old"),
        (Gpus(["H100"], "450.2", ""), CUDA_BUILD, "broken", "torch sees no device"),
        (Gpus([], "580.1", "No devices were found"), CUDA_BUILD, "broken", "No devices were found"),
        (Gpus(["H100"], "580.1", ""), {}, "note", "torch cannot be asked"),
    ],
)  # fmt: skip
def test_gpus(visible, torch, status, pattern):
    check = checks.gpu(visible, Imported({}, torch))
    assert check.status == status
    assert pattern in check.text
    assert bool(check.remedy) == (status == "broken")


@pytest.mark.parametrize(
    ("found", "gpu", "status"),
    [
        (Compiler("gcc 12", True, True, ""), True, "ok"),
        (Compiler("gcc 12", True, False, "Python.h: no such file"), True, "broken"),
        (Compiler("gcc 12", True, False, "Python.h: no such file"), False, "ok"),
        (Compiler("gcc 12", False, False, "cannot find crti.o"), False, "note"),
        (None, True, "broken"),
        (None, False, "note"),
    ],
)
def test_a_compiler_matters_more_where_triton_launches(monkeypatch, found, gpu, status):
    monkeypatch.setattr(checks, "compiler", lambda: found)
    check = checks.c_compiler(gpu=gpu)
    assert check.status == status
    assert bool(check.remedy) == (status != "ok")


def test_versions_that_are_too_old(monkeypatch):
    monkeypatch.setattr(Package, "version", "2.4.1+cu118")
    check = checks.needed("torch", [Package("torch", "2.11")], Imported({}, CPU_BUILD))
    assert check.status == "broken"
    assert check.remedy == "pip install --upgrade 'torch>=2.11'"
    for least in ("2.4", "2.4.1", "2.4.1.0", ""):
        assert not Package("torch", least).too_old
    extra = checks.of_extra("train", [Package("tyro", "3")], Imported({}, {}))
    assert extra.status == "broken"
    assert "fastdml[train]" in extra.remedy


def test_a_set_variable_that_makes_kernels_slow(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check = checks.needed("triton", [Package("triton", "")], Imported({}, {}))
    assert (check.status, check.remedy) == ("note", "unset TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert checks.needed("triton", [Package("triton", "")], Imported({}, {})).status == "ok"


@pytest.mark.parametrize(
    ("asked", "threads", "status"), [("8", 8, "note"), (None, 8, "note"), ("2", 2, "ok")]
)
def test_more_threads_than_cpus(monkeypatch, asked, threads, status):
    monkeypatch.setattr(host, "cpus", lambda: 2)
    monkeypatch.setattr(host, "quota", lambda: 1.5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    check = checks.processors(threads)
    assert check.status == status
    assert "quota of the container: 1.5" in check.text
    assert ("set_num_threads(2)" in check.remedy) == (asked is None)


def test_little_room(monkeypatch, tmp_path):
    usage = SimpleNamespace(total=64 << 20, free=60 << 20)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(host, "memory", lambda: (2e9, 5e8))
    (shared,) = checks.shared_memory(tmp_path)
    assert "--shm-size" in shared.remedy
    found = [shared, checks.disk(tmp_path), checks.memory()]
    assert [check.status for check in found] == ["note"] * 3
    assert all(check.remedy for check in found)
    assert not list(checks.shared_memory(tmp_path / "absent"))


def test_a_current_folder_that_is_gone(monkeypatch, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert checks.disk() == Check(
        "disk", "broken", "the current folder has been removed", "cd to another"
    )


def test_no_folder_for_temporary_files(monkeypatch):
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    (check,) = checks.temporary()
    assert (check.status, "TMPDIR" in check.remedy) == ("broken", True)
    monkeypatch.setenv("CC", sys.executable)
    assert checks.c_compiler(gpu=False).text.endswith(
        "no folder for temporary files can be written to"
    )


def test_a_compiler_that_nobody_can_call(monkeypatch):
    monkeypatch.setenv("CC", 'gcc "-O2')
    check = checks.c_compiler(gpu=False)
    assert check.status == "note"
    assert check.text == 'CC=gcc "-O2 compiles nothing: No closing quotation'


def test_a_check_that_fails_itself_leaves_the_others(monkeypatch, capfd):
    def fails() -> tuple[float, float]:
        raise PermissionError(13, "Permission denied", "/proc/meminfo")

    monkeypatch.setattr(host, "memory", fails)
    monkeypatch.setattr(checks, "try_imports", lambda packages: Imported({"torch": "absent"}, {}))
    assert cli.main(["doctor", "--json"]) == 1
    found = {check["name"]: check for check in json.loads(capfd.readouterr().out)["checks"]}
    assert found["memory"]["status"] == "broken"
    assert "PermissionError" in found["memory"]["text"]
    assert found["disk"]["status"] in ("ok", "note")


def test_a_wrong_loss_is_broken(monkeypatch):
    rows = [
        {"native": "absent"},
        {"route": "torch", "errors": {"float32": [1e-7, 3e-2]}, "right": False},
    ]
    monkeypatch.setattr(child, "run", lambda *a: child.Rows(rows, "killed by SIGILL"))
    native, wrong, ended = checks.self_test()
    assert (native.status, wrong.status, ended.status) == ("note", "broken", "broken")
    assert "1e-07 and 3e-02 of float32" in wrong.text
    assert ended.text == "the self-test ended after torch: killed by SIGILL"
    assert "pip install" in native.remedy
    assert checks.native("_cpu_rows.so: wrong ELF class").status == "broken"


def test_extras_are_those_of_the_distribution(monkeypatch):
    lines = [
        "numpy", 'triton>=3.6; platform_system == "Linux"', 'tyro>=0.9; extra == "train"',
        'transformers[torch]>=4 ; extra == "examples"', "fastdml[train]; extra == 'all'",
        "Pillow>=10.1; python_version > '3' and extra == \"train\"",
    ]  # fmt: skip
    monkeypatch.setattr(packages.metadata, "requires", lambda name: lines)
    assert packages.required() == [Package("numpy", ""), Package("triton", "3.6")]
    assert packages.required("train") == [Package("tyro", "0.9"), Package("pillow", "10.1")]
    assert packages.required("all") == []
    assert packages.required("train")[1].module == "PIL"

    def absent(name: str) -> None:
        raise packages.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "requires", absent)
    assert packages.required() is None
    check = checks.installation(None)
    assert (check.status, check.remedy) == ("note", f"pip install -e {ROOT}")
