"""The command `gaf`. Each command's options are the fields of its dataclass below."""

import dataclasses
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.style import Style
from rich.text import Text
from tyro.conf import OmitArgPrefixes, Positional

from gaf_lab.records import run as records
from gaf_lab.settings.checks import (
    MOST_SEEDS,
    MOST_WORKERS,
    ConfigError,
    check_count,
    check_tau,
    first_line,
    nearest,
)
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.fields import ModelName
from gaf_lab.settings.presets import DEMO
from gaf_lab.settings.reading import from_toml

Words = list[str]
Command = Callable[[Words, Console], int]

# beyond these nothing comes of it but waiting
MOST_ROUNDS, MOST_BATCH, MOST_MICRO_BATCHES, MOST_PROCESSES = 100_000, 100_000, 1024, 256
LIGHTER = "Lower --b, --k, --rows or --size, or take a smaller --model."


def say(console: Console, text: str) -> None:
    """A line as it is: where it is too long a terminal breaks it, and a pipe gets it whole."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_file(console: Console, what: str, path: Path) -> None:
    """A line with a file's path, which a terminal opens at a click."""
    link = Style(link=path.resolve().as_uri())
    console.print(Text.assemble(f"{what} ", (str(path), link)), soft_wrap=True)


@dataclass
class Demo:
    """Label noise on MNIST-5k in about a minute: averaging, GAF and its control, 3 paired seeds; a table, figures, a page."""

    out: Path = Path("runs/demo")
    """Folder for records, figures and report.html. Runs of an earlier demo in it are replaced."""
    seeds: int = 3
    """Paired seeds, at least 1. Higher narrows the intervals and takes longer."""
    passes: float = DEMO.passes
    """Length of each run in passes over the training set. Lower is faster and shows less memorisation."""


def demo(words: Words, console: Console) -> int:
    options = tyro.cli(Demo, prog="gaf demo", args=words)
    from gaf_lab.experiments import demo as job
    from gaf_lab.records.locks import own_folder
    from gaf_lab.report import page as report

    check_count("seeds", options.seeds, 1, MOST_SEEDS)
    base = dataclasses.replace(DEMO, passes=options.passes)
    started = time.perf_counter()
    with own_folder(options.out, f"gaf demo {shlex.join(words)}"):
        job.clear(options.out)
        runs = job.demo(options.out, console, options.seeds, base)
        if not runs:
            console.print("No run was finished; there is nothing to report.")
            return 1
        console.print(report.table(runs))
        page = report.write(runs, options.out, title="GAF demo: label noise on MNIST-5k")
    say(console, f"{len(runs)} runs in {time.perf_counter() - started:.0f} s. Page: {page}")
    return 0


