"""`fastdml data`: the data sets that there are by name."""

from __future__ import annotations

import json

from fastdml.cli.parsing import Parser

# The values of `DataSet.files` as the table shows them.
FILES = {"none": "none", "download": "--download", "own": "your own"}


def data(args: list[str]) -> None:
    """list the data sets: names, classes, images, where files come from and belong, what for"""
    parser = Parser("data", data)
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    options = parser.parse(args)

    from fastdml.data import catalogue
    from fastdml.report.tables import fixed_columns

    known = catalogue()
    if options.json:
        keys = ("name", "task", "num_classes", "image_shape", "files", "place", "purpose")
        print(json.dumps([{key: getattr(row, key) for key in keys} for row in known], indent=1))
        return
    rows = [("data", "task", "classes", "images", "files", "below --root", "what for")]
    rows += [
        (
            row.name,
            row.task,
            f"{row.num_classes:,}" if row.num_classes else "any",
            row.input,
            FILES[row.files],
            row.place or "-",
            row.purpose,
        )
        for row in known
    ]
    print(fixed_columns(rows, text=(0, 1, 3, 4, 5, 6)))
