"""What a reader of a figure must know about its runs; printed on the figure too."""

from collections.abc import Iterable

from gaf_lab.paper.items import Item
from gaf_lab.paper.scales import Reading, Scale
from gaf_lab.settings.plan import Configs

SOURCES = {"paper": "its text", "code": "its released code"}


def note_conditions(
    item: Item, plan: Configs, scale: Scale, reading: Reading, generated: bool
) -> list[str]:
    """Sentences on scale, data and sizes. generated: whether pictures stand in for ImageNet's."""
    if not plan:
        return [
            "Computed by this library from a problem in two dimensions; "
            "nothing was trained for it beforehand."
        ]
    found = [note_scale(scale, reading)]
    if generated and item.id == "fig3":
        found.append(
            "No ImageNet was found: a reduced ViT on generated pictures stands in for ViT-L/16 on "
            "ImageNet."
        )
    seeds = len({config.seed for config in plan})
    ks, bs = list_values(c.k for c in plan), list_values(c.b for c in plan)
    sizes = f"k = {ks}; b = {bs}; n = {seeds} seed{'' if seeds == 1 else 's'}."
    return [*found, *note_lengths(plan, generated), sizes]


def note_scale(scale: Scale, reading: Reading) -> str:
    if scale == "smoke":
        return (
            "Smoke scale: a handful of steps on few pictures shows that it runs, and nothing else."
        )
    if scale == "small":
        return "Small scale: not the paper's setting."
    return f"The paper's setting, as read in {SOURCES[reading]}."


def note_lengths(plan: Configs, generated: bool) -> list[str]:
    """For each network and data set, the passes over the pictures."""
    passes: dict[str, set[float]] = {}
    for c in plan:
        pictures = "generated JPEGs" if generated and c.dataset == "imagenet" else c.dataset
        setting = f"{c.model} on {c.limit or 'all'} pictures of {pictures}"
        passes.setdefault(setting, set()).add(c.passes)
    return [f"{setting}, {value_range(values)} passes." for setting, values in passes.items()]


def list_values(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(values))))


def value_range(values: set[float]) -> str:
    """From the least to the greatest."""
    return " to ".join(f"{value:g}" for value in sorted({min(values), max(values)}))
