"""What one training run is: a frozen, typed config. The command line and TOML files are both derived from it."""

import dataclasses
import datetime
import difflib
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DataName = Literal[
    "digits",
    "mnist5k",
    "fashion-mnist",
    "cifar10",
    "cifar100",
    "cifar100n",
    "cifar100n-coarse",
    "noise",
    "imagenet",
]
NoiseName = Literal["none", "symmetric", "asymmetric", "human"]
SamplerName = Literal["iid", "stratified-observed", "stratified-clean"]
ModelName = Literal[
    "mlp", "convnet", "resnet18", "resnet34", "preact-resnet34", "vit-l16", "vit-tiny"
]
ThresholdName = Literal["fixed", "auto", "signal", "noise-floor", "quantile", "moving-average"]
PolicyName = Literal["mean", "gaf", "random-skip", "replay-skip", "random-subset", "scaled-lr"]

# training pictures of each data set
PICTURES = {
    "digits": 1438, "mnist5k": 4000, "fashion-mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000, "cifar100n": 50_000,
    "cifar100n-coarse": 50_000, "noise": 50_000, "imagenet": 1_281_167,
}  # fmt: skip
MOST_STEPS = 10**9
LEAST_PASSES = 1e-6
MOST_PIXELS = 4096
MOST_SEEDS, MOST_RUNS = 1000, 100_000
MOST_WORKERS = 512  # a process with torch is some 300 MB


