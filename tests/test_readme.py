"""The claims of the README, docs/demo.md and docs/cost.md: code runs, figures are the records'.

`python tests/test_readme.py` prints the tables anew.
"""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gaf_lab.bench.cost_model import Network
from gaf_lab.bench.predictions import predict_point, read_points
from gaf_lab.records import packs
from gaf_lab.records.find import find_runs
from gaf_lab.report import measures
from gaf_lab.report import statistics as st
from gaf_lab.report.arms import Arm
from helpers.tables import by_name, mean_of, percent, points_between, ratio, table

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src"
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
    arms = by_name(find_runs([ROOT / "results" / "demo"]))
    accuracies = table(
        "arm | n | selected | last | memorised | corrected | accepted | steps taken",
        (
            [name, len(arm.seeds), *(percent(arm, measure) for measure in columns)]
            for name, arm in arms.items()
        ),
    )
    pairs = (("GAF", "averaging"), ("random subset", "averaging"), ("GAF", "random subset"))
    rows = []
    for first, second in pairs:
        found = (points_between(arms[first], arms[second], measure) for measure in columns[:2])
        rows.append([f"{first} - {second}", *found])
    heading = "Paired differences in points, with 95% bootstrap intervals:"
    return "\n\n".join([accuracies, heading, table("difference | selected | last", rows)])


def read_lines(name: str) -> list[dict[str, Any]]:
    """Of a benchmark's file, without the conditions before the lines of each run."""
    lines = map(json.loads, (ROOT / "benchmarks" / name).read_text().splitlines())
    return [line for line in lines if line["kind"] != "conditions"]


ACCUMULATE = ("accumulate.jsonl", "accumulate-kept-memory.jsonl")


def bench_table(name: str) -> str:
    rows = []
    for line in read_lines(name):
        extra = f"{line['extra_gradients']:.2f}"
        rows.append([line["k"], f"`{line['way']}`", ratio(line), extra])
    head = "k | way | time, ratio (10% to 90%) | extra memory at the peak, gradients"
    return table(head, rows)


# b, hidden; over plain accumulation, GAF and start="best": earlier figures, and the goals
SMALL_MODELS = [
    (20, 512, (1.58, 3.05), (1.15, 1.5)),
    (20, 64, (2.57, 2.94), (1.4, 1.6)),
    (100, 512, (1.26, 1.96), (1.08, 1.25)),
]
FIGURES = "<!-- figures: benchmarks/accumulate-mlp.jsonl -->\n"
PRODUCTS = "<!-- figures: benchmarks/products.jsonl -->\n"


def small_models() -> dict[tuple[int, int, str], dict[str, Any]]:
    """Lines of the record by b, hidden and way."""
    return {(x["b"], x["hidden"], x["way"]): x for x in read_lines("accumulate-mlp.jsonl")}


def small_models_table() -> str:
    found, rows = small_models(), []
    ways = [f"gaf.{way}" for way in ("Mean()", "GAF()", "GAF(start='best')")]
    for hidden, b in ((512, 100), (512, 20), (64, 100), (64, 20)):
        lines = [found[b, hidden, way] for way in ways]
        plain = f"{sorted(line['plain_ms_median'] for line in lines)[1]:.1f}"
        rows.append([hidden, b, plain, *map(ratio_in_hundredths, lines)])
    return table("hidden | b | plain, ms | " + " | ".join(f"`{way}`" for way in ways), rows)


def ratio_in_hundredths(line: dict[str, Any]) -> str:
    low, high = line["ratio_p10"], line["ratio_p90"]
    return f"{line['ratio_median']:.2f} ({low:.2f} to {high:.2f})"


def before_after_table() -> str:
    """GAF that accepts all rows, and start="best", over plain accumulation."""
    found, rows = small_models(), []
    for b, hidden, before, goals in SMALL_MODELS:
        ways = ("gaf.GAF()", "gaf.GAF(start='best')")
        after = [f"{found[b, hidden, way]['ratio_median']:.2f}" for way in ways]
        pairs = zip(before, after, goals, strict=True)
        rows.append([hidden, b, *(x for was, now, goal in pairs for x in (was, now, goal))])
    names = ("`GAF()`", '`GAF(start="best")`')
    heads = (f"{name} {when}" for name in names for when in ("before", "after", "goal"))
    return table("hidden | b | " + " | ".join(heads), rows)


def products_table() -> str:
    """Of a row's arithmetic, in milliseconds of CPU time."""
    found = {(x["rows"], x["way"]): x for x in read_lines("products.jsonl")}
    columns = list(dict.fromkeys(rows for rows, _ in found))
    rows = [
        [way, *(f"{found[name, way]['ms_median']:.2f}" for name in columns)]
        for way in dict.fromkeys(way for _, way in found)
    ]
    return table("CPU ms | " + " | ".join(columns), rows)


