"""The table of docs/probe.md is that of the records in results/probe-mnist5k.jsonl, which `gaf probe` wrote.

`python tests/test_probe_page.py` prints it anew.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def lines() -> list[dict[str, Any]]:
    text = (ROOT / "results" / "probe-mnist5k.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == "probe" and line["m"] == 1]


def table() -> str:
    rows = ["| b | after steps | distance, mean | B (95%) | d_eff | recommended tau | accepted, predicted | measured |", "|---" * 8 + "|"]
    for line in lines():
        scale = f"{line['noise_scale']:.0f} ({line['noise_low']:.0f} to {line['noise_high']:.0f})"
        shares = f"{line['tau']:.3f} | {100 * line['predicted']:.1f}% | {100 * line['measured']:.1f}%"
        rows.append(f"| {line['b']} | {line['after']} | {line['distance_mean']:.3f} | {scale} | {line['dimension']:.0f} | {shares} |")
    return "\n".join(rows)


def test_the_pages_table_is_the_records():
    assert table() in (ROOT / "docs" / "probe.md").read_text()


def test_acceptance_was_predicted_to_within_ten_points_at_both_sizes():
    assert {line["b"] for line in lines()} == {10, 100}
    assert all(abs(line["predicted"] - line["measured"]) <= 0.1 for line in lines())


if __name__ == "__main__":
    print(table())