class ConfigError(ValueError):
    """A config that cannot be run; the message names the field, what it must be, its value and the fix."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are those of the demo."""

    dataset: DataName = "mnist5k"
    """Pictures to train on."""
    noise: NoiseName = "symmetric"
    """How training labels are made wrong: to any other class, to the next class (of the super-class), or as people did."""
    noise_rate: float = 0.4
    """Share of training labels that are flipped, in [0, 1); for symmetric and asymmetric. Higher is harder."""
    heldout: float = 0.1
    """Share of the training set that is kept, with its noisy labels, to select an epoch, in [0, 1). Higher selects better, trains less."""
    sampler: SamplerName = "iid"
    """How micro-batches are drawn: in shuffled passes, or with as many of each class, by the observed or by the clean label."""
    augment: bool = False
    """Random crop with padding 4 and horizontal flip; for imagenet a random resized crop and flip."""
    limit: int = 0
    """Uses only this many training pictures, and as many test pictures, always the same; 0 uses all. Lower is faster and memorises more."""
    size: int = 224
    """For imagenet: height and width that pictures are brought to, a multiple of 16 for the ViTs. Higher costs time and memory."""

    model: ModelName = "mlp"
    """Network. mlp: pixels-512-512-classes."""
    stem: Literal["imagenet", "cifar"] = "cifar"
    """First layers of a ResNet: 7x7 with stride 2 and max-pool, or 3x3. "imagenet" is faster and less accurate on small pictures."""

    k: int = 8
    """Micro-batches per step, at least 1. Higher lets the filter choose among more and averages over more."""
    b: int = 20
    """Samples per micro-batch, at least 1. Higher makes micro-gradients agree more, so that the same tau filters less."""
    passes: float = 40.0
    """Length of the run in passes over the training set (k * b samples a step, stepped on or not)."""
    eval_every: float = 2.0
    """Passes between evaluations, each with a checkpoint. Lower gives finer curves and costs time."""
    probe: int = 5000
    """Training samples, a fixed draw, on which memorisation is measured. Higher is more exact and costs time."""

    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    """Optimizer of torch.optim."""
    lr: float = 0.05
    """Learning rate, above 0. Higher learns and memorises faster."""
    momentum: float = 0.9
    """Momentum of sgd and rmsprop, in [0, 1)."""
    nesterov: bool = False
    """Nesterov momentum, for sgd."""
    weight_decay: float = 0.0
    """Weight decay, at least 0. Higher keeps weights smaller."""
    schedule: Literal["constant", "cosine", "multi-step", "plateau"] = "constant"
    """Learning rate over the run: as it is, to 0 along a cosine, times gamma at milestones, times gamma at a plateau of the loss."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """For multi-step: shares of the run after which the learning rate falls, in (0, 1)."""
    gamma: float = 0.1
    """For multi-step and plateau: what the learning rate is multiplied by, in (0, 1)."""
    patience: int = 100
    """For plateau: looks at the loss without improvement before the learning rate falls. Higher waits longer."""
    plateau_every: int = 1
    """For plateau: evaluations between looks at the loss, at least 1."""
    schedule_waits: bool = False
    """Whether a skipped step holds the schedule back (the paper) or not, so that all arms see the same learning rates."""
    select_on: Literal["heldout", "test"] = "heldout"
    """What drives the plateau schedule. The released code uses the test set."""

    loss: Literal["cross-entropy", "gce", "elr"] = "cross-entropy"
    """What is minimised: cross-entropy, generalised cross-entropy (arXiv 1805.07836) or early-learning regularisation (2007.00151)."""
    label_smoothing: float = 0.0
    """Share of the label that is spread over all classes, in [0, 1), for cross-entropy (arXiv 1512.00567). Higher trusts labels less."""
    gce_q: float = 0.7
    """For gce: q in (0, 1]; towards 0 it is cross-entropy, at 1 the mean absolute error. Higher trusts labels less."""
    elr_beta: float = 0.7
    """For elr: weight of the past in a sample's target, in [0, 1)."""
    elr_lambda: float = 3.0
    """For elr: weight of the regulariser, at least 0. Higher holds the model to what it said early on."""
    mixup: float = 0.0
    """Alpha of the Beta distribution by which pictures and labels are mixed (arXiv 1710.09412). 0: not at all; higher mixes more."""
    sam: float = 0.0
    """Radius of sharpness-aware minimisation for each micro-batch, at least 0 (arXiv 2010.01412). 0: none; doubles the time of a step."""
    ema: float = 0.0
    """Decay, per step taken, of an average of the weights that is evaluated in their place, in [0, 1). 0: none."""
    early_stopping: int = 0
    """Evaluations without a better accuracy on held-out labels before the run ends; its end is at its best weights. 0: none."""

    policy: PolicyName = "gaf"
    """What is done with the k micro-gradients. replay-skip, random-subset and scaled-lr need `replay`."""
    tau: float = 0.8
    """For gaf: largest cosine distance to the running sum that is accepted, in [0, 2]. Lower filters more."""
    threshold: ThresholdName = "fixed"
    """For gaf: whether tau stays as it is, or is set by what the steps have shown; see gaf.thresholds. auto: the recommended one."""
    threshold_by: float | None = None
    """What the threshold goes by: kappa of signal, z of noise-floor, p of quantile, margin of moving-average; without it, the one's own
    default. Higher filters more, but for p."""
    half_life: int = 0
    """For quantile: steps in which its p halves; 0: never."""
    start: Literal["first", "best", "worst"] = "first"
    """For gaf: the micro-gradient that the running sum starts from."""
    average: Literal["mean", "halving"] = "mean"
    """For gaf: the paper's mean, or the released code's halving."""
    min_accepted: int = 2
    """For gaf: accepted micro-gradients without which the step is skipped, at least 1. Higher skips more."""
    scope: Literal["all", "group", "layer"] = "all"
    """For gaf: one decision for the whole gradient, for each bucket that DistributedDataParallel would make, or for each layer."""
    step_probability: float = 0.5
    """For random-skip: chance that a step is taken, in [0, 1]; with `replay` the share of steps that the recorded run took."""
    replay: Path | None = None
    """For controls: folder of the run whose recorded steps (replay-skip, random-subset) or acceptance (scaled-lr) are taken over."""
    bn: Literal["all", "accepted"] = "all"
    """Which micro-batches move BatchNorm's running statistics."""

    seed: int = 0
    """Of noise, split, initial weights, sampling and augmentation. Runs with the same seed are paired."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Precision of the forward pass."""
    channels_last: bool = False
    """Memory layout of pictures and weights; changes the speed."""
    compile: bool = False
    """Whether the model goes through torch.compile: a minute at the start, faster steps where it helps."""
    engine: Literal["auto", "plain", "device"] = "auto"
    """plain: gaf.Accumulator, which waits for the decision; device: a step that never waits, on CUDA captured as a graph. auto takes
    device on CUDA wherever it can run the config. Both decide alike."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is one."""
    label: str = ""
    """What tables and figures call the arm; without it, its name comes from the fields above. Changes nothing else."""

    def __post_init__(self) -> None:
        check_tau(self.tau)
        for field in dataclasses.fields(self):
            check_type(field, getattr(self, field.name))
        rules = {
            "noise_rate": (0 <= self.noise_rate < 1, "must lie in [0, 1)", "It is the share of labels that are flipped."),
            "heldout": (0 <= self.heldout < 1, "must lie in [0, 1)", "0.1 keeps a tenth."),
            "k": (self.k >= 1, "must be at least 1", "It is the number of micro-batches per step."),
            "b": (self.b >= 1, "must be at least 1", "It is the number of samples per micro-batch."),
            "passes": (0 < self.passes < math.inf, "must be above 0 and finite", "It is the length of the run."),
            "eval_every": (LEAST_PASSES <= self.eval_every < math.inf, f"must be at least {LEAST_PASSES:g} and finite", "It is in passes."),
            "probe": (self.probe >= 1, "must be at least 1", "5000 is usual."),
            "limit": (self.limit >= 0, "must be at least 0", "0 uses all pictures."),
            "size": (16 <= self.size <= MOST_PIXELS, f"must lie in [16, {MOST_PIXELS}]", "224 is usual."),
            "label_smoothing": (0 <= self.label_smoothing < 1 and (not self.label_smoothing or self.loss == "cross-entropy"),
                                "must lie in [0, 1), and goes with cross-entropy alone", "Set it to 0, or loss to 'cross-entropy'."),
            "gce_q": (0 < self.gce_q <= 1, "must lie in (0, 1]", "0.7 is usual."),
            "elr_beta": (0 <= self.elr_beta < 1, "must lie in [0, 1)", "0.7 is usual."),
            "elr_lambda": (0 <= self.elr_lambda < math.inf, "must be at least 0 and finite", "3 is usual."),
            "mixup": (0 <= self.mixup < math.inf, "must be at least 0 and finite", "1 is usual."),
            "sam": (0 <= self.sam < math.inf, "must be at least 0 and finite", "0.05 is usual."),
            "ema": (0 <= self.ema < 1, "must lie in [0, 1)", "0.99 is usual."),
            "early_stopping": (self.early_stopping >= 0 and (self.heldout > 0 or not self.early_stopping),
                               "must be at least 0, and needs heldout above 0", "It counts evaluations on held-out labels."),
            "lr": (0 < self.lr < math.inf, "must be above 0 and finite", "0.05 suits the demo."),
            "momentum": (0 <= self.momentum < 1, "must lie in [0, 1)", "0.9 is usual."),
            "weight_decay": (0 <= self.weight_decay < math.inf, "must be at least 0 and finite", "5e-4 is usual."),
            "gamma": (0 < self.gamma < 1, "must lie in (0, 1)", "0.1 is usual."),
            "milestones": (all(0 < m < 1 for m in self.milestones), "must lie in (0, 1)", "They are shares of the run."),
            "patience": (self.patience >= 0, "must be at least 0", "It counts looks at the loss."),
            "plateau_every": (self.plateau_every >= 1, "must be at least 1", "It counts evaluations."),
            "tau": (0 <= self.tau <= 2, "must lie in [0, 2]", "It is a cosine distance; the paper uses 0.97."),
            # k = 1 with the default passes, for the commands that refuse k = 1 say so better
            "min_accepted": (1 <= self.min_accepted <= (max(self.k, 2) if self.policy == "gaf" else math.inf),
                             f"must be at least 1 and at most k = {self.k}, or no step is ever taken", "The paper uses 2."),
            "step_probability": (0 <= self.step_probability <= 1, "must lie in [0, 1]", "Give GAF's share of steps."),
            "nesterov": (not self.nesterov or self.momentum > 0, "needs momentum above 0", "Set momentum, or nesterov off."),
            "scope": (self.scope == "all" or (self.bn == "all" and self.threshold == "fixed"),
                      "'group' and 'layer' go with bn 'all' and a fixed threshold alone: each part accepts other micro-batches",
                      "Set bn 'all' and threshold 'fixed', or scope 'all'."),
            "threshold_by": (self.threshold_by is None or math.isfinite(self.threshold_by), "must be finite",
                             "Leave it out for the threshold's own default."),
            "half_life": (self.half_life >= 0 and (not self.half_life or self.threshold == "quantile"),
                          "must be at least 0, and goes with threshold 'quantile' alone", "It counts steps; 0 is never."),
            "replay": (self.replay is not None or self.policy not in REPLAYING, f"must be set for policy {self.policy!r}",
                       "Give the folder of a gaf run."),
            "loss": (self.loss != "elr" or not (self.sam or self.mixup), "elr goes neither with sam nor with mixup", "Set both to 0."),
            "select_on": (self.select_on == "test" or self.heldout > 0 or self.schedule != "plateau",
                          "needs heldout above 0 for a plateau schedule", "Set heldout, or select_on 'test'."),
        }  # fmt: skip
        for name, (holds, requirement, fix) in rules.items():
            if not holds:
                raise ConfigError(f"{name} {requirement}; got {getattr(self, name)!r}. {fix}")
        if self.noise == "human" and self.dataset not in ("cifar100n", "cifar100n-coarse"):
            raise ConfigError(
                f"noise 'human' needs a data set with human labels; got {self.dataset!r}. Use cifar100n or cifar100n-coarse."
            )
        check_length(self)

    @property
    def arm(self) -> str:
        """The label, or a name from what the config does with micro-gradients, loss and weights."""
        return self.label or named(self)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        values = dataclasses.asdict(self)
        return values | {
            "replay": None if self.replay is None else str(self.replay),
            "milestones": list(self.milestones),
        }

    @property
    def hash(self) -> str:
        """Twelve hex digits that differ where the run does: the label says nothing, and of a replayed run only its folder's name counts.

        A field that came to be after records were kept counts once it leaves its default, so that older records keep their hash.
        """
        counted = {
            name: value
            for name, value in self.plain().items()
            if name not in LATER or value != LATER[name]
        }
        del counted["label"]
        counted |= {"replay": None if self.replay is None else self.replay.name}
        return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:12]


