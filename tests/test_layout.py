"""The house stays in order: imports run one way, without circles, and files and functions short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What each part may import beside itself and what is `BELOW_ALL`, as docs/architecture.md draws it.
LOSSES = {
    "grouped_loss", "linear_checks", "linear_loss", "loss", "loss_checks", "loss_options",
    "metric_losses", "mutual_stats", "scalar_schedule", "fastdml_kernels",
}  # fmt: skip
COHORT = {
    "cohort", "cohort_export", "cohort_files", "cohort_teachers", "export_check",
    "exported_weights", "image_record", "models", "peer_outputs",
}  # fmt: skip
PARTS = {
    "analysis", "data", "engine", "machine", "parallel", "plan", "report", "reproduce", "train",
}  # fmt: skip
BUILT_ON = {"model_card", "preprocessing", "predictor"}  # the trainers
MAY_IMPORT = {
    "fastdml_kernels": set(),
    "models": set(),
    "data": {"fastdml_kernels"},
    "metrics": set(),
    "report": set(),
    "engine": {*LOSSES, *COHORT, "parallel"},
    "parallel": {*LOSSES, *COHORT},
    "train": {*LOSSES, *COHORT, "engine", "parallel", "data", "metrics", "report"},
    "analysis": {*LOSSES, *COHORT, "engine", "data", "metrics", "report", "train"},
    "reproduce": {*LOSSES, *COHORT, "engine", "data", "metrics", "report", "train", "analysis"},
    "machine": {*LOSSES, *COHORT, "engine"},
    "plan": {*LOSSES, *COHORT, "engine", "parallel", "data", "report"},
    "preprocessing": {*COHORT, "data"},
    "model_card": {*COHORT, "data", "report", "train"},
    "predictor": {*COHORT, "preprocessing", "train"},
    "cli": {*COHORT, *BUILT_ON, *PARTS, "fastdml_kernels"},
    **dict.fromkeys(LOSSES - {"fastdml_kernels"}, LOSSES),
    **dict.fromkeys(COHORT - {"models"}, COHORT),
}
BELOW_ALL = {
    "absent_tensors", "arguments", "devices", "errors", "eval_mode", "files", "host",
    "list_options", "logs", "names", "namesake", "notebook", "paths", "peer_groups", "terminal",
    "torch_private", "units", "yaml_file", "fastdml",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of both packages by its name."""
    found = {}
    for folder in (ROOT, ROOT / "kernels"):
        for path in folder.glob("fastdml*/**/*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules of ours that a module imports, inside functions too; not for types alone."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            inside = [f"{source}.{alias.name}" for alias in node.names]
            wanted = [full if full in MODULES else source for full in inside]
        else:
            continue
        yield from (module for module in wanted if module in MODULES and module != name)


def part(name: str) -> str:
    """The package or file right below fastdml, or fastdml_kernels as a whole."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "fastdml" and rest else first


def test_imports_run_one_way():
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imports(name)
        if part(name) not in ("fastdml", "__main__", part(other))
        and part(other) not in (BELOW_ALL if part(name) != "fastdml_kernels" else ())
        and part(other) not in MAY_IMPORT.get(part(name), ())
    ]
    assert not wrong, "\n".join(wrong)


def test_every_part_of_the_library_has_its_place():
    parts = {part(name) for name in MODULES} - {"__main__"}
    assert parts == BELOW_ALL | MAY_IMPORT.keys()


def test_no_imports_in_circles():
    TopologicalSorter({name: set(imports(name)) for name in MODULES}).prepare()


def test_files_can_be_read_at_a_sitting():
    folders = ("fastdml", "kernels", "bench", "docs", "examples")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".c", ".sh")]
    long = [p.name for p in files if len(p.read_text().splitlines()) > 500]
    long += [p.name for p in ROOT.glob("tests/**/*.py") if len(p.read_text().splitlines()) > 700]
    assert not long


def test_functions_are_short():
    """A kernel is one function, since what it calls is compiled into it: they may be longer."""
    long = []
    for path in (p for f in ("fastdml", "kernels", "bench") for p in (ROOT / f).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                kernel = any("triton" in ast.unparse(d) for d in node.decorator_list)
                if node.end_lineno - node.lineno + 1 > (300 if kernel else 120):
                    long.append(f"{path.name}: {node.name}")
    assert not long


CAPTURES = ("torch.cuda.graph", "torch.cuda.make_graphed_callables")


def captures(tree: ast.AST) -> Iterator[tuple[int, bool]]:
    """The line of each capture in the code, and whether Python's garbage collector is off in it."""
    safe = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            items = [item.context_expr for item in node.items]
            names = [ast.unparse(item).partition("(")[0] for item in items]
            if "without_collector" in names:
                safe |= {id(item) for item in items[names.index("without_collector") :]}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CAPTURES or name.endswith(".capture_begin"):
                yield node.lineno, id(node) in safe


def test_every_capture_is_without_the_collector():
    """An object that it frees there may end the capture: see `engine.graph.without_collector`."""
    found = {}
    for folder in ("fastdml", "kernels", "bench", "tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for line, safe in captures(ast.parse(path.read_text())):
                found[f"{path.relative_to(ROOT)}:{line}"] = safe
    assert {name.partition(":")[0] for name in found} >= {
        "fastdml/engine/graph.py",
        "bench/timing.py",
    }
    assert all(found.values()), [name for name, safe in found.items() if not safe]
