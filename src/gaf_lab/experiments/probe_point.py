"""A probe of a training, and its line, which holds all that table and figure show:

    {"kind": "probe", "after", "steps_taken", "k", "b", "m", "rows", "absent",
     "distance_mean", "distance_expected", "distance": [10%, 50%, 90%],
     "noise_scale", "noise_low", "noise_high", "dimension",
     "tau", "tau_interval", "predicted", "measured", "measured_interval", "measured_steps",
     "reason", "bins": [...], "curve": [[tau, predicted, measured, measured steps], ...],
     "layers": [{"name", "distance": [10%, 50%, 90%], "noise_scale", "dimension"}, ...]}

after, steps_taken: steps of training before the probe, and those that moved the weights.
m: how many measured micro-gradients were merged into one; b is the number of samples in it then.
noise_scale, dimension and all predictions are from m = 1.
distance_expected: B / (b + B).
tau_interval, measured_interval: [low, high] of 95%, by leaving out an eighth of the rows at a time;
null if m is not 1 or the rows are too few.
bins: pairs by cosine distance, 100 bins over [0, 2].
measured: on the micro-gradients that no prediction was made from.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gaf.measure.advice import Recommendation
from gaf.measure.result import Probe
from gaf.rules.prediction import expected_cosine
from gaf_lab.records import run as records

BINS = 100
QUANTILES = (0.1, 0.5, 0.9)
ProbeLine = dict[str, Any]
CURVE_TAUS = [round(0.2 + 0.025 * i, 3) for i in range(41)]  # 0.2 to 1.2


@dataclass(frozen=True, eq=False)
class ProbePoint:
    """A probe after some steps of training, at micro-batches merged m at a time.

    taken: the steps that moved the weights.
    """

    after: int
    taken: int
    m: int
    probe: Probe
    advice: Recommendation
    tau_interval: list[float] | None
    measured_interval: list[float] | None

    def line(self) -> dict[str, Any]:
        return self._line

    @cached_property
    def _line(self) -> dict[str, Any]:
        noise, merged = self.probe.noise, self.probe.merged(self.m)
        distances = merged.distances()
        found = {
            "kind": "probe",
            "after": self.after,
            "steps_taken": self.taken,
            "k": merged.k,
            "b": merged.b,
            "m": self.m,
            "rows": len(merged),
            "absent": merged.absent,
            "distance_mean": float(distances.mean()),
            "distance_expected": 1 - expected_cosine(noise.rho / self.m, 1),
            "distance": distance_quantiles(distances),
            "noise_scale": noise.scale,
            "noise_low": noise.low,
            "noise_high": noise.high,
            "dimension": noise.dimension,
            "tau": self.advice.tau,
            "tau_interval": self.tau_interval,
            "predicted": self.advice.predicted,
            "measured": self.advice.measured.rows,
            "measured_interval": self.measured_interval,
            "measured_steps": self.advice.measured.steps,
            "reason": self.advice.reason,
            "bins": torch.histc(distances, BINS, 0, 2).int().tolist(),
            "curve": [self._curve_point(merged, tau) for tau in CURVE_TAUS],
            "layers": [],
        }
        if self.m == 1:
            found["layers"] = [layer_line(merged, name) for name in merged.layers]
        rounded: dict[str, Any] = round_off(records.as_json(found))
        return rounded

    def _curve_point(self, merged: Probe, tau: float) -> list[float]:
        measured = merged.measured(tau)
        return [tau, self.probe.predicted(tau, self.m), measured.rows, measured.steps]


def layer_line(probe: Probe, name: str) -> dict[str, Any]:
    noise, distances = probe.noise_in(name), probe.distances(name)
    return {
        "name": name,
        "distance": distance_quantiles(distances),
        "noise_scale": noise.scale,
        "dimension": noise.dimension,
    }


def distance_quantiles(distances: Tensor) -> list[float | None]:
    """10%, 50% and 90% of the distances; null if a layer's gradients are all zero."""
    if not len(distances):
        return [None] * len(QUANTILES)
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    found: list[float | None] = distances.quantile(at).tolist()
    return found


def round_off(value: Any) -> Any:
    """Floats to six digits: no figure shows more."""
    if isinstance(value, dict):
        return {key: round_off(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_off(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
