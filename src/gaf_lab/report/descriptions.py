"""What each arm does with the k micro-gradients of a step, in a sentence."""

from typing import Any

from gaf_lab.report.arms import Arm, is_gaf
from gaf_lab.report.text import listing
from gaf_lab.settings.config import LATER

CONTROL_TEXTS = {
    "mean": "averages all micro-gradients at every step: plain data-parallel training.",
    "random-skip": (
        "averages all micro-gradients, and takes a step with a fixed probability{probability}."
    ),
    "replay-skip": (
        "averages all micro-gradients, at the steps that GAF took in a recorded run: "
        "GAF's skips without its choice."
    ),
    "random-subset": (
        "averages random micro-gradients, as many as GAF accepted, at the steps that GAF took in "
        "a recorded run: GAF's skips and batch sizes without its choice."
    ),
    "scaled-lr": (
        "averages all micro-gradients at every step, with a learning rate multiplied by the share "
        "that GAF accepted in a recorded run."
    ),
    "guard": "averages all micro-gradients, without those that are broken (`gaf.Guard`).",
    "median": "takes the median of the micro-gradients at each coordinate (`gaf.Median`).",
    "until-agreement": (
        "averages micro-gradients until a share {rho} of their mean is signal, as estimated from "
        "the agreement in the steps before."
    ),
    "replay-sizes": (
        "averages as many micro-gradients at each step as a recorded run, whatever they are."
    ),
    "mean-size": "averages as many micro-gradients at every step as a recorded run did on average.",
}
STARTS = {
    "best": ", starting from the one that most agree with",
    "worst": ", starting from the one that fewest agree with",
}
# field -> the value that switches the technique off, and what the technique does
TECHNIQUES: dict[str, tuple[Any, str]] = {
    "loss": ("cross-entropy", "trained with the loss {!r}"),
    "label_smoothing": (0.0, "labels smoothed by {:g}"),
    "mixup": (0.0, "pictures mixed with alpha = {:g}"),
    "sam": (0.0, "gradients taken at a distance of {:g} uphill (SAM)"),
    "ema": (0.0, "evaluated at an average of the weights with decay {:g}"),
    "agreement": ("none", "samples weighed by the agreement score {!r}"),
    "shuffle_weights": (False, "these weights given to samples at random"),
    "audit_passes": (0.0, "labels judged for {:g} passes, then new weights and light suspects"),
    "early_stopping": (
        0,
        "ends after {} evaluations without a better held-out accuracy, at its best weights",
    ),
    "clip": (0.0, "updates clipped to a norm of {:g}"),
}


def describe(arm: Arm) -> str:
    """What the arm does with the micro-gradients, and its other techniques for noisy labels."""
    techniques = []
    for name, (off, text) in TECHNIQUES.items():
        value = arm.config.get(name, off)
        if value != off:
            techniques.append(text.format(value))
    if not techniques:
        return describe_policy(arm)
    return f"{describe_policy(arm)} In addition: {listing(techniques)}."


def describe_policy(arm: Arm) -> str:
    config = arm.config
    if is_gaf(arm):
        return describe_gaf(config)
    policy = config.get("policy")
    if policy not in CONTROL_TEXTS:
        return f"policy {policy!r}." if policy else "its policy was not recorded."
    probability, chance = "", config.get("step_probability")
    if config.get("replay"):
        probability = ", GAF's in a recorded run"
    elif chance is not None:
        probability = f" of {chance:g}"
    rho = format(config.get("rho") or LATER["rho"], "g")
    return CONTROL_TEXTS[policy].format(probability=probability, rho=rho)


def describe_gaf(config: dict[str, Any]) -> str:
    tau, least = config.get("tau"), config.get("min_accepted")
    limit = "τ" if tau is None else f"τ = {tau:g}"
    how = STARTS.get(str(config.get("start")), "")
    if config.get("average") == "halving":
        how += ", halving the sum at each"
    fewer = "too few agree" if least is None else f"fewer than {least} agree"
    where = " in each bucket of parameters by itself" if config.get("scope") == "group" else ""
    return (
        f"averages the micro-gradients whose cosine distance to their running sum is at most "
        f"{limit}, one after the other{how}, and skips the step where {fewer}{where}."
    )


def descriptions(arms: list[Arm]) -> list[tuple[str, str]]:
    """(method, what it does); by arm for methods that differ between points of the grid."""
    by_method: dict[str, set[str]] = {}
    for arm in arms:
        by_method.setdefault(arm.method, set()).add(describe(arm))
    found = []
    for arm in arms:
        same = len(by_method[arm.method]) == 1
        found.append((arm.method if same else arm.name, describe(arm)))
    return list(dict.fromkeys(found))