def label_noise(config: TrainConfig) -> str:
    """What is wrong with the training labels, in words: "40% symmetric label noise", "human labels"; empty where they are clean."""
    if config.noise == "human":
        return "human labels"
    return (
        f"{100 * config.noise_rate:g}% {config.noise} label noise"
        if config.noise != "none" and config.noise_rate
        else ""
    )


REPLAYING = ("replay-skip", "random-subset", "scaled-lr")
ARMS = {
    "mean": "averaging", "gaf": "GAF", "random-skip": "random skip", "replay-skip": "replay skip", "random-subset": "random subset",
    "scaled-lr": "averaging, scaled rate",
}  # fmt: skip
LATER = {
    "limit": 0, "size": 224, "loss": "cross-entropy", "label_smoothing": 0.0, "gce_q": 0.7, "elr_beta": 0.7,
    "elr_lambda": 3.0, "mixup": 0.0, "sam": 0.0, "ema": 0.0, "early_stopping": 0, "scope": "all", "threshold": "fixed",
    "threshold_by": None, "half_life": 0, "compile": False, "engine": "auto",
}  # fmt: skip


def named(config: TrainConfig) -> str:
    """What sets an arm apart, in words: "GAF, start best", "label smoothing", "averaging, AdamW"."""
    techniques = {
        "GCE": config.loss == "gce", "ELR": config.loss == "elr", "label smoothing": config.label_smoothing, "mixup": config.mixup,
        "SAM": config.sam, "EMA of weights": config.ema, "early stopping": config.early_stopping,
    }  # fmt: skip
    used = [name for name, on in techniques.items() if on]
    filtering, by = config.policy == "gaf", config.threshold_by
    variants = {
        f"{config.threshold} {'' if by is None else f'{by:g}'}".strip(): filtering and config.threshold not in ("fixed", "auto"),
        "tau auto": filtering and config.threshold == "auto", f"half-life {config.half_life}": filtering and config.half_life,
        f"start {config.start}": filtering and config.start != "first", "halving": filtering and config.average == "halving",
        "per bucket": filtering and config.scope == "group", "per layer": filtering and config.scope == "layer",
        OPTIMIZERS[config.optimizer]: config.optimizer != "sgd",
    }  # fmt: skip
    base = [] if config.policy == "mean" and used else [ARMS[config.policy]]
    return ", ".join([" + ".join(base + used), *(name for name, on in variants.items() if on)])


OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}


def check_tau(tau: Any) -> None:
    """The library's "auto" is a threshold here."""
    if tau == "auto":
        raise ConfigError(
            "tau must be a number; got 'auto'. For the recommended threshold, which sets tau, use --threshold auto."
        )


# what a field takes, and how TOML calls it
KINDS: dict[Any, tuple[Any, str]] = {
    int: (int, "an integer"),
    float: ((int, float), "a float"),
    bool: (bool, "a boolean"),
    str: (str, "a string"),
    Path: (Path, "a path, in TOML a string"),
    tuple: (tuple, "an array of floats"),
}


def check_type(field: "dataclasses.Field[Any]", value: Any) -> None:
    choices = get_args(field.type)
    if choices and all(isinstance(c, str) for c in choices):
        if value not in choices:
            raise ConfigError(
                f"{field.name} must be one of {', '.join(choices)}; got {shown(value)}.{nearest(str(value), choices)}"
            )
        return
    if value is None and type(None) in choices:
        return
    known = [kind for kind in (field.type, get_origin(field.type), *choices) if kind in KINDS]
    types, words = KINDS[known[0]]
    if not of_type(value, types):
        raise ConfigError(f"{field.name} must be {words}; got {toml_kind(value)}{example(field)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{field.name} must fit into 64 bits; got {value:.3g}{example(field)}")


