"""`gaf paper`: how long figures will take, their runs, and a page that sets them beside the paper's values."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy

from gaf_lab.data.download import cache
from gaf_lab.data.generated import make_pictures
from gaf_lab.data.imagenet import PLACES
from gaf_lab.paper import items as paper
from gaf_lab.paper import page as paper_page
from gaf_lab.paper.items import Configs, Item, Reading, Scale
from gaf_lab.progress import Tell, line, silent
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.sizes import PICTURES
from gaf_lab.sweeps.jobs import jobs
from gaf_lab.sweeps.sweep import SweepResult, sweep
from gaf_lab.training import models
from gaf_lab.training.console import Progress

TIMED = 32  # samples in the batch that is timed, at most
START = 1.0  # seconds of a run beside its steps and evaluations: data, network, records
LARGE = 50_000_000  # parameters above which it is one sample
# all others have 3 x 32 x 32, ImageNet its size
SHAPES = {"digits": (1, 8, 8), "mnist5k": (1, 28, 28), "fashion-mnist": (1, 28, 28)}


def reproduce(
    names: Sequence[str],
    scale: Scale,
    out: Path,
    console: Console,
    *,
    reading: Reading = "paper",
    seeds: int | None = None,
    data_folder: Path | None = None,
    workers: int = 1,
    **how: Any,
) -> tuple[Path, SweepResult]:
    """Runs what the figures need and `out` does not have yet, and writes one page of all of them there.

    Args:
        names: figures and tables, as in `gaf_lab.paper.items.ITEMS`.
        scale: as for `gaf_lab.paper.items.plan`.
        out: folder for runs, figures and the page.
        console: is told how many runs there are and how long they will take.
        reading: as for `gaf_lab.paper.items.plan`.
        seeds: as for `gaf_lab.paper.items.plan`.
        data_folder: as for `gaf_lab.sweeps.sweep.sweep`.
        workers: as for `gaf_lab.sweeps.sweep.sweep`.
        **how: engine, address, command, as for `gaf_lab.sweeps.sweep.sweep`.

    Returns:
        The page's path, and what the sweep found.
    """
    plans = {name: paper.plan(name, scale, reading, seeds) for name in names}
    configs = list({config.hash: config for plan in plans.values() for config in plan}.values())
    todo = jobs(configs, out, data_folder=None, keep_checkpoints=True, command=None)
    left = [job.config for job in todo.values() if job.finished_run() is None]
    console.print(
        f"{', '.join(names)} at scale {scale}: {len(configs)} runs, {len(left)} of them to do.",
        highlight=False,
    )
    generated = (
        scale == "smoke"
        and any(c.dataset == "imagenet" for c in configs)
        and not has_imagenet(data_folder)
    )
    if left:
        announce(left, workers, console)
    swept = SweepResult([], {})
    for folder, part in places(configs, data_folder, out / "pictures" if generated else None):
        one = sweep(part, out, workers=workers, data_folder=folder, console=console, **how)
        swept = SweepResult([*swept.runs, *one.runs], swept.failed | one.failed)
    found = {str(run.header["config_hash"]): run for run in swept.runs}
    sections = [
        (
            paper.ITEMS[name],
            [found[c.hash] for c in plan if c.hash in found],
            notes(paper.ITEMS[name], plan, scale, reading, generated),
        )
        for name, plan in plans.items()
    ]
    title = f"The paper, at scale {scale}" if len(names) > 1 else paper.ITEMS[names[0]].title
    with Progress(console, "figure") as progress:
        return paper_page.write(sections, out, title, progress), swept


def announce(configs: Configs, workers: int, console: Console) -> None:
    """Says how long the runs will take."""
    with Progress(console, "network") as progress:
        seconds = estimate(configs, workers, progress)
    line(console, f"About {spelled(seconds)} on {workers} at a time, by a short measurement.")


def has_imagenet(folder: Path | None) -> bool:
    """Whether there is something of ImageNet; what is wrong with it, a run will say."""
    place = folder or cache()
    return any((place / name / "train").is_dir() for name in PLACES)


def places(
    configs: Configs, folder: Path | None, pictures: Path | None
) -> list[tuple[Path | None, Configs]]:
    """The runs by where their data are: those of ImageNet in `pictures`, which are generated there, where that is given."""
    if pictures is not None:  # the same ones again, where they are there already
        make_pictures(pictures, classes=10, per_class=40, size=48)
    drawn = [config for config in configs if config.dataset == "imagenet" and pictures is not None]
    rest = [config for config in configs if config not in drawn]
    return [(place, part) for place, part in ((folder, rest), (pictures, drawn)) if part]


def notes(item: Item, plan: Configs, scale: Scale, reading: Reading, generated: bool) -> list[str]:
    """What a reader of the figure must know of how it came to be; printed on the figure too."""
    if not plan:
        return [
            "Computed by this library from a problem in two dimensions; nothing was trained for it beforehand."
        ]
    seeds = len({config.seed for config in plan})
    sizes = {"smoke": "Smoke scale: a handful of steps on few pictures shows that it runs, and nothing else.",
             "small": "Small scale: not the paper's setting.",
             "full": f"The paper's setting, as read in {'its released code' if reading == 'code' else 'its text'}."}  # fmt: skip
    settings: dict[str, set[float]] = {}
    for c in plan:
        pictures = "generated JPEGs" if generated and c.dataset == "imagenet" else c.dataset
        settings.setdefault(f"{c.model} on {c.limit or 'all'} pictures of {pictures}", set()).add(
            c.passes
        )
    shown = [f"{line}, {ranged(passes)} passes." for line, passes in settings.items()]
    ks, bs = (
        ", ".join(map(str, sorted(values))) for values in ({c.k for c in plan}, {c.b for c in plan})
    )
    found = [
        sizes[scale],
        *shown,
        f"k = {ks}; b = {bs}; n = {seeds} seed{'' if seeds == 1 else 's'}.",
    ]
    if generated and item.id == "fig3":
        found.insert(
            1,
            "No ImageNet was found: a reduced ViT on generated pictures stands in for ViT-L/16 on ImageNet.",
        )
    return found


def ranged(values: set[float]) -> str:
    """From the least to the greatest."""
    return " to ".join(f"{value:g}" for value in sorted({min(values), max(values)}))


def spelled(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def estimate(configs: Configs, workers: int, tell: Tell = silent) -> float:
    """Seconds that the runs will take, `workers` at a time, from a step of each kind of network, timed here. tell: how far it is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        kinds, speeds = {kind(c): c for c in configs}, {}
        for number, (each, config) in enumerate(kinds.items(), 1):
            tell("measuring", number, len(kinds))
            speeds[each] = speed(config)
    finally:
        torch.set_num_threads(threads)
    return sum(cost(c, *speeds[kind(c)]) for c in configs) / min(workers, len(configs))


