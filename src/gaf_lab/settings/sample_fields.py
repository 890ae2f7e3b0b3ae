"""Fields of a config that concern single samples: their weights, and how many each class has."""

from dataclasses import dataclass
from typing import Literal

from gaf_lab.settings.fields import TrainFields

AgreementName = Literal["none", "prototype", "plain-prototype", "vote", "loss"]
SuspectsName = Literal["prototype", "plain-prototype", "network", "random", "none"]


@dataclass(frozen=True)
class SampleFields(TrainFields):
    """All fields of a run's config; those of `TrainFields` come first."""

    imbalance: float = 1.0
    """Samples of the first class over those of the last, at least 1.
    Those between fall geometrically. Higher makes the last classes rarer."""
    agreement: AgreementName = "none"
    """Score by which gaf.SampleAgreement weighs the samples of each micro-batch. none: no weights.
    plain-prototype: without its refinement (refine=False).
    The scores are taken from cross-entropy, whatever the loss."""
    shuffle_weights: bool = False
    """For agreement: gives the weights of a micro-batch to its samples at random.
    The control with the same weights."""
    audit_passes: float = 0.0
    """Passes of averaging that judge the labels; then the run starts again from new weights.
    Suspects weigh `suspect_weight` from then on. Where few labels look wrong, or the features are
    too weak to tell, the run goes on instead, by cross-entropy. 0: no audit."""
    suspects: SuspectsName = "prototype"
    """For an audit: the samples whose label mostly differed from the nearest prototype
    (gaf.SampleAgreement, also with refine=False), or from the network's answer; as many at random
    as by prototypes; none."""
    suspect_weight: float = 0.2
    """For an audit: weight of a suspect, in [0, 1]; others weigh 1.

    It is nearer to 1 where under 30% of a class's labels are suspect, or over 70%."""
