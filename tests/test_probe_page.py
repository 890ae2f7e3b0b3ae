"""The tables of docs/probe.md are those of the records in results/probe-mnist5k.jsonl, which `gaf probe` wrote.

`python tests/test_probe_page.py` prints them anew.
"""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def lines(merged: bool = False) -> list[dict[str, Any]]:
    text = (ROOT / "results" / "probe-mnist5k.jsonl").read_text()
    return [
        line
        for line in map(json.loads, text.splitlines())
        if line["kind"] == "probe" and (line["m"] > 1) == merged
    ]


def table() -> str:
    rows = [
        "| b | after steps | distance, mean | B (95%) | d_eff | recommended tau | accepted, predicted | measured |",
        "|---" * 8 + "|",
    ]
    for line in lines():
        scale = f"{line['noise_scale']:.0f} ({line['noise_low']:.0f} to {line['noise_high']:.0f})"
        shares = (
            f"{line['tau']:.3f} | {100 * line['predicted']:.1f}% | {100 * line['measured']:.1f}%"
        )
        rows.append(
            f"| {line['b']} | {line['after']} | {line['distance_mean']:.3f} | {scale} | {line['dimension']:.0f} | {shares} |"
        )
    return "\n".join(rows)


def merged_table() -> str:
    head = [
        "b",
        "after steps",
        "merged to",
        "distance, mean",
        "expected from B",
        "recommended tau",
        "accepted, predicted",
        "measured",
    ]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in lines(merged=True):
        distances = f"{line['distance_mean']:.3f} | {line['distance_expected']:.3f}"
        shares = (
            f"{line['tau']:.3f} | {100 * line['predicted']:.1f}% | {100 * line['measured']:.1f}%"
        )
        rows.append(
            f"| {line['b'] // line['m']} | {line['after']} | {line['b']} | {distances} | {shares} |"
        )
    return "\n".join(rows)


@pytest.mark.parametrize("shown", [table, merged_table])
def test_the_pages_tables_are_the_records(shown):
    assert shown() in (ROOT / "docs" / "probe.md").read_text()


def test_acceptance_was_predicted_to_within_ten_points_at_both_sizes():
    assert {line["b"] for line in lines()} == {10, 100}
    assert all(abs(line["predicted"] - line["measured"]) <= 0.1 for line in lines())


def test_of_merged_rows_it_was_predicted_to_within_ten_points_from_b_100_and_24_from_b_10():
    gaps = {
        b: [
            abs(x["predicted"] - x["measured"]) for x in lines(merged=True) if x["b"] // x["m"] == b
        ]
        for b in (10, 100)
    }
    assert max(gaps[100]) <= 0.1
    assert 0.235 <= max(gaps[10]) <= 0.245


if __name__ == "__main__":
    print(table(), merged_table(), sep="\n\n")
