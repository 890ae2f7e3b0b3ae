"""The figures of docs/any-rule.md are the records', and its block that needs TorchJD runs.

`python tests/test_any_rule_page.py` prints the table anew.
"""

import re

import pytest

from test_readme import ROOT, ddp_table

FILE = "ddp-rules.jsonl"


def page() -> str:
    return (ROOT / "docs" / "any-rule.md").read_text()


def test_the_table_is_the_records() -> None:
    assert ddp_table(FILE) in page()


def test_the_block_with_torchjd_runs() -> None:
    pytest.importorskip("torchjd", reason="torchjd is not installed")
    pytest.importorskip("quadprog", reason="torchjd's quadprog-projector is not installed")
    (block,) = re.findall(r"```text\n(.*?)```", page(), re.DOTALL)
    exec(compile("import gaf, torch\n" + block, "docs/any-rule.md", "exec"), {})


if __name__ == "__main__":
    print(ddp_table(FILE))
