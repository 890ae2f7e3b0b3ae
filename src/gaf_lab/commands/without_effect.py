"""Options on the command line that would have no effect: they are refused, not ignored."""

from collections.abc import Callable
from typing import NamedTuple

from gaf_lab.commands.common import Words
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.settings.rules import REPLAYING

OF_GAF = ("tau", "threshold", "threshold-by", "half-life", "start", "average")
IN_PACKAGES = ("digits", "mnist5k", "noise")  # data sets that are read from no file
FOLLOWING = ("random-skip", *REPLAYING)


class Need(NamedTuple):
    """What an option needs, as a test of the config and in words."""

    met: Callable[[TrainConfig], bool]
    words: str


GAF_POLICY = Need(lambda c: c.policy == "gaf", "--policy gaf")
NEEDS_OF: dict[str, tuple[Need, ...]] = {
    **dict.fromkeys(OF_GAF, (GAF_POLICY,)),
    "threshold-by": (GAF_POLICY, Need(lambda c: c.threshold != "fixed", "another --threshold")),
    "noise-rate": (
        Need(lambda c: c.noise != "none" or c.noise_rate == 0, "--noise symmetric or asymmetric"),
    ),
    "replay": (
        Need(lambda c: c.policy in FOLLOWING, f"a --policy that follows: {', '.join(FOLLOWING)}"),
    ),
    "nesterov": (Need(lambda c: c.optimizer in ("sgd", "muon"), "--optimizer sgd or muon"),),
    "size": (Need(lambda c: bool(c.task) or c.dataset == "imagenet", "--dataset imagenet"),),
    "data": (Need(lambda c: bool(c.task) or c.dataset not in IN_PACKAGES, "another --dataset"),),
    "shuffle-weights": (Need(lambda c: c.agreement != "none", "--agreement"),),
    "suspects": (Need(lambda c: bool(c.audit_passes), "--audit-passes"),),
}


def refuse_without_effect(words: Words, config: TrainConfig) -> None:
    """ConfigError for an option that is given and that nothing would read."""
    for option, needs in NEEDS_OF.items():
        if not is_given(words, option):
            continue
        for need in needs:
            if not need.met(config):
                raise ConfigError(
                    f"{option.replace('-', '_')} would have no effect here; it needs "
                    f"{need.words}. Give that, or leave --{option} out."
                )


def is_given(words: Words, option: str) -> bool:
    spelled = {f"--{option}", f"--{option.replace('-', '_')}"}
    return any(word.split("=", 1)[0] in spelled for word in words)
