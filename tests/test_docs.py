"""The documentation builds without a warning, shows everything public, and its code runs.

In a browser a page loads from itself alone. A block is one of

    python      runs: those of a page in order, in one namespace
    sh          each command is parsed by what would run it; a block that begins with cd runs
    toml        is a plan of gaf sweep
    diff, text  not run; what they call of gaf exists and takes these arguments
    indented    formulas and folders, treated as text; the page of a program states that it was
                not run
"""

import ast
import inspect
import json
import math
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest
import tyro
from rich.console import Console

import gaf
from gaf_lab.commands.main import COMMANDS
from gaf_lab.commands.paper import PaperOptions
from gaf_lab.commands.plans import find_plan
from gaf_lab.commands.sweep import SweepOptions
from gaf_lab.paper.items import find_item
from gaf_lab.settings import plan
from gaf_lab.settings.reading import tomllib
from helpers.browser import WIDER, WIDTHS, chromium, complaints, emulate, settled
from test_readme import README, ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = {str(page.relative_to(DOCS)): page.read_text() for page in PAGES}
KNOWN = {"python", "sh", "toml", "diff", "text"}
TOOLS = {"gaf", "python", "torchrun", "make", "pip", "ray"}  # what a command may begin with


class Block(NamedTuple):
    language: str  # "" for an indented block
    text: str
    line: int  # of its first line in the page, from 0


def blocks(page: str, *languages: str) -> list[Block]:
    """Those of the languages, fenced at the left margin or indented, in order."""
    text = TEXTS[page]
    parts = re.finditer(
        r"^```(\w+)\n(.*?)^```$|(?<=\n\n)((?:    [^\n]*\n|\n(?= {4}))+)", text, re.M | re.S
    )
    found = [
        Block(
            m[1] or "",
            m[2] if m[1] else textwrap.dedent(m[3]),
            text.count("\n", 0, m.start(2 if m[1] else 3)),
        )
        for m in parts
    ]
    return [block for block in found if block.language in languages]


# --- the site ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


def html_of(page: str) -> str:
    return str(Path(page).with_suffix(".html"))


def test_every_page_is_in_the_navigation(site: Path):
    (navigation,) = re.findall(
        r'<nav class="md-nav md-nav--primary.*?</nav>\s*</div>',
        (site / "faq.html").read_text(),
        re.S,
    )
    assert [page for page in TEXTS if f'href="{html_of(page)}"' not in navigation] == []


def test_no_formula_is_taken_for_a_tag(site: Path):
    """<g, S> outside of code vanishes on a page."""
    found = {
        page: re.findall(r"<\w+[,_^|][^>]*>", (site / html_of(page)).read_text()) for page in TEXTS
    }
    assert {page: tags for page, tags in found.items() if tags} == {}


def public() -> set[str]:
    adapters = {
        "accelerate": ["attach"],
        "lightning": ["GAFCallback", "GAFDDPStrategy"],
        "trackers": ["metrics"],
        "transformers": ["GAFMixin", "GAFTrainer"],
    }
    return {f"gaf.{name}" for name in gaf.__all__} | {
        f"gaf.integrations.{m}.{name}" for m, names in adapters.items() for name in names
    }


def test_the_reference_has_every_public_name(site: Path):
    text = (site / "reference.html").read_text()
    headings = re.findall(r'<h3 id="[\w.]+" class="doc doc-heading">(.*?)</h3>', text, re.S)
    shown = {re.sub(r"<[^>]*>", "", heading).split()[0] for heading in headings}
    assert public() <= shown
    # of Handle, for the engines
    assert all(f"<code>{name}" not in text for name in ("judge", "settle"))


