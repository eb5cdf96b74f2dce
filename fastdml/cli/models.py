"""`fastdml models`: the models that there are by name."""

from __future__ import annotations

import json
from typing import Any

from fastdml.cli.parsing import Parser
from fastdml.errors import InputError, MissingExtra
from fastdml.names import fits, nearest

NOTE = """parameters: for 100 classes and 3 channels
also other depths and widths; package.module:function, your own; timm:NAME, of timm;
NAME@SIZE, any of these on images that it resizes to SIZE x SIZE"""


def models(args: list[str]) -> None:
    """list the models, or those of a name, timm's too: parameters, images, weights, what for"""
    parser = Parser("models", models)
    parser.add_argument(
        "pattern",
        nargs="?",
        metavar="PATTERN",
        help="part of a name, or a pattern such as 'resnet*d': searches timm's models as well",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    options = parser.parse(args)

    from fastdml.report.tables import fixed_columns

    rows = own(options.pattern)
    missing = ""
    if options.pattern is not None:
        try:
            rows += of_timm(options.pattern)
        except MissingExtra as error:
            missing = f"timm's are not searched: {error}"
        if not rows:
            raise InputError(no_model(options.pattern, missing))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    table = [("model", "parameters", "images", "pretrained", "what for")]
    table += [
        (
            row["name"],
            f"{row['parameters']:,}" if row["parameters"] else "-",
            row["input"],
            "yes" if row["pretrained"] else "-",
            row["purpose"],
        )
        for row in rows
    ]
    print(fixed_columns(table, text=(0, 2, 3, 4)))
    print(NOTE)
    if missing:
        print(missing)
    elif options.pattern is None:
        print("fastdml models PATTERN searches timm's as well, such as fastdml models vit_tiny")
    else:
        print("pretrained: --pretrained begins with ImageNet's weights, where timm has them")


def own(pattern: str | None) -> list[dict[str, Any]]:
    """fastdml's own models; parameters are counted."""
    from fastdml.models import catalogue

    rows = catalogue()
    return [row._asdict() for row in rows if pattern is None or fits(row.name, pattern)]


def of_timm(pattern: str) -> list[dict[str, Any]]:
    """timm's models, none of which is built: their parameters are not counted."""
    from fastdml.models.timm_models import timm_models

    return [
        {
            "name": f"timm:{row.name}",
            "parameters": None,
            "input": row.input,
            "purpose": "takes other sizes" if row.any_size else "made for this size",
            "pretrained": row.pretrained,
        }
        for row in timm_models(pattern.removeprefix("timm:"))
    ]


def no_model(pattern: str, missing: str) -> str:
    from fastdml.models import model_names

    near = nearest(pattern, model_names())
    text = f"no model has {pattern!r} in its name"
    text += f"; nearest: {', '.join(near)}" if near else "; fastdml models lists those there are"
    return f"{text} ({missing})" if missing else text