def of_type(value: Any, types: Any) -> bool:
    if isinstance(value, bool) and types is not bool:
        return False
    if types is tuple and isinstance(value, tuple):
        return all(of_type(one, (int, float)) for one in value)
    return isinstance(value, types)


def example(field: "dataclasses.Field[Any]") -> str:
    """How a field is written, by its default; a bare full stop where it has none."""
    known = field.default is not None and field.default != ""
    return f". It is written as in {field.name} = {toml(field.default)}." if known else "."


def toml(value: Any) -> str:
    """A value as a TOML file has it, cut off where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def toml_kind(value: Any) -> str:
    """A value, and what TOML calls its kind, which is nothing for a value that TOML does not know."""
    names = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "an array", tuple: "an array",
             dict: "a table"}  # fmt: skip
    if type(value) in names:
        return f"{names[type(value)]}, {toml(value)}"
    return (
        f"a date or time, {value}"
        if isinstance(value, datetime.date | datetime.time)
        else repr(value)
    )


def shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else toml_kind(value)


def check_length(config: TrainConfig) -> None:
    """ConfigError where a step would hold more samples than the run, or the run more steps than anyone waits for."""
    drawn = max(config.passes, 1) * PICTURES[config.dataset]
    if config.k * config.b > drawn:
        raise ConfigError(
            f"k and b must not make a step hold more samples than the whole run, {drawn:,.0f}; got k = {config.k:,} and "
            f"b = {config.b:,}. Lower them."
        )
    steps = drawn / (config.k * config.b)
    if steps >= MOST_STEPS:
        raise ConfigError(
            f"passes must need fewer than {MOST_STEPS:,} steps; got {config.passes:g}, which need {steps:.2g}. Lower passes."
        )


def check_count(name: str, value: int, least: int, most: int, fix: str = "") -> None:
    """ConfigError where a number of things is too small, or absurd."""
    if value < least:
        raise ConfigError(f"{name} must be at least {least}; got {value}.{fix and ' ' + fix}")
    if value > most:
        raise ConfigError(f"{name} must be at most {most:,}; got {value:,}.{fix and ' ' + fix}")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def nearest(word: str, known: Any) -> str:
    """A question that suggests the nearest known word; empty where none is really near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def from_dict(values: dict[str, Any], base: TrainConfig, source: str) -> TrainConfig:
    """`base` with values from a TOML file or a record. An unknown key is refused with the nearest known one."""
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(
                f"{source}: unknown key {key!r}.{nearest(key, known)} Known keys: {', '.join(known)}."
            )
    converted = dict(values)
    if isinstance(converted.get("milestones"), list):
        converted["milestones"] = tuple(converted["milestones"])
    if isinstance(converted.get("replay"), str):
        converted["replay"] = Path(converted["replay"])
    for name, value in converted.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        if whole and isinstance(getattr(base, name), float):
            converted[name] = float(value)
    try:
        return dataclasses.replace(base, **converted)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def from_toml(path: Path, base: TrainConfig) -> TrainConfig:
    source = f"config file {path}"
    values = read_toml(path, source, "Write one with keys as in `gaf train --help`.")
    return from_dict(values, base, source)


def read_toml(path: Path, source: str, fix: str) -> dict[str, Any]:
    """The tables of a TOML file. source: what messages call it; fix: what one does where there is none."""
    if path.is_dir():
        raise ConfigError(f"{source}: must be a file; it is a folder. {fix}")
    if not path.exists():
        raise ConfigError(f"{source}: must exist; it does not. {fix}")
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{source}: must be readable; it is not ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source}: must be UTF-8, as TOML is; byte {error.start + 1} is not. Save it as UTF-8."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: must be TOML; {error}.") from None
