"""The demo's second part: the labels of the same digits, on the page."""

import csv
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gaf_lab.commands.demo import run_demo
from gaf_lab.data.make_data import make_run_data
from gaf_lab.data.sets import load_dataset
from gaf_lab.experiments import demo as job
from gaf_lab.experiments.demo_labels import TILES, find_labels, label_section
from gaf_lab.settings.presets import DEMO
from helpers.browser import assert_page_is_sound
from helpers.reports import nine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo whose first part is simulated."""
    out = tmp_path_factory.mktemp("demo")
    runs = nine(out / "simulated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "demo", lambda *sizes: None)
        patch.setattr(job, "finished_runs", lambda *sizes: runs)
        assert run_demo(["--passes", "2", "--out", str(out)], Console(quiet=True)) == 0
    return out


def test_it_judges_the_labels_of_the_first_part(tmp_path: Path) -> None:
    found = find_labels(dataclasses.replace(DEMO, passes=2.0), tmp_path, lambda *at: None)
    first = make_run_data(DEMO, None, torch.device("cpu"))
    assert found.problem.train.observed.equal(first.train.observed)
    assert found.problem.origin.equal(first.origin)
    section = label_section(found)
    auroc = found.line()["auroc"]["quality"]
    assert section["facts"][0][:2] == ("AUROC", f"{auroc:.3f}") and auroc > 0.9
    assert [tile["index"] for tile in section["tiles"]] == [
        found.origin[row] for row in found.order[:TILES]
    ]
    truth = load_dataset("mnist5k", None).train_y
    wrong = sum(tile["given"] != int(truth[tile["index"]]) for tile in section["tiles"])
    assert f"{wrong} labels are wrong" in section["heading"]


def test_the_page_shows_the_first_suspects(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    rows = list(csv.DictReader((folder / "labels" / "samples.csv").open()))[:TILES]
    shown: list[Any] = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="sample (\d+)', page)
    assert shown == [row["index"] for row in rows]
    labels = re.findall(r"<b>(\d) → (\d)</b>", page)
    assert labels == [(row["given_label"], row["predicted_label"]) for row in rows]
    assert page.count(">label is right<") == sum(row["flipped"] == "0" for row in rows)
    assert (folder / "labels" / "audit.jsonl").is_file()


def test_the_page_is_sound(folder: Path) -> None:
    assert_page_is_sound(folder / "report.html")
