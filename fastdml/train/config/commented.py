"""The settings of a run as a YAML file for people: all, in groups, each below its help text.

It is another form of what `TrainConfig.save` writes, and `--config` takes both.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from fastdml.errors import require
from fastdml.train.config.base import TrainConfig
from fastdml.train.config.fields import FieldText, field_texts, field_types

WIDTH = 100


def commented_yaml(config: TrainConfig) -> str:
    """The text of such a file; read back it gives this configuration."""
    values, hints = config.to_dict(), field_types(type(config))
    lines = [
        f"# Settings for: fastdml train {config.data} --config FILE",
        "# A setting that is left out has its default; options of the command win over the file.",
    ]
    group = None
    for field in _texts(type(config)):
        if field.group != group:
            group = field.group
            lines += ["", f"# --- {group} ---"]
        for text in (field.text, _choices(hints[field.name])):
            lines += textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")
        lines.append(_line(field.name, values[field.name]))
    return "\n".join(lines) + "\n"


def _texts(kind: type[TrainConfig]) -> Iterator[FieldText]:
    """The text of every field, in the order of the fields; without one where the sources are not
    installed."""
    texts: dict[str, FieldText] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, TrainConfig):
            try:
                texts |= {text.name: text for text in field_texts(base)}
            except OSError:
                continue
    for name in field_types(kind):
        yield texts.get(name, FieldText("settings", name, ""))


def _choices(hint: Any) -> str:
    """What a setting of a few names may be, as a line."""
    kinds = [hint, *get_args(hint)]  # of a tuple and of `... | None` too
    names = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    return f"Choices: {', '.join(map(str, names))}" if names else ""


def _line(name: str, value: Any) -> str:
    yaml = require("yaml", "train")
    if isinstance(value, list):
        text = yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip()
        return f"{name}: {text}"
    return yaml.safe_dump({name: value}, width=float("inf"), allow_unicode=True).strip()
