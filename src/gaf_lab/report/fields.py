"""Settings: which fields of a config have an effect on a run, which differ, and these in words."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gaf_lab.records.run import Run
from gaf_lab.settings.config import LATER, TrainConfig
from gaf_lab.settings.rules import GROWING
from gaf_lab.settings.task_source import name_task

FIELDS = tuple(field.name for field in dataclasses.fields(TrainConfig))
# these name a run; what a control replays differs from seed to seed
RUN_FIELDS = ("seed", "label", "replay")
FILTER_FIELDS = (
    *("tau", "threshold", "threshold_by", "half_life"),
    *("start", "average", "min_accepted", "scope", "metric"),
)
TECHNIQUE_FIELDS = (
    *("loss", "label_smoothing", "gce_q", "elr_beta", "elr_lambda"),
    *("mixup", "sam", "ema", "early_stopping", "clip", "agreement", "shuffle_weights"),
    *("audit_passes", "suspects", "suspect_weight"),
)
GROWING_FIELDS = ("rho", "at_most", "rate_by")
METHOD_FIELDS = (
    *(*FILTER_FIELDS, *GROWING_FIELDS, *TECHNIQUE_FIELDS),
    *("policy", "step_probability"),
)
DATA_FIELDS = ("task", "dataset", "noise", "noise_rate", "limit")
SIZE_FIELDS = (
    *("heldout", "sampler", "augment", "imbalance"),
    *("size", "model", "stem", "k", "b", "passes"),
)

# what a task of the user's own need not look at, and the defaults
NOT_OF_TASKS = {"dataset": "mnist5k", "model": "mlp", "stem": "cifar", "size": 224}

Settings = dict[str, Any]  # the fields of a config that have an effect on the run, and their values


def settings_of(run: Run, by_folder: dict[Path, Run]) -> Settings:
    """The run's settings. A control takes the filter's from the run that it replays, if given."""
    config = LATER | run.header["config"]
    if config.get("replay"):
        replayed = by_folder.get(run.folder.parent / Path(config["replay"]).name)
        if replayed is not None:
            others = LATER | replayed.header["config"]
            shared = (*FILTER_FIELDS, *GROWING_FIELDS)
            config |= {field: others[field] for field in shared if field in others}
    fields = [field for field in dict.fromkeys([*FIELDS, *config]) if field in config]
    return {
        field: config[field]
        for field in fields
        if field not in RUN_FIELDS and has_effect(field, config)
    }


def has_effect(field: str, config: Settings) -> bool:
    """Whether a field has an effect on a run: averaging has no tau, clean labels have no rate."""
    policy, replays = config.get("policy"), bool(config.get("replay"))
    if field in FILTER_FIELDS:
        weighs_all = policy in ("mean", "guard", "median", *GROWING)
        return not weighs_all and (policy != "random-skip" or replays)
    if field in GROWING_FIELDS:
        return policy in GROWING
    if field == "step_probability":
        return policy == "random-skip" and not replays
    if field in ("suspects", "suspect_weight"):
        return bool(config.get("audit_passes"))
    if field == "shuffle_weights":
        return config.get("agreement") != "none"
    if field in ("task", "task_source"):
        return bool(config.get(field))
    if field in NOT_OF_TASKS and config.get("task"):
        return bool(config[field] != NOT_OF_TASKS[field])
    return field != "noise_rate" or config.get("noise") not in ("none", "human")


def has_label(runs: list[Run]) -> bool:
    return any(run.header["config"].get("label") for run in runs)


def differing_fields(of: Sequence[Settings]) -> list[str]:
    """The fields that are not the same in all, in the config's order."""
    fields = dict.fromkeys(field for settings in of for field in settings)
    differing = [
        field for field in fields if any(other.get(field) != of[0].get(field) for other in of)
    ]
    known = [field for field in FIELDS if field in differing]
    return known + [field for field in differing if field not in FIELDS]


def point_fields(differing: Iterable[list[str]], unlabelled: Sequence[Settings]) -> list[str]:
    """The fields of a point; see `arms.group_by_arm`."""
    sizes = [field for field in differing_fields(unlabelled) if field in SIZE_FIELDS]
    others = [field for fields in differing for field in fields]
    found = dict.fromkeys([*DATA_FIELDS, *sizes, *others])
    return [field for field in found if field not in METHOD_FIELDS]


def in_words(settings: Settings, fields: Sequence[str]) -> list[str]:
    """Fields as on the command line: "tau 0.5", "no augment"; without those that have no value."""
    return [
        field_in_words(field.replace("_", " "), name_value(field, settings[field]))
        for field in fields
        if settings.get(field) is not None
    ]


def name_value(field: str, value: Any) -> Any:
    """The value; a task by its name, without the folders of its file."""
    return name_task(value) if field == "task" and value else value


def field_in_words(words: str, value: Any) -> str:
    if isinstance(value, bool):
        return words if value else f"no {words}"
    if isinstance(value, list | tuple):
        return " ".join([words, *(f"{one:g}" for one in value)])
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"
