"""Gradient agreement filtering: average only the micro-gradients that agree, and skip the step where too few do."""

from gaf.device.accumulate import Accumulator
from gaf.measure.probe import probe
from gaf.measure.result import Probe
from gaf.ranks.attach import attach
from gaf.ranks.handle import Handle
from gaf.record.audit import Audit
from gaf.record.outcome import Outcome
from gaf.rules.averaging import Mean, RandomSkip
from gaf.rules.combine import aggregate
from gaf.rules.decision import Decision
from gaf.rules.gram import gram
from gaf.rules.policies import GAF
from gaf.rules.reference import reference
from gaf.rules.thresholds import (
    MovingAverageTau,
    NoiseFloorTau,
    QuantileTau,
    ScheduleTau,
    SignalTau,
)

__version__ = "0.1.0"
__all__ = [
    "GAF",
    "Accumulator",
    "Audit",
    "Decision",
    "Handle",
    "Mean",
    "MovingAverageTau",
    "NoiseFloorTau",
    "Outcome",
    "Probe",
    "QuantileTau",
    "RandomSkip",
    "ScheduleTau",
    "SignalTau",
    "aggregate",
    "attach",
    "gram",
    "probe",
    "reference",
]
