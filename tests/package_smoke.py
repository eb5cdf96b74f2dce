"""Wheel and source distribution, each installed into an empty environment of every Python that is
here, and tried there. Opt-in, since torch alone is several GB: `make smoke`.

It needs uv (`pip install uv`), which keeps what it has downloaded and links it into environments;
one environment exists at a time. What is checked within one is `package_checks.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKS = ROOT / "tests" / "package_checks.py"
CLIENT = ROOT / "tests" / "typing_cases" / "right.py"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SETTINGS = """[mypy]
ignore_missing_imports = True
no_implicit_reexport = True
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, help="versions or interpreters")
    parser.add_argument("--only", choices=("wheel", "sdist", "train", "types"), action="append")
    options = parser.parse_args()
    wanted = options.only or ["wheel", "sdist", "train", "types"]
    with tempfile.TemporaryDirectory(prefix="fastdml-smoke-") as folder:
        smoke = Smoke(Path(folder))
        wheel, sdist = smoke.build()
        for python in options.pythons:
            for kind, dist in (("wheel", wheel), ("sdist", sdist)):
                if kind in wanted:
                    smoke.bare(python, dist)
        last = options.pythons[-1]
        if "train" in wanted:
            smoke.first_hour(last, wheel)
        if "types" in wanted:
            smoke.types(last, wheel)
    return 0


class Smoke:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uv = shutil.which("uv") or sys.exit("package_smoke needs uv: pip install uv")
        # Nothing of this checkout may be found from there.
        self.env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(self, command: Sequence[str | Path], **options) -> str:
        """Its output; ends everything where it fails."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\nexit code {done.returncode}")
        return done.stdout

    def build(self) -> tuple[Path, Path]:
        """(wheel, sdist) of the files that git has; the sdist makes the same wheel."""
        source, out = self.folder / "source", self.folder / "dist"
        names = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split("\0")
        for name in filter(None, names):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
        self.run([self.uv, "build", "-q", "--sdist", "--wheel", "--out-dir", out, source])
        (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
        again = self.folder / "again"
        self.run([self.uv, "build", "-q", "--wheel", "--out-dir", again, sdist])
        (second,) = again.glob("*.whl")
        assert contents(second) == contents(wheel), "the sdist makes another wheel"
        with tarfile.open(sdist) as archive:
            files = {name.partition("/")[2] for name in archive.getnames()}
        assert {"examples/configs/quick.yaml", "tests/package_smoke.py", "mkdocs.yml"} <= files
        print(f"built {wheel.name} ({len(contents(wheel))} files) and {sdist.name}; same contents")
        return wheel, sdist

    def environment(self, python: str, *what: str) -> Path:
        """A new one in place of the last; its Python."""
        venv = self.folder / "venv"
        shutil.rmtree(venv, ignore_errors=True)
        self.run([self.uv, "venv", "-q", "--no-python-downloads", "--python", python, venv])
        self.run([self.uv, "pip", "install", "-q", "--python", venv / "bin/python", *what])
        return venv / "bin/python"

    def elsewhere(self, name: str) -> Path:
        """An empty folder to work in."""
        folder = self.folder / "work" / name
        folder.mkdir(parents=True)
        return folder

    def bare(self, python: str, dist: Path) -> None:
        """Without any extra."""
        start = time.perf_counter()
        interpreter = self.environment(python, str(dist))
        installed = time.perf_counter()
        work = self.elsewhere(f"{python}-{dist.suffix}".replace("/", "_"))
        out = self.run([interpreter, "-I", CHECKS, "bare"], cwd=work)
        assert not list(work.iterdir()), list(work.iterdir())
        print(
            f"{python} {dist.name}: installed in {installed - start:.0f} s, checked in "
            f"{time.perf_counter() - installed:.0f} s\n{indented(out)}",
            flush=True,
        )

    def first_hour(self, python: str, wheel: Path) -> None:
        """Own images to a trained network in plain torch, with extras."""
        start = time.perf_counter()
        interpreter = self.environment(python, f"fastdml[train,onnx,images] @ {wheel.as_uri()}")
        out = self.run([interpreter, "-I", CHECKS, "first-hour"], cwd=self.elsewhere("first-hour"))
        print(f"first hour, {time.perf_counter() - start:.0f} s\n{indented(out)}", flush=True)

    def types(self, python: str, wheel: Path) -> None:
        """mypy and pyright know the types from the wheel alone."""
        start = time.perf_counter()
        interpreter = self.environment(
            python, f"fastdml[train] @ {wheel.as_uri()}", "mypy", "pyright[nodejs]"
        )
        work = self.elsewhere("types")
        shutil.copy(CLIENT, work)
        (work / "mypy.ini").write_text(SETTINGS)
        out = self.run([interpreter, "-m", "mypy", CLIENT.name], cwd=work)
        pyright = [interpreter, "-m", "pyright", "--pythonpath", interpreter]
        out += self.run([*pyright, CLIENT.name], cwd=work)
        print(f"types, {time.perf_counter() - start:.0f} s\n{indented(out)}", flush=True)


def contents(wheel: Path) -> dict[str, str]:
    """The files of a wheel with their hashes; compiled code by its name alone."""
    archive = zipfile.ZipFile(wheel)
    found = {name: hashlib.md5(archive.read(name)).hexdigest() for name in archive.namelist()}
    return found | {name: "" for name in found if name.endswith((".so", "RECORD"))}


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