@dataclass
class Train:
    """Trains one run. Options come from the defaults, then --preset, then --toml, then the command line."""

    config: OmitArgPrefixes[TrainConfig]
    out: Path = Path("runs/train")
    """Folder for records and checkpoint."""
    preset: str | None = None
    """A config by name; `gaf presets` lists them."""
    toml: Path | None = None
    """A TOML file with config keys."""
    data: Path | None = None
    """Folder with the data set's archive or its unpacked folder; without it, it is downloaded."""
    steps: int | None = None
    """Ends the run at this step."""
    resume: bool = False
    """Goes on from the checkpoint in --out, to the same result as a run that was never stopped."""
    tracker: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also sends every evaluation's numbers there: to tensorboard/ or wandb/ in --out, or to trackio's own folder."""
    tensorboard: bool = False
    """The same as --tracker tensorboard."""


def train(words: Words, console: Console) -> int:
    options = parsed_train(words) if not under_torchrun() else of_rank_0(parsed_train, words)
    if isinstance(options, int):
        return options
    from gaf_lab.training import console as shown
    from gaf_lab.training import parallel, trackers
    from gaf_lab.training.run import train as run

    group = parallel.here()
    resume, done = group.led(lambda: look_before(options, group.world))
    if done is not None:
        say(console, f"{options.out}: the run is complete ({done} steps); nothing to do.")
        return 0
    listener = shown.ConsoleListener(console)
    boards = (
        [trackers.TrackerListener(name, options.out) for name in told_to(options)]
        if group.leads
        else []
    )
    everyone = shown.Listeners(listener, *boards)
    start = (
        "gaf train "
        if group.world == 1
        else f"torchrun --nproc-per-node {group.world} -m gaf_lab train "
    )
    job = partial(
        run,
        options.config,
        options.out,
        everyone,
        data_folder=options.data,
        steps=options.steps,
        resume=resume,
    )
    try:
        job(command=start + shlex.join(words), group=group)
    except KeyboardInterrupt:
        say(
            console,
            f"\nStopped. Go on with: {start}{shlex.join(words_to_go_on(words, options.out))}",
        )
        return 130
    finally:
        listener.close()
        for board in boards:
            board.close()
    say(console, f"Records: {options.out / 'records.jsonl'}. Page: gaf report {options.out}")
    return 0


def words_to_go_on(words: Words, out: Path) -> Words:
    """What goes on with a run that was stopped; or begins it, where it was stopped while it read its data."""
    begun = (out / records.FILE).is_file()
    return [*(word for word in words if word != "--resume"), *(["--resume"] if begun else [])]


def parsed_train(words: Words) -> Train:
    options = tyro.cli(Train, prog="gaf train", args=words, default=Train(base_config(words)))
    if options.steps is not None and options.steps < 1:
        raise ConfigError(
            f"steps must be at least 1; got {options.steps}. Leave it out to run all passes."
        )
    return options


def of_rank_0(parse: Callable[[Words], Train], words: Words) -> Train | int:
    """What rank 0 makes of the words, or the exit code where the parser has said all there is to say."""
    from gaf_lab.training import parallel

    def work() -> Train | int:
        try:
            return parse(words)
        except SystemExit as stop:
            return int(stop.code or 0)

    return parallel.here().led(work)


def look_before(options: Train, ranks: int) -> tuple[bool, str | None]:
    """Refuses what cannot run before anything is made. Whether to resume; and where the run is complete, its steps."""
    from gaf_lab.records.locks import check_free
    from gaf_lab.training import parallel, trackers
    from gaf_lab.training.run import look_into, restarted

    parallel.check(options.config, ranks)
    trackers.check(told_to(options))
    check_free(options.out)
    resume = options.resume or restarted(options.out)
    done = look_into(options.config, options.out, resume)
    return resume, None if done is None else f"{done.evals[-1]['step']:,}"


def told_to(options: Train) -> list[str]:
    """The trackers of a run, each once."""
    return list(
        dict.fromkeys((*options.tracker, *(("tensorboard",) if options.tensorboard else ())))
    )


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    told = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return told and int(os.environ["WORLD_SIZE"]) > 1


def base_config(words: Words) -> TrainConfig:
    """The config before the command line's own options: defaults, preset, TOML file."""
    from gaf_lab.settings.presets import preset

    if asks_for_help(words):  # a wrong file or name must not stand before it
        return TrainConfig()
    given = {name: value_of(words, name) for name in ("--preset", "--toml", "--tau")}
    check_tau(given["--tau"])  # before the parser, which would say that it is no float
    base = preset(given["--preset"]) if given["--preset"] is not None else TrainConfig()
    return from_toml(Path(given["--toml"]), base) if given["--toml"] is not None else base


def asks_for_help(words: Words) -> bool:
    return "-h" in words or "--help" in words


def value_of(words: Words, option: str) -> str | None:
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == option:
            return following
        if word.startswith(option + "="):
            return word.split("=", 1)[1]
    return None


@dataclass
class Paper:
    """Figures and tables of the paper: their runs, then one page that sets them beside the paper's values."""

    ids: Positional[tuple[str, ...]] = ()
    """Which, such as fig6 or table1; all for every one."""
    list: bool = False
    """Shows which there are, what the paper claims in them, and how many runs they take."""
    scale: Literal["smoke", "small", "full"] = "smoke"
    """smoke: seconds, to see it run; small: up to two hours on two cores; full: the paper's setting, for a GPU."""
    reading: Literal["paper", "code"] = "paper"
    """Where the paper and its released code differ: whose setting."""
    data: Path | None = None
    """Folder with the data sets' archives; without it, they are downloaded."""
    out: Path = Path("runs/paper")
    """Folder for runs, figures and the page. Figures share runs in it, and finished ones are not repeated."""
    seeds: int | None = None
    """Paired seeds, at least 1, in place of the scale's number."""
    workers: int | None = None
    """Runs at the same time; without it, one for each core."""
    engine: Literal["local", "together", "ray"] = "local"
    """Processes on this machine; runs that take turns on one GPU; or tasks on a Ray cluster that shares the folder --out."""
    address: str = "auto"
    """Of the Ray cluster."""