def write_small_models() -> None:
    """Writes the tables into docs/speed.md, each after its mark."""
    page = ROOT / "docs" / "speed.md"
    mark = PRODUCTS + page.read_text().split(PRODUCTS)[1].partition("\n\n")[0]
    page.write_text(page.read_text().replace(mark, PRODUCTS + products_table()))
    before, *parts = page.read_text().split(FIGURES)
    tables = (small_models_table(), before_after_table())
    rest = (part.partition("\n\n")[2] for part in parts)
    filled = (f"{FIGURES}{one}\n\n{text}" for one, text in zip(tables, rest, strict=True))
    page.write_text(before + "".join(filled))


def ddp_table(name: str) -> str:
    """Of a file that `gaf bench ddp` or benchmarks/slow_network.py wrote."""
    rows = []
    for line in read_lines(name):
        extra = "" if line["extra_gradients"] is None else f"{line['extra_gradients']:.2f}"
        alone, sent = f"{line['alone_ratio_median']:.2f}", f"{line['sent_bytes'] / 1e6:.1f}"
        rows.append([line["k"], line["way"], ratio(line), alone, sent, extra])
    head = (
        "k | way | step, ratio (10% to 90%) | aggregation alone, ratio | MB sent by a rank"
        " | extra memory, gradients"
    )
    return table(head, rows)


def hsdp_table(name: str) -> str:
    """Of a file that `gaf bench hsdp` or benchmarks/slow_network.py wrote."""
    rows = []
    for line in read_lines(name):
        extra = "" if line["extra_shards"] is None else f"{line['extra_shards']:.2f}"
        cpu, sent = f"{line['cpu_ratio_median']:.2f}", f"{line['sent_bytes'] / 1e6:.1f}"
        rows.append([line["way"], ratio(line), cpu, sent, extra])
    head = (
        "way | step, ratio (10% to 90%) | CPU time, ratio | MB sent to other replicas"
        " | extra memory, shards"
    )
    return table(head, rows)


