"""A network as one file of Python that needs torch, not fastdml: what exported weights are loaded
into elsewhere.

The file holds the definitions that the network is made of, copied from this package, and a function
`build` that makes the network. Of timm's networks and of a user's own it holds the call that makes
them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from fastdml.errors import require
from fastdml.models import registry
from fastdml.models.input_size import split_size
from fastdml.models.own import is_own, taken_by
from fastdml.models.reid_head import ReidHead, ReidModel
from fastdml.models.timm_models import IMAGENET_RESNETS, create_timm_model, keep_last_stage

DROPPED = "register_model"  # a decorator that makes no difference to what it decorates


class Spec(NamedTuple):
    """What `create_model` made a network from."""

    name: str
    num_classes: int
    in_channels: int
    head: ReidHead | None
    image_size: tuple[int, int] | None


def module_source(spec: Spec, network: nn.Module) -> str:
    """The text of the file. network: made from `spec`, to tell its class by."""
    roots: dict[Any, None] = {}  # classes and functions to copy, in order
    imports: dict[str, None] = {}
    lines = _building(spec, network, roots, imports)
    title = spec.name if spec.head is None else f"{spec.name} with a head for re-identification"
    definitions = _Copied()
    for root in roots:
        definitions.add(root.__module__, root.__name__)
    body = textwrap.indent("\n".join(lines), "    ")
    head = [f'"""{title}, as fastdml builds it."""', "from __future__ import annotations"]
    head.append(_import_lines(["from torch import nn", *imports, *definitions.imports]))
    parts = [
        "\n\n".join(head),
        *definitions.texts,
        f'def build() -> nn.Module:\n    """The network, with fresh weights."""\n{body}',
    ]
    return "\n\n\n".join(parts) + "\n"


def ensemble_source(kind: type[nn.Module], modules: Sequence[str]) -> str:
    """The text of a file that makes an ensemble of the networks that files called `modules` make.
    kind: its class, which takes a list of networks."""
    definitions = _Copied()
    definitions.add(kind.__module__, kind.__name__)
    imports = [f"from {module} import build as {module}" for module in modules]
    parts = [
        '"""The ensemble of several networks: its parts are made by the files imported."""\n\n'
        "from __future__ import annotations\n\n"
        + _import_lines(["from torch import nn", *imports, *definitions.imports]),
        *definitions.texts,
        "def build() -> nn.Module:\n"
        '    """The networks, with fresh weights."""\n'
        f"    return {kind.__name__}([{', '.join(f'{module}()' for module in modules)}])",
    ]
    return "\n\n\n".join(parts) + "\n"


def _import_lines(imports: Iterable[str]) -> str:
    """Statements of one name each, sorted, and one for each module that names come from."""
    plain, named = set(), defaultdict[str, set[str]](set)
    for line in imports:
        module, _, name = line.removeprefix("from ").partition(" import ")
        if name:
            named[module].add(name)
        else:
            plain.add(line)
    lines = [f"from {module} import {', '.join(sorted(named[module]))}" for module in sorted(named)]
    return "\n".join([*sorted(plain), *lines])


def _building(spec: Spec, network: Any, roots: dict, imports: dict) -> list[str]:
    """The lines of `build`, which end by returning the network."""
    name, size = split_size(spec.name)
    if size is not None:
        roots[type(network)] = None
        within = spec._replace(name=name, image_size=(size, size))
        inner = _building(within, network.model, roots, imports)
        made = f"{type(network).__name__}(model, {size}, {spec.num_classes})"
        return [*_assigned(inner), f"return {made}"]
    if spec.head is not None:
        roots |= {ReidHead: None, ReidModel: None}
        lines = _assigned(_backbone(spec, network.backbone, roots, imports))
        call = _call("ReidModel", "model", spec.num_classes, spec.head, name=name)
        return [*lines, f"return {call[:-1]}, in_channels={spec.in_channels})"]
    return _backbone(spec, network, roots, imports)


def _backbone(spec: Spec, network: nn.Module, roots: dict, imports: dict) -> list[str]:
    name, arguments = spec.name, {"num_classes": spec.num_classes, "in_channels": spec.in_channels}
    if name.startswith("timm:") or (spec.head is not None and name in IMAGENET_RESNETS):
        return _of_timm(spec, roots, imports)
    if is_own(name):
        module, _, function = name.partition(":")
        imports[f"from {module} import {function}"] = None
        made = getattr(importlib.import_module(module), function)
        return [f"return {_call(function, **taken_by(made, arguments))}"]
    found = registry.find(name)
    assert found is not None, f"{name} was built, so it is registered"
    known, numbers = found
    build: Any = known.build
    if spec.head is not None:
        arguments |= {"large": True, "last_stride": spec.head.last_stride}
    if build.__module__.startswith("fastdml."):
        roots[type(network)] = None
        build = type(network)
    else:
        imports[f"from {build.__module__} import {build.__name__}"] = None
    return [f"return {_call(build.__name__, **numbers, **taken_by(build, arguments))}"]


def _of_timm(spec: Spec, roots: dict, imports: dict) -> list[str]:
    name = spec.name.removeprefix("timm:")
    config = require("timm", "reid").get_pretrained_cfg(name)
    if spec.head is None and not (config and config.fixed_input_size and spec.image_size):
        imports["import timm"] = None
        given = {"num_classes": spec.num_classes, "in_chans": spec.in_channels}
        return [f"return {_call('timm.create_model', name, **given)}"]
    roots[create_timm_model] = None
    classes = spec.num_classes if spec.head is None else 0
    options: dict[str, Any] = {"pretrained": False, "image_size": spec.image_size}
    call = _call("create_timm_model", name, classes, spec.in_channels, **options)
    if spec.head is None or spec.head.last_stride != 1:
        return [f"return {call}"]
    roots[keep_last_stage] = None
    return [f"model = {call}", "keep_last_stage(model)", "return model"]


def _assigned(lines: list[str]) -> list[str]:
    return [*lines[:-1], lines[-1].replace("return ", "model = ", 1)]


def _call(function: str, *values: Any, **options: Any) -> str:
    first = [v if v == "model" else repr(v) for v in values]
    return f"{function}({', '.join([*first, *(f'{k}={v!r}' for k, v in options.items())])})"


class _Copied:
    """Definitions of fastdml's with all of fastdml's that they use, each before its users."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.imports: dict[str, None] = {}  # of other packages
        self._seen: dict[str, str] = {}  # a name and the module that defines it

    def add(self, module: str, name: str) -> None:
        if name in self._seen:
            assert self._seen[name] == module, f"{module} and {self._seen[name]} define {name}"
            return
        self._seen[name] = module
        names = _names(module)
        node, text = names.defined[name]
        for used in _used(node):
            if used in names.defined:
                self.add(module, used)
            elif used in names.ours:
                self.add(*names.ours[used])
            elif used in names.others:
                self.imports[names.others[used]] = None
        if text not in self.texts:  # one assignment may define several names
            self.texts.append(text)


