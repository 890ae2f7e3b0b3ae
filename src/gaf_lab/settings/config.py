"""What one training run is: a frozen, typed config. The command line and TOML files follow it."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from gaf_lab.settings.arms import name_arm
from gaf_lab.settings.checks import check_tau
from gaf_lab.settings.kinds import check_type
from gaf_lab.settings.rules import check_rules
from gaf_lab.settings.sample_fields import SampleFields
from gaf_lab.settings.task_source import locate_task, name_task

# fields that are younger than the oldest records, with their defaults
LATER = {
    "task": "",
    "task_source": "",
    "limit": 0,
    "size": 224,
    "loss": "cross-entropy",
    "label_smoothing": 0.0,
    "gce_q": 0.7,
    "elr_beta": 0.7,
    "elr_lambda": 3.0,
    "mixup": 0.0,
    "sam": 0.0,
    "ema": 0.0,
    "early_stopping": 0,
    "clip": 0.0,
    "scope": "all",
    "metric": "euclidean",
    "threshold": "fixed",
    "threshold_by": None,
    "half_life": 0,
    "rho": 0.7,
    "at_most": 64,
    "rate_by": "constant",
    "compile": False,
    "engine": "auto",
    "imbalance": 1.0,
    "agreement": "none",
    "shuffle_weights": False,
    "audit_passes": 0.0,
    "suspects": "prototype",
    "suspect_weight": 0.2,
}


@dataclass(frozen=True)
class TrainConfig(SampleFields):
    """One training run. The defaults are those of the demo; `gaf audit` has its own."""

    def __post_init__(self) -> None:
        check_tau(self.tau)
        for field in dataclasses.fields(self):
            check_type(field, getattr(self, field.name))
        if self.task and not self.task_source:
            task, source = locate_task(self.task)
            object.__setattr__(self, "task", task)
            object.__setattr__(self, "task_source", source)
        check_rules(self)

    @property
    def arm(self) -> str:
        """The label, or a name from what the config does with micro-gradients, loss and weights."""
        return self.label or name_arm(self)

    def plain(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = dataclasses.asdict(self)
        replay = None if self.replay is None else str(self.replay)
        return values | {"replay": replay, "milestones": list(self.milestones)}

    @property
    def hash(self) -> str:
        """Twelve hex digits that differ if the runs differ.

        The label does not count; of a replayed run only its folder's name does, and of a task's
        file only its name and source. A field of LATER counts only if it differs from its default,
        so that older records keep their hash.
        """
        values = self.plain()
        del values["label"]
        values["replay"] = None if self.replay is None else self.replay.name
        values["task"] = self.task and name_task(self.task)
        default = {name for name, value in LATER.items() if values[name] == value}
        counted = {name: value for name, value in values.items() if name not in default}
        return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:12]
