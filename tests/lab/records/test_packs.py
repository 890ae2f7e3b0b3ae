"""A pack holds what its runs' folders hold, without single steps, to five digits."""

import json
from pathlib import Path

import pytest

from gaf_lab.records import packs
from gaf_lab.records import run as records
from gaf_lab.records.find import find_runs
from gaf_lab.report import measures
from gaf_lab.report import statistics as st
from gaf_lab.report.arms import group_by_arm

DEMO = Path(__file__).parents[3] / "results" / "demo"


@pytest.fixture(scope="module")
def runs():
    return find_runs([DEMO])


def test_headers_ends_and_statistics_survive(runs, tmp_path):
    packs.write_pack(runs, tmp_path / "p.jsonl")
    again = packs.read_pack(tmp_path / "p.jsonl")
    assert [run.header for run in again] == [packs.with_short_replay(run.header) for run in runs]
    assert [run.end for run in again] == [run.end for run in runs]
    for arm, same in zip(group_by_arm(runs), group_by_arm(again), strict=True):
        for measure in measures.shown_measures(runs[0].score):
            one, other = st.spread_over_seeds(arm, measure), st.spread_over_seeds(same, measure)
            assert one is not None
            assert other is not None
            assert other.mean == pytest.approx(one.mean, rel=1e-5)  # five digits


def test_every_number_of_every_evaluation_survives(runs, tmp_path):
    packs.write_pack(runs, tmp_path / "p.jsonl")
    for run, same in zip(runs, packs.read_pack(tmp_path / "p.jsonl"), strict=True):
        for line, other in zip(run.evals, same.evals, strict=True):
            assert line.keys() - other.keys() == {"rows"}
            for key, value in other.items():
                assert value == (
                    pytest.approx(line[key], rel=1e-4) if isinstance(value, float) else line[key]
                )


def test_runs_of_other_conditions_keep_theirs(runs, tmp_path):
    other = records.Run(
        runs[0].folder,
        runs[0].header | {"commit": "another", "machine": {"cpu": "another"}},
        runs[0].evals,
        None,
    )
    packs.write_pack([*runs, other], tmp_path / "p.jsonl")
    last = packs.read_pack(tmp_path / "p.jsonl")[-1]
    assert last.header["commit"] == "another"
    assert last.header["machine"]["cpu"] == "another"
    assert last.end is None


def test_a_replayed_run_is_named_without_its_place(runs, tmp_path):
    header = runs[0].header | {"config": runs[0].header["config"] | {"replay": "/home/me/runs/gaf"}}
    packs.write_pack([records.Run(runs[0].folder, header, [], None)], tmp_path / "p.jsonl")
    assert "home" not in (tmp_path / "p.jsonl").read_text()
    (run,) = packs.read_pack(tmp_path / "p.jsonl")
    assert run.header["config"]["replay"] == "gaf"


def test_report_finds_packs_beside_folders(runs, tmp_path):
    packs.write_pack(runs[:2], tmp_path / "p.jsonl")
    assert len(find_runs([DEMO, tmp_path / "p.jsonl"])) == len(runs) + 2


@pytest.mark.parametrize("text", ["", "{}\n", "no json\n", json.dumps({"kind": "run"}) + "\n"])
def test_what_is_no_pack_is_refused(text, tmp_path):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(
        ValueError, match=r"must be a pack of runs, whose first line is of kind 'pack'; it is not"
    ):
        packs.read_pack(tmp_path / "p.jsonl")


def test_without_runs_there_is_no_pack(tmp_path):
    with pytest.raises(ValueError, match="must have at least one run; got none"):
        packs.write_pack([], tmp_path / "p.jsonl")
