"""The rooms keep their order: who imports whom, how long a file is, one meaning to a name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src"

# From the ground up. A room imports only rooms before it; files outside the rooms are the ground.
ROOMS = {
    "gaf": ["rules", "record", "measure", "device", "ranks", "samples", "integrations"],
    "gaf_lab": [
        *("settings", "records", "data", "training", "tasks", "sweeps"),
        *("report", "paper", "bench", "experiments", "commands"),
    ],
}
APART = {("gaf.device", "gaf.ranks"), ("gaf.ranks", "gaf.device")}  # know nothing of each other
FACES = {"gaf", "gaf_lab", "gaf_lab.__main__"}  # hand on what the rooms hold

LONGEST = 200  # lines of a file
LONGER = {  # may only shrink
    # the public class: its documentation takes 130 of them
    "gaf/device/accumulate.py": 330,
}
TWICE = {  # names that several files define
    "gaf": {
        "attach",  # of gaf, and of gaf.integrations.accelerate: both are public
    },
    "gaf_lab": {
        "main",
        "table",
    },
}

MODULES = {
    ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ROOMS
    for path in sorted((SOURCES / package).rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def imports(module: str) -> Iterator[str]:
    """Modules of this project that a module imports, inside functions too."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {name if name in MODULES else node.module for name in names} & MODULES.keys()


def room(module: str) -> str:
    package, *rest = module.split(".")
    return f"{package}.{rest[0]}" if rest and rest[0] in ROOMS[package] else package


def floor(name: str) -> int:
    package, *rest = name.split(".")
    return 1 + ROOMS[package].index(rest[0]) if rest else 0


@pytest.mark.parametrize("module", [module for module in MODULES if module not in FACES])
def test_a_room_imports_only_lower_ones(module: str) -> None:
    here = room(module)
    for other in imports(module):
        there = room(other)
        if there.split(".")[0] != here.split(".")[0]:
            assert here.startswith("gaf_lab"), f"{module} imports {other}: the library knows no lab"
        else:
            assert floor(there) <= floor(here) and (here, there) not in APART, f"{module}: {other}"


def test_no_import_goes_in_a_circle() -> None:
    left = {module: set(imports(module)) - {module} for module in MODULES}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_no_file_is_long() -> None:
    lines = {str(p.relative_to(SOURCES)): p.read_text().count("\n") for p in MODULES.values()}
    long = {name: count for name, count in lines.items() if count > LONGEST}
    assert {n: c for n, c in long.items() if c > LONGER.get(n, LONGEST)} == {}
    assert LONGER.keys() <= long.keys(), "take what is short again off the list"


@pytest.mark.parametrize("package", ROOMS)
def test_a_name_is_defined_in_one_file(package: str) -> None:
    files: dict[str, list[str]] = {}
    for module in (m for m in MODULES if m.split(".")[0] == package):
        for name in {name for node in TREES[module].body for name in defined(node)}:
            files.setdefault(name, []).append(module)
    twice = {name: where for name, where in files.items() if len(where) > 1}
    assert {name: where for name, where in twice.items() if name not in TWICE[package]} == {}
    assert TWICE[package] <= twice.keys(), "take what is defined once again off the list"


def defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return [t.id for t in targets if isinstance(t, ast.Name) and not t.id.startswith("__")]