def paper(words: Words, console: Console) -> int:
    options: Any = tyro.cli(Paper, prog="gaf paper", args=words)
    from gaf_lab.paper import items as plans
    from gaf_lab.paper.reproduce import described, reproduce
    from gaf_lab.records.locks import own_folder

    if options.list or not options.ids:
        from rich.table import Table

        table = Table("id", "figure or table", "the paper's claim", "runs")
        for item, count in described(options.scale, options.seeds):
            table.add_row(item.id, item.title, item.claim, str(count))
        console.print(table)
        return 0
    workers = options.workers if options.workers is not None else os.cpu_count() or 1
    check_count("workers", workers, 1, MOST_WORKERS, "One for each core is usual.")
    names = (
        list(plans.ITEMS)
        if options.ids == ("all",)
        else [plans.item(name).id for name in options.ids]
    )
    how = {
        "engine": options.engine,
        "address": options.address,
        "command": "gaf paper " + shlex.join(words),
    }
    try:
        with own_folder(options.out, f"gaf paper {shlex.join(words)}"):
            page, swept = reproduce(
                names, options.scale, options.out, console, reading=options.reading, seeds=options.seeds, data_folder=options.data,
                workers=workers, **how,
            )  # fmt: skip
    except KeyboardInterrupt:
        say(console, f"\nStopped. Go on with: gaf paper {shlex.join(words)}")
        return 130
    for name, why in swept.failed.items():
        say(console, f"{name}: {why}")
    say(console, f"Page: {page}")
    return 1 if swept.failed else 0


@dataclass
class Sweep:
    """Runs a list of configs, several at a time. Finished runs are not repeated; those that were cut off go on."""

    plan: Positional[str]
    """A TOML file (docs/sweeps.md), a preset, or a figure or table of the paper."""
    out: Path | None = None
    """Folder for the runs' folders and the index sweep.jsonl; without it, runs/ and the plan's name. For Ray, all machines share it."""
    workers: int | None = None
    """Runs at the same time; without it, one for each core, with Ray as many as the cluster has room for."""
    seeds: int | None = None
    """Paired seeds, at least 1, in place of the plan's."""
    data: Path | None = None
    """Folder with the data sets' archives; without it, they are downloaded."""
    scale: Literal["smoke", "small", "full"] = "smoke"
    """For a figure or table of the paper: as in gaf paper."""
    reading: Literal["paper", "code"] = "paper"
    """For a figure or table of the paper: as in gaf paper."""
    engine: Literal["local", "together", "ray"] = "local"
    """Processes on this machine; runs that take turns in one process, which share a GPU; or tasks on a Ray cluster."""
    address: str = "auto"
    """Of the Ray cluster; auto is the one that this machine is part of."""
    dry_run: bool = False
    """Shows the runs, and how far each is, and starts none."""


def sweep(words: Words, console: Console) -> int:
    options = tyro.cli(Sweep, prog="gaf sweep", args=words)
    from gaf_lab.commands.plans import find_plan
    from gaf_lab.sweeps.jobs import describe_plan
    from gaf_lab.sweeps.sweep import sweep as run_sweep
    from gaf_lab.sweeps.worker import INDEX

    configs = find_plan(options.plan, options.seeds, options.scale, options.reading)
    out = options.out or Path("runs") / Path(options.plan).stem
    command = f"gaf sweep {shlex.join(words)}"
    if options.dry_run:
        for line in describe_plan(configs, out):
            say(console, line)
        return 0
    started = time.perf_counter()
    workers = (
        options.workers
        if options.workers is not None
        else len(configs)
        if options.engine == "ray"
        else os.cpu_count() or 1
    )
    shared: dict[str, Any] = {
        "data_folder": options.data,
        "engine": options.engine,
        "address": options.address,
        "command": command,
    }
    try:
        swept = run_sweep(configs, out, workers=workers, console=console, **shared)
    except KeyboardInterrupt:
        say(console, f"\nStopped. Go on with the same command: {command}")
        return 130
    for name, why in swept.failed.items():
        say(console, f"{name} failed: {why}")
    say(console, f"{len(swept.runs)} of {len(swept.runs) + len(swept.failed)} runs are finished, in {time.perf_counter() - started:.0f} s. "
                 f"Index: {out / INDEX}. Page: gaf report {out}")  # fmt: skip
    return 1 if swept.failed else 0


