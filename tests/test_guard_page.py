"""The tables of docs/guard.md are those of the records in benchmarks/guard*.jsonl.

`python tests/test_guard_page.py` writes the tables anew, and prints what the sentences must say.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from gaf_lab.bench.guard_faults import CLEAN, LABELS
from gaf_lab.bench.guard_results import detection_cell, mean_accuracy
from helpers.tables import table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "guard.md"
FILES = ("guard.jsonl", "guard-b8.jsonl")  # b = 32, b = 8
KS = (2, 4, 8)
TASK, K = "mnist5k", 4  # of the table of accuracies


@cache
def read_lines(name: str, kind: str) -> list[dict[str, Any]]:
    text = (ROOT / "benchmarks" / name).read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def delays(name: str, fault: str, k: int) -> list[int | None]:
    lines = read_lines(name, "bench-guard")
    own = (line["delays"] for line in lines if (line["fault"], line["k"]) == (fault, k))
    return [delay for seeds in own for delay in seeds]


def detections(name: str) -> str:
    faults = dict.fromkeys(line["fault"] for line in read_lines(name, "bench-guard"))
    rows = (
        [fault, *(detection_cell(delays(name, fault, k)) for k in KS)]
        for fault in faults
        if fault != CLEAN
    )
    return table(" | ".join(["fault", *(f"k = {k}" for k in KS)]), rows)


def accuracies() -> str:
    lines = read_lines(FILES[0], "bench-guard")
    lines = [one for one in lines if (one["task"], one["k"]) == (TASK, K)]
    ways = list(lines[0]["accuracy"])
    rows = ([one["fault"], *(mean_accuracy(one["accuracy"][way]) for way in ways)] for one in lines)
    return table(" | ".join(["fault", *(f"`{way}`" for way in ways)]), rows)


def tables() -> list[str]:
    return [*map(detections, FILES), accuracies()]


def claims() -> Iterator[str]:
    """Of the page's sentences."""
    for name in FILES:
        clean = read_lines(name, "bench-guard-clean")
        steps, alarms = sum(one["steps"] for one in clean), sum(len(one["alarms"]) for one in clean)
        yield f"{number_of(alarms)} in {steps:,} clean steps"
        faults = read_lines(name, "bench-guard")
        wrong, runs = sum(one["wrong"] for one in faults), sum(len(one["delays"]) for one in faults)
        yield f"{number_of(wrong)} of another worker in {runs} runs"


def number_of(alarms: int) -> str:
    return f"{alarms} alarm{'s' * (alarms != 1)}"


def test_the_tables_are_the_records() -> None:
    text = PAGE.read_text()
    assert [made for made in tables() if made not in text] == []


def test_the_sentences_are_the_records() -> None:
    text = " ".join(PAGE.read_text().split())
    assert [claim for claim in claims() if claim not in text] == []


def test_at_most_one_false_alarm_in_10000_clean_steps_on_each_task() -> None:
    clean = [line for name in FILES for line in read_lines(name, "bench-guard-clean")]
    for task in {line["task"] for line in clean}:
        own = [line for line in clean if line["task"] == task]
        assert sum(len(one["alarms"]) for one in own) <= sum(one["steps"] for one in own) / 10_000


def test_every_fault_above_the_noise_is_named() -> None:
    for k in KS:
        for fault in ("NaN", "infinite", "1000 times", "exponent bit"):
            assert all(None not in delays(name, fault, k) for name in FILES)
    for k in (4, 8):
        assert all(None not in delays(name, LABELS, k) for name in FILES)


if __name__ == "__main__":
    before, heading, measured = PAGE.read_text().partition("## Measured\n")
    made = iter(tables())
    measured = re.sub(r"(^\|.*\n)+", lambda _: next(made) + "\n", measured, flags=re.MULTILINE)
    PAGE.write_text(before + heading + measured)
    print(*claims(), sep="\n")
