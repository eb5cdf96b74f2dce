"""Templates to HTML, with every value escaped."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from fastdml.errors import require

# Control characters that HTML cannot hold, and those that turn the direction of the text around
# them, so that a name cannot rewrite what stands beside it.
UNPRINTABLE = dict.fromkeys(
    [
        *(*range(9), 11, 12, *range(14, 32), *range(127, 160)),
        *(*range(0x202A, 0x202F), *range(0x2066, 0x206A)),
        *(*range(0xD800, 0xE000), 0xFFFE, 0xFFFF),
    ],
    "\ufffd",
)


def render(template: str, **values: Any) -> str:
    """The HTML of one of the templates beside this file."""
    text = _environment().get_template(template).render(**values)
    return text.translate(UNPRINTABLE)


@cache
def _environment() -> Any:
    jinja2 = require("jinja2", "train")  # torch brings it
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = lambda: environment.filters["safe"](_read("style.css"))
    return environment


def _read(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text("utf-8")
