"""Thresholds that adapt: tau as a function of what the steps so far have shown.

A fixed tau does not transfer between tasks, because the distances that it is compared with do not.
Two micro-gradients g_i = g + e_i with Cov(e_i) = Sigma / b have an expected cosine of

    E[cos] = b / (b + B)        B = tr(Sigma) / |g|^2, the gradient noise scale (arXiv 1812.06162)

and two that are noise alone have a cosine of mean 0 and variance 1 / d_eff, where
d_eff = tr(Sigma)^2 / tr(Sigma^2). A threshold object takes the place of a number:
`gaf.GAF(tau=gaf.SignalTau())`. It learns from the decisions of earlier steps only, and from numbers
that every rank has anyway: it costs no communication, is the same on all ranks, and never waits for
the device. Its state is one small vector on the rows' device, changed in place, so that a captured
CUDA graph may hold it.

tau is about angles, and so is what a threshold learns: each step's inner products count in units of
that step's own mean |g_i|^2. A loss scale that a GradScaler moves, or a step of huge gradients,
makes no difference.
"""

from gaf.rules.thresholds.base import Threshold
from gaf.rules.thresholds.moving_average import MovingAverageTau
from gaf.rules.thresholds.noise_floor import NoiseFloorTau
from gaf.rules.thresholds.quantile import QuantileTau
from gaf.rules.thresholds.schedule import ScheduleTau
from gaf.rules.thresholds.signal import SignalTau

__all__ = [
    "MovingAverageTau",
    "NoiseFloorTau",
    "QuantileTau",
    "ScheduleTau",
    "SignalTau",
    "Threshold",
]
