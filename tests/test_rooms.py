"""Each room of the package imports only from rooms below it, and nothing in circles."""

import ast
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT

# From the ground up; what stands in one tuple is on one floor, and a room's own files may use one another.
FLOORS = [
    ("errors", "modes"),
    ("options",),
    ("memory", "checksum"),
    ("budget", "verdicts"),
    ("distributed",),
    ("network",),
    ("calibration",),
    ("zoo",),
    ("solve",),
    ("masks",),
    ("result", "methods", "schedule"),
    ("arguments",),
    ("job",),
    ("pipeline",),
    ("deploy",),
    ("semi_structured",),
    ("cli",),
    ("snows",),  # the package's own __init__
    ("export", "measure"),
    ("run_folder", "report"),  # former names
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
FILES = sorted((ROOT / "snows").rglob("*.py"))


def module(path):
    """A file's module, as `snows.network.trace`; a package's without __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def imported(path):
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module}
    return {name for name in found if name.split(".")[0] == "snows"}


def room(name):
    return name.split(".")[1] if "." in name else name


@pytest.mark.parametrize("name", MODULES)
def test_a_room_uses_only_rooms_below_it(name):
    above = [
        other
        for other in imported(MODULES[name])
        if room(other) != room(name) and FLOOR[room(other)] >= FLOOR[room(name)]
    ]
    assert not above


def test_there_are_no_circles():
    TopologicalSorter({name: imported(path) for name, path in MODULES.items()}).prepare()


def test_every_room_says_in_a_line_what_it_holds():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
