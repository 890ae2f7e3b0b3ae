"""One plain dictionary of metrics, for any tracker that takes numbers by name."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

NAMES = (
    *("acceptance", "distance_mean", "distance_min", "cosine_mean", "cosine_min"),
    *("noise_scale", "tau", "rows_mean", "agreement", "signal_share"),
)
SHOWN = ("cosine", "norm")  # of each worker
FEW_WORKERS = 16  # so many curves a person can tell apart


@runtime_checkable
class Source(Protocol):
    """A `gaf.Accumulator`, a `gaf.Handle`, or another object with their `stats`."""

    def stats(self, b: float = 1) -> dict[str, Any]: ...


def metrics(source: Source, b: float = 1) -> dict[str, float]:
    """The current agreement, as numbers by name. A number that is not finite is left out.

        wandb.run.log(metrics(acc), step=step)                      # Weights & Biases
        trackio.log(metrics(acc), step=step)                        # trackio
        for name, value in metrics(acc).items():                    # TensorBoard
            writer.add_scalar(name, value, step)

    Over the last 100 steps: `gaf/acceptance`, share in [0, 1] of the compared micro-gradients that
    were accepted; `gaf/distance_mean` and `gaf/distance_min`, cosine distances in [0, 2];
    `gaf/noise_scale`, in units of b. Of the last step: `gaf/tau`, the largest distance that is
    accepted. With `until`: `gaf/rows_mean`, micro-gradients per step over the last 100;
    `gaf/agreement` and `gaf/signal_share`, see `gaf.Accumulator.stats`. Since the start:
    `gaf/stepped`, share in [0, 1] of the steps that were taken, and `gaf/skipped`, the number of
    those that were not.

    Over ranks also, where they are measured: `gaf/cosine_mean` and `gaf/cosine_min`, the ranks'
    cosines to the sum of the others; of each worker, by its rank, `gaf/worker/3/cosine` and
    `gaf/worker/3/norm`, means over the last 100 measured steps (see `Handle.workers`). Beyond 16
    workers the extremes stand for them: `gaf/worker/cosine_min`, `gaf/worker/norm_min` and
    `gaf/worker/norm_max`. Under `gaf.Guard` `gaf/alarms`, the number of alarms so far.

    Args:
        source: what decides. With `gaf.attach` the numbers are the same on every rank, so that one
            rank may log them.
        b: samples per micro-batch. With 1, the noise scale counts micro-batches.
    """
    stats = source.stats(b)
    steps, stepped = stats["steps"], stats["stepped"]
    found = {name: stats.get(name, math.nan) for name in NAMES}
    found |= {"stepped": stepped / steps if steps else math.nan, "skipped": steps - stepped}
    if hasattr(source, "workers"):
        found |= metrics_of_workers(source.workers())
    if hasattr(getattr(source, "policy", None), "findings"):
        found["alarms"] = len(source.alarms)  # type: ignore[attr-defined]
    return {f"gaf/{name}": float(value) for name, value in found.items() if math.isfinite(value)}


def metrics_of_workers(workers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each worker's cosine and norm; of many workers the extremes."""
    if len(workers) <= FEW_WORKERS:
        return {f"worker/{w['rank']}/{name}": w[name] for w in workers for name in SHOWN}
    cosines, norms = ([w[name] for w in workers if w[name] == w[name]] for name in SHOWN)
    return {
        "worker/cosine_min": min(cosines, default=math.nan),
        "worker/norm_min": min(norms, default=math.nan),
        "worker/norm_max": max(norms, default=math.nan),
    }
