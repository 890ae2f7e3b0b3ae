"""The tables of docs/samples.md are the records in results/ and benchmarks/.

`python tests/test_samples_page.py` prints them.
"""

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WAYS = ("gaf.ghost_gram", "vmap(grad)", "TorchJD autogram")


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / path).read_text().splitlines()][1:]


def found_table() -> str:
    """What a training without weights finds, by noise and passes."""
    rows = [
        "| label noise | passes | AUROC, prototype | AUROC, disagreement | AUROC, loss | "
        "first 100, prototype | first 100, loss | issues | of these wrong | wrong in all |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in groups(weigh=False):
        scores = [
            *(f"auroc_{name}" for name in ("prototype", "disagreement", "loss")),
            *(f"precision100_{name}" for name in ("prototype", "loss")),
        ]
        known = "auroc_loss" in group[0]
        cells = [spread(group, name) if known else "" for name in scores]
        counts = [f"{mean(group, name):.0f}" for name in ("issues", "issues_wrong", "wrong")]
        rows.append(f"| {start(group)} | {' | '.join([*cells, *counts])} |")
    return "\n".join(rows)


def weighed_table() -> str:
    """Accuracy of both ways of training, and what the weighed one finds."""
    rows = [
        "| label noise | passes | accuracy, plain | accuracy, weighed | "
        "AUROC, prototype, weighed |",
        "|---|---|---|---|---|",
    ]
    for plain, weighed in zip(groups(weigh=False), groups(weigh=True), strict=True):
        known = "auroc_loss" in weighed[0]
        cells = [percent(plain), percent(weighed)]
        cells.append(spread(weighed, "auroc_prototype") if known else "")
        rows.append(f"| {start(plain)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def groups(weigh: bool) -> list[list[dict[str, Any]]]:
    """The seeds of each noise and number of passes."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines("results/label-issues.jsonl"):
        if line["weigh"] == weigh:
            found.setdefault((line["noise"], line["passes"]), []).append(line)
    return list(found.values())


def start(group: list[dict[str, Any]]) -> str:
    noise = group[0]["noise"]
    return f"{noise if noise == 'none' else '40% ' + noise} | {group[0]['passes']}"


def mean(group: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(line[name] for line in group)


def spread(group: list[dict[str, Any]], name: str) -> str:
    return f"{mean(group, name):.3f} ± {statistics.stdev(line[name] for line in group):.3f}"


def percent(group: list[dict[str, Any]]) -> str:
    values = [100 * line["accuracy"] for line in group]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


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
    tables = (found_table(), weighed_table(), step_table(), cost_table())
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
    print(found_table(), weighed_table(), step_table(), cost_table(), sep="\n\n")
