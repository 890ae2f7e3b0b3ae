"""The commands as a person types them; every mistake becomes one message, with exit code 2."""

import io
import json
import operator
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console

import gaf
from gaf_lab.bench import accumulate
from gaf_lab.commands import main as cli
from gaf_lab.own_code import is_installed
from gaf_lab.records import run as records
from gaf_lab.records.output import replace_whole
from gaf_lab.settings.presets import PRESETS
from gaf_lab.training.console import COLUMNS, ConsoleListener, table_line

SMALL = [
    "--dataset",
    "digits",
    "--model",
    "mlp",
    "--k",
    "3",
    "--b",
    "16",
    "--passes",
    "1.5",
    "--eval-every",
    "0.5",
]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs `gaf WORDS` in this process; returns exit code, output and errors."""
    monkeypatch.setattr(cli, "Console", lambda **options: Console(**{"width": 200, **options}))

    def call(*words):
        try:
            code = cli.main([str(w) for w in words])
        except SystemExit as stop:  # the parser of options ends the program itself
            code = stop.code
        seen = capsys.readouterr()
        # without the lines of a box
        return code, seen.out, " ".join(seen.err.replace("│", " ").split())

    return call


def test_train_writes_records_that_report_turns_into_a_page(run, tmp_path):
    for policy, seed in (("gaf", 0), ("mean", 0)):
        code, out, _ = run(
            "train",
            *SMALL,
            "--policy",
            policy,
            "--seed",
            seed,
            "--out",
            tmp_path / f"{policy}-{seed}",
        )
        assert code == 0
        assert "held-out" in out
    recorded = records.read(tmp_path / "gaf-0")
    assert recorded.header["command"].startswith("gaf train --dataset digits")
    assert (recorded.header["config"]["k"], recorded.end["status"]) == (3, "finished")
    code, out, _ = run("report", tmp_path, "--out", tmp_path / "page")
    assert code == 0
    assert "averaging" in out
    assert {p.name for p in (tmp_path / "page").iterdir()} >= {
        "report.html",
        "accuracy.png",
        "distance.png",
        "memorisation.png",
    }


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ((), "digits, 40% symmetric label noise: 1,"),
        (("--noise", "none"), "digits: 1,"),
        (("--noise-rate", 0), "digits: 1,"),
    ],
)
def test_train_says_first_what_is_wrong_with_the_labels(run, tmp_path, words, start):
    _, out, _ = run("train", *SMALL, *words, "--steps", 1, "--out", tmp_path)
    assert out.startswith(start)


def test_a_config_that_the_engine_cannot_run_leaves_no_folder(run, tmp_path):
    out = tmp_path / "run"
    code, _, shown = run("train", *SMALL, "--engine", "device", "--mixup", 0.5, "--out", out)
    assert code != 0
    assert shown.startswith("gaf train: mixup must be 0 for engine 'device'; got 0.5.")
    assert not out.exists()


def test_the_command_line_wins_over_toml_and_toml_over_the_preset(run, tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text('dataset = "digits"\nk = 5\ntau = 0.6\n')
    words = [
        "--preset",
        "demo-gaf",
        "--toml",
        toml,
        "--tau",
        "0.7",
        "--steps",
        "2",
        "--out",
        tmp_path / "run",
    ]
    assert run("train", *words)[0] == 0
    config = records.read(tmp_path / "run").header["config"]
    assert (config["dataset"], config["k"], config["tau"], config["b"]) == ("digits", 5, 0.7, 20)


def test_resume_goes_on_and_says_from_where(run, tmp_path):
    assert run("train", *SMALL, "--steps", 5, "--out", tmp_path)[0] == 0
    code, out, _ = run("train", *SMALL, "--resume", "--out", tmp_path)
    assert code == 0
    assert "from step 5" in out
    assert records.read(tmp_path).end["status"] == "finished"


@pytest.mark.parametrize("steps", [(), ("--steps", 5)])
def test_resuming_a_finished_run_says_so_and_changes_nothing(run, tmp_path, steps):
    assert run("train", *SMALL, "--out", tmp_path)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    last = records.read(tmp_path).evals[-1]["step"]
    code, out, _ = run("train", *SMALL, *steps, "--resume", "--tensorboard", "--out", tmp_path)
    assert (code, out) == (0, f"{tmp_path}: the run is complete ({last} steps); nothing to do.\n")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resuming_a_finished_run_with_another_config_is_still_refused(run, tmp_path):
    assert run("train", *SMALL, "--out", tmp_path)[0] == 0
    code, _, err = run("train", *SMALL, "--tau", 0.5, "--resume", "--out", tmp_path)
    assert code == 2
    assert "tau: 0.8 there, 0.5 here" in err


def test_resuming_where_nothing_is_makes_no_folder(run, tmp_path):
    code, _, err = run("train", *SMALL, "--resume", "--out", tmp_path / "runs" / "absent")
    assert code == 2
    assert "must exist to resume; it does not. Start the run without --resume." in err
    assert not (tmp_path / "runs").exists()


def test_tensorboard_writes_events(run, tmp_path):
    assert run("train", *SMALL, "--tensorboard", "--out", tmp_path)[0] == 0
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
        (
            ["train", "--preset", "cifar100-gad"],
            "unknown preset 'cifar100-gad'. Did you mean 'cifar100-gaf'?",
        ),
        (
            ["train", "--tau", "auto"],
            (
                "tau must be a number; got 'auto'. For the recommended threshold, which sets "
                "tau, use --threshold auto."
            ),
        ),
        (
            ["train", "--k", "4", "--min-accepted", "9"],
            "min_accepted must be at least 1 and at most k = 4",
        ),
        (["train", "--tau", "3"], "tau must lie in [0, 2]; got 3.0"),
        (["train", "--k", "0"], "k must be at least 1; got 0"),
        (["train", "--noise-rate", "1"], "noise_rate must lie in [0, 1); got 1.0"),
        (["train", "--steps", "0"], "steps must be at least 1; got 0"),
        (["train", "--out", "/dev/null/run"], "output folder /dev/null/run: must be writable"),
        (["train", "--toml", "/nowhere.toml"], "config file /nowhere.toml: must exist"),
        (["data", "cifar-100"], "Did you mean 'cifar100'?"),
        (["report", "/nowhere"], "/nowhere: must exist; it does not. Give a folder of runs"),
        (["bench", "fsdp"], "There is: gaf bench accumulate, gaf bench ddp"),
        (
            ["bench", "accumulate", "--model", "resnet-18"],
            "invalid choice 'resnet-18' for argument '--model'",
        ),
        (["demo", "--seeds", "0"], "seeds must be at least 1; got 0"),
    ],
)
def test_a_mistake_becomes_one_message(run, words, message):
    code, _, err = run(*words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--out", "/dev/null/run"],
        ["demo", "--out", "/dev/null/run"],
        ["bench", "accumulate", "--out", "/dev/null/run/bench.jsonl"],
    ],
)
def test_every_command_says_which_output_folder_cannot_be_written_and_why(run, words):
    code, _, err = run(*words)
    assert code == 2
    assert (
        "output folder /dev/null/run: must be writable; it is not (/dev/null/run: Not "
        "a directory). Give another one with --out."
    ) in err


def test_a_report_that_cannot_be_written_still_shows_its_table(run, tmp_path):
    assert run("train", *SMALL, "--out", tmp_path)[0] == 0
    code, out, err = run("report", tmp_path, "--out", "/dev/null/page")
    assert code == 2
    assert "GAF" in out
    assert "output folder /dev/null/page: must be writable" in err


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("typo", "typo: must exist; it does not"),
        ("empty", "empty: must hold at least one run (a file records.jsonl); none was found"),
        ("p.jsonl", "p.jsonl: must hold at least one run; none was found"),
    ],
)
def test_a_report_refuses_each_place_without_runs_before_it_writes(run, tmp_path, place, message):
    assert run("train", *SMALL, "--out", tmp_path / "run")[0] == 0
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.jsonl").write_text('{"kind": "pack"}\n')
    code, out, err = run("report", tmp_path / "run", tmp_path / place, "--out", tmp_path / "page")
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "page").exists()


def test_a_report_takes_a_runs_own_file_and_goes_beside_it(run, tmp_path):
    assert run("train", *SMALL, "--out", tmp_path)[0] == 0
    code, out, _ = run("report", tmp_path / "records.jsonl", tmp_path)
    assert code == 0
    assert f"Page: {tmp_path / 'report.html'}" in out
    assert "All 1 finished." in (tmp_path / "report.html").read_text()


def test_an_archive_that_is_not_there_is_asked_for_by_name(run, tmp_path):
    code, _, err = run(
        "train", "--dataset", "cifar100", "--data", tmp_path, "--out", tmp_path / "run"
    )
    assert code == 2
    assert "cifar-100-python.tar.gz" in err


def test_an_unknown_option_is_refused_with_the_nearest(run):
    code, _, err = run("train", "--taus", "0.5")
    assert code == 2
    assert "--tau" in err.replace("--taus", "")


def test_data_shows_what_is_in_a_data_set(run):
    code, out, _ = run("data", "digits")
    assert code == 0
    assert "10" in out


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in cli.COMMANDS)


SUBCOMMANDS = [
    *([name] for name in cli.COMMANDS),
    *(["bench", kind] for kind in ("accumulate", "ddp", "train", "cpu")),
]


@pytest.mark.parametrize("words", SUBCOMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    "asks", [lambda w: [*w, "--help"], lambda w: [*w, "-h"], lambda w: ["help", *w]]
)
def test_every_command_answers_help_with_its_own_usage(run, words, asks):
    code, out, err = run(*asks(words))
    assert (code, err) == (0, "")
    assert f"usage: gaf {' '.join(words)}" in out
    kind = cli.COMMANDS[words[0]][1] if len(words) == 1 and words != ["bench"] else ""
    assert " ".join(kind.split())[:40] in " ".join(out.split())


def test_help_answers_whatever_else_stands_there(run):
    assert run("train", "--toml", "/nowhere.toml", "--help")[0] == 0
    assert run("train", "--preset", "typo", "-h")[0] == 0


@pytest.mark.parametrize("words", [["help"], ["--help"], ["-h"], []])
def test_help_is_the_same_however_it_is_asked_for(run, words):
    code, out, _ = run(*words)
    assert code == 0
    assert out == run("--help")[1]


@pytest.mark.parametrize("words", [["--version"], ["-V"], ["version"]])
def test_the_version_is_the_packages(run, words):
    assert run(*words) == (0, f"gaf {gaf.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["help", "trian"], "unknown command 'trian'. Did you mean 'train'?"),
        (["--verison"], "unknown command '--verison'. Did you mean '--version'?"),
        (
            ["bench", "acumulate"],
            "got 'acumulate'. Did you mean 'accumulate'? There is: gaf bench accumulate",
        ),
        (["presets", "extra"], "Unrecognized options: extra"),
        (["bench", "ddp", "--round", "3"], "--rounds INT"),
        (["probe", "--row", "3"], "--rows INT"),
    ],
)
def test_an_unknown_word_is_answered_with_the_nearest(run, words, message):
    code, _, err = run(*words)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "--k", 99_999_999],
            "k and b must not make a step hold more samples than the whole run",
        ),
        (
            ["train", "--preset", "cifar100-gaf", "--k", 99_999_999],
            "got k = 99,999,999 and b = 100. Lower them.",
        ),
        (["train", "--lr", "inf"], "lr must be above 0 and finite; got inf"),
        (["train", "--b", 0], "b must be at least 1; got 0"),
        (
            ["train", "--passes", "1e9", "--k", 1, "--b", 1],
            "passes must need fewer than 1,000,000,000 steps",
        ),
        (
            ["train", "--dataset", "cifar100", "--k", 200_000, "--b", 20, "--start", "best"],
            "k and b must",
        ),
        (
            [
                "train",
                "--dataset",
                "digits",
                "--k",
                50_000,
                "--b",
                1,
                "--start",
                "best",
                "--passes",
                50,
            ],
            (
                "k = 50,000 micro-gradients of 301,066 numbers, held side by side: must fit "
                "into memory"
            ),
        ),
        (["train", "--steps", -1], "steps must be at least 1; got -1"),
        (["demo", "--seeds", 10**8], "seeds must be at most 1,000; got 100,000,000."),
        (["demo", "--passes", "nan"], "passes must be above 0 and finite; got nan"),
        (
            ["demo", "--passes", "1e9", "--seeds", 1],
            "passes must need fewer than 1,000,000,000 steps",
        ),
        (["audit", "--seeds", 10**8], "seeds must be at most 1,000"),
        (["sweep", "demo-gaf", "--seeds", 10**8], "seeds must be at most 1,000"),
        (
            ["sweep", "demo-gaf", "--workers", 10**8],
            "workers must be at most 512; got 100,000,000.",
        ),
        (["paper", "fig6", "--workers", 0], "workers must be at least 1; got 0."),
        (["paper", "fig6", "--workers", -3], "workers must be at least 1; got -3."),
        (["paper", "fig6", "--seeds", 10**8], "seeds must be at most 1,000"),
        (["bench", "accumulate", "--k", 0], "k must be at least 1; got 0."),
        (
            ["bench", "accumulate", "--b", 0],
            "b must be at least 2; got 0. BatchNorm needs two samples.",
        ),
        (["bench", "accumulate", "--rounds", 0], "rounds must be at least 2; got 0."),
        (["bench", "accumulate", "--k"], "k must name at least one number; got none."),
        (["bench", "accumulate", "--b"], "b must name at least one number; got none."),
        (["bench", "accumulate", "--hidden", 64], "hidden is the mlp's; got it for resnet18."),
        (
            ["bench", "accumulate", "--model", "mlp", "--hidden", 0],
            "hidden must be at least 1; got 0.",
        ),
        (["bench", "ddp", "--k", 99_999_999], "k must be at most 256; got 99,999,999."),
        (["bench", "ddp", "--rounds", 10**9], "rounds must be at most 100,000"),
        (
            ["bench", "ddp", "--predict", "--bandwidth-gbit", 0],
            "bandwidth_gbit must be above 0 and finite; got 0.0",
        ),
        (
            ["bench", "ddp", "--predict", "--latency-us", "nan"],
            "latency_us must be above 0 and finite; got nan",
        ),
        (
            ["bench", "ddp", "--predict", "--gflops", "inf"],
            "gflops must be above 0 and finite; got inf",
        ),
        (
            ["bench", "ddp", "--predict", "--parameters", -1],
            "parameters must be above 0 and finite; got -1",
        ),
        (["bench", "cpu", "--rounds", 1], "rounds must be at least 2; got 1."),
        (["bench", "cpu", "--models"], "models must name at least one; got none."),
        (["bench", "train", "--k", 99_999_999], "k and b must not make a step hold more"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_absurd_sizes_are_refused_before_anything_runs(run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)  # the default folders are here
    monkeypatch.setattr("gaf_lab.training.loop.Training.macro_batch", None)
    code, _, err = run(*words)
    assert code == 2
    assert message in err


def test_what_does_not_fit_into_memory_after_all_becomes_one_message(run, monkeypatch):
    def fill(*_):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
            "can't allocate memory: you tried to "
            "allocate 131072000000 bytes.\nException raised from"
        )

    monkeypatch.setitem(cli.COMMANDS, "data", (fill, ""))
    code, _, err = run("data")
    assert code == 2
    assert "gaf data: the machine must have more memory; [enforce fail" in err
    assert "Lower --b, --k, --rows or --size" in err
    monkeypatch.setitem(cli.COMMANDS, "data", (operator.getitem, ""))
    with pytest.raises(TypeError, match="indices"):  # our own mistakes stay visible
        run("data")


@pytest.mark.parametrize("kind", ["accumulate", "ddp", "train", "cpu"])
def test_a_bench_refuses_a_folder_as_its_file_before_it_measures(run, tmp_path, kind):
    code, _, err = run("bench", kind, "--out", tmp_path)
    assert code == 2
    assert f"output file {tmp_path}: must be a file; it is a folder. Give a file's name" in err


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "samples.csv"
    with replace_whole(path) as part:
        part.write_text("first")

    def fail():
        with replace_whole(path) as part:
            part.write_text("sec")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["samples.csv"]


@pytest.fixture
def short_turns(monkeypatch):
    """Turns of a step or two: what is looked at is not the time."""
    monkeypatch.setattr(accumulate, "TURN", 1e-4)


@pytest.mark.usefixtures("short_turns")
def test_bench_compares_all_ways_and_writes_its_figures(run, tmp_path):
    out = tmp_path / "bench.jsonl"
    code, shown, _ = run(
        "bench", "accumulate", "--model", "convnet", "--b", 4, "--k", 6, "--rounds", 3, "--out", out
    )
    assert code == 0
    assert "gaf.GAF()" in shown
    conditions, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert conditions["model"] == "convnet"
    assert all(line["ratio_p10"] <= line["ratio_median"] <= line["ratio_p90"] for line in lines)
    held = {line["way"]: line["extra_gradients"] for line in lines}
    # streaming holds one gradient more; start="best" holds k rows where plain holds one,
    # and autograd's own beside them
    assert held["gaf.GAF()"] < 2 < held["gaf.GAF(start='best')"]


@pytest.mark.usefixtures("short_turns")
def test_bench_accumulate_compares_in_every_size_of_the_mlp(run, tmp_path):
    out = tmp_path / "bench.jsonl"
    sizes = ("--hidden", 8, 4, "--b", 3, 2, "--k", 2, "--rounds", 2)
    code, shown, _ = run("bench", "accumulate", "--model", "mlp", *sizes, "--out", out)
    assert code == 0
    assert "…" not in shown  # the table fits 80 columns
    conditions, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert conditions["pictures"] == "1x28x28"
    assert [(line["hidden"], line["b"]) for line in lines[::3]] == [(8, 3), (8, 2), (4, 3), (4, 2)]
    assert all(line["cpu_ratio_p10"] <= line["cpu_ratio_median"] for line in lines)


def test_presets_are_listed(run):
    code, out, _ = run("presets")
    assert code == 0
    assert "cifar100-gaf-code" in out


@pytest.mark.parametrize(
    ("words", "lines"), [(["presets"], len(PRESETS)), (["--help"], 4 + len(cli.COMMANDS))]
)
def test_lists_have_a_line_each_in_a_pipe(capsys, monkeypatch, words, lines):
    # no terminal: rich wraps at some width nevertheless
    monkeypatch.setattr(cli, "Console", lambda **options: Console(width=40, **options))
    assert cli.main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == lines


def test_python_dash_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "gaf_lab", "--help"], capture_output=True, text=True, check=True
    )
    assert "usage: gaf COMMAND" in done.stdout


def test_the_progress_bar_fits_80_columns():
    from gaf_lab.training.console import make_bars

    screen = io.StringIO()
    with make_bars(Console(file=screen, width=80, force_terminal=True)) as bars:
        bars.add_task(
            "random-subset-0", total=100, completed=50, facts="test 83.7%, memorised 100.0%"
        )
        bars.refresh()
    text = screen.getvalue()
    assert "memorised 100.0%" in text
    assert "50%" in text
    assert "…" not in text


def test_the_columns_of_a_run_stay_apart_and_fit_78():
    titles = table_line(COLUMNS)
    assert len(titles) <= 78
    assert all(f" {title}" in titles for title in COLUMNS)
    assert "loss  held-out" in titles.replace("   ", "  ")
    assert "test  memorised" in titles
    screen = io.StringIO()
    shares = dict.fromkeys(("heldout_accuracy", "test_accuracy", "memorised", "acceptance"), 1.0)
    wide = {
        "passes": 2000.0,
        "step": 500_000,
        "train_loss": 12.3456,
        "distance_mean": 1.234,
        "samples_per_second": 1_234_567.0,
    }
    ConsoleListener(Console(file=screen, width=80)).evaluated(wide | shares)
    cells = ["2000.00", "500,000", "12.346", *["100.0%"] * 4, "1.234", "1,234,567"]
    assert screen.getvalue().splitlines()[-1].split() == cells


def test_a_file_beside_the_sources_is_the_users_own():
    ours = Path(cli.__file__).parents[2]
    assert is_installed(str(ours / "gaf" / "probe.py"))
    assert is_installed(json.__file__)
    assert is_installed(pytest.__file__)
    assert not is_installed(f"{ours}_of_mine/task.py")


def test_a_warning_of_gaf_is_its_words_alone(monkeypatch):
    seen = []

    def command(words, console):
        for text in ("gaf: 2 of 3 classes", "torch: something"):
            seen.append(warnings.formatwarning(UserWarning(text), UserWarning, "a.py", 7, "code"))
        return 0

    monkeypatch.setitem(cli.COMMANDS, "data", (command, None))
    usual = warnings.formatwarning
    assert cli.main(["data"]) == 0
    assert seen[0] == "gaf: 2 of 3 classes\n"
    assert "a.py:7: UserWarning: torch: something" in seen[1]
    assert warnings.formatwarning is usual
