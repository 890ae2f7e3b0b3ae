"""The tables of docs/probe.md are those of the records that `gaf probe` wrote.

The records are in results/probe-mnist5k.jsonl.
`python tests/test_probe_page.py` prints them anew.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tables import table

ROOT = Path(__file__).parent.parent


def lines(merged: bool = False) -> list[dict[str, Any]]:
    text = (ROOT / "results" / "probe-mnist5k.jsonl").read_text()
    return [
        line
        for line in map(json.loads, text.splitlines())
        if line["kind"] == "probe" and (line["m"] > 1) == merged
    ]


def probe_table() -> str:
    rows = []
    for line in lines():
        scale = f"{line['noise_scale']:.0f} ({line['noise_low']:.0f} to {line['noise_high']:.0f})"
        measured = (f"{line['distance_mean']:.3f}", scale, f"{line['dimension']:.0f}")
        rows.append([line["b"], line["after"], *measured, *recommendation(line)])
    head = (
        "b | after steps | distance, mean | B (95%) | d_eff | recommended tau"
        " | accepted, predicted | measured"
    )
    return table(head, rows)


def merged_table() -> str:
    rows = []
    for line in lines(merged=True):
        sizes = (line["b"] // line["m"], line["after"], line["b"])
        distances = (f"{line[key]:.3f}" for key in ("distance_mean", "distance_expected"))
        rows.append([*sizes, *distances, *recommendation(line)])
    head = (
        "b | after steps | merged to | distance, mean | expected from B | recommended tau"
        " | accepted, predicted | measured"
    )
    return table(head, rows)


def recommendation(line: dict[str, Any]) -> list[str]:
    """tau, and the predicted and measured share that it accepts."""
    shares = (f"{100 * line[key]:.1f}%" for key in ("predicted", "measured"))
    return [f"{line['tau']:.3f}", *shares]


@pytest.mark.parametrize("make", [probe_table, merged_table])
def test_the_pages_tables_are_the_records(make):
    assert make() in (ROOT / "docs" / "probe.md").read_text()


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
    print(probe_table(), merged_table(), sep="\n\n")
