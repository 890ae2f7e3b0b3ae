"""Gradient agreement filtering: average only the micro-gradients that agree.

Before averaging k micro-gradients, GAF drops those that point away from the rest; if too few agree,
it skips the optimizer step. The way of the data through the folders: an engine (device or ranks)
takes the rows, rules decide, record counts. In import order, each importing only those above it:

    rules       rows -> K = G G^T -> Decision -> w^T G, the same for both engines
    record      what came of the decisions: statistics, gated schedulers, `Audit`
    measure     micro-gradients looked at without a step (`probe`)
    device      micro-gradients one after the other in time, on one device (`Accumulator`)
    ranks       micro-gradients of data-parallel processes (`attach`, `Handle`, `all_reduce`)
    samples     rows that are single samples, from one backward pass (`Samples`, `SampleAgreement`)
    integrations    the two engines in Lightning, Accelerate and transformers

Read rules/combine.py first: `aggregate` is the whole algorithm on a matrix. Then rules/gram.py (K),
rules/sequential.py (the rule), rules/policies.py (`GAF`), and device/accumulate.py or
ranks/attach.py for where the rows come from and where the update goes.
"""

from gaf.device.accumulate import Accumulator
from gaf.measure.probe import probe
from gaf.measure.result import Probe
from gaf.ranks.all_reduce import all_reduce
from gaf.ranks.attach import attach
from gaf.ranks.handle import Handle
from gaf.record.audit import Audit
from gaf.record.outcome import Outcome
from gaf.rules.averaging import Mean, RandomSkip
from gaf.rules.combine import aggregate
from gaf.rules.coordinatewise import Median, SignAgreement, TrimmedMean
from gaf.rules.decision import Decision
from gaf.rules.enough import Agreement
from gaf.rules.gram import gram
from gaf.rules.guard import Guard
from gaf.rules.policies import GAF
from gaf.rules.random_mask import RandomMask
from gaf.rules.reference import reference
from gaf.rules.thresholds import (
    MovingAverageTau,
    NoiseFloorTau,
    QuantileTau,
    ScheduleTau,
    SignalTau,
)
from gaf.samples.agreement import SampleAgreement
from gaf.samples.ghost import ghost_gram
from gaf.samples.recording import recording
from gaf.samples.samples import Samples

__version__ = "0.1.0"
__all__ = [
    "GAF",
    "Accumulator",
    "Agreement",
    "Audit",
    "Decision",
    "Guard",
    "Handle",
    "Mean",
    "Median",
    "MovingAverageTau",
    "NoiseFloorTau",
    "Outcome",
    "Probe",
    "QuantileTau",
    "RandomMask",
    "RandomSkip",
    "SampleAgreement",
    "Samples",
    "ScheduleTau",
    "SignAgreement",
    "SignalTau",
    "TrimmedMean",
    "aggregate",
    "all_reduce",
    "attach",
    "ghost_gram",
    "gram",
    "probe",
    "recording",
    "reference",
]
