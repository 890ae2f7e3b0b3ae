"""`gaf paper`: the runs of figures, and a page that sets them beside the paper's values."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gaf_lab.data.download import cache
from gaf_lab.data.generated import make_pictures
from gaf_lab.data.imagenet import PLACES
from gaf_lab.paper import page
from gaf_lab.paper.estimate import announce
from gaf_lab.paper.items import ITEMS
from gaf_lab.paper.notes import note_conditions
from gaf_lab.paper.plans import make_plan
from gaf_lab.paper.scales import Reading, Scale
from gaf_lab.settings.plan import Configs
from gaf_lab.sweeps.jobs import jobs
from gaf_lab.sweeps.sweep import SweepResult, sweep
from gaf_lab.training.console import Progress


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
    """Runs what the figures need and `out` lacks, and writes one page of all figures there.

    Args:
        names: figures and tables, as in `gaf_lab.paper.items.ITEMS`.
        scale: as for `gaf_lab.paper.plans.make_plan`.
        out: folder for runs, figures and the page.
        console: shows the number of runs, an estimate of the time, and the progress.
        reading: as for `gaf_lab.paper.plans.make_plan`.
        seeds: as for `gaf_lab.paper.plans.make_plan`.
        data_folder: as for `gaf_lab.sweeps.sweep.sweep`.
        workers: as for `gaf_lab.sweeps.sweep.sweep`.
        **how: engine, address, command, as for `gaf_lab.sweeps.sweep.sweep`.

    Returns:
        The page's path, and the result of the sweep.
    """
    plans = {name: make_plan(name, scale, reading, seeds) for name in names}
    configs = list({config.hash: config for plan in plans.values() for config in plan}.values())
    finished = finished_hashes(configs, out)
    left = len(configs) - len(finished)
    console.print(
        f"{', '.join(names)} at scale {scale}: {len(configs)} runs, {left} of them to do.",
        highlight=False,
    )
    generated = needs_pictures(configs, scale, data_folder)
    seconds = announce(configs, workers, console, finished) if left else None
    swept = SweepResult([], {})
    how |= {"workers": workers, "console": console, "seconds": seconds}
    for folder, part in split_by_data(
        configs, data_folder, out / "pictures" if generated else None
    ):
        one = sweep(part, out, data_folder=folder, **how)
        swept = SweepResult([*swept.runs, *one.runs], swept.failed | one.failed)
    found = {str(run.header["config_hash"]): run for run in swept.runs}
    sections = []
    for name, plan in plans.items():
        runs = [found[c.hash] for c in plan if c.hash in found]
        notes = note_conditions(ITEMS[name], plan, scale, reading, generated)
        sections.append((ITEMS[name], runs, notes))
    title = f"The paper, at scale {scale}" if len(names) > 1 else ITEMS[names[0]].title
    with Progress(console, "figure") as progress:
        return page.write_page(sections, out, title, progress), swept


def finished_hashes(configs: Configs, out: Path) -> set[str]:
    plan = jobs(configs, out, data_folder=None, keep_checkpoints=True, command=None)
    return {job.config.hash for job in plan.values() if job.finished_run()}


def needs_pictures(configs: Configs, scale: Scale, folder: Path | None) -> bool:
    """Whether generated pictures stand in for ImageNet's: at smoke scale, without ImageNet."""
    imagenet = any(config.dataset == "imagenet" for config in configs)
    return scale == "smoke" and imagenet and not has_imagenet(folder)


def has_imagenet(folder: Path | None) -> bool:
    """Whether any part of ImageNet is there; a run reports what is wrong with it."""
    place = folder or cache()
    return any((place / name / "train").is_dir() for name in PLACES)


def split_by_data(
    configs: Configs, folder: Path | None, pictures: Path | None
) -> list[tuple[Path | None, Configs]]:
    """The runs by their data's folder. ImageNet's runs use `pictures`, if given, generated here."""
    if pictures is None:
        return [(folder, configs)] if configs else []
    make_pictures(pictures, classes=10, per_class=40, size=48)  # the same at each call
    on_pictures = [config for config in configs if config.dataset == "imagenet"]
    rest = [config for config in configs if config.dataset != "imagenet"]
    return [(place, part) for place, part in ((folder, rest), (pictures, on_pictures)) if part]