@dataclass
class Report:
    """The table, figures and page of any set of runs."""

    runs: Positional[tuple[Path, ...]]
    """Folders of runs, folders that hold such, a run's records.jsonl, or files of results/, in which many runs are packed."""
    out: Path | None = None
    """Folder for report.html and the figures; without it, the first of the runs' folders, or for a packed file runs/ and its name."""
    title: str | None = None
    """Heading of the page."""


def report(words: Words, console: Console) -> int:
    options = tyro.cli(Report, prog="gaf report", args=words)
    from gaf_lab.records.find import find_runs
    from gaf_lab.report import page
    from gaf_lab.training.console import Progress

    if not options.runs:
        raise ConfigError(
            "report needs at least one folder of runs; got none. Give what `gaf train --out` or `gaf demo --out` wrote."
        )
    found = [run for run in find_runs(list(options.runs)) if run.evals]
    if not found:
        raise ConfigError("report needs a run with at least one evaluation; these have none yet.")
    out = options.out or beside(options.runs[0])
    console.print(page.table(found))
    records.make_folder(out)
    with Progress(console, "figure") as progress:
        path = page.write(found, out, title=options.title, tell=progress)
    say(console, f"Page: {path}")
    return 0


def beside(place: Path) -> Path:
    """Where the report of a place goes: into the folder, that of a run's records, or for a pack into runs/ under its name."""
    if place.is_dir():
        return place
    return place.parent if place.name == records.FILE else Path("runs") / place.stem


@dataclass
class Audit:
    """Ranks training samples by how likely their labels are wrong, the most suspect first, with a sheet of their pictures."""

    config: OmitArgPrefixes[TrainConfig]
    out: Path = Path("runs/audit")
    """Folder for samples.csv, suspects.png, audit.png and audit.jsonl."""
    preset: str | None = None
    """A config by name; `gaf presets` lists them."""
    toml: Path | None = None
    """A TOML file with config keys."""
    data: Path | None = None
    """Folder with the data set's archive or its unpacked folder; without it, it is downloaded."""
    seeds: int = 1
    """Paired seeds, from the config's own on, at least 1. samples.csv and the pictures are the first one's."""


def audit(words: Words, console: Console) -> int:
    options = tyro.cli(Audit, prog="gaf audit", args=words, default=Audit(base_config(words)))
    from gaf_lab.records.locks import own_folder

    check_count("seeds", options.seeds, 1, MOST_SEEDS)
    with own_folder(options.out, f"gaf audit {shlex.join(words)}"):
        return run_audit(options, words, console)


def run_audit(options: Audit, words: Words, console: Console) -> int:
    from gaf_lab.bench import accumulate as file
    from gaf_lab.experiments import audit as job
    from gaf_lab.training.console import Progress, labelled, trained
    from gaf_lab.training.run import pick_device

    say(console, f"{labelled(options.config)}; {trained(options.config)}")
    found = []
    with Progress(console) as progress:
        for seed in range(options.config.seed, options.config.seed + options.seeds):
            config = dataclasses.replace(options.config, seed=seed)
            told = partial(
                lambda seed, what, step, steps: progress(f"seed {seed}, {what}", step, steps),
                seed,
            )
            found.append(job.audit(config, options.data, told))
    lines = [one.line() for one in found]
    job.write_samples(found[0], options.out / "samples.csv")
    job.draw(found[0], options.out / "audit.png")
    job.draw_suspects(found[0], options.out / "suspects.png")
    conditions = {"command": "gaf audit " + shlex.join(words), "config": options.config.plain()}
    file.write(found, options.out / "audit.jsonl", conditions, pick_device(options.config.device))
    console.print(job.table(lines))
    say(console, job.verdict(lines))
    say(console, f"Samples: {options.out / 'samples.csv'}. Figure: {options.out / 'audit.png'}")
    show_file(console, f"The {job.SUSPECTS} first as pictures:", options.out / "suspects.png")
    return 0


