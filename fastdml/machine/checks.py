"""What `fastdml doctor` looks at, one line each, with the remedy where something is wrong.

Nothing is imported here that may be missing or broken: that happens in processes of their own.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fastdml
from fastdml import host
from fastdml.errors import one_line
from fastdml.machine import child
from fastdml.machine.compiler import compiler
from fastdml.machine.gpu import Gpus, gpus
from fastdml.machine.packages import EXTRAS, Package, required
from fastdml.namesake import other_apex

OLDEST_PYTHON = (3, 10)
NEEDED = ("numpy", "torch", "triton")
SECONDS = 120.0  # for imports, and again for the self-test: a cold disk, kernels to compile
LITTLE = 1 << 30  # bytes of memory or disk
SHARED = Path("/dev/shm")
GPU_BUILDS = "https://pytorch.org/get-started/locally"


class Check(NamedTuple):
    name: str
    # ok; note: works without, or slower; broken: something fails
    status: Literal["ok", "note", "broken"]
    text: str
    remedy: str = ""


class Imported(NamedTuple):
    """What came of importing packages: errors by module, and what torch says of the machine."""

    errors: dict[str, str]
    torch: dict[str, Any]


def checks() -> Iterator[Check]:
    """All checks, each as soon as it is known. One that fails itself is reported as broken, and the
    others follow."""
    yield from _looked_at("python", lambda: [python()])
    packages = required()
    yield from _looked_at("fastdml", lambda: [installation(packages)])
    extras = {extra: found for extra in EXTRAS if (found := required(extra))}
    imported = try_imports([p for found in extras.values() for p in found])
    yield from (needed(name, packages or [], imported) for name in _names_of_needed())
    visible = gpus()
    yield from _looked_at("gpu", lambda: [gpu(visible, imported)])
    yield from _looked_at("compiler", lambda: [c_compiler(gpu=bool(visible))])
    if "torch" in imported.errors or "triton" in imported.errors:
        yield Check("self-test", "note", "not possible without a working torch and triton")
    else:
        yield from _looked_at("self-test", self_test)
    for extra, found in extras.items():
        yield of_extra(extra, found, imported)
    yield from _looked_at("apex", apex)
    yield from _looked_at("cpus", lambda: [processors(imported.torch.get("threads"))])
    yield from _looked_at("memory", lambda: [memory()])
    yield from _looked_at("workers", shared_memory)
    yield from _looked_at("temporary", temporary)
    yield from _looked_at("disk", lambda: [disk()])


def _looked_at(name: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    try:
        yield from look()
    except Exception as error:  # a machine can be broken in ways that nobody foresaw
        text = f"cannot be looked at: {one_line(error)}"
        yield Check(name, "broken", text, "report it with these lines")


def python() -> Check:
    text = f"{platform.python_version()}, {sys.executable}, {platform.platform()}"
    if sys.version_info < OLDEST_PYTHON:
        return Check("python", "broken", text, "fastdml needs Python 3.10 or newer")
    return Check("python", "ok", text)


def installation(packages: list[Package] | None) -> Check:
    home = Path(fastdml.__file__).parent
    text = f"{fastdml.__version__}, {home}"
    if packages is None:
        remedy = f"pip install -e {home.parent}" if clone() else "pip install fastdml"
        return Check("fastdml", "note", f"{text}: on the path but not installed", remedy)
    return Check("fastdml", "ok", text)


def clone() -> Path | None:
    """The folder of fastdml's sources, where this is an installation of such a folder."""
    folder = Path(fastdml.__file__).parents[1]
    return folder if (folder / "setup.py").is_file() else None


def try_imports(packages: list[Package]) -> Imported:
    """Imports what is installed. What a package takes down with it is tried again in a process of
    its own."""
    waiting = [*NEEDED, *dict.fromkeys(p.module for p in packages if p.version is not None)]
    found = Imported({}, {})
    while waiting:
        rows, failure = child.run("fastdml.machine.imports", waiting, SECONDS)
        for row in rows:
            waiting.remove(row["module"])
            if row["error"]:
                found.errors[row["module"]] = row["error"]
            found.torch.update(row["facts"])
        if waiting:
            found.errors[waiting.pop(0)] = failure or "gives no answer"
    return found


def _names_of_needed() -> tuple[str, ...]:
    return NEEDED if platform.system() == "Linux" else ("numpy", "torch")


