"""`fastdml doctor`: what is here, what is missing, and the command that gets it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fastdml.cli.parsing import Parser

if TYPE_CHECKING:
    from fastdml.machine.checks import Check

WIDTH = 14  # of the name's column
MARKS = {"ok": "ok", "note": "note", "broken": "BROKEN"}


def doctor(args: list[str]) -> None:
    """look at this machine: what is installed, missing or broken, and a self-test of the loss"""
    parser = Parser("doctor", doctor)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse(args)

    from fastdml import __version__
    from fastdml.machine.checks import checks

    found: list[Check] = []
    for check in checks():
        found.append(check)
        if not options.json:
            print(line(check), flush=True)
    broken = [check for check in found if check.status == "broken"]
    if options.json:
        rows = [check._asdict() for check in found]
        print(json.dumps({"fastdml": __version__, "broken": len(broken), "checks": rows}, indent=1))
    elif broken:
        print(f"\n{len(broken)} broken: {', '.join(check.name for check in broken)}")
    else:
        print("\nnothing is broken")
    if broken:
        raise SystemExit(1)


def line(check: Check) -> str:
    """A check as the terminal shows it, its remedy in a line of its own."""
    text = f"{MARKS[check.status]:<7} {check.name:<{WIDTH}} {check.text}"
    return f"{text}\n{'':<8}{'':<{WIDTH}} -> {check.remedy}" if check.remedy else text
