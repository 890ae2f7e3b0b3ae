"""Synthetic runs for the reports, and a reader of pages."""

import math
import random
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from matplotlib.image import imread

from gaf_lab.records import run as records
from gaf_lab.records.run import Run

ONE_COLOUR = 0.02  # largest distance of a pixel's channels from a colour, to count as that colour
STEPS = 28  # per pass


POLICIES = {"averaging": "mean", "GAF": "gaf", "random subset": "random-subset"}


LAST = {"averaging": 0.64, "GAF": 0.85, "random subset": 0.81}


def simulate(
    folder: Path,
    arm: str,
    seed: int,
    *,
    last: float | None = None,
    status: str = "finished",
    passes: int = 40,
    nulls: tuple[str, ...] = (),
    **header,
) -> Run:
    """A run that learns to 88%, and then forgets down to `last` as it memorises.

    It has the first `passes` evaluations of 40, one per pass.
    """
    folder.mkdir(parents=True)
    records.append(folder, head(folder.name, arm, seed) | header)
    draw = random.Random(f"{arm}/{seed}")
    fallen = 0.88 - (LAST[arm] if last is None else last)
    for t in range(1, passes + 1):
        rise, fall = 1 - math.exp(-t / 3), 1 / (1 + math.exp(4.5 - t * 9 / 40))
        accuracy = 0.1 + 0.78 * rise - fallen * fall + draw.gauss(0, 0.004)
        line = {
            "kind": "eval",
            "step": t * STEPS,
            "steps_taken": t * STEPS // 2,
            "samples": t * STEPS * 160,
            "passes": t,
            "seconds": 1.5 * t,
            "acceptance": 0.4,
            "distance_mean": 0.45 + 0.4 * rise + 0.2 * fallen * fall,
            "heldout_accuracy": 0.1 + 0.6 * (accuracy - 0.1),
            "test_accuracy": accuracy,
            "memorised": 0.03 + 3.5 * fallen * fall,
            "corrected": 0.85 * rise - 3 * fallen * fall,
            "rows": [3] * STEPS,
        }
        records.append(folder, line | dict.fromkeys(nulls))
    if status:
        records.append(folder, {"kind": "end", "status": status, "seconds": 1.5 * passes})
    return records.read(folder)


def head(name: str, arm: str, seed: int) -> dict:
    config = {
        "dataset": "mnist5k",
        "noise": "symmetric",
        "noise_rate": 0.4,
        "model": "mlp",
        "k": 8,
        "b": 20,
        "lr": 0.05,
        "policy": POLICIES.get(arm, "gaf"),
        "tau": 0.8,
        "min_accepted": 2,
        "seed": seed,
    }
    return {
        "kind": "run",
        "name": name,
        "arm": arm,
        "config": config,
        "config_hash": "0123456789ab",
        "command": "gaf demo --seeds 3",
        "versions": {"torch": "2.13.0"},
        "machine": {"cores": 8},
        "commit": "b3bf7001",
    }


def nine(folder: Path) -> list[Run]:
    return [simulate(folder / f"{arm}-{seed}", arm, seed) for arm in POLICIES for seed in range(3)]


@dataclass
class Page(HTMLParser):
    """A page's elements with their attributes, and its text outside scripts and styles."""

    source: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    raw: dict[str, list[str]] = field(default_factory=lambda: {"script": [], "style": []})

    def __post_init__(self):
        super().__init__()
        self.inside = ""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        self.raw.get(self.inside, self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def share_of(colour: str, path: Path) -> float:
    """The share of a picture's pixels that have a colour."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float((np.abs(imread(path)[..., :3] - rgb).max(axis=-1) < ONE_COLOUR).mean())
