"""A page seen in headless Chromium: what is wrong with it on a screen, on a phone and on paper."""

import base64
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WIDTHS = (1280, 390)  # pixels: a laptop, a phone
PAPER = 673  # pixels between the margins of 16 mm on A4, at 96 to the inch
SHRUNK = 1.05  # printing shrinks what is wider than the paper; more than this shows
PATIENCE = 600.0  # seconds for a page to come to rest: the machine may be busy
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# Names of missing pictures, and of figures that show neither a picture nor a drawing with content.
EMPTY = """
const seen = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== "hidden";
const whole = (image) => image.complete && image.naturalWidth > 0;
const size = (e) => Math.max(e.getBoundingClientRect().width, e.getBoundingClientRect().height);
const drawn = (plot) => seen(plot) && (plot.data || []).some((trace) => trace.visible !== false)
  && [...plot.querySelectorAll("svg .mlayer path, svg .mlayer image")].some((e) => size(e) > 1);
const images = [...document.images].filter((image) => !whole(image))
  .map((image) => `picture ${image.alt || image.src.slice(0, 60)}`);
const figures = [...document.querySelectorAll("figure")].filter((figure) =>
  ![...figure.querySelectorAll("img")].some((image) => seen(image) && whole(image))
  && ![...figure.querySelectorAll(".js-plotly-plot")].some(drawn))
  .map((figure) => `figure ${figure.id}`);
return [...images, ...figures];
"""
# On paper: figures without a picture, and drawings that would be printed beside it.
UNPRINTED = """
const seen = (e) => e.getClientRects().length > 0;
const figures = [...document.querySelectorAll("figure")];
return [
  ...figures.filter((f) => ![...f.querySelectorAll("img")].some(seen))
    .map((f) => `figure ${f.id} has no picture`),
  ...figures.filter((f) => [...f.querySelectorAll(".js-plotly-plot")].some(seen))
    .map((f) => `figure ${f.id} has a live drawing`),
];
"""
# Names of elements that reach beyond the width and are not inside something that scrolls.
# Empty if the page does not scroll sideways.
WIDER = """
const width = arguments[0], root = document.documentElement;
if (Math.max(root.scrollWidth, document.body.scrollWidth) <= width) return [];
const beyond = (e) => e.getBoundingClientRect().right > width + 0.5;
const clips = (e) => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
const inside = (e) => e && e !== document.body && (clips(e) || inside(e.parentElement));
const wide = [...document.body.querySelectorAll("*")]
  .filter((e) => beyond(e) && !inside(e.parentElement));
const name = (e) => `<${e.tagName.toLowerCase()} ${e.id || e.className}>`;
return [`the page is ${root.scrollWidth} wide`, ...wide.map(name).slice(0, 5)];
"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A driver of Chromium with a profile of its own. Skips the test if one of them is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = (
        shutil.which("chromium") or shutil.which("google-chrome"),
        shutil.which("chromedriver"),
    )
    if browser is None or driver is None:
        pytest.skip(f"{'Chromium' if browser is None else 'chromedriver'} is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # it may still be writing to it when it ends
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        running = webdriver.Chrome(
            options=options, service=webdriver.ChromeService(executable_path=driver)
        )
        try:
            yield running
        finally:
            running.quit()


def assert_page_is_sound(path: Path, driver: Any = None) -> None:
    """Fails with a list of all that is wrong with the page; driver: a browser that runs already."""
    if driver is None:
        with chromium() as driver:
            return assert_page_is_sound(path, driver)
    found = faults(path, driver)
    assert not found, f"{path}:\n" + "\n".join(found)
    return None


def faults(path: Path, driver: Any) -> list[str]:
    """Console errors, missing or empty figures, and overflow, on the screens and on paper."""
    driver.get_log("browser")
    emulate(driver, WIDTHS[0])
    driver.get(path.resolve().as_uri())
    found = (
        []
        if driver.execute_script("return document.querySelector('figure')")
        else ["the page has no figure"]
    )
    for width in WIDTHS:
        emulate(driver, width)
        found += [
            f"{width} pixels: {what} is empty"
            for what in settled(lambda: driver.execute_script(EMPTY))
        ]
        found += [
            f"{width} pixels: {what}"
            for what in settled(lambda w=width: driver.execute_script(WIDER, w))
        ]
    emulate(driver, PAPER, "print")
    found += [f"print: {what}" for what in settled(lambda: driver.execute_script(UNPRINTED))]
    found += [
        f"print: {what}"
        for what in settled(lambda: driver.execute_script(WIDER, round(SHRUNK * PAPER)))
    ]
    emulate(driver, WIDTHS[0])
    if not pages(printed(driver)):
        found.append("print: the PDF has no page")
    return found + complaints(driver)


def complaints(driver: Any) -> list[str]:
    """Errors that the console has shown since the last look."""
    return [
        f"console: {entry['message'][:300]}"
        for entry in driver.get_log("browser")
        if entry["level"] == "SEVERE"
    ]


def emulate(driver: Any, width: int, media: str = "") -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media})


def settled(look: Callable[[], list[str]]) -> list[str]:
    """What is still wrong once the page has had time to draw and to follow a new width."""
    end = time.monotonic() + PATIENCE
    while (found := look()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def printed(driver: Any) -> bytes:
    """The page as PDF on A4."""
    told = driver.execute_cdp_cmd(
        "Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True}
    )
    return base64.b64decode(told["data"])


def pages(pdf: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


def pictures(pdf: bytes) -> int:
    """Pictures in it, those for transparency left out."""
    return len(re.findall(rb"/Subtype\s*/Image\b(?![^>]*/ColorSpace\s*/DeviceGray)", pdf))