@dataclass
class Probe:
    """Measures micro-gradients without stepping: distances, noise scale, what each tau would accept, and which tau to take."""

    config: OmitArgPrefixes[TrainConfig]
    out: Path = Path("runs/probe")
    """Folder for probe.jsonl and probe.png."""
    preset: str | None = None
    """A config by name; `gaf presets` lists them."""
    toml: Path | None = None
    """A TOML file with config keys."""
    data: Path | None = None
    """Folder with the data set's archive or its unpacked folder; without it, it is downloaded."""
    after: tuple[int, ...] = (0, 100)
    """Steps of training, with the config's own policy and tau, after which it looks. 0: the initial weights, which agree most."""
    rows: int = 128
    """Micro-gradients measured each time, at least 8 and twice k. Higher is more exact and costs time and memory."""
    slices: int = 1
    """Parts that the gradient is measured in. Higher divides the memory and multiplies the time by it."""
    share: float = 0.5
    """Of the compared micro-gradients accepted, at most, under the recommended tau, in (0, 1). Lower filters more."""
    chance: float = 0.05
    """Of pure noise passing a comparison, at most, under the recommended tau, in (0, 1). Lower filters more."""


def probe(words: Words, console: Console) -> int:
    options = tyro.cli(Probe, prog="gaf probe", args=words, default=Probe(base_config(words)))
    from gaf_lab.records.locks import own_folder

    with own_folder(options.out, f"gaf probe {shlex.join(words)}"):
        return run_probe(options, words, console)


def run_probe(options: Probe, words: Words, console: Console) -> int:
    from gaf_lab.bench import accumulate as file
    from gaf_lab.experiments import probe as job
    from gaf_lab.training.console import Progress, labelled, trained
    from gaf_lab.training.run import pick_device

    config = options.config
    sizes = (options.rows, options.slices, options.share, options.chance)
    say(console, f"{labelled(config)}; {trained(config)}")
    with Progress(console) as progress:
        found = list(job.look(config, options.after, options.data, *sizes, progress))
    lines = [one.line() for one in found]
    console.print(job.table(lines))
    console.print(job.layer_table([line for line in lines if line["layers"]][-1]))
    for verdict in job.verdicts(lines):
        say(console, verdict)
    conditions = {
        "command": "gaf probe " + shlex.join(words),
        "config": config.plain(),
        "share": options.share,
        "chance": options.chance,
    }
    file.write(found, options.out / "probe.jsonl", conditions, pick_device(config.device))
    job.draw(lines, options.out / "probe.png")
    say(console, f"Figures: {options.out / 'probe.jsonl'}, {options.out / 'probe.png'}")
    say(console, job.recommendation(lines))
    return 0


@dataclass
class Data:
    """Fetches a data set, verifies it, and shows what is in it."""

    name: Positional[str]
    """digits, mnist5k, fashion-mnist, cifar10, cifar100, cifar100n, cifar100n-coarse, noise or imagenet."""
    data: Path | None = None
    """Folder with the archive or its unpacked folder; without it, it is downloaded."""


def data(words: Words, console: Console) -> int:
    options = tyro.cli(Data, prog="gaf data", args=words)
    from rich.table import Table

    from gaf_lab.data.dataset import describe_dataset
    from gaf_lab.data.sets import load_dataset
    from gaf_lab.training.console import Progress

    table = Table(show_header=False)
    with Progress(console, "part") as progress:
        progress(f"reading {options.name}", 1, 2)
        loaded = load_dataset(options.name, options.data)
        progress(f"counting {options.name}", 2, 2)
        facts = describe_dataset(loaded)
    for fact, value in facts.items():
        table.add_row(fact, value)
    console.print(table)
    return 0


@dataclass
class BenchAccumulate:
    """Time and memory of a step: plain accumulation, averaging and GAF in turn, in one process."""

    model: ModelName = "resnet18"
    """Network, as in gaf train."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers of a ResNet: imagenet or cifar."""
    b: int = 100
    """Samples per micro-batch."""
    k: tuple[int, ...] = (2, 4)
    """Micro-batches per step."""
    rounds: int = 30
    """Steps of each kind. Higher narrows the spread."""
    out: Path | None = None
    """File for the figures, JSON lines."""


