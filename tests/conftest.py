"""Settings of every test.

Tests marked `gpu` are skipped, and say so, where there is no CUDA device. There, kernels run under
Triton's interpreter, in the same process and by the same tests as on a GPU; `tests/kernels` is on
the path for its helper `oracle`. Threads that wait for each other sleep: spinning makes small
networks up to ten times slower where cores are shared. Real CIFAR-100 is found or unpacked here.
A shell starts background jobs with some signals ignored, and runs respect that. Tests send these
signals, so they are set back to their default here.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which torch is not
for number, usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)
ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() or config.getoption("--dry-run", False):  # which runs no test
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """The folder of what scans of images found; the user's own is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "fastdml" / "scans"


@pytest.fixture(scope="session")
def cifar100_root(tmp_path_factory):
    """A folder with both versions of the real files, unpacked for the session if need be."""
    if all(
        (ROOT / "data" / f).is_file()
        for f in ("cifar-100-python/train", "cifar-100-binary/train.bin")
    ):
        yield ROOT / "data"
        return
    unpack = ROOT.parent / "shared" / "data" / "unpack.py"
    if not unpack.is_file():
        pytest.skip("real CIFAR-100 is absent: put cifar-100-python and cifar-100-binary in ./data")
    pytest.importorskip("PIL", reason="real CIFAR-100 is packed and needs Pillow to unpack")
    folder = tmp_path_factory.mktemp("cifar100")
    subprocess.run([sys.executable, unpack, folder], check=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def take(monkeypatch):
    """Lets a measurement find one candidate fastest, and eager on one thread; nobody is given up.
    Returns a list that gets the times of each measurement."""
    from fastdml.engine import auto, rehearsal

    def fastest(execution: str, threads: int) -> list:
        asked = []

        def chosen(times):
            asked.append(times)
            wanted = rehearsal.Candidate(execution, threads)
            return wanted if wanted in times else next(iter(times))

        monkeypatch.setattr(auto, "fastest", chosen)
        monkeypatch.setattr(rehearsal, "LATE", 1e9)
        monkeypatch.setattr(rehearsal, "ROUNDS", 1)
        monkeypatch.setattr(rehearsal, "FIRST_LATE", 1e9)
        return asked

    return fastest


@pytest.fixture
def cache_weights():
    """A function that saves weights of a network of timm's, called by name, as the cache of Hugging
    Face's hub in a folder holds them, and gives them."""

    def cache(name: str, hub: Path) -> dict[str, torch.Tensor]:
        import timm
        from safetensors.torch import save_file

        with torch.random.fork_rng():
            torch.manual_seed(1)
            weights = timm.create_model(name).state_dict()
        repository = timm.get_pretrained_cfg(name).hf_hub_id
        folder = hub / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / "0123abcd"
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0123abcd")
        save_file(weights, snapshot / "model.safetensors")
        return weights

    return cache


@pytest.fixture
def small_disk(tmp_path):
    """Mounts an empty file system of so many MB, unmounted behind the test."""
    folder = tmp_path / "disk"

    def mounted(megabytes: int) -> Path:
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        try:
            done = subprocess.run(mount, capture_output=True, text=True)
        except FileNotFoundError as error:
            pytest.skip(f"no mount: {error}")
        if done.returncode:
            pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mounted
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
