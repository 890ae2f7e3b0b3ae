"""A command's threads sleep while they wait for one another; docs/speed.md has what that saves."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gaf_lab

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"OMP_WAIT_POLICY": "passive"}),
        *((given, given) for given in [{name: "9"} for name in gaf_lab.WAITING]),
    ],
)
def test_threads_sleep_while_they_wait_unless_the_user_says_how(given, found, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    gaf_lab.let_threads_sleep()
    assert os.environ == found


def test_openmp_has_heard_of_it_before_torch_is_imported():
    clean = {name: value for name, value in os.environ.items() if name not in gaf_lab.WAITING}
    done = subprocess.run(
        [sys.executable, "-m", "gaf_lab", "data", "digits"],
        env=clean | {"OMP_DISPLAY_ENV": "true"},
        capture_output=True,
        text=True,
        check=True,
    )
    told = [line.strip() for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line]
    if not told:
        pytest.skip("this OpenMP does not display its settings")
    assert all(line.endswith("'PASSIVE'") for line in told)


def test_the_pages_table_is_what_was_measured():
    spec = importlib.util.spec_from_file_location("threads", ROOT / "benchmarks" / "threads.py")
    threads = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(threads)
    text = (ROOT / "benchmarks" / "threads.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "threads"]
    assert "\n".join(threads.table(lines)) in (ROOT / "docs" / "speed.md").read_text()