@dataclass
class BenchDDP:
    """Time, bytes and memory of a step among k processes: plain DDP, gaf.attach, and gathering every gradient, in one run."""

    model: ModelName = "resnet18"
    """Network, as in gaf train."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers of a ResNet: imagenet or cifar."""
    b: int = 32
    """Samples per process."""
    k: tuple[int, ...] = (2, 4, 8)
    """Processes, one thread each."""
    rounds: int = 20
    """Steps of each kind, at least 2. Higher narrows the spread."""
    out: Path | None = None
    """File for the figures, JSON lines."""
    predict: bool = False
    """Measures nothing; prints what the cost model of docs/cost.md says."""
    against: Path | None = None
    """A file that --out wrote, whose figures are set beside the predicted ones."""
    latency_us: float = 20.0
    """Microseconds a message takes."""
    bandwidth_gbit: float | None = None
    """Gigabits per second that a rank sends; without it 10, or with --against the file's limit, or what fits its plain DDP."""
    memory_gb: float = 10.0
    """Gigabytes per second that a rank reads from memory."""
    gflops: float = 30.0
    """Billions of operations per second of the Gram matrix's product: a CPU core's in float32, a GPU's in float64."""
    parameters: int = 11_227_812
    """Coordinates of the gradient; the default is resnet18's with 100 classes."""
    bytes: int = 4
    """Bytes per coordinate."""


@dataclass
class BenchTrain:
    """Training steps per second on CIFAR-100 in the paper's setting: averaging, GAF, and a plain PyTorch loop, in turn, in one process."""

    data: Path | None = None
    """Folder with CIFAR-100's archive; without it, white noise of the same shape."""
    model: ModelName = "resnet18"
    """Network, as in gaf train."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers of a ResNet: imagenet or cifar."""
    k: int = 2
    """Micro-batches per step."""
    b: int = 100
    """Samples per micro-batch."""
    sampler: Literal["iid", "stratified-clean"] = "stratified-clean"
    """How micro-batches are drawn: in shuffled passes, or with as many of each class."""
    engine: Literal["auto", "plain", "device"] = "auto"
    """As in gaf train."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is one."""
    rounds: int = 30
    """Rounds, at least 2: a step of each kind on the CPU, 64 on CUDA. Higher narrows the spread."""
    workers: tuple[int, ...] = (0,)
    """Processes of the plain loop's DataLoader; one row for each number."""
    out: Path | None = None
    """File for the figures, JSON lines."""


@dataclass
class BenchCPU:
    """Steps per second on the CPU: threads, channels-last and torch.compile in turn; one process against one for each core."""

    models: tuple[Literal["resnet18", "convnet", "mlp"], ...] = ("resnet18", "convnet", "mlp")
    """Networks: resnet18 and convnet in the paper's setting, mlp in the demo's."""
    compile: bool = True
    """Whether torch.compile is measured too; it takes minutes to start."""
    rounds: int = 10
    """Rounds, at least 2. Higher narrows the spread."""
    out: Path | None = None
    """File for the figures, JSON lines."""


def bench(words: Words, console: Console) -> int:
    kinds: dict[str, tuple[Command, type]] = {
        "accumulate": (bench_accumulate, BenchAccumulate),
        "ddp": (bench_ddp, BenchDDP),
        "train": (bench_train, BenchTrain),
        "cpu": (bench_cpu, BenchCPU),
    }
    if words[:1] in (["-h"], ["--help"]):
        say(console, "usage: gaf bench WHAT [OPTIONS]; gaf bench WHAT --help\n")
        for kind, (_, options) in kinds.items():
            say(console, f"  {kind:10} {options.__doc__}")
        return 0
    if not words or words[0] not in kinds:
        word = " ".join(words[:1])
        raise ConfigError(f"bench must be told what to measure; got {word!r}.{nearest(word, kinds)} "
                          f"There is: {', '.join(f'gaf bench {kind}' for kind in kinds)}.")  # fmt: skip
    return kinds[words[0]][0](words[1:], console)


def check_bench(options: Any, least_k: int, most_k: int) -> None:
    """Refuses sizes that nothing can be measured at, or that nobody waits for, before anything is measured."""
    for k in options.k:
        check_count("k", k, least_k, most_k)
    if not options.k:
        raise ConfigError("k must name at least one number; got none. Give --k 2 4.")
    check_count("b", options.b, 2, MOST_BATCH, "BatchNorm needs two samples.")
    check_rounds(options)


def check_rounds(options: Any) -> None:
    check_count("rounds", options.rounds, 2, MOST_ROUNDS, "A spread needs two.")
    if options.out is not None:
        records.make_file(options.out)


