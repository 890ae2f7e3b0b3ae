"""The table of docs/rules.md is that of benchmarks/rules.jsonl.

`python tests/test_rules_page.py` prints it anew.
"""

import json
import re
import statistics
from typing import Any

import gaf
from helpers.tables import table
from test_readme import ROOT

LINES: list[dict[str, Any]] = [
    json.loads(line) for line in (ROOT / "benchmarks" / "rules.jsonl").read_text().splitlines()[1:]
]


def page() -> str:
    return (ROOT / "docs" / "rules.md").read_text()


def different(key: str) -> list[str]:
    return list(dict.fromkeys(line[key] for line in LINES))


def accuracy(rule: str, setting: str) -> str:
    """Mean and standard deviation over the seeds."""
    runs = [line for line in LINES if (line["rule"], line["setting"]) == (rule, setting)]
    found = [100 * run["accuracy"] for run in runs]
    return f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"


def rules_table() -> str:
    settings = different("setting")
    rows = [[rule, *(accuracy(rule, s) for s in settings)] for rule in different("rule")]
    return table(" | ".join(["rule", *settings]), rows)


def test_the_table_is_the_records() -> None:
    assert rules_table() in page()


def test_every_policy_is_on_the_page() -> None:
    policies = ("Mean", "RandomSkip", "GAF", "Guard", "Median", "TrimmedMean", "SignAgreement")
    named = set(re.findall(r"`gaf\.(\w+)", page()))
    assert {*policies, "RandomMask"} <= named
    assert all(hasattr(gaf, name) for name in named)


if __name__ == "__main__":
    print(rules_table())
