"""Imports point downward: what a room may know."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from launch import ROOT

from softcot_ds.choices import METHODS, STRATEGIES, TASKS

PACKAGE = ROOT / "softcot_ds"
FLOORS = (
    ("errors", "launchers", "differences", "points", "progress", "tables", "shipped"),
    ("choices", "files", "section", "values"),
    ("settings", "task_config", "backbone_config", "chains_config", "coconut_config", "lora_config", "strategy_config"),
    ("evaluation_config", "ccot_config"),
    ("recipe", "lock", "distributed", "hub"),
    ("run_dir",),
    ("cells",),
    ("apart", "study_config", "launch"),
    ("pair",),
    ("tasks",),
    ("data",),
    ("models",),
    ("methods",),
    ("experiment",),
    ("planning",),
    ("agreement",),
    ("adapter",),
    ("thoughts", "card"),
    ("inference",),
    ("training", "evaluation", "diagnosis"),
    ("command", "chain"),
    (
        "targets",
        "cache",
        "train",
        "evaluate",
        "generate",
        "lm_eval",
        "doctor",
        "submit",
        "slurm",
        "plan",
        "study",
        "push",
    ),
    ("recipes", "init", "schema"),
    ("cli",),
)
"""From the ground up. A room knows what lies below it; rooms of one floor do not know each other."""


def name_of(path: Path) -> str:
    """A module's dotted name, without the package's own."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {name_of(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: ast.parse(source) for name, source in SOURCES.items()}


def imports(name: str) -> Iterator[str]:
    """The modules that one imports, whether at once or where it needs them."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "from softcot_ds..., please"
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "softcot_ds":
            module = node.module.removeprefix("softcot_ds").removeprefix(".")
            for alias in node.names:
                below = f"{module}.{alias.name}".removeprefix(".")
                yield below if below in MODULES else module
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("softcot_ds") for alias in node.names), "from ... import, please"


def room(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_a_module_knows_its_room_and_what_lies_below(name):
    for other in imports(name):
        if other and room(other) != room(name):
            assert floor(other) < floor(name), f"{name} imports {other}"


def test_no_circles():
    graph = {name: {other for other in imports(name) if other and other != name} for name in MODULES}
    packages = {name for name in MODULES if any(other.startswith(f"{name}.") for other in MODULES)}
    # What a package's own __init__ gathers is no circle: it is imported first, by its modules too.
    TopologicalSorter({name: others - packages for name, others in graph.items() if name not in packages}).prepare()


def test_rooms_are_those_on_disk():
    assert {name for rooms in FLOORS for name in rooms} == {room(name) for name in MODULES if name != "__init__"}


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(PACKAGE.glob("*/__init__.py"))])
def test_a_room_names_its_modules(name):
    docstring = ast.get_docstring(MODULES[name]) or ""
    named = {line.split()[0] for line in docstring.splitlines() if line.partition(" ")[0].endswith(".py")}
    there = {path.name for path in (PACKAGE / name).glob("*.py")} - {"__init__.py"}
    entries = {*METHODS.values(), *TASKS.values(), *STRATEGIES.values()}
    listed = {entry.partition(":")[0].removeprefix(f"softcot_ds.{name}.") + ".py" for entry in entries}
    assert there - listed <= named <= there


def test_modules_and_functions_are_short():
    for name, source in SOURCES.items():
        assert len(source.splitlines()) < 600, name
        for node in ast.walk(MODULES[name]):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}: {node.name}"