def bench_accumulate(words: Words, console: Console) -> int:
    options: Any = tyro.cli(BenchAccumulate, prog="gaf bench accumulate", args=words)
    check_bench(options, 1, MOST_MICRO_BATCHES)
    from gaf_lab.bench import accumulate as job
    from gaf_lab.training.console import Progress

    with Progress(console, "round") as progress:
        sizes = (options.b, options.k, options.rounds)
        found = job.accumulate(options.model, options.stem, *sizes, tell=progress)
    console.print(job.table(found))
    if options.out is not None:
        conditions = {
            "model": options.model,
            "stem": options.stem,
            "b": options.b,
            "rounds": options.rounds,
            "pictures": "3x32x32",
        }
        job.write(found, options.out, conditions)
        say(console, f"Figures: {options.out}")
    return 0


def bench_ddp(words: Words, console: Console) -> int:
    options: Any = tyro.cli(BenchDDP, prog="gaf bench ddp", args=words)
    if options.predict or options.against is not None:
        return bench_predict(options, console)
    check_bench(options, 2, MOST_PROCESSES)
    from gaf_lab.bench import accumulate as file
    from gaf_lab.bench import ddp as job
    from gaf_lab.training.console import Progress

    wanted = job.Options(options.model, options.stem, options.b, options.rounds)
    with Progress(console, "part") as progress:
        found = job.run(wanted, options.k, tell=progress)
    console.print(job.table(found))
    if options.out is not None:
        file.write(found, options.out, job.conditions(wanted))
        say(console, f"Figures: {options.out}")
    return 0


def bench_train(words: Words, console: Console) -> int:
    options: Any = tyro.cli(BenchTrain, prog="gaf bench train", args=words)
    check_rounds(options)
    from gaf_lab.bench import accumulate as file
    from gaf_lab.bench import train as job
    from gaf_lab.training.console import Progress
    from gaf_lab.training.run import pick_device

    given = {name: value for name, value in vars(options).items() if name not in ("data", "out")}
    wanted = job.Options(data_folder=options.data, **given)
    with Progress(console, "round") as progress:
        found = job.train(wanted, tell=progress)
    say(console, "white noise of CIFAR-100's shape" if options.data is None else "CIFAR-100")
    console.print(job.arm_table(found))
    console.print(job.part_table(found))
    if options.out is not None:
        file.write(found, options.out, job.conditions(wanted), pick_device(options.device))
        say(console, f"Figures: {options.out}")
    return 0


def bench_cpu(words: Words, console: Console) -> int:
    options: Any = tyro.cli(BenchCPU, prog="gaf bench cpu", args=words)
    check_rounds(options)
    if not options.models:
        raise ConfigError("models must name at least one; got none. Leave it out for all.")
    from gaf_lab.bench import accumulate as file
    from gaf_lab.bench import cpu as job
    from gaf_lab.training.console import Progress

    with Progress(console, "round") as progress:
        found = job.run(options.models, options.rounds, options.compile, tell=progress)
    console.print(job.table(found))
    for model in options.models:
        say(console, f"{model}: {job.advice(found, model)}")
    if options.out is not None:
        file.write(found, options.out, {"rounds": options.rounds})
        say(console, f"Figures: {options.out}")
    return 0


def check_network(options: BenchDDP) -> None:
    for name in ("latency_us", "bandwidth_gbit", "memory_gb", "gflops", "parameters", "bytes"):
        value = getattr(options, name)
        holds = value is None or (0 < value < math.inf) or (value == 0 and name == "latency_us")
        if not holds:
            raise ConfigError(
                f"{name} must be above 0 and finite; got {value}. Leave it out for a usual value."
            )


def bench_predict(options: BenchDDP, console: Console) -> int:
    from gaf_lab.bench import cost_model as predict

    check_network(options)
    gbit, told = options.bandwidth_gbit, "as given"
    points: list[dict[str, Any]] = []
    if options.against is not None:
        conditions, points = predict.read(options.against)
        if gbit is None and "mbit" in conditions:
            gbit, told = conditions["mbit"] / 1000, "the limit under which the file was measured"
        elif gbit is None:
            gbit, told = (
                predict.fitted_beta(points, options.latency_us * 1e-6) * 8e-9,
                "fitted to the file's plain DDP",
            )
    if gbit is None:
        gbit = 10.0
    network = predict.Network(
        options.latency_us * 1e-6, gbit * 1e9 / 8, options.memory_gb * 1e9, options.gflops * 1e9
    )
    local = f"memory {options.memory_gb:g} GB/s, {options.gflops:g} Gflop/s"
    say(console, f"{options.latency_us:g} us a message, {gbit:.3g} Gbit/s ({told}), {local}")
    console.print(
        predict.against(points, network)
        if points
        else predict.table(options.parameters * options.bytes, network)
    )
    return 0