def needed(name: str, packages: list[Package], imported: Imported) -> Check:
    """numpy, torch or triton: there, new enough, and can be imported."""
    package = next((p for p in packages if p.name == name), Package(name, ""))
    error = imported.errors.get(name)
    if package.version is None and error:
        return Check(name, "broken", "not installed", f"pip install {name}")
    text = package.version or "of an unknown version"
    if name == "torch":
        text += f", built for {_build(imported.torch)}" if imported.torch else ""
    if error:
        remedy = f"pip install --force-reinstall {name}"
        return Check(name, "broken", f"{text} cannot be imported: {error}", remedy)
    if package.too_old:
        remedy = f"pip install --upgrade '{name}>={package.least}'"
        return Check(name, "broken", f"{text}, and fastdml needs {package.least}", remedy)
    if name == "triton" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        text += ", but TRITON_INTERPRET is set: kernels run in Python, many times slower"
        return Check(name, "note", text, "unset TRITON_INTERPRET")
    return Check(name, "ok", text)


def _build(torch: dict[str, Any]) -> str:
    if torch["cuda"]:
        return f"CUDA {torch['cuda']}"
    return f"ROCm {torch['hip']}" if torch["hip"] else "CPUs alone"


def gpu(visible: Gpus | None, imported: Imported) -> Check:
    """The GPUs that torch reaches, beside those that the system shows."""
    torch = imported.torch
    driver = f", driver {visible.driver}" if visible and visible.driver else ""
    if torch.get("devices") and not torch["error"]:
        devices = ", ".join(
            f"{d['name']} (capability {d['capability']}, {_gb(d['free'])} of {_gb(d['memory'])} "
            "free)"
            for d in torch["devices"]
        )
        return Check("gpu", "ok", f"{devices}{driver}")
    if visible is None:
        if torch.get("hip"):
            return Check("gpu", "note", f"none that torch reaches: {torch['error'] or 'no device'}")
        return Check("gpu", "ok", "none: everything runs on the CPU")
    name = f"{', '.join(visible.names) or 'a driver'}{driver}"
    if visible.failure:
        remedy = "repair the driver until nvidia-smi lists the GPU"
        return Check("gpu", "broken", f"{name}: {visible.failure}", remedy)
    if not torch:
        return Check("gpu", "note", f"{name}; torch cannot be asked")
    if not torch["cuda"]:
        remedy = f"install torch for CUDA, as {GPU_BUILDS} says"
        return Check("gpu", "broken", f"{name}, but torch is a build for CPUs", remedy)
    reason = torch["error"] or "torch sees no device"
    remedy = (
        f"install a torch whose CUDA this driver and this GPU support ({GPU_BUILDS}), or a newer "
        "driver; in a container give it the GPU (docker run --gpus all); look at "
        "CUDA_VISIBLE_DEVICES"
    )
    return Check("gpu", "broken", f"{name}, but torch cannot use it: {reason}", remedy)


def c_compiler(*, gpu: bool) -> Check:
    """Needed on a GPU, where Triton builds its launches; on a CPU only to build the native loss."""
    found = compiler()
    wrong: Literal["note", "broken"] = "broken" if gpu else "note"
    use = "Triton launches no kernel without" if gpu else "needed to build the CPU's native loss"
    if found is None:
        return Check("compiler", wrong, f"none: {use}", "apt install gcc, or conda install gcc")
    if not found.works:
        text = f"{found.name} compiles nothing: {found.failure}"
        return Check("compiler", wrong, text, "apt install gcc libc6-dev, or set CC to one")
    if gpu and not found.headers:
        text = f"{found.name} does not find Python's headers, which Triton's launches need"
        return Check("compiler", "broken", text, "apt install python3-dev, or a Python with them")
    return Check("compiler", "ok", found.name)


def self_test() -> Iterator[Check]:
    """The native loss, and the loss by each route against float64."""
    rows, failure = child.run("fastdml.machine.self_test", [], SECONDS)
    for row in rows:
        if "native" in row:
            yield native(row["native"])
            continue
        errors = ", ".join(
            f"{loss:.0e} and {grads:.0e} of {dtype}"
            for dtype, (loss, grads) in row["errors"].items()
        )
        text = f"relative errors of losses and gradients against float64: {errors}"
        yield Check(
            f"loss, {row['route']}",
            "ok" if row["right"] else "broken",
            text if row["right"] else f"{text}: more than rounding explains",
            "" if row["right"] else _rebuild(),
        )
    if failure:
        last = rows[-1].get("route", "the first") if rows else "the start"
        text = f"the self-test ended after {last}: {failure}"
        yield Check("self-test", "broken", text, "report it with these lines")


def native(state: str) -> Check:
    if state == "built":
        return Check("native loss", "ok", "built: the CPU's loss runs in C")
    if state == "absent":
        text = (
            "not built: the CPU's loss runs in torch, right but slower (fastdml bench measures it)"
        )
        return Check("native loss", "note", text, f"with a C compiler, {_rebuild()}")
    return Check("native loss", "broken", f"built, but does not load: {state}", _rebuild())


