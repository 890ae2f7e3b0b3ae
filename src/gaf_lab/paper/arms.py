"""Arms of the paper's figures: from GAF's config to the configs that are compared with it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gaf_lab.settings.choices import PolicyName
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.plan import Configs, follow
from gaf_lab.settings.rules import REPEATING

MakeArms = Callable[[TrainConfig], Configs]  # from GAF's config to that of every arm

ADAMW_RATE = 1e-3  # its usual learning rate
UNSET = Path("unset")  # the run to replay, until `follow` names it


def averaging(gaf: TrainConfig) -> TrainConfig:
    return dataclasses.replace(gaf, policy="mean", average="mean", label="")


def averaging_alone(gaf: TrainConfig) -> Configs:
    return [averaging(gaf)]


def named_averaging(gaf: TrainConfig) -> Configs:
    """Averaging, called so whatever its optimizer."""
    return [dataclasses.replace(averaging(gaf), label="averaging")]


def averaging_and_gaf(gaf: TrainConfig) -> Configs:
    return [averaging(gaf), gaf]


def code_baseline_and_gaf(gaf: TrainConfig) -> Configs:
    """GAF and the released scripts' baseline, a separate loop over batches of 128."""
    return [dataclasses.replace(averaging(gaf), k=1, b=128, sampler="iid"), gaf]


def with_controls(gaf: TrainConfig) -> Configs:
    """Averaging, GAF, and controls: agreement against fewer steps and against smaller batches.

    With k = 2 GAF takes both rows or none, so that a control with GAF's steps would repeat its run.
    """
    return [*averaging_and_gaf(gaf), *controls(gaf, "random-skip", "random-subset")]


def controls(gaf: TrainConfig, *policies: PolicyName) -> Configs:
    """A control for each policy under which it can differ from GAF."""
    return [control(gaf, policy) for policy in policies if gaf.k > 2 or policy not in REPEATING]


def control(gaf: TrainConfig, policy: PolicyName) -> TrainConfig:
    """Averaging under a policy that follows GAF's run."""
    return follow(dataclasses.replace(averaging(gaf), policy=policy, replay=UNSET), gaf)


def averaging_at_tau_2(gaf: TrainConfig) -> Configs:
    """GAF; at tau = 2, which accepts everything, averaging."""
    return [averaging(gaf) if gaf.tau == 2 else gaf]


def averaging_at_k_1(make_arms: MakeArms) -> MakeArms:
    """The arms; at k = 1, which has nothing to filter, averaging."""
    return lambda gaf: [averaging(gaf)] if gaf.k == 1 else make_arms(gaf)


def every_arm(gaf: TrainConfig) -> Configs:
    """GAF and its variants, the controls, and other techniques (sources: docs/controls.md)."""

    def variant(**changes: Any) -> TrainConfig:
        return dataclasses.replace(gaf, **changes)

    def rival(**changes: Any) -> TrainConfig:
        return dataclasses.replace(averaging(gaf), **changes)

    macro_batch = gaf.k * gaf.b
    return [
        *averaging_and_gaf(gaf),
        *controls(gaf, "random-skip", "replay-skip", "random-subset", "scaled-lr"),
        variant(start="best"),
        variant(start="worst"),
        variant(average="halving"),
        variant(scope="group"),
        *(variant(k=k, b=macro_batch // k, label=f"GAF, k = {k}") for k in (2, 4, 8) if k != gaf.k),
        variant(optimizer="adamw", lr=ADAMW_RATE),
        rival(optimizer="adamw", lr=ADAMW_RATE),
        rival(early_stopping=4),
        rival(ema=0.99),
        rival(label_smoothing=0.1),
        rival(loss="gce"),
        rival(loss="elr"),
        rival(mixup=1.0),
        rival(sam=0.05),
        rival(b=4 * gaf.b, label="larger batch"),
    ]