@dataclass
class Presets:
    """Lists the configs that have a name."""


def presets(words: Words, console: Console) -> int:
    tyro.cli(Presets, prog="gaf presets", args=words)
    from gaf_lab.settings.presets import PRESETS

    for name, c in PRESETS.items():
        sizes = f"k {c.k}, b {c.b}, noise {c.noise} {c.noise_rate:g}"
        say(
            console,
            f"{name:20} {c.dataset:10} {c.model:16} {c.arm:14} {sizes}"
            + (f", tau {c.tau:g}" if c.policy == "gaf" else ""),
        )
    return 0


COMMANDS: dict[str, tuple[Command, str | None]] = {
    "demo": (demo, Demo.__doc__),
    "train": (train, Train.__doc__),
    "sweep": (sweep, Sweep.__doc__),
    "paper": (paper, Paper.__doc__),
    "probe": (probe, Probe.__doc__),
    "audit": (audit, Audit.__doc__),
    "report": (report, Report.__doc__),
    "data": (data, Data.__doc__),
    "bench": (
        bench,
        "What a step costs: gaf bench train, accumulate, ddp; gaf bench cpu: which settings are fast on a CPU.",
    ),
    "presets": (presets, Presets.__doc__),
}


def main(words: Words | None = None) -> int:
    """Runs `gaf WORDS...`; an error that a user can mend becomes one message and exit code 2."""
    words = sys.argv[1:] if words is None else words
    if not (words[:1] == ["train"] and under_torchrun()):
        return command(words, Console())
    from gaf_lab.training import parallel

    group = parallel.join()
    try:
        code = command(words, Console(quiet=not group.leads))
    except parallel.Elsewhere:
        code = 2
    return parallel.leave(code)


def command(words: Words, console: Console) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help"):
        return overview(console)
    if words[0] in ("-V", "--version", "version"):
        import gaf

        say(console, f"gaf {gaf.__version__}")
        return 0
    if words[0] not in COMMANDS:
        known = [*COMMANDS, "help", "--help", "--version"]
        say(
            Console(stderr=True),
            f"gaf: unknown command {words[0]!r}.{nearest(words[0], known)} There are: {', '.join(COMMANDS)}.",
        )
        return 2
    try:
        return COMMANDS[words[0]][0](words[1:], console)
    except KeyboardInterrupt:
        say(Console(stderr=True), f"\ngaf {words[0]}: stopped.")
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        return 1
    except mendable() as error:
        return refuse(words[0], str(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return refuse(
            words[0], f"the machine must have more memory; {first_line(error)}. {LIGHTER}"
        )


def refuse(name: str, message: str) -> int:
    """Says what a user can mend; the exit code that goes with it."""
    Console(stderr=True, soft_wrap=True).print(
        f"gaf {name}: {message}", style="red", markup=False, highlight=False
    )
    return 2


def out_of_memory(error: Exception) -> bool:
    """Whether the machine or the accelerator had no more; torch has a type for the accelerator's alone."""
    return isinstance(error, MemoryError) or any(
        words in str(error).lower()
        for words in ("out of memory", "allocate memory", "not enough memory")
    )


def overview(console: Console) -> int:
    say(
        console,
        "gaf: gradient agreement filtering\n\n"
        "usage: gaf COMMAND [OPTIONS]; gaf COMMAND --help; gaf --version\n",
    )
    for name, (_, text) in COMMANDS.items():
        say(console, f"  {name:8} {text}")
    return 0


def mendable() -> tuple[type[Exception], ...]:
    """Errors whose message says all that a user needs."""
    from gaf_lab.data.sources import DataError
    from gaf_lab.records.checkpoint import CheckpointError
    from gaf_lab.training.run import Diverged

    return ConfigError, ValueError, OSError, DataError, CheckpointError, Diverged


if __name__ == "__main__":
    raise SystemExit(main())
