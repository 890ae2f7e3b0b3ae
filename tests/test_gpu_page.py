"""The figures of docs/engine.md are those of benchmarks/gpu.jsonl.

`python tests/test_gpu_page.py` prints the tables anew.
"""

import json
from typing import Any

from test_readme import ROOT

PAGE = ROOT / "docs" / "engine.md"


def lines(kind: str) -> list[dict[str, Any]]:
    text = (ROOT / "benchmarks" / "gpu.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def table_of_checks() -> str:
    rows = ["| part | checks | passed |", "|---|---|---|"]
    for part in dict.fromkeys(line["part"] for line in lines("check")):
        found = [line["ok"] for line in lines("check") if line["part"] == part]
        rows.append(f"| {part} | {len(found)} | {sum(ok is True for ok in found)} |")
    return "\n".join(rows)


def table_of_ratios() -> str:
    rows = ["| step | ms | times plain | 10% to 90% | rounds |", "|---|---|---|---|---|"]
    for line in lines("ratio"):
        spread = f"{line['ratio_p10']:.2f} to {line['ratio_p90']:.2f}"
        rows.append(
            f"| {line['name']} | {line['ms_median']:.1f} | {line['ratio_median']:.2f} | {spread} | "
            f"{line['rounds']} |"
        )
    return "\n".join(rows)


def conditions() -> str:
    first = lines("check")[0]
    return (
        f"One {first['device']}, torch {first['torch']}, NCCL {first['nccl']}, driver "
        f"{first['driver']}, {first['date'][:10]}."
    )


def test_the_tables_are_the_records() -> None:
    page = PAGE.read_text()
    for part in (table_of_checks(), table_of_ratios(), conditions()):
        assert part in page


def test_the_records_are_of_a_gpu_and_of_one_commit() -> None:
    every = lines("check") + lines("ratio")
    assert len({line["commit"] for line in every}) == 1
    assert all(line["cuda"] and line["nccl"] for line in every)


if __name__ == "__main__":
    print(conditions(), table_of_checks(), table_of_ratios(), sep="\n\n")
