"""What the README claims: its code runs, and its figures are those of the records in the repository.

`python tests/test_readme.py` prints the tables anew.
"""

import json
import re
import runpy
from pathlib import Path

import pytest

from gaf_lab.bench.cost_model import Network
from gaf_lab.bench.predictions import predict_point, read_points
from gaf_lab.records.find import find_runs
from gaf_lab.report import measures
from gaf_lab.report import statistics as st
from gaf_lab.report.arms import group_by_arm

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def demo_table() -> str:
    columns = (
        measures.SELECTED,
        measures.LAST,
        measures.MEMORISED,
        measures.CORRECTED,
        measures.ACCEPTANCE,
        measures.STEPS_TAKEN,
    )
    lines = [
        "| arm | n | selected | last | memorised | corrected | accepted | steps taken |",
        "|---|---|---|---|---|---|---|---|",
    ]
    arms = group_by_arm(find_runs([ROOT / "results" / "demo"]))
    for arm in arms:
        found = [st.spread_over_seeds(arm, measure) for measure in columns]
        lines.append(
            f"| {arm.name} | {found[0].n} | "
            + " | ".join(f"{100 * s.mean:.1f} ± {100 * s.deviation:.1f}" for s in found)
            + " |"
        )
    named = {arm.name: arm for arm in arms}
    lines += ["", "Paired differences in points, with 95% bootstrap intervals:", ""]
    lines += ["| difference | selected | last |", "|---|---|---|"]
    for first, second in (
        ("GAF", "averaging"),
        ("random subset", "averaging"),
        ("GAF", "random subset"),
    ):
        both = [
            st.paired_difference(named[first], named[second], measure)
            for measure in (measures.SELECTED, measures.LAST)
        ]
        cells = (f"{100 * d.mean:+.1f} ({100 * d.low:.1f} to {100 * d.high:.1f})" for d in both)
        lines.append(f"| {first} - {second} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bench_table() -> str:
    text = (ROOT / "benchmarks" / "accumulate.jsonl").read_text()
    lines = [
        "| k | way | time, ratio (10% to 90%) | extra memory at the peak, gradients |",
        "|---|---|---|---|",
    ]
    for line in map(json.loads, text.splitlines()[1:]):
        spread = f"{line['ratio_median']:.3f} ({line['ratio_p10']:.2f} to {line['ratio_p90']:.2f})"
        lines.append(
            f"| {line['k']} | `{line['way']}` | {spread} | {line['extra_gradients']:.2f} |"
        )
    return "\n".join(lines)


def ddp_table(name: str) -> str:
    """Of a file that `gaf bench ddp` or benchmarks/slow_network.py wrote."""
    head = [
        "k",
        "way",
        "step, ratio (10% to 90%)",
        "aggregation alone, ratio",
        "MB sent by a rank",
        "extra memory, gradients",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in map(json.loads, (ROOT / "benchmarks" / name).read_text().splitlines()[1:]):
        spread = f"{line['ratio_median']:.3f} ({line['ratio_p10']:.2f} to {line['ratio_p90']:.2f})"
        extra = "" if line["extra_gradients"] is None else f"{line['extra_gradients']:.2f}"
        lines.append(
            f"| {line['k']} | {line['way']} | {spread} | {line['alone_ratio_median']:.2f} | {line['sent_bytes'] / 1e6:.1f} | {extra} |"
        )
    return "\n".join(lines)


def messages_table() -> str:
    found = [
        json.loads(line)
        for line in (ROOT / "benchmarks" / "messages.jsonl").read_text().splitlines()
    ]
    lines = [
        "| processes | link | " + " | ".join(found[0]["ms_median"]) + " |",
        "|---" * (2 + len(found[0]["ms_median"])) + "|",
    ]
    for line in found:
        link = "one machine" if line["mbit"] is None else f"{line['mbit'] / 1000:g} Gbit/s"
        lines.append(
            f"| {line['k']} | {link} | "
            + " | ".join(f"{ms:.0f}" for ms in line["ms_median"].values())
            + " |"
        )
    return "\n".join(lines)


def predicted_table() -> str:
    """The cost model beside the slow link, with the defaults of `gaf bench ddp --against`."""
    given, points = read_points(ROOT / "benchmarks" / "slow_network.jsonl")
    network = Network(20e-6, given["mbit"] * 1e6 / 8, 10e9, 30e9)
    lines = ["| k | way | predicted ms | measured ms |", "|---|---|---|---|"]
    for point in points:
        seconds, _ = predict_point(point, network)
        lines.append(
            f"| {point['k']} | {point['way']} | {1000 * seconds:.0f} | {point['alone_ms_median']:.0f} |"
        )
    return "\n".join(lines)


DDP = ("ddp.jsonl", "ddp-b32.jsonl", "slow_network.jsonl")


@pytest.mark.parametrize("block", BLOCKS)
def test_the_readmes_code_runs(block, tmp_path):
    file = tmp_path / "block.py"
    file.write_text(block)
    runpy.run_path(str(file))


def test_there_is_code_to_run():
    assert len(BLOCKS) >= 2


def test_the_readmes_diff_is_the_code_that_the_tests_run():
    for call in (
        "acc = gaf.Accumulator(optimizer, gaf.GAF(",
        "acc.backward(",
        "decision = acc.step()",
    ):
        assert any(call in block for block in BLOCKS)


@pytest.mark.parametrize("table", [demo_table, bench_table])
def test_the_readmes_figures_are_the_records(table):
    assert table() in README


@pytest.mark.parametrize("name", DDP)
def test_the_figures_of_the_page_on_cost_are_the_records(name):
    assert ddp_table(name) in (ROOT / "docs" / "cost.md").read_text()


def test_the_figures_of_messages_and_of_the_model_are_the_records():
    text = (ROOT / "docs" / "cost.md").read_text()
    assert messages_table() in text
    assert predicted_table() in text


def test_the_readmes_figures_of_data_parallel_steps_are_the_records():
    assert ddp_table(DDP[0]) in README


def test_every_file_that_the_readme_points_to_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_annotated_tree_names_every_module():
    modules = [
        p.name
        for folder in ("gaf", "gaf_lab")
        for p in (ROOT / "src" / folder).glob("*.py")
        if not p.name.startswith("__")
    ]
    assert [name for name in modules if name not in README] == []


if __name__ == "__main__":
    print(
        demo_table(),
        bench_table(),
        *map(ddp_table, DDP),
        messages_table(),
        predicted_table(),
        sep="\n\n",
    )
