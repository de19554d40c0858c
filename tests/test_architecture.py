"""What keeps the code readable: imports point down, optional packages stay in functions, nothing runs stored code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gracile"
FILES = sorted(PACKAGE.rglob("*.py"))

#: A module or package may import those of its own level and below; `__init__` is on top.
LEVELS = [
    {"errors", "layer_stats", "data", "goal", "context", "environment", "config", "files", "modes", "sharing"}
    | {"version"},
    {"criteria", "losses", "formats", "ranges", "metrics", "solvers"},
    {"nn"},
    {"stats", "graph", "patterns", "allocate", "knapsack", "equalize", "select"} | {"surgery", "pretrained"},
    {"recipe", "compress", "artifact", "evaluate", "report"}
    | {"check", "inspection", "measure", "result", "run_directory"},
    {"steps", "targets", "inputs"},
    {"optimize", "planner", "search", "stopwatch", "recipe_json", "export", "cli", "demo", "sensitivity"}
    | {"__init__", "__main__"},
]
LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}
#: The level whose members do not import each other at all: a step knows no runtime, a runtime knows no step.
SEPARATE = LEVELS[5]

OPTIONAL = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "nncf", "transformers", "tokenizers"}
OPTIONAL |= {"huggingface_hub", "sentence_transformers", "sklearn", "matplotlib", "jinja2", "rich", "keras"}
#: `click` decorates the commands where they are defined, so the command line may import it at its top.
COMMAND_LINE = "cli"
STORED_CODE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def label(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def unit_of(path: Path) -> str:
    """First part of the path below the package: 'graph' for graph/axes.py, 'data' for data.py."""
    return Path(path.relative_to(PACKAGE).parts[0]).stem


def nodes(tree: ast.AST, *, in_functions: bool) -> Iterator[ast.AST]:
    """Every node, without the bodies of `if TYPE_CHECKING:`, and without those of functions unless asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if in_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from nodes(node, in_functions=in_functions)


def imports(path: Path, *, in_functions: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, `from a import b` as 'a.b'."""
    for node in nodes(tree_of(path), in_functions=in_functions):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inside = ["gracile", *path.relative_to(PACKAGE).parent.parts]
                base = ".".join([*inside[: len(inside) - node.level + 1], *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def units_imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and unit of all that is imported from the package itself; a name of `gracile` counts as '__init__'."""
    for line, name in imports(path, in_functions=True):
        parts = name.split(".")
        if parts[0] == "gracile":
            yield line, parts[1] if len(parts) > 1 and parts[1] in LEVEL_OF else "__init__"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_point_down(path: Path):
    unit = unit_of(path)
    assert unit in LEVEL_OF, f"{unit} has no level: add it to LEVELS in this test, where it belongs by DESIGN"
    for line, other in units_imported(path):
        if other == unit:
            continue
        where = f"{label(path)}:{line}: {unit} (level {LEVEL_OF[unit]}) imports {other} (level {LEVEL_OF[other]})"
        assert LEVEL_OF[other] <= LEVEL_OF[unit], f"{where}: imports point down"
        assert not {unit, other} <= SEPARATE, f"{where}: steps, targets and inputs do not import each other"


def test_units_of_one_level_do_not_import_each_other_in_a_circle():
    edges: dict[str, set[str]] = {}
    for path in FILES:
        edges.setdefault(unit_of(path), set()).update(unit for _, unit in units_imported(path))
    done: set[str] = set()

    def visit(unit: str, trail: tuple[str, ...]) -> None:
        assert unit not in trail, f"circular imports: {' -> '.join([*trail[trail.index(unit) :], unit])}"
        if unit not in done:
            for other in sorted(edges.get(unit, set()) - {unit}):
                visit(other, (*trail, unit))
            done.add(unit)

    for unit in sorted(edges):
        visit(unit, ())


@pytest.mark.parametrize("path", FILES, ids=label)
def test_optional_packages_are_imported_inside_functions_only(path: Path):
    top = [(line, name) for line, name in imports(path, in_functions=False) if name.split(".")[0] in OPTIONAL]
    assert not top, f"{label(path)} imports an optional or heavy package at its top: {top}"
    if unit_of(path) != COMMAND_LINE:
        assert "click" not in {name.split(".")[0] for _, name in imports(path, in_functions=False)}


@pytest.mark.parametrize("path", FILES, ids=label)
def test_nothing_runs_code_that_was_stored(path: Path):
    for line, name in imports(path, in_functions=True):
        assert name.split(".")[0] not in STORED_CODE, f"{label(path)}:{line} imports {name}"
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        call, where = ast.unparse(node.func), f"{label(path)}:{node.lineno}"
        assert call not in {"eval", "exec", "compile"}, f"{where} calls {call}"
        assert call not in {"torch.load", "torch.save"}, f"{where} calls {call}, which pickles: use safetensors"
        if call in {"np.load", "numpy.load"}:
            allowed = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("allow_pickle")
            assert allowed == "False", f"{where} calls np.load without allow_pickle=False"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_file_holds_one_idea(path: Path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 350, f"{label(path)} has {lines} lines: two ideas share it"
