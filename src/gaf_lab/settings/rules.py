"""Rules of a run's config: the range of each number, and which fields go together."""

import math

from gaf_lab.settings.checks import ConfigError, require
from gaf_lab.settings.fields import TrainFields
from gaf_lab.settings.sample_fields import SampleFields
from gaf_lab.settings.sample_rules import check_samples
from gaf_lab.settings.sizes import PICTURES

MOST_STEPS = 10**9
LEAST_PASSES = 1e-6
MOST_PIXELS = 4096
GROWING = ("until-agreement", "replay-sizes", "mean-size")  # steps of micro-batches one by one
# policies that follow a recorded run
REPLAYING = ("replay-skip", "random-subset", "scaled-lr", "replay-sizes", "mean-size")
REPEATING = ("replay-skip", "random-subset")  # with k = 2 they take GAF's steps on the same rows


def check_rules(config: SampleFields) -> None:
    """Refuses a config that breaks a rule; the message names the field, its value and the fix."""
    check_data(config)
    check_loss(config)
    check_samples(config)
    check_optimizer(config)
    check_filter(config)
    check_growing(config)
    check_length(config)


def check_data(c: TrainFields) -> None:
    """Pictures, labels, and how they are divided into steps and evaluations."""
    finite = f"must be at least {LEAST_PASSES:g} and finite"
    shares = "It is the share of labels that are flipped."
    require(c, "noise_rate", 0 <= c.noise_rate < 1, "must lie in [0, 1)", shares)
    require(c, "heldout", 0 <= c.heldout < 1, "must lie in [0, 1)", "0.1 keeps a tenth.")
    require(c, "k", c.k >= 1, "must be at least 1", "It is the number of micro-batches per step.")
    require(c, "b", c.b >= 1, "must be at least 1", "It is the number of samples per micro-batch.")
    length = "It is the length of the run."
    require(c, "passes", 0 < c.passes < math.inf, "must be above 0 and finite", length)
    require(c, "eval_every", LEAST_PASSES <= c.eval_every < math.inf, finite, "It is in passes.")
    require(c, "probe", c.probe >= 1, "must be at least 1", "5000 is usual.")
    require(c, "limit", c.limit >= 0, "must be at least 0", "0 uses all pictures.")
    pixels = f"must lie in [16, {MOST_PIXELS}]"
    require(c, "size", 16 <= c.size <= MOST_PIXELS, pixels, "224 is usual.")
    named = bool(c.task) or c.noise != "task"
    require(c, "noise", named, "goes with a task of your own alone", "Give --task, or another.")
    if c.noise == "human" and (c.task or c.dataset not in ("cifar100n", "cifar100n-coarse")):
        raise ConfigError(
            f"noise 'human' needs a data set with human labels; got {c.dataset!r}. "
            "Use cifar100n or cifar100n-coarse."
        )


def check_loss(c: TrainFields) -> None:
    """The loss, and techniques against memorised labels."""
    require(
        c,
        "label_smoothing",
        0 <= c.label_smoothing < 1 and (not c.label_smoothing or c.loss == "cross-entropy"),
        "must lie in [0, 1), and goes with cross-entropy alone",
        "Set it to 0, or loss to 'cross-entropy'.",
    )
    at_least_0 = "must be at least 0 and finite"
    require(c, "gce_q", 0 < c.gce_q <= 1, "must lie in (0, 1]", "0.7 is usual.")
    require(c, "elr_beta", 0 <= c.elr_beta < 1, "must lie in [0, 1)", "0.7 is usual.")
    require(c, "elr_lambda", 0 <= c.elr_lambda < math.inf, at_least_0, "3 is usual.")
    require(c, "mixup", 0 <= c.mixup < math.inf, at_least_0, "1 is usual.")
    require(c, "sam", 0 <= c.sam < math.inf, at_least_0, "0.05 is usual.")
    require(c, "ema", 0 <= c.ema < 1, "must lie in [0, 1)", "0.99 is usual.")
    require(
        c,
        "early_stopping",
        c.early_stopping >= 0 and (c.heldout > 0 or not c.early_stopping),
        "must be at least 0, and needs heldout above 0",
        "It counts evaluations on held-out labels.",
    )
    alone = c.loss != "elr" or not (c.sam or c.mixup)
    require(c, "loss", alone, "elr goes neither with sam nor with mixup", "Set both to 0.")


