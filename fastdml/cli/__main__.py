"""`python -m fastdml.cli` is the command `fastdml`."""

from __future__ import annotations

import sys

from fastdml.cli import main

if __name__ == "__main__":
    sys.exit(main())
