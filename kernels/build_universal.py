"""Writes `fastdml_kernels` in the layout that Hugging Face's `kernels` loads, as a universal build:
Python and Triton alone, for every torch, and compiled where it runs.

    python kernels/build_universal.py FOLDER

    kernel = kernels.get_local_kernel(Path("FOLDER"))
    kernel.mutual_loss(logits, kernel.Call(...))

Several versions of a kernel may be loaded into one process, and `fastdml_kernels` may be installed
beside them. So each build registers its operators under a name of its own, made of the sources.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent / "fastdml_kernels"
DATA = ("py.typed", "tile_table.json")
# `torch.library.define("fastdml::NAME", ...)`, `torch.ops.fastdml.NAME(...)`
OPERATOR = re.compile(r"\bfastdml(?=::)|(?<=\btorch\.ops\.)fastdml(?=\.)")


def build(folder: Path) -> Path:
    """The folder of the build below `folder`, which holds nothing but this build then."""
    sources = {path.name: path.read_text() for path in sorted(PACKAGE.glob("*.py"))}
    digest = hashlib.sha256(json.dumps(sources).encode()).hexdigest()
    name = f"_fastdml_kernels_universal_{digest[:7]}"  # of the module and of its operators
    variant = folder / "build" / "torch-universal"
    if variant.exists():
        shutil.rmtree(variant)
    package = variant / PACKAGE.name
    package.mkdir(parents=True)
    for file, text in sources.items():
        (package / file).write_text(OPERATOR.sub(name, text))
    for file in DATA:
        shutil.copy(PACKAGE / file, package / file)
    metadata = {
        "name": "fastdml-kernels", "id": name, "version": 1, "license": "Apache-2.0",
        "python-depends": [], "backend": {"type": "cuda"},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what kernels takes")
    print(build(parser.parse_args().folder))


if __name__ == "__main__":
    main()