def messages_table() -> str:
    text = (ROOT / "benchmarks" / "messages.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    rows = []
    for line in lines:
        link = "one machine" if line["mbit"] is None else f"{line['mbit'] / 1000:g} Gbit/s"
        rows.append([line["k"], link, *(f"{ms:.0f}" for ms in line["ms_median"].values())])
    return table(" | ".join(["processes", "link", *lines[0]["ms_median"]]), rows)


def predicted_table() -> str:
    """The cost model beside the slow link, with the defaults of `gaf bench ddp --against`."""
    given, points = read_points(ROOT / "benchmarks" / "slow_network.jsonl")
    network = Network(20e-6, given["mbit"] * 1e6 / 8, 10e9, 30e9)
    rows = []
    for point in points:
        seconds, _ = predict_point(point, network)
        times = (f"{1000 * seconds:.0f}", f"{point['alone_ms_median']:.0f}")
        rows.append([point["k"], point["way"], *times])
    return table("k | way | predicted ms | measured ms", rows)


def points(arms: dict[str, Arm], first: str, second: str) -> float:
    """By how many points of test accuracy one arm ended above another."""
    found = st.paired_difference(arms[first], arms[second], measures.LAST)
    assert found is not None
    return 100 * found.mean


def claims() -> Iterator[str]:
    """The figures in the README's sentences, as the records have them."""
    demo = by_name(find_runs([ROOT / "results" / "demo"]))
    yield f"GAF ends {points(demo, 'GAF', 'averaging'):.1f} points above averaging, but"
    yield f"already ends {points(demo, 'random subset', 'averaging'):.1f} points above it"
    best, own = (
        f"{100 * mean_of(demo[name], measures.SELECTED):.1f}%" for name in ("averaging", "GAF")
    )
    yield f"checkpoint ({best}) is as good as GAF at its own ({own})"
    table = packs.read_pack(ROOT / "results" / "table1-small.jsonl")
    clean, some, most = (
        by_name(run for run in table if run.header["config"]["noise_rate"] == rate)
        for rate in (0.0, 0.4, 0.6)
    )
    yield f"GAF ends {points(some, 'GAF', 'averaging'):.1f} points above averaging and"
    yield f"and {points(some, 'GAF', 'random subset'):.1f} above the random subset"
    yield f"is level with it ({points(some, 'early stopping', 'GAF'):.1f} points ahead)"
    yield f"ends {points(some, 'GCE', 'GAF'):.1f} points ahead"
    for rival in ("early stopping", "GCE"):
        yield f"With 60% wrong labels both end {points(most, rival, 'GAF'):.0f} points ahead"
    yield f"On clean labels GAF ends {points(clean, 'averaging', 'GAF'):.0f} point behind averaging"
    usual, kept = map(slower_by, ACCUMULATE)
    yield f"made steps {usual} slower on a CPU"
    yield f"or {kept} where freed memory stays with the process"
    yield f"and {on_a_gpu('gpu-h100')} on an H100, {on_a_gpu('gpu')} on an H200"


def slower_by(name: str) -> str:
    """The lowest and the highest of GAF's steps, in percent."""
    own = [line for line in read_lines(name) if line["way"] == "gaf.GAF()"]
    assert max(line["extra_gradients"] for line in own) <= 1
    slower = sorted(100 * (line["ratio_median"] - 1) for line in own)
    return f"{slower[0]:.1f} to {slower[-1]:.1f}%"


def on_a_gpu(name: str) -> str:
    """The same of the Accumulator on a GPU, pictures of 224 pixels."""
    lines = map(json.loads, (ROOT / "benchmarks" / f"{name}.jsonl").read_text().splitlines())
    slower = sorted(
        100 * (line["ratio_median"] - 1)
        for line in lines
        if line["kind"] == "ratio" and "Accumulator" in line["name"]
        if "224" in line["name"] and "GAF" in line["name"]
    )
    return f"{slower[0]:.1f} to {slower[-1]:.1f}%"


HSDP = ("hsdp.jsonl", "hsdp-slow.jsonl")
DDP = ("ddp.jsonl", "ddp-b32.jsonl", "ddp-b32-amd.jsonl", "slow_network.jsonl")


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


def test_the_readmes_figures_are_the_records():
    text = " ".join(README.split())
    assert [claim for claim in claims() if claim not in text] == []


def test_the_figures_of_the_page_on_the_demo_are_the_records():
    assert demo_table() in (ROOT / "docs" / "demo.md").read_text()


def test_the_figures_of_the_page_on_cost_are_the_records():
    text = (ROOT / "docs" / "cost.md").read_text()
    tables = [messages_table(), predicted_table(), *map(bench_table, ACCUMULATE)]
    tables += [*map(ddp_table, DDP), *map(hsdp_table, HSDP)]
    assert [table for table in tables if table not in text] == []


def test_the_page_on_speed_shows_the_record_of_small_models():
    text = (ROOT / "docs" / "speed.md").read_text()
    assert f"{FIGURES}{small_models_table()}\n" in text
    assert f"{FIGURES}{before_after_table()}\n" in text
    assert f"{PRODUCTS}{products_table()}\n" in text


def test_every_file_that_the_readme_points_to_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def rooms_of(package: str) -> list[str]:
    return [path.parent.name for path in sorted((SOURCES / package).glob("*/__init__.py"))]


def test_the_annotated_tree_names_every_room_and_every_file_of_the_library():
    (tree,) = re.findall(r"(?m)^    src/gaf/ .*\n(?:    .*\n)+", README)
    library, _, lab = tree.partition("    src/gaf_lab/")
    assert [room for room in rooms_of("gaf_lab") if f"\n      {room}/ " not in lab] == []
    ground, *rest = re.split(r"\n      (\w+)/ ", library)
    texts = {"": ground} | dict(zip(rest[::2], rest[1::2], strict=True))
    assert sorted(texts) == ["", *rooms_of("gaf")]
    for path in (SOURCES / "gaf").rglob("*.py"):
        folders = path.relative_to(SOURCES / "gaf").parts[:-1]
        if not path.name.startswith("__"):
            assert re.search(rf"\b{path.name}\b", texts[folders[0] if folders else ""]), path
    named = set(re.findall(r"\w+\.py", library))
    assert named <= {path.name for path in (SOURCES / "gaf").rglob("*.py")}


def test_every_file_that_a_text_names_by_its_folder_exists():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    homes = (ROOT, SOURCES, SOURCES / "gaf", SOURCES / "gaf_lab")
    for page in pages:
        for path in re.findall(r"(?<![\w/.])(?:\w+/)+\w+\.py\b", page.read_text()):
            folders = (*homes, page.parent)
            assert any((home / path).exists() for home in folders), f"{page.name}: {path}"


if __name__ == "__main__":
    write_small_models()
    print(
        demo_table(),
        *map(bench_table, ACCUMULATE),
        *map(ddp_table, DDP),
        messages_table(),
        predicted_table(),
        *map(hsdp_table, HSDP),
        sep="\n\n",
    )
