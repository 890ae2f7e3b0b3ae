"""The name of an arm, from what its config does with micro-gradients, loss and weights."""

from typing import Any

from gaf_lab.settings.fields import TrainFields
from gaf_lab.settings.sample_fields import SampleFields

POLICY_NAMES = {
    "mean": "averaging",
    "gaf": "GAF",
    "random-skip": "random skip",
    "replay-skip": "replay skip",
    "random-subset": "random subset",
    "scaled-lr": "averaging, scaled rate",
    "guard": "Guard",
    "median": "median",
    "until-agreement": "until agreement",
    "replay-sizes": "replayed sizes",
    "mean-size": "mean size",
}
OPTIMIZER_NAMES = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "rmsprop": "RMSprop",
    "muon": "Muon",
    "lamb": "LAMB",
    "lion": "Lion",
    "soap": "SOAP",
    "shampoo": "Shampoo",
    "schedule-free": "ScheduleFree",
    "adamw-all": "AdamW of all rows",
    "rmsprop-all": "RMSprop of all rows",
}


def name_arm(config: SampleFields) -> str:
    """What distinguishes an arm: "GAF, start best", "label smoothing", "averaging, AdamW"."""
    used = techniques(config)
    base = [] if config.policy == "mean" and used else [POLICY_NAMES[config.policy]]
    variants = filter_variants(config) if config.policy == "gaf" else growing_variants(config)
    if config.optimizer != "sgd":
        variants.append(OPTIMIZER_NAMES[config.optimizer])
    return ", ".join([" + ".join(base + used), *variants])


def techniques(config: SampleFields) -> list[str]:
    """Names of the techniques that the config uses against memorised labels."""
    uses: dict[str, Any] = {
        name_audit(config): config.audit_passes,
        name_weights(config): config.agreement != "none",
        "GCE": config.loss == "gce",
        "ELR": config.loss == "elr",
        "label smoothing": config.label_smoothing,
        "mixup": config.mixup,
        "SAM": config.sam,
        "EMA of weights": config.ema,
        "early stopping": config.early_stopping,
        "gradient clipping": config.clip,
    }
    return [name for name, used in uses.items() if used]


def name_audit(config: SampleFields) -> str:
    suspects = {
        "plain-prototype": ", plain prototypes",
        "network": ", network's suspects",
        "random": ", random suspects",
    }
    name = f"audit {config.audit_passes:g}{suspects.get(config.suspects, '')}"
    return f"restart {config.audit_passes:g}" if config.suspects == "none" else name


def name_weights(config: SampleFields) -> str:
    return f"{config.agreement} weights{', shuffled' if config.shuffle_weights else ''}"


def filter_variants(config: TrainFields) -> list[str]:
    """How GAF differs from the paper's rule with a fixed tau."""
    variants: dict[str, Any] = {
        name_threshold(config): config.threshold != "fixed",
        f"half-life {config.half_life}": config.half_life,
        f"start {config.start}": config.start != "first",
        "halving": config.average == "halving",
        "per bucket": config.scope == "group",
        "per layer": config.scope == "layer",
        f"{config.metric} metric": config.metric != "euclidean",
    }
    return [name for name, differs in variants.items() if differs]


def growing_variants(config: TrainFields) -> list[str]:
    """The share of signal that is asked for, and how the learning rate follows."""
    rho = [f"rho {config.rho:g}"] if config.policy == "until-agreement" else []
    return rho if config.rate_by == "constant" else [*rho, f"{config.rate_by} rate"]


def name_threshold(config: TrainFields) -> str:
    if config.threshold == "auto":
        return "tau auto"
    by = "" if config.threshold_by is None else f" {config.threshold_by:g}"
    return config.threshold + by
