"""One plain dictionary of metrics, for any tracker that takes numbers by name."""

import math
from typing import Any, Protocol, runtime_checkable


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
    accepted. Since the start: `gaf/stepped`, share in [0, 1] of the steps that were taken, and
    `gaf/skipped`, the number of those that were not.

    Args:
        source: what decides. With `gaf.attach` the numbers are the same on every rank, so that one
            rank may log them.
        b: samples per micro-batch. With 1, the noise scale counts micro-batches.
    """
    stats = source.stats(b)
    steps, stepped = stats["steps"], stats["stepped"]
    names = ("acceptance", "distance_mean", "distance_min", "noise_scale", "tau")
    found = {name: stats[name] for name in names}
    found |= {"stepped": stepped / steps if steps else math.nan, "skipped": steps - stepped}
    return {f"gaf/{name}": float(value) for name, value in found.items() if math.isfinite(value)}