def test_the_reference_shows_doctests_as_code(site: Path):
    text = (site / "reference.html").read_text()
    assert "<blockquote>" not in text
    assert '<span class="gp">&gt;&gt;&gt; </span>' in text


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_pages_in_a_browser(address: str):
    """No message on the console, no request to another host, nothing wider than the screen.

    And the search finds a name.
    """
    with chromium() as driver:
        for page in ("index", "getting-started", "choosing-tau", "cost", "faq", "reference"):
            driver.get(f"{address}/{page}.html")
            for width in WIDTHS:
                emulate(driver, width)
                assert settled(lambda w=width: driver.execute_script(WIDER, w)) == [], page
            asked = driver.execute_script(
                "return performance.getEntriesByType('resource').map((entry) => entry.name)"
            )
            assert asked
            assert [url for url in asked if not url.startswith(address)] == []
        driver.get(f"{address}/index.html?q=SignalTau")
        hits = (
            "return document.querySelectorAll('.md-search-result__item').length"
            " ? [] : ['nothing is found']"
        )
        assert settled(lambda: driver.execute_script(hits)) == []
        assert complaints(driver) == []


# --- blocks ------------------------------------------------------------------------------------


def test_blocks_are_of_a_known_kind():
    """Each fence is at the margin and names a known language, or ends a block.

    So no block escapes the tests below.
    """
    for page, text in TEXTS.items():
        fences = re.findall(r"^.*(?:```|~~~).*$", text, re.M)
        assert set(fences[::2]) <= {f"```{language}" for language in KNOWN}, page
        assert set(fences[1::2]) <= {"```"}, page
        assert len(blocks(page, *KNOWN)) == len(fences) / 2, page


def test_a_program_runs_or_its_page_states_that_it_was_not_run():
    for page, text in TEXTS.items():
        programs = [
            block.text
            for block in blocks(page, "text", "diff", "")
            if re.search(r"^\s*(import|from) \w", block.text, re.M)
        ]
        assert not programs or re.search(r"\*\*([\w ]+ )?not (been )?run\*\*", text), page
        for program in programs:
            ast.parse(textwrap.dedent(program))


def calls(source: str) -> Iterator[ast.Call]:
    """Calls of gaf.NAME in what parses of the source."""
    try:
        tree = ast.parse(source.strip())
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and re.fullmatch(r"gaf\.\w+", ast.unparse(node.func)):
            yield node


