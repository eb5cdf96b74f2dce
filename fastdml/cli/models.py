"""`fastdml models`: the models that there are by name."""

from __future__ import annotations

import json

from fastdml.cli.parsing import Parser


def models(args: list[str]) -> None:
    """list the models: names, parameters, images, what for"""
    parser = Parser("models", models)
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    options = parser.parse(args)

    from fastdml.models import catalogue
    from fastdml.report.tables import fixed_columns

    known = catalogue()
    if options.json:
        print(json.dumps([row._asdict() for row in known], indent=1))
        return
    rows = [("model", "parameters", "images", "what for")]
    rows += [(row.name, f"{row.parameters:,}", row.input, row.purpose) for row in known]
    print(fixed_columns(rows, text=(0, 2, 3)))
    print(
        "parameters: for 100 classes and 3 channels\n"
        "also other depths and widths; package.module:function, your own; timm:NAME, of timm;\n"
        "NAME@SIZE, any of these on images that it resizes to SIZE x SIZE"
    )
