"""The package as a user meets it: imports, names, docstrings, without the tests' type checks."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gaf

SOURCES = Path(gaf.__file__).parent
MODULES = sorted(p for p in SOURCES.rglob("*.py") if "integrations" not in p.parts)


def run(code: str) -> str:
    """In a fresh interpreter, where neither jaxtyping nor its hook was imported."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:gaf", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_gaf_imports_torch_and_nothing_else_that_torch_does_not() -> None:
    """Not the lab, no plots, no command line, and jaxtyping only if the tests imported it."""
    code = (
        "import sys, torch; before = set(sys.modules); import gaf, json; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    new = {name.partition(".")[0] for name in json.loads(run(code))}
    foreign = {name for name in new if name not in sys.stdlib_module_names} - {"gaf", "torch"}
    assert not foreign


def test_every_public_name_exists_and_has_a_docstring() -> None:
    assert gaf.__doc__
    for name in gaf.__all__:
        assert inspect.getdoc(getattr(gaf, name)), name


def test_the_names_of_the_design_are_public() -> None:
    assert {
        "GAF",
        "Accumulator",
        "Decision",
        "Mean",
        "RandomSkip",
        "aggregate",
        "gram",
        "reference",
    } <= set(gaf.__all__)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCES)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert path.read_text().startswith('"""')


def test_every_public_method_of_the_accumulator_has_a_docstring() -> None:
    for name, method in inspect.getmembers(gaf.Accumulator, inspect.isfunction):
        assert name.startswith("_") or inspect.getdoc(method), name


def test_every_example_in_a_docstring_gives_what_it_shows() -> None:
    """All of them are found: as many as there are prompts in the sources."""
    parts = [p.relative_to(SOURCES.parent).with_suffix("").parts for p in MODULES]
    names = [".".join(part for part in path if part != "__init__") for path in parts]
    code = f"""
import doctest, importlib
results = [doctest.testmod(importlib.import_module(name)) for name in {names!r}]
print(sum(r.failed for r in results), sum(r.attempted for r in results))
"""
    failed, attempted = map(int, run(code).splitlines()[-1].split())
    assert failed == 0
    assert attempted == sum(p.read_text().count(">>> ") for p in MODULES)
    assert attempted >= 4


def test_the_library_decides_alike_without_the_type_checks() -> None:
    """In a plain interpreter, where the annotations are no more than names."""
    rows = torch.randn(5, 8).add(0.3).tolist()
    code = f"""
import torch, gaf, json
p = torch.nn.Parameter(torch.zeros(8))
acc = gaf.Accumulator(torch.optim.SGD([p], 1.0), gaf.GAF(0.9))
for row in {rows!r}:
    acc.backward((p * torch.tensor(row)).sum())
print(json.dumps([acc.step().accepted.tolist(), p.tolist()]))
"""
    update, decision = gaf.aggregate(torch.tensor(rows), gaf.GAF(0.9))
    accepted, found = json.loads(run(code))
    assert accepted == decision.accepted.tolist()
    assert 0 < sum(accepted) < 5
    # a float32 sum of five numbers of size 1
    torch.testing.assert_close(torch.tensor(found), -update, rtol=0, atol=1e-6)


def test_the_library_is_marked_as_typed() -> None:
    assert (Path(gaf.__file__).parent / "py.typed").exists()