def _rebuild() -> str:
    folder = clone()
    if folder is not None:
        return f"pip install -e {folder}"
    return "pip install --force-reinstall --no-deps --no-binary fastdml fastdml"


def of_extra(extra: str, packages: list[Package], imported: Imported) -> Check:
    """The packages of an extra: versions, or what is missing or fails."""
    name = f"[{extra}]"
    missing = [p.name for p in packages if p.version is None]
    there = [p for p in packages if p.version is not None]
    broken = [p for p in there if p.module in imported.errors]
    old = [p for p in there if p.too_old]
    if broken:
        errors = "; ".join(f"{p} cannot be imported: {imported.errors[p.module]}" for p in broken)
        names = " ".join(p.name for p in broken)
        # torchvision and others are built for one version of torch, so both are named
        return Check(name, "broken", errors, f"pip install --upgrade torch {names}")
    if old:
        texts = ", ".join(f"{p} is older than {p.least}" for p in old)
        return Check(name, "broken", texts, f"pip install --upgrade 'fastdml[{extra}]'")
    if missing:
        text = f"{', '.join(missing)} not installed: {EXTRAS[extra]}"
        return Check(name, "note", text, f"pip install 'fastdml[{extra}]'")
    return Check(name, "ok", ", ".join(map(str, there)))


def apex() -> Iterator[Check]:
    """Whether an installed package apex is NVIDIA's, and complete."""
    if importlib.util.find_spec("apex") is None:
        return
    namesake = other_apex()
    if namesake is not None:
        text = f"{namesake} is PyPI's package of that name, not NVIDIA's"
        yield Check("apex", "broken", text, "pip uninstall apex")
    elif importlib.util.find_spec("amp_C") is None:
        text = "NVIDIA's, without its CUDA extensions, which the optimizers apex_* need"
        yield Check("apex", "note", text, "build it as https://github.com/NVIDIA/apex says")
    else:
        yield Check("apex", "ok", "NVIDIA's")


def processors(threads: int | None) -> Check:
    """Cores, a container's share of them, and the threads that torch starts."""
    there, may = os.cpu_count() or 1, host.cpus()
    text = f"{may} of {there} for this process"
    if math.isfinite(host.quota()):
        text += f" (quota of the container: {host.quota():g})"
    asked = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        text += f"; torch takes {threads}"
    text += f"; OMP_NUM_THREADS={asked}" if asked else "; OMP_NUM_THREADS is not set"
    if threads is not None and threads > may:
        remedy = (
            "unset OMP_NUM_THREADS, or set it to that"
            if asked
            else f"in a loop of your own, torch.set_num_threads({may}); fastdml train does it"
        )
        return Check("cpus", "note", f"{text}: more threads than CPUs wait for each other", remedy)
    return Check("cpus", "ok", text)


def memory() -> Check:
    total, free = host.memory()
    if math.isnan(total):
        return Check("memory", "note", "the system does not say")
    text = f"{_gb(free)} of {_gb(total)} free"
    if free < LITTLE:
        remedy = "end other programs, or give the container more"
        return Check("memory", "note", f"{text}: torch alone takes several 100 MB", remedy)
    return Check("memory", "ok", text)


def shared_memory(folder: Path = SHARED) -> Iterator[Check]:
    """Where worker processes of a loader leave batches; containers get 64 MB by default."""
    if not folder.is_dir():
        return
    usage = shutil.disk_usage(folder)
    text = f"{_gb(usage.free)} of {_gb(usage.total)} free in {folder}"
    if usage.free < LITTLE:
        text += ", through which a loader's worker processes pass their batches"
        yield Check("workers", "note", text, "docker run --shm-size 4g, or --loader resident")
    else:
        yield Check("workers", "ok", text)


def temporary() -> Iterator[Check]:
    """Compilers, Triton's among them, need a folder for files in between."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        text = "no folder for temporary files can be written to"
        yield Check("temporary", "broken", text, "set TMPDIR to a folder that can be")


def disk(folder: Path | None = None) -> Check:
    """Room for runs, which go below the current folder."""
    try:
        folder = folder or Path.cwd()
    except FileNotFoundError:
        return Check("disk", "broken", "the current folder has been removed", "cd to another")
    usage = shutil.disk_usage(folder)
    text = f"{_gb(usage.free)} of {_gb(usage.total)} free in {folder}"
    if not os.access(folder, os.W_OK):
        remedy = "go elsewhere, or give --folder"
        return Check("disk", "note", f"{text}, which cannot be written to", remedy)
    if usage.free < LITTLE:
        return Check("disk", "note", text, "make room: a run keeps its weights and a checkpoint")
    return Check("disk", "ok", text)


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
