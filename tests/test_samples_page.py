"""The tables of costs in docs/samples.md are the records in benchmarks/.

`python tests/test_samples_page.py` prints them.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WAYS = ("gaf.ghost_gram", "vmap(grad)", "TorchJD autogram")


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / path).read_text().splitlines()][1:]


def cost_table() -> str:
    """CPU time over that of a plain pass, and MiB, by network and n."""
    costs = {(line["model"], line["n"], line["way"]): line for line in lines(BENCH)}
    heads = [f"{way}: time, MiB" for way in ("plain", *WAYS)]
    rows = [f"| network | n | {' | '.join(heads)} |", "|---|---|---|---|---|---|"]
    for model, n in dict.fromkeys((model, n) for model, n, _ in costs):
        plain = costs[model, n, "forward and backward"]
        cells = [f"1, {plain['peak_mib']:.0f}"]
        for way in WAYS:
            line = costs.get((model, n, way))
            cells.append(
                "" if line is None else f"{line['cpu_ratio_median']:.1f}, {line['peak_mib']:.0f}"
            )
        rows.append(f"| {model} | {n} | {' | '.join(cells)} |")
    return "\n".join(rows)


def step_table() -> str:
    """Time of a step with SampleAgreement over that of plain training."""
    rows = ["| score | time | 10% to 90% | CPU time |", "|---|---|---|---|"]
    for line in lines(STEPS):
        low, high = (line[f"ratio_{name}"] for name in ("p10", "p90"))
        cells = [f"{line['ratio_median']:.2f}", f"{low:.2f} to {high:.2f}"]
        rows.append(f"| {line['score']} | {' | '.join(cells)} | {line['cpu_ratio_median']:.2f} |")
    return "\n".join(rows)


BENCH, STEPS = "benchmarks/samples.jsonl", "benchmarks/samples-step.jsonl"


def test_the_tables_are_the_records() -> None:
    text = (ROOT / "docs" / "samples.md").read_text()
    tables = (step_table(), cost_table())
    assert [table for table in tables if table not in text] == []


def test_a_step_judged_by_prototypes_is_as_long_as_a_plain_one() -> None:
    """At most 1.05 times as long."""
    (line,) = (line for line in lines(STEPS) if line["score"] == "prototype")
    assert line["b"] == 100 and line["ratio_median"] < 1.05 and line["cpu_ratio_median"] < 1.05


def test_a_batch_of_128_takes_a_fifth_of_the_memory_of_per_sample_gradients() -> None:
    """Of ResNet18; the gradients alone, without what their computation takes."""
    (line,) = (
        line
        for line in lines(BENCH)
        if (line["model"], line["n"], line["way"]) == ("resnet18", 128, "gaf.ghost_gram")
    )
    assert 5 * line["peak_mib"] < line["per_sample_gradients_mib"]


if __name__ == "__main__":
    print(step_table(), cost_table(), sep="\n\n")
