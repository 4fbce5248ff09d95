"""The import table, read from the syntax trees: what a module may know of the others."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "splitwatch"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up; a module may import from its own room and from those before it.
ROOMS = (
    "records",
    "events",
    "ranks",
    "metrics",
    "budget",
    "precision",
    "recompute",
    "undisturbed",
    "batches",
    "tape",
    "grouped",
    "linear_map",
    "anatomy",
    "channels",
    "handlers",
    "discovery",
    "layers",
    "trace",
    "probe",
    "collect",
    "watch geometry",
    "growth",
    "report",
    "diagnosis",
    "control",
    "rewarm",
    "watcher",
    "arguments",
    "grower",
    "huggingface",
    "lightning",
    "bench",
    "cli",
)
RANK = {name: rank for rank, room in enumerate(ROOMS) for name in room.split()}

# Which file alone may import a heavy library.
OWNERS = {
    "pytorch_lightning": "lightning/",
    "lightning": "lightning/",
    "tensorboard": "report/board.py",
    "torch.utils.tensorboard": "report/board.py",
    "matplotlib": "report/figures",
    "transformers": "huggingface.py",
}


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node):
    """Every node of a tree but what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield child
            yield from statements(child)


def imports(path):
    """Dotted names of the modules that a file imports, wherever in it."""
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module):
    return module.split(".")[1] if "." in module else ""


def is_within(module, library):
    return module == library or module.startswith(library + ".")


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_upwards_only(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in RANK, f"{own} has no place in the table"
    for module in imports(path):
        if is_within(module, "splitwatch"):
            known = room(module)
            assert known == own or RANK[known] < RANK[own], f"{own} imports {module}"
            assert {known, own} != {"watch", "geometry"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_have_one_door(path):
    for module in imports(path):
        for library, owner in OWNERS.items():
            if is_within(module, library):
                assert name_of(path).startswith(owner), f"{name_of(path)} imports {module}"


def test_solvers_and_theory_never_see_a_model():
    solvers = ("eigen", "krylov", "operators", "drift")
    for name in (*solvers, "plateau"):
        found = set(imports(PACKAGE / f"geometry/{name}.py"))
        assert not [module for module in found if is_within(module, "torch.nn") and module != "torch.nn.functional"]
        allowed = ("splitwatch.records", *(f"splitwatch.geometry.{solver}" for solver in solvers))
        assert all(module.startswith(allowed) for module in found if is_within(module, "splitwatch"))


def test_records_know_no_modules():
    assert not [module for module in imports(PACKAGE / "records.py") if is_within(module, "splitwatch")]
    assert {m for m in imports(PACKAGE / "events.py") if m.count(".") == 1 and is_within(m, "splitwatch")} == {
        "splitwatch.records"
    }
    assert "torch.nn" not in set(imports(PACKAGE / "records.py")) | set(imports(PACKAGE / "events.py"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= 300


def test_heavy_libraries_are_loaded_late_and_one_of_lightnings_packages_is_enough():
    """Nothing but what its dependency torchmetrics loads by itself, such as matplotlib where it is installed.

    One interpreter for all of it: torch and Lightning take seconds to load.
    """
    code = """
import sys, torchmetrics
before = set(sys.modules)

def loaded(*names):
    return [name for name in names if name in set(sys.modules) - before]

import splitwatch
print(loaded("pytorch_lightning", "lightning", "tensorboard", "matplotlib", "transformers"))
import splitwatch.report.board
print(loaded("tensorboard", "splitwatch.report.figures"))

import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "lightning" else find(name, *rest)
import pytorch_lightning
print(loaded("lightning.pytorch"), issubclass(splitwatch.SplitWatch, pytorch_lightning.Callback))
print(loaded("lightning.pytorch"))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == ["[]", "[]", "[] True", "[]"]