class _Names(NamedTuple):
    """What the names at the top of a module mean."""

    defined: dict[str, tuple[ast.stmt, str]]  # with the text of the definition
    ours: dict[str, tuple[str, str]]  # imported from another module of fastdml: it, and the name
    others: dict[str, str]  # imported from elsewhere: the line that does


@cache
def _names(module: str) -> _Names:
    source = inspect.getsource(importlib.import_module(module))
    lines = source.splitlines()
    found = _Names({}, {}, {})
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            kept = [d for d in node.decorator_list if DROPPED not in ast.unparse(d)]
            decorators = [f"@{ast.unparse(d)}" for d in kept]
            text = "\n".join([*decorators, *lines[node.lineno - 1 : node.end_lineno]])
            node.decorator_list = kept
            found.defined[node.name] = node, text
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            for name in (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)):
                found.defined[name] = node, text
        elif isinstance(node, ast.Import):
            for alias in node.names:
                found.others[alias.asname or alias.name] = f"import {ast.unparse(alias)}"
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            for alias in node.names:
                name = alias.asname or alias.name
                if str(node.module).partition(".")[0] == "fastdml":
                    found.ours[name] = str(node.module), alias.name
                else:
                    found.others[name] = f"from {node.module} import {ast.unparse(alias)}"
    return found


def _used(node: ast.AST) -> Iterable[str]:
    """The names that a definition reads, in order."""
    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    return dict.fromkeys(names)
