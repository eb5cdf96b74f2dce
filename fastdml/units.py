"""Sizes, durations and shares as text."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """A number of bytes in MB, below 1 MB in kB."""
    return f"{nbytes / 1e6:,.0f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, for instance "7.5 min"."""
    units = (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))
    unit, length = next((u, n) for u, n in units if seconds >= 1.5 * n or u == "s")
    count = seconds / length
    return f"{count:.1f} {unit}" if count < 9.95 else f"{count:,.0f} {unit}"


def milliseconds(seconds: float) -> str:
    """Three digits of so many milliseconds, such as "12.3", and all digits from 1,000 on."""
    count = 1000 * seconds
    return f"{count:.3g}" if count < 999.5 else f"{count:,.0f}"


def rate(count: float) -> str:
    """A count a second, thousands from 10,000 on as "15.7k"."""
    return f"{count:,.0f}" if count < 9999.5 else f"{count / 1000:,.1f}k"


def percent(fraction: float | None) -> str:
    """A fraction of 1 in percent with two decimals and no sign; "-" for None."""
    return "-" if fraction is None else f"{100 * fraction:.2f}"


def count_of_threads(n: int) -> str:
    return f"{n} thread{'s' * (n != 1)}"
