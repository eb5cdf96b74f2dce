"""A YAML file of settings, `name: value` lines, written atomically and read without trusting it.

A value is a scalar or a list of scalars. That is checked before anything is constructed, so that
nested aliases, which stand for more values than memory holds, are refused at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdml.errors import InputError, require
from fastdml.files import write_atomically
from fastdml.paths import expanded

CONFIG = "config.yaml"  # the settings of a run, in its folder
LARGEST = 1 << 20  # bytes; a device named by mistake may have no end


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in the file, by name. It is read once, so that it may be a pipe."""
    yaml = require("yaml", "train")
    place = expanded(path)
    try:
        with place.open("rb") as file:
            content = file.read(LARGEST + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"cannot read the settings {path}: {reason}") from None
    if len(content) > LARGEST:
        raise InputError(f"cannot read the settings {path}: they are more than {LARGEST:,} bytes")
    try:
        return _values(yaml, yaml.SafeLoader(text), path)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{path} is not YAML: nested too deeply") from None
    except Exception as error:  # of yaml, and whatever its constructors meet in names
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def write_settings(path: Path, values: dict[str, Any]) -> None:
    """Replaces the file by these plain values, in their order."""
    yaml = require("yaml", "train")
    write_atomically(path, yaml.safe_dump(values, sort_keys=False))


def _values(yaml: Any, loader: Any, path: str | Path) -> dict[str, Any]:
    node = loader.get_single_node()
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise InputError(f"{path} must hold 'name: value' lines, not {kind}")
    _check_flat(yaml, loader, node, path)
    return loader.construct_document(node)


def _check_flat(yaml: Any, loader: Any, node: Any, path: str | Path) -> None:
    """Refuses a name given twice, values that are more than a list of scalars, and those that are
    not what they look like, such as the date 2001-99-99."""
    names: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            raise InputError(f"{path}, line {line}: {name!r} is not the name of a setting")
        if name in names:
            raise InputError(
                f"{path}, line {line}: {name} is set twice, first on line {names[name]}: leave "
                "one of them"
            )
        names[name] = line
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(item, yaml.ScalarNode) for item in items):
            raise InputError(
                f"{path}, line {line}: {name} must be a single value or a list of them"
            )
        for part in {id(part): part for part in (*items, value)}.values():
            _check_value(loader, part, name, path)


def _check_value(loader: Any, node: Any, name: str, path: str | Path) -> None:
    try:
        loader.construct_object(node, deep=True)
    except Exception:  # of yaml, or whatever its constructors meet, such as an AttributeError
        text = repr(node.value)[:80] if isinstance(node.value, str) else "the list"
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        line = node.start_mark.line + 1
        raise InputError(
            f"{path}, line {line}: {text} for {name} is no {kind}: write a number, or a name in "
            "quotes"
        ) from None