def fragments(text: str) -> list[str]:
    """Lines without their comments, and code within a line."""
    lines = [line.lstrip("+ ").partition("  #")[0] for line in text.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", text)


def test_what_fragments_call_exists_and_takes_these_arguments():
    """In code within a line, in diffs and in text; ... stands for any arguments."""
    texts = [*TEXTS.values(), README]
    found = [call for text in texts for part in fragments(text) for call in calls(part)]
    assert len(found) > 50
    for call in found:
        given = [None for argument in call.args if ast.unparse(argument) != "..."]
        signature = inspect.signature(eval(ast.unparse(call.func), {"gaf": gaf}))
        signature.bind_partial(
            *given, **{keyword.arg: None for keyword in call.keywords if keyword.arg}
        )


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_names_with_dots_exist():
    texts = TEXTS | {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")}
    found = {
        name
        for text in texts.values()
        for name in re.findall(r"(?<![\w.])gaf(?:_lab)?(?:\.\w+)+", text)
    }
    assert [name for name in found - {"gaf.pt"} if not exists(name)] == []


RUN = """
import json, sys
for page, blocks in json.load(sys.stdin).items():
    names = {"__name__": "page"}
    for line, text in blocks:
        exec(compile("\\n" * line + text, page, "exec"), names)
"""


def test_python_blocks_run(tmp_path: Path):
    """All pages in one process, so that torch is imported once; an error names page and line."""
    found = {
        str(DOCS / page): [(block.line, block.text) for block in blocks(page, "python")]
        for page in TEXTS
    }
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(found),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_ray_trains_as_its_page_says(tmp_path: Path):
    """The two programs of the page as one file."""
    for module in ("ray", "pyarrow", "pandas"):
        pytest.importorskip(module, reason="ray[train] is not installed")
    page = "frameworks/ray-train.md"
    program = tmp_path / "program.py"
    program.write_text("\n".join(block.text for block in blocks(page, "python", "text")))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shown = re.findall(r"'gaf/acceptance': ([\d.]+)", done.stdout)
    assert shown
    assert 0 < float(shown[0]) < 1


def test_a_toml_block_is_a_plan_of_as_many_runs_as_its_page_says(tmp_path: Path):
    plans = [(page, block.text) for page in TEXTS for block in blocks(page, "toml")]
    assert plans
    for page, text in plans:
        (tmp_path / "plan.toml").write_text(text)
        (counts,) = re.findall(r"This is (\d+) seeds x (\d+) noise rates x (\d+) arms", TEXTS[page])
        assert len(plan.from_file(tmp_path / "plan.toml")) == math.prod(map(int, counts))


# --- commands ----------------------------------------------------------------------------------


def commands() -> list[str]:
    """Every command of the pages' and the README's blocks, without comments; ; separates two."""
    shells = [
        block.text
        for page in TEXTS
        for block in blocks(page, "sh")
        if not block.text.startswith("cd ")
    ]
    readme = [
        line
        for block in re.findall(r"(?:^    .*\n)+", README, re.M)
        for line in textwrap.dedent(block).splitlines()
    ]
    lines = [line for shell in shells for line in shell.splitlines()] + [
        line for line in readme if line.split()[0] in TOOLS
    ]
    parts = [part.strip() for line in lines for part in line.partition(" #")[0].split(";")]
    return sorted({part.removeprefix("sudo ") for part in parts if part})


class Parsed(Exception):
    pass


def parse_gaf(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the command up to the end of tyro's work."""
    given: list[Any] = []

    def parse(*args: Any, cli: Any = tyro.cli, **kwargs: Any) -> None:
        given.append(cli(*args, **kwargs))
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse)
    with pytest.raises(Parsed):
        COMMANDS[words[0]][0](words[1:], Console(quiet=True))
    (options,) = given
    if isinstance(options, PaperOptions):
        assert [find_item(name) for name in options.ids if name != "all"] or options.list
    if isinstance(options, SweepOptions) and not options.plan.endswith(".toml"):
        assert find_plan(options.plan, options.seeds, options.scale, options.reading)


def parse_program(words: list[str]) -> None:
    """A script that is there, and options that it has."""
    source = (ROOT / words[0]).read_text()
    assert all(f'"{word}"' in source for word in words[1:] if word.startswith("--"))


@pytest.mark.parametrize("command", commands())
def test_a_command_parses(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    tool, *words = shlex.split(command, comments=True)
    if files := re.findall(r"--task (\w+\.py):", command):  # a page's own
        monkeypatch.chdir(tmp_path)
        Path(files[0]).touch()
    tool = Path(tool).name
    if tool == "gaf" and words != ["presets"]:
        parse_gaf(words, monkeypatch)
    elif tool == "python":
        parse_program(words)
    elif tool == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words)
        if options.module:
            assert options.training_script == "gaf_lab"
            parse_gaf(options.training_script_args, monkeypatch)
        else:
            parse_program([options.training_script, *options.training_script_args])
    elif tool == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif tool == "ray":
        scripts = pytest.importorskip("ray.scripts.scripts", reason="ray is not installed")
        scripts.cli.commands[words[0]].make_context(words[0], words[1:])
    else:
        assert tool in TOOLS
        assert tool != "pip" or words[0] == "install"


def test_extras_and_targets_named_anywhere_are_there():
    text = "\n".join([*TEXTS.values(), README])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {
        name
        for names in re.findall(r"(?:\.|gaf)\[([a-z,]+)\]['`]", text)
        for name in names.split(",")
    }
    assert "lab" in named
    assert named <= set(extras)
    targets = set(re.findall(r"`make (\w+)`", text))
    assert "docs" in targets
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))


def test_the_pictures_of_val_move_into_folders_as_the_page_on_imagenet_says(tmp_path: Path):
    (block,) = [block.text for block in blocks("imagenet.md", "sh") if block.text.startswith("cd ")]
    val = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    val.mkdir(parents=True)
    pictures = {"ILSVRC2012_val_00000001": "n01440764", "ILSVRC2012_val_00000002": "n01443537"}
    for picture in pictures:
        (val / f"{picture}.JPEG").touch()
    lines = [
        "ImageId,PredictionString",
        *(f"{picture},{kind} 1 2 3 4" for picture, kind in pictures.items()),
    ]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    subprocess.run(["bash", "-e", "-c", block], cwd=tmp_path, check=True)
    assert sorted(val.rglob("*.JPEG")) == [
        val / kind / f"{picture}.JPEG" for picture, kind in pictures.items()
    ]
