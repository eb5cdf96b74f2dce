"""Decodes single files, and says what is wrong with those that cannot be decoded.

`python -m fastdml.data.files.check_worker DECODER` does so for a list of files, so that a decoder
that crashes or hangs takes only this process down (see `check_files.py`). It starts in a quarter of
a second with Pillow, since it needs no torch, and in about one with DALI.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from fastdml.data.files.decode import BadImage, decode
from fastdml.errors import require

if TYPE_CHECKING:
    import numpy as np

READY = "ready\n"


def reason(path: str) -> str | None:
    """Why Pillow cannot decode a file, or None."""
    try:
        decode(path)
    except BadImage as bad:
        return bad.reason
    return None


def decoded(encoded: Any, device: str) -> Any:
    """RGB with the EXIF orientation applied, as in `fastdml.data.files.decode`."""
    fn = require("nvidia.dali.fn", "dali")
    types = require("nvidia.dali.types", "dali")
    return fn.decoders.image(encoded, device=device, output_type=types.RGB, adjust_orientation=True)


class Probe:
    """Decodes single files by DALI on the CPU. May crash the process: see `check_files.py`."""

    def __init__(self) -> None:
        self._pipe: Any = None

    def _build(self) -> Any:
        dali = require("nvidia.dali", "dali")
        fn = require("nvidia.dali.fn", "dali")
        types = require("nvidia.dali.types", "dali")
        pipe = dali.Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        with pipe:
            name = fn.external_source(name="source", dtype=types.UINT8, ndim=1)
            pipe.set_outputs(decoded(fn.io.file.read(name), "cpu"))
        pipe.build()
        return pipe

    def pixels(self, path: str) -> np.ndarray:
        """(H, W, 3) uint8; RuntimeError where DALI cannot."""
        import numpy as np

        if self._pipe is None:
            self._pipe = self._build()
        try:
            self._pipe.feed_input("source", [np.frombuffer(os.fsencode(path), np.uint8)])
            return np.array(self._pipe.run()[0].at(0))
        except RuntimeError:
            self._pipe = None  # a pipeline does not survive a bad file
            raise

    def reason(self, path: str) -> str | None:
        try:
            self.pixels(path)
        except RuntimeError as error:
            said = [line for line in str(error).splitlines() if "rror" in line or "ailed" in line]
            return f"DALI cannot decode it ({said[-1].strip() if said else 'no reason given'})"
        return None


def serve(decoder: str) -> None:
    """Reads a JSON list of paths from stdin; answers with READY, and each with a line, its reason
    or null."""
    paths = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a decoder prints goes elsewhere
    probe = Probe() if decoder == "dali" else None
    answers.write(READY)
    answers.flush()
    for path in paths:
        why = reason(path)
        if why is None and probe is not None:
            why = probe.reason(path)
        answers.write(json.dumps(why) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