def check_optimizer(c: TrainFields) -> None:
    """The optimizer and the learning rate's schedule."""
    rate = "must be above 0 and finite"
    require(c, "lr", 0 < c.lr < math.inf, rate, "0.05 suits the demo.")
    require(c, "momentum", 0 <= c.momentum < 1, "must lie in [0, 1)", "0.9 is usual.")
    decay = "must be at least 0 and finite"
    require(c, "weight_decay", 0 <= c.weight_decay < math.inf, decay, "5e-4 is usual.")
    require(c, "gamma", 0 < c.gamma < 1, "must lie in (0, 1)", "0.1 is usual.")
    averaging = c.optimizer == "schedule-free" and bool(c.ema or c.early_stopping)
    require(
        c,
        "optimizer",
        not averaging,
        "averages weights itself, and goes neither with ema nor with early_stopping",
        "Set both to 0.",
    )
    whole = not c.clip or c.policy != "gaf" or c.scope == "all"
    require(
        c,
        "clip",
        0 <= c.clip < math.inf and whole,
        "must be at least 0 and finite, and goes with scope 'all' alone",
        "1 is usual, 0 is none.",
    )
    inside = all(0 < m < 1 for m in c.milestones)
    require(c, "milestones", inside, "must lie in (0, 1)", "They are shares of the run.")
    require(c, "patience", c.patience >= 0, "must be at least 0", "It counts looks at the loss.")
    require(
        c, "plateau_every", c.plateau_every >= 1, "must be at least 1", "It counts evaluations."
    )
    moving = not c.nesterov or c.momentum > 0
    require(c, "nesterov", moving, "needs momentum above 0", "Set momentum, or nesterov off.")
    require(
        c,
        "select_on",
        c.select_on == "test" or c.heldout > 0 or c.schedule != "plateau",
        "needs heldout above 0 for a plateau schedule",
        "Set heldout, or select_on 'test'.",
    )


def check_filter(c: TrainFields) -> None:
    """The policy and its settings."""
    paper = "It is a cosine distance; the paper uses 0.97."
    require(c, "tau", 0 <= c.tau <= 2, "must lie in [0, 2]", paper)
    # k = 1 passes with the default; the commands that refuse k = 1 have a better message
    most_accepted = max(c.k, 2) if c.policy == "gaf" else math.inf
    require(
        c,
        "min_accepted",
        1 <= c.min_accepted <= most_accepted,
        f"must be at least 1 and at most k = {c.k}, or no step is ever taken",
        "The paper uses 2.",
    )
    chance = 0 <= c.step_probability <= 1
    require(c, "step_probability", chance, "must lie in [0, 1]", "Give GAF's share of steps.")
    require(
        c,
        "scope",
        c.scope == "all" or (c.bn == "all" and c.threshold == "fixed"),
        "'group' and 'layer' go with bn 'all' and a fixed threshold alone: each part accepts other "
        "micro-batches",
        "Set bn 'all' and threshold 'fixed', or scope 'all'.",
    )
    moments = c.metric != "optimizer" or c.optimizer in ("adam", "adamw", "rmsprop")
    fix = "Use --optimizer adam, or --metric whitened."
    require(c, "metric", moments, "needs the second moments of adam, adamw or rmsprop", fix)
    require(
        c,
        "threshold_by",
        c.threshold_by is None or math.isfinite(c.threshold_by),
        "must be finite",
        "Leave it out for the threshold's own default.",
    )
    require(
        c,
        "half_life",
        c.half_life >= 0 and (not c.half_life or c.threshold == "quantile"),
        "must be at least 0, and goes with threshold 'quantile' alone",
        "It counts steps; 0 is never.",
    )
    replayed = c.replay is not None or c.policy not in REPLAYING
    needed = f"must be set for policy {c.policy!r}"
    require(c, "replay", replayed, needed, "Give the folder of a gaf run.")
    differs = c.policy not in REPEATING or c.k != 2 or c.min_accepted != 2
    same = f"must not be 2 for policy {c.policy!r}: GAF takes both or none, so it repeats GAF's run"
    require(c, "k", differs, same, "Use policy 'random-skip'.")


def check_growing(c: TrainFields) -> None:
    """Steps that average as many micro-batches as it takes."""
    half = "0.5 asks for as much signal as noise."
    require(c, "rho", 0 < c.rho < 1, "must be above 0 and below 1", half)
    require(c, "at_most", c.at_most >= 2, "must be at least 2", "It counts micro-batches.")
    grows = c.policy in GROWING
    alone = f"must be 1 for policy {c.policy!r}, which adds micro-batches up one by one"
    require(c, "k", not grows or c.k == 1, alone, "Set --k 1.")
    scaled = "must be 'constant' for a policy with k micro-batches per step"
    require(c, "rate_by", grows or c.rate_by == "constant", scaled, "Scale lr itself.")
    no_pause = f"must be off for policy {c.policy!r}, whose schedule counts micro-batches"
    require(c, "schedule_waits", not (grows and c.schedule_waits), no_pause, "Leave it out.")


def check_length(c: TrainFields) -> None:
    """Refuses a step with more samples than the run, and a run of absurdly many steps."""
    if c.task:
        return  # how many samples it has is known once it has been called
    samples = max(c.passes, 1) * PICTURES[c.dataset]
    if c.k * c.b > samples:
        raise ConfigError(
            f"k and b must not make a step hold more samples than the whole run, {samples:,.0f}; "
            f"got k = {c.k:,} and b = {c.b:,}. Lower them."
        )
    steps = samples / (c.k * c.b)
    if steps >= MOST_STEPS:
        raise ConfigError(
            f"passes must need fewer than {MOST_STEPS:,} steps; got {c.passes:g}, "
            f"which need {steps:.2g}. Lower passes."
        )
