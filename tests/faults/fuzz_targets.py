"""The product's parsers, each with inputs that are nearly right. A target registers itself when its
file is imported. See `fuzzing`.
"""

from __future__ import annotations

import fuzz_data
import fuzz_loss
import fuzz_report
import fuzz_runs
from fuzz_registry import TARGETS

__all__ = ["TARGETS", "fuzz_data", "fuzz_loss", "fuzz_report", "fuzz_runs"]
