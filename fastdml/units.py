"""Numbers as people read them."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """A number of bytes, never 0 MB of something."""
    return f"{nbytes / 1e6:,.0f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """In the unit that suits it, for instance "7.5 min"."""
    units = (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))
    unit, length = next((u, n) for u, n in units if seconds >= 1.5 * n or u == "s")
    count = seconds / length
    return f"{count:.1f} {unit}" if count < 9.95 else f"{count:,.0f} {unit}"


def percent(fraction: float | None) -> str:
    """A fraction of 1 in hundredths, without the sign; "-" where there is none."""
    return "-" if fraction is None else f"{100 * fraction:.2f}"


def count_of_threads(n: int) -> str:
    return f"{n} thread{'s' * (n != 1)}"