def kind(config: TrainConfig) -> tuple[Any, ...]:
    """What the time per sample depends on."""
    return (
        config.model,
        config.stem,
        shape_of(config),
        min(config.b, TIMED),
        config.autocast,
        config.device,
    )


def shape_of(config: TrainConfig) -> tuple[int, int, int]:
    return (
        (3, config.size, config.size)
        if config.dataset == "imagenet"
        else SHAPES.get(config.dataset, (3, 32, 32))
    )


def cost(config: TrainConfig, training: float, looking: float) -> float:
    """Seconds of a run, from those of a sample in training and in evaluation."""
    pictures = PICTURES[config.dataset]
    held = min(config.limit or pictures, pictures)
    looked_at = (
        min(config.limit or pictures, pictures // 5)
        + min(config.probe, held)
        + config.heldout * held
    )
    evaluations = config.passes / config.eval_every
    trained = config.passes * held * (1 - config.heldout) * (2 if config.sam else 1)
    return START + trained * training + evaluations * looked_at * looking


def speed(config: TrainConfig) -> tuple[float, float]:
    """Seconds per sample, in training and in evaluation, of a network on random pictures."""
    from gaf_lab.training.run import pick_device

    device = pick_device(config.device)
    model = models.build(config.model, shape_of(config), 100, config.stem).to(device)
    size = sum(p.numel() for p in model.parameters())
    x = torch.randn(1 if size > LARGE else min(config.b, TIMED), *shape_of(config), device=device)
    y = torch.zeros(len(x), dtype=torch.int64, device=device)

    def step() -> None:
        cross_entropy(model(x), y).backward()
        for p in model.parameters():
            p.grad = None

    return timed(step, device) / len(x), timed(lambda: looked(model, x), device) / len(x)


@torch.no_grad()
def looked(model: nn.Module, x: torch.Tensor) -> None:
    model(x)


def timed(work: Any, device: torch.device) -> float:
    """Seconds of the second and third call; the first warms up."""
    work()
    started = time.perf_counter()
    for _ in range(2):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / 2


def described(scale: Scale, seeds: int | None = None) -> list[tuple[Item, int]]:
    """Every figure with the number of its runs."""
    return [(item, len(paper.plan(name, scale, seeds=seeds))) for name, item in paper.ITEMS.items()]
