"""The report's page in a real browser, on screens and on paper: sound, and usable.

The checks themselves are tested on pages that are broken.
"""

import base64
import io
import re
from pathlib import Path

import pytest
from matplotlib import pyplot

from gaf_lab.report.charts import CHARTS
from gaf_lab.report.page import write_report
from helpers.browser import (
    PAPER,
    assert_page_is_sound,
    chromium,
    complaints,
    emulate,
    faults,
    pages,
    pictures,
    printed,
    settled,
)
from helpers.reports import nine, simulate

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # selenium's sockets


@pytest.fixture(scope="module")
def driver():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write_report(nine(folder / "runs"), folder, "Nine runs")


def test_the_page_is_sound(page, driver):
    assert_page_is_sound(page, driver)


def test_a_page_of_twenty_arms_with_long_names_is_sound(tmp_path, driver):
    names = [
        "averaging",
        "GAF",
        *(f"GAF with another technique of a long name, number {i}" for i in range(17)),
        "x" * 120,
    ]
    runs = [
        simulate(tmp_path / f"{i}-{seed}", name, seed, last=0.6 + 0.01 * i)
        for i, name in enumerate(names)
        for seed in range(1 + i % 2)
    ]
    assert_page_is_sound(write_report(runs, tmp_path / "out"), driver)


def test_a_page_of_a_run_that_has_just_begun_is_sound(tmp_path, driver):
    assert_page_is_sound(
        write_report([simulate(tmp_path / "run", "GAF", 0, passes=1, status="")], tmp_path / "out"),
        driver,
    )


def opened(page: Path, driver) -> None:
    """The page on a screen, once its drawings have taken the place of the pictures."""
    emulate(driver, 1280)
    driver.get(page.as_uri())
    waiting = "return document.querySelectorAll('figure:not(.drawn)').length"
    assert settled(lambda: ["not drawn"] * driver.execute_script(waiting)) == []


def test_every_view_of_every_figure_is_drawn_when_it_is_chosen(page, driver):
    opened(page, driver)
    views = driver.find_elements("css selector", ".views button")
    assert len(views) == sum(len(chart.axes) for chart in CHARTS if len(chart.axes) > 1) > 0
    titles = []
    for view in views:
        view.click()
        figure = view.find_element("xpath", "ancestor::figure")
        titles.append(
            (figure.get_attribute("id"), figure.find_element("css selector", ".live .xtitle").text)
        )
        assert figure.find_elements("css selector", ".live .mlayer .trace path")
    assert len(set(titles)) == len(views)
    assert complaints(driver) == []


def lines(driver) -> dict[str, int]:
    """By figure, the lines that it shows."""
    return {
        chart.name: len(driver.find_elements("css selector", f"#{chart.name} .mlayer .trace"))
        for chart in CHARTS
    }


@pytest.mark.parametrize("how", ["mouse", "keyboard"])
def test_an_arm_that_is_switched_off_leaves_all_figures_and_comes_back(how, page, driver):
    opened(page, driver)
    box, before = driver.find_element("css selector", "[data-arm='GAF']"), lines(driver)
    switch = box.click if how == "mouse" else lambda: box.send_keys(" ")
    switch()
    assert all(0 < count < before[name] for name, count in lines(driver).items())
    switch()
    assert lines(driver) == before


def test_the_picker_is_reached_by_the_tabulator(page, driver):
    opened(page, driver)
    focus = "return document.activeElement.dataset.arm"
    driver.execute_script("document.querySelector('[data-arm]').focus()")
    names = [driver.execute_script(focus)]
    for _ in range(2):
        driver.switch_to.active_element.send_keys("\t")
        names.append(driver.execute_script(focus))
    assert names == ["averaging", "GAF", "random subset"]


def test_without_what_unpacks_the_drawings_the_pictures_stay(page, driver):
    script = {"source": "delete self.DecompressionStream"}
    added = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", script)
    try:
        assert faults(page, driver) == []
        assert not driver.find_elements("css selector", ".drawn")
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_on_paper_every_figure_is_a_picture(page, driver):
    emulate(driver, 1280)
    driver.get(page.as_uri())
    pdf = printed(driver)
    assert pages(pdf) > 1
    assert pictures(pdf) == sum(len(chart.axes) for chart in CHARTS)


def picture() -> str:
    """A small picture as data URL."""
    buffer = io.BytesIO()
    pyplot.imsave(buffer, [[0.0, 1.0]])
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write(path: Path, inside: str) -> Path:
    path.write_text(
        "<!doctype html><meta charset=utf-8><title>x</title><link rel=icon href='data:,'>"
        f"<style>body{{margin:0}}</style>{inside}"
    )
    return path


SOUND = f"<figure id=one><img alt=one src='{picture()}'></figure>"
PLOT = "<div class=js-plotly-plot style='height:10px'>drawing</div>"


def test_a_page_that_is_sound_has_no_faults(tmp_path, driver):
    assert faults(write(tmp_path / "sound.html", SOUND), driver) == []
    long = f"<div style='overflow-x:auto'><div style='width:3000px'>wide</div></div>{SOUND}"
    assert faults(write(tmp_path / "long.html", long), driver) == []


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("", ["the page has no figure"]),
        (
            SOUND + "<img alt=another src=missing.png>",
            [
                "1280 pixels: picture another is empty",
                "390 pixels: picture another is empty",
                "console: .*missing.png - Failed to load resource",
            ],
        ),
        (SOUND + "<script>drawAll()</script>", ["console: .*drawAll is not defined"]),
        (
            SOUND + "<figure id=two></figure>",
            [
                "1280 pixels: figure two is empty",
                "390 pixels: figure two is empty",
                "print: figure two has no picture",
            ],
        ),
        (
            f"<figure id=two>{PLOT}</figure>",
            [
                "1280 pixels: figure two is empty",
                "390 pixels: figure two is empty",
                "print: figure two has no picture",
                "print: figure two has a live drawing",
            ],
        ),
        (
            SOUND.replace("<img", "<img style='display:none'"),
            [
                "1280 pixels: figure one is empty",
                "390 pixels: figure one is empty",
                "print: figure one has no picture",
            ],
        ),
        (
            SOUND + "<div id=bar style='width:600px'>wide</div>",
            ["390 pixels: the page is 600 wide", "390 pixels: <div bar>"],
        ),
        (
            SOUND
            + f"<style>@media print {{ p {{ width: {PAPER + 50}px }} }}</style><p id=bar>wide</p>",
            [f"print: the page is {PAPER + 50} wide", "print: <p bar>"],
        ),
    ],
    ids=[
        "no figure",
        "a missing picture",
        "a script error",
        "an empty figure",
        "a drawing of nothing",
        "a hidden picture",
        "too wide",
        "too wide on paper",
    ],
)
def test_what_is_broken_is_found(inside, expected, tmp_path, driver, monkeypatch):
    monkeypatch.setattr("helpers.browser.PATIENCE", 0.3)
    found = faults(write(tmp_path / "page.html", inside), driver)
    assert len(found) == len(expected), found
    for fault, words in zip(found, expected, strict=True):
        assert re.search(words, fault), fault


def test_a_page_that_is_broken_fails_with_what_is_wrong(tmp_path, driver):
    with pytest.raises(AssertionError, match=r"page.html:\nthe page has no figure"):
        assert_page_is_sound(write(tmp_path / "page.html", ""), driver)
