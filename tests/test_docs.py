"""The documentation: it builds without a warning, names everything public, and its code runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gaf
from gaf_lab.config import tomllib
from test_readme import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
KNOWN = {"python", "sh", "toml", "text", "diff"}  # of these, python runs, sh and toml are parsed
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


def test_every_page_is_built(site: Path):
    assert all((site / page.relative_to(DOCS).with_suffix(".html")).is_file() for page in PAGES)


def test_the_reference_has_every_public_name(site: Path):
    text = (site / "reference.html").read_text()
    anchors = {anchor.split(".")[-1] for anchor in re.findall(r'id="(gaf[\w.]*)"', text)}
    assert anchors >= set(gaf.__all__) - {"probe"} | {"probe", "GAFMixin", "GAFCallback", "metrics"}


def test_pages_load_nothing_from_elsewhere(site: Path):
    for page in ("index.html", "reference.html"):
        text = (site / page).read_text()
        assert not re.findall(
            r'<(?:script|link|img)[^>]*(?:src|href)="https?://[^"]*"[^>]*(?:stylesheet|script|icon)?', text.replace('rel="canonical"', "")
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_blocks_are_of_a_known_language(page: Path):
    assert {kind for kind, _ in FENCE.findall(page.read_text())} <= KNOWN
    indented = re.findall(r"(?:^    .*\n)+", FENCE.sub("", page.read_text()), re.M)
    assert not [text for text in indented if re.search(r"^    (import|from) \w", text, re.M)]  # a program belongs in a block that runs


RUN = """
import json, sys
for page, blocks in json.load(sys.stdin).items():
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
"""


@pytest.mark.parametrize("group", ["the library", "frameworks"])
def test_python_blocks_run(tmp_path: Path, group: str):
    """The blocks of a page in order, in one namespace; the pages in one process, so that torch is imported once."""
    chosen = [page for page in PAGES if (page.parent.name == "frameworks") == (group == "frameworks")]
    found = {str(page): blocks(page, "python") for page in chosen if blocks(page, "python")}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(found), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_toml_blocks_parse(page: Path):
    for block in blocks(page, "toml"):
        assert tomllib.loads(block)


def commands() -> list[str]:
    """Every command line of the pages' shell blocks, without its comment."""
    lines = [line.partition("  #")[0].strip() for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return sorted({line for line in lines if line and not line.startswith("#")})


def test_shell_blocks_name_what_there_is():
    """Subcommands and options of gaf, paths of examples, extras of the package, targets of the Makefile."""
    from gaf_lab.cli import COMMANDS

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    checked = 0
    for line in commands():
        words = line.split()
        for path in (word for word in words if word.startswith(("examples/", "benchmarks/")) and word.endswith(".py")):
            assert (ROOT / path).is_file(), line
        for names in re.findall(r"'\.\[([\w,]+)\]'", line):
            assert set(names.split(",")) <= set(extras), line
        if words[0] == "gaf":
            assert words[1] in COMMANDS, line
            source = (ROOT / "src" / "gaf_lab" / "cli.py").read_text() + (ROOT / "src" / "gaf_lab" / "config.py").read_text()
            for option in (word[2:].replace("-", "_") for word in words if word.startswith("--")):
                assert re.search(rf"^    {option}: ", source, re.M), line
        checked += 1
    assert checked > 3
