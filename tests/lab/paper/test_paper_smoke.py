"""`gaf paper all` at scale smoke on the real CIFAR-100.

Every figure is there, the page is sound, and nothing runs twice. As it is typed 65 runs train a
ResNet, which is slow; with a perceptron in its place in all runs but fig5's all else is the same.
"""

import dataclasses
import io

import pytest
from rich.console import Console

from gaf_lab.commands import main as cli
from gaf_lab.paper import plans
from gaf_lab.paper.items import ITEMS
from gaf_lab.records.find import find_runs
from helpers.browser import assert_page_is_sound

IDS = tuple(ITEMS)
TYPED = ("noise", "imagenet")  # data sets of one run each


def said_by(words, code):
    out = io.StringIO()
    assert cli.run_command(["paper", *words], Console(file=out, width=160)) == code
    return out.getvalue()


def with_perceptrons(config):
    smoke = reduce_to_smoke(config)
    return smoke if config.dataset in TYPED else dataclasses.replace(smoke, model="mlp")


reduce_to_smoke = plans.reduce_to_smoke


@pytest.fixture(scope="module", params=["mlp", pytest.param("resnet18", marks=pytest.mark.slow)])
def everything(request, real, tmp_path_factory):
    """The folder of one command for all ten, and what it said."""
    out = tmp_path_factory.mktemp("paper") / "out"
    words = ["all", "--data", str(real), "--out", str(out), "--workers", "2"]
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "mlp":
            patch.setattr(plans, "reduce_to_smoke", with_perceptrons)
        yield out, words, said_by(words, 0)


def test_it_says_beforehand_how_many_runs_there_are_and_how_long_they_take(everything):
    _, _, said = everything
    runs = {config.hash for name in IDS for config in plans.make_plan(name)}
    assert f"{len(runs)} runs, {len(runs)} of them to do." in said
    assert "by a short measurement" in said


@pytest.mark.parametrize("name", IDS)
def test_every_figure_is_there_with_its_runs(everything, name):
    out, _, _ = everything
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    finished = {
        run.header["config_hash"]
        for run in find_runs([out])
        if run.end and run.end["status"] == "finished"
    }
    assert {config.hash for config in plans.make_plan(name)} <= finished


def test_the_page_has_them_all_and_is_sound(everything):
    out, _, _ = everything
    text = (out / "paper.html").read_text()
    assert all(item.title in text for item in ITEMS.values())
    assert (
        "No ImageNet was found: a reduced ViT on generated pictures stands in for "
        "ViT-L/16 on ImageNet." in text
    )
    assert_page_is_sound(out / "paper.html")


def test_again_nothing_is_run(everything):
    out, words, _ = everything
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/records.jsonl")}
    assert " 0 of them to do." in said_by(words, 0)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/records.jsonl")} == before


def test_a_figure_that_does_not_exist_is_refused_with_the_nearest():
    assert cli.run_command(["paper", "tabel1"], Console(file=io.StringIO())) == 2
