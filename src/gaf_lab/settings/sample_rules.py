"""Rules of the fields that concern single samples."""

import math

from gaf_lab.settings.checks import require
from gaf_lab.settings.sample_fields import SampleFields

RESTARTED = ("sgd", "adam", "adamw", "rmsprop", "muon")  # those whose past is all in their state


def check_samples(c: SampleFields) -> None:
    """Weights of samples, an audit with a restart, and classes of different sizes."""
    finite = "must be at least 1 and finite"
    require(c, "imbalance", 1 <= c.imbalance < math.inf, finite, "1 keeps all samples.")
    require(
        c,
        "imbalance",
        c.imbalance == 1 or c.dataset != "imagenet",
        "must be 1 for pictures in files",
        "Use another data set.",
    )
    mixed = bool(c.sam or c.mixup)
    require(
        c,
        "agreement",
        c.agreement == "none" or not (mixed or c.audit_passes),
        "must be 'none' with sam, mixup or audit_passes",
        "Set these to 0.",
    )
    check_audit_fields(c, mixed)


def check_audit_fields(c: SampleFields, mixed: bool) -> None:
    """The audit is averaging on cross-entropy, and shorter than the run."""
    length = 0 <= c.audit_passes < c.passes
    require(c, "audit_passes", length, f"must lie in [0, passes = {c.passes:g})", "12 of 30.")
    require(
        c,
        "audit_passes",
        not c.audit_passes or (c.policy == "mean" and not (mixed or c.early_stopping)),
        "must be 0 unless the policy is 'mean' without sam, mixup and early_stopping",
        "Set --policy mean, and the others to 0.",
    )
    require(
        c,
        "optimizer",
        not c.audit_passes or c.optimizer in RESTARTED,
        f"must be one of {', '.join(RESTARTED)} for an audit, after which it starts again",
        "Use one of these, or no audit.",
    )
    one = 0 <= c.suspect_weight <= 1
    require(c, "suspect_weight", one, "must lie in [0, 1]", "0 drops suspects; 0.2 is usual.")
