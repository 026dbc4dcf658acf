"""What the modules of the package may not do: import from rows below their own, or repeat a default."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from shrp_hf import defaults

PACKAGE = Path(__file__).parents[1] / "shrp_hf"
MAX_LINES = 450
ROWS = (
    ("_version", "defaults", "files"),
    ("plans", "card_parts"),
    ("models", "numerics"),
    ("families",),
    ("scoring", "pruning", "checkpoints"),
    ("export",),
    ("measuring",),
    ("selectors",),
    ("tasks", "training"),
    ("structures",),
    ("publishing",),
    ("workflows",),
    ("cli", "__init__"),
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
# A saved model carries the files of models/, and the Hub's loader runs them where only these are installed.
SHIPPED_MAY_IMPORT = ("torch", "transformers", "huggingface_hub.dataclasses")


def module_name(path: Path) -> str:
    """`shrp_hf/models/expert_layer.py` is "shrp_hf.models.expert_layer"; a folder's `__init__.py` is the folder."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields line and module, leading dots included, of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, "." * node.level + node.module
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, "." * node.level + alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def shipped_complaint(name: str) -> str | None:
    sibling = name.startswith(".") and not name.startswith("..")
    known = any(f"{name}.".startswith(f"{package}.") for package in (*SHIPPED_MAY_IMPORT, *sys.stdlib_module_names))
    return None if sibling or known else f"models/ ships with saved models and may not import {name}"


def direction_complaint(room: str, name: str) -> str | None:
    if name.startswith("."):
        return f"write {PACKAGE.name}.x for {name}: only models/ imports relatively"
    if name.split(".")[0] != PACKAGE.name:
        return None
    target = room_of(name)
    if target == "__init__":
        return "imports the package root"
    is_folder_sibling = target == room and (PACKAGE / room).is_dir()
    # A room that is not in the table is complained about where it stands.
    if is_folder_sibling or ROW_OF.get(target, -1) < ROW_OF[room]:
        return None
    return f"{room} (row {ROW_OF[room]}) may not import {name} (row {ROW_OF[target]})"


def complaints(module: str, source: str) -> list[str]:
    """One line for each rule that this source would break as this module."""
    room = room_of(module)
    if room not in ROW_OF:
        return [f"{room}: add it to ROWS in tests/test_layering.py, in the first row that is below all its imports"]
    tree = ast.parse(source)
    found = {
        (line, shipped_complaint(name) if room == "models" else direction_complaint(room, name))
        for line, name in imported(tree)
    }
    if len(source.splitlines()) > MAX_LINES:
        found.add((len(source.splitlines()), f"the file has more than {MAX_LINES} lines: split it"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            found.add((node.lineno, "print: log or return instead"))
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            found.add((node.lineno, "future annotations switch off the validation of configs"))
    return [f"line {line}: {complaint}" for line, complaint in sorted(found, key=str) if complaint]


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_the_house_rules(module):
    assert complaints(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_no_import_cycle():
    graph = {}
    for module, path in MODULES.items():
        folder = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = [name for _, name in imported(ast.parse(path.read_text(encoding="utf-8")))]
        graph[module] = {folder + name if name.startswith(".") else name for name in names} & set(MODULES)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_every_file_is_found():
    assert {"shrp_hf", "shrp_hf.plans.keep_plan", "shrp_hf.models.expert_layer", "shrp_hf.selectors"} <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        pytest.param(
            "plans.x",
            "from shrp_hf.training.trainer import x",
            "plans (row 1) may not import shrp_hf.training.trainer",
            id="up",
        ),
        pytest.param("pruning", "from shrp_hf.scoring import X", "may not import shrp_hf.scoring", id="own row"),
        pytest.param("plans.x", "def f():\n    import shrp_hf.cli", "line 2: plans (row 1)", id="inside a function"),
        pytest.param("plans.x", "importlib.import_module('shrp_hf.cli')", "may not import shrp_hf.cli", id="by name"),
        pytest.param("cli", "import shrp_hf", "package root", id="root"),
        pytest.param("cli", "from shrp_hf import __version__", "package root", id="name from the root"),
        pytest.param("cli", "from .plan import KeepPlan", "only models/ imports relatively", id="relative"),
        pytest.param("cli", "from . import plan", "only models/ imports relatively", id="relative room"),
        pytest.param("models.x", "from ..plan import KeepPlan", "may not import ..plan", id="parent"),
        pytest.param("models.x", "from shrp_hf.models import y", "may not import shrp_hf.models", id="absolute"),
        pytest.param(
            "models.x", "from shrp_hf.plans.keep_plan import KeepPlan", "may not import shrp_hf.plans.keep_plan", id="leaving"
        ),
        pytest.param("models.x", "import numpy", "may not import numpy", id="third party in models"),
        pytest.param("models.x", "import huggingface_hub", "may not import huggingface_hub", id="hub in models"),
        pytest.param("attic", "", "attic: add it to ROWS", id="unknown room"),
        pytest.param("plans.x", "from __future__ import annotations", "future annotations", id="future"),
        pytest.param("plans.x", "print(1)", "line 1: print", id="print"),
        pytest.param("plans.x", "\n" * (MAX_LINES + 1), "split it", id="long"),
    ],
)
def test_broken_rule_is_reported(module, source, complaint):
    assert complaint in "\n".join(complaints(f"shrp_hf.{module}", source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "training.x",
            "from shrp_hf.plans.keep_plan import KeepPlan\nfrom shrp_hf.models.expert_layer import x\nimport numpy",
        ),
        ("selectors.x", "from shrp_hf.selectors.base import Selector"),
        ("models.x", "from .y import z\nfrom . import y\nfrom huggingface_hub.dataclasses import strict\nimport math"),
    ],
)
def test_kept_rules_are_not_reported(module, source):
    assert complaints(f"shrp_hf.{module}", source) == []


def repeated_defaults(source: str) -> list[str]:
    """Arguments and fields that are given, as a literal, the value that `shrp_hf.defaults` has under their name."""
    shared = {name.lower(): value for name, value in vars(defaults).items() if name.isupper()}
    found = []
    for node in ast.walk(ast.parse(source)):
        pairs: list = [(node.target, node.value)] if isinstance(node, ast.AnnAssign) and node.value else []
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        if isinstance(node, ast.FunctionDef):
            named = node.args.posonlyargs + node.args.args
            pairs = list(zip(named[len(named) - len(node.args.defaults) :], node.args.defaults, strict=True))
            pairs += [pair for pair in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if pair[1]]
        for target, value in pairs:
            name = getattr(target, "arg", getattr(target, "id", "")).lower()
            if name in shared and isinstance(value, ast.Constant) and value.value == shared[name]:
                found.append(f"line {value.lineno}: take `{name.upper()}` from shrp_hf.defaults")
    return found


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) not in ("defaults", "models")])
def test_a_shared_default_stands_in_one_place(module):
    assert repeated_defaults(MODULES[module].read_text(encoding="utf-8")) == []


def test_a_repeated_default_is_found():
    source = "seed: int = 0\nMAX_LENGTH = 128\ndef f(a, seed=0, *, batch_size=32, max_length=64): ..."
    assert [line.partition(":")[0] for line in repeated_defaults(source)] == ["line 1", "line 2", "line 3", "line 3"]
