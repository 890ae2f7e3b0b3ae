"""Gradient agreement filtering: average only the micro-gradients that agree, and skip the step where too few do."""

from gaf.accumulate import Accumulator
from gaf.attach import attach
from gaf.audit import Audit
from gaf.combine import aggregate
from gaf.decision import Decision
from gaf.gram import gram
from gaf.handle import Handle
from gaf.policies import GAF, Mean, RandomSkip
from gaf.probe import Probe, probe
from gaf.reference import reference
from gaf.telemetry import Outcome
from gaf.thresholds import MovingAverageTau, NoiseFloorTau, QuantileTau, ScheduleTau, SignalTau

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
