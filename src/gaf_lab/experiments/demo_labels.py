"""The demo's second part: which of the same noisy digits have a wrong label."""

import base64
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from gaf_lab.experiments.audit import audit_labels
from gaf_lab.experiments.audit_figures import pictures_of
from gaf_lab.experiments.audit_report import write_samples
from gaf_lab.experiments.audit_result import AuditResult
from gaf_lab.records.measurements import write_measurements
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.presets import AUDIT

TILES = 24
FOLDER = "labels"  # in the demo's folder
CHANCE = "the chance that a wrong label ranks above a right one"


def find_labels(
    base: TrainConfig, folder: Path, progress: Callable[[int, int], None]
) -> AuditResult:
    """Audits the labels of the demo's first seed; writes samples.csv and audit.jsonl."""
    passes = min(AUDIT.passes, base.passes)
    sizes: dict[str, Any] = {"policy": AUDIT.policy, "k": AUDIT.k, "b": AUDIT.b, "passes": passes}
    config = dataclasses.replace(base, **sizes)
    found = audit_labels(config, None, progress)
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_samples(found, folder / FOLDER / "samples.csv")
    write_measurements([found], folder / FOLDER / "audit.jsonl", {"config": config.plain()})
    return found


def label_section(found: AuditResult) -> dict[str, Any]:
    """What the page shows: words, numbers, and a tile for each of the first suspects."""
    config, line = found.problem.config, found.line()
    tiles = [tile(found, row) for row in found.order[:TILES]]
    wrong = sum(tile["given"] != tile["truth"] for tile in tiles)
    right = sum(tile["suggested"] == tile["truth"] for tile in tiles)
    first, recall = line["first100"]["quality"], line["issues"]["recall"]
    marked = line["issues"]["count"]
    return {
        "lede": (
            f"One more run on the labels of seed {config.seed}, plain averaging for "
            f"{config.passes:g} passes, judges every label while it trains, by "
            "gaf.SampleAgreement. It knows nothing of the truth."
        ),
        "facts": [
            ("AUROC", f"{line['auroc']['quality']:.3f}", CHANCE),
            ("precision", f"{100 * first:.0f}%", "of the first 100 suspects are wrong"),
            ("recall", f"{100 * recall:.0f}%", f"of the wrong labels are among {marked:,} marked"),
        ],
        "heading": (
            f"The first {len(tiles)} suspects: {wrong} labels are wrong, {right} suggestions right"
        ),
        "file": f"{FOLDER}/samples.csv",
        "tiles": tiles,
    }


def tile(found: AuditResult, row: int) -> dict[str, Any]:
    pictures = pictures_of(found)
    assert pictures is not None
    return {
        "png": png_address(pictures[found.index[row]]),
        "given": found.report["given_label"][row],
        "suggested": found.report["predicted_label"][row],
        "truth": found.truth[row],
        "index": found.origin[row],
    }


def png_address(picture: Tensor) -> str:
    """A picture of bytes (1, H, W) as an address that contains it."""
    file = io.BytesIO()
    Image.fromarray(picture[0].cpu().numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
