"""What can be set about a training run: the fields of its config, with their help texts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gaf_lab.settings.choices import (
    DataName,
    MetricName,
    ModelName,
    NoiseName,
    OptimizerName,
    PolicyName,
    SamplerName,
    ThresholdName,
)


@dataclass(frozen=True)
class TrainFields:
    """The fields of a run's config. `gaf_lab.settings.config.TrainConfig` checks and names them."""

    task: str = ""
    """Your own task: a function that returns a gaf_lab.Problem, as module:function or
    file.py:function (docs/your-task.md).
    Without it, the task is dataset and model. With it, noise is none by default."""
    task_source: str = ""
    """First digits of the SHA-256 of the task's source file; filled in from the file."""
    dataset: DataName = "mnist5k"
    """Pictures to train on."""
    noise: NoiseName = "symmetric"
    """How training labels are made wrong.
    symmetric: flip to any other class.
    asymmetric: flip to the next class (within the super-class).
    human: use human labels.
    task: the task makes them wrong itself, by noise_rate."""
    noise_rate: float = 0.4
    """Share of training labels that are flipped, in [0, 1); for symmetric, asymmetric and task.
    Higher is harder."""
    heldout: float = 0.1
    """Share of the training set kept, with its noisy labels, to select an epoch, in [0, 1).
    Higher selects better and trains less."""
    sampler: SamplerName = "iid"
    """How micro-batches are drawn. iid: in shuffled passes; stratified: equally many of each class.
    The class is that of the observed label or of the clean one.
    sharded: an eighth of each step from each of eight parts, wrong labels in the first ones."""
    augment: bool = False
    """Random crop with padding 4 and horizontal flip.
    For imagenet: a random resized crop and flip."""
    limit: int = 0
    """Uses only so many training pictures, and as many test pictures, always the same. 0: all.
    Lower is faster and memorises more."""
    size: int = 224
    """For imagenet: height and width of the resized pictures, a multiple of 16 for the ViTs.
    Higher costs time and memory."""

    model: ModelName = "mlp"
    """Network. mlp: pixels-512-512-classes; mlp-small: pixels-128-128-classes."""
    stem: Literal["imagenet", "cifar"] = "cifar"
    """First layers of a ResNet: 7x7 with stride 2 and max-pool, or 3x3.
    "imagenet" is faster and less accurate on small pictures."""

    k: int = 8
    """Micro-batches per step, at least 1.
    Higher lets the filter choose among more and averages over more."""
    b: int = 20
    """Samples per micro-batch, at least 1.
    Higher makes micro-gradients agree more, so that the same tau filters less."""
    passes: float = 40.0
    """Length of the run in passes over the training set.
    A step counts k * b samples, skipped steps included."""
    eval_every: float = 2.0
    """Passes between evaluations, each with a checkpoint.
    Lower gives finer curves and costs time."""
    probe: int = 5000
    """Training samples, a fixed draw, on which memorisation is measured.
    Higher is more exact and costs time."""

    optimizer: OptimizerName = "sgd"
    """Optimizer. muon: torch's, for matrices, and adamw for the rest.
    lamb, lion, soap, shampoo and schedule-free (AdamW's) are of the package pytorch-optimizer.
    adamw-all, rmsprop-all: those whose second moments see rejected micro-gradients too."""
    lr: float = 0.05
    """Learning rate, above 0. Higher learns and memorises faster."""
    momentum: float = 0.9
    """Momentum of sgd, rmsprop, rmsprop-all and muon, in [0, 1)."""
    nesterov: bool = False
    """Nesterov momentum, for sgd and muon."""
    weight_decay: float = 0.0
    """Weight decay, at least 0. Higher keeps weights smaller."""
    clip: float = 0.0
    """Largest norm of the update, over all parameters. 0: no clipping; lower clips more."""
    schedule: Literal["constant", "cosine", "multi-step", "plateau"] = "constant"
    """Learning rate over the run. cosine: falls to 0 along a cosine.
    multi-step: times gamma at milestones. plateau: times gamma at a plateau of the loss."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """For multi-step: shares of the run after which the learning rate falls, in (0, 1)."""
    gamma: float = 0.1
    """For multi-step and plateau: factor of the learning rate, in (0, 1)."""
    patience: int = 100
    """For plateau: looks at the loss without improvement before the learning rate falls.
    Higher waits longer."""
    plateau_every: int = 1
    """For plateau: evaluations between looks at the loss, at least 1."""
    schedule_waits: bool = False
    """Whether a skipped step pauses the schedule (the paper).
    Without it, all arms have the same learning rates."""
    select_on: Literal["heldout", "test"] = "heldout"
    """Labels that drive the plateau schedule. The released code uses the test set."""

    loss: Literal["cross-entropy", "gce", "elr"] = "cross-entropy"
    """Loss to minimise. gce: generalised cross-entropy (arXiv 1805.07836).
    elr: early-learning regularisation (arXiv 2007.00151)."""
    label_smoothing: float = 0.0
    """Share of the label spread over all classes, in [0, 1); for cross-entropy (arXiv 1512.00567).
    Higher trusts labels less."""
    gce_q: float = 0.7
    """For gce: q in (0, 1]; towards 0 it is cross-entropy, at 1 the mean absolute error.
    Higher trusts labels less."""
    elr_beta: float = 0.7
    """For elr: weight of the past in a sample's target, in [0, 1)."""
    elr_lambda: float = 3.0
    """For elr: weight of the regulariser, at least 0.
    Higher holds the model to its early predictions."""
    mixup: float = 0.0
    """Alpha of the Beta distribution by which pictures and labels are mixed (arXiv 1710.09412).
    0: no mixing; higher mixes more."""
    sam: float = 0.0
    """Radius of sharpness-aware minimisation for each micro-batch, at least 0 (arXiv 2010.01412).
    0: none; doubles the time of a step."""
    ema: float = 0.0
    """Decay per step taken, in [0, 1), of an average of the weights.
    The average is evaluated in place of the weights. 0: none."""
    early_stopping: int = 0
    """Evaluations without a better accuracy on held-out labels before the run ends.
    Its result is the best weights. 0: none."""

    policy: PolicyName = "gaf"
    """What is done with the k micro-gradients; guard and median: gaf.Guard and gaf.Median.
    replay-skip, random-subset and scaled-lr need `replay`.
    until-agreement, replay-sizes and mean-size add micro-batches up one by one, with k = 1."""
    tau: float = 0.8
    """For gaf: largest accepted cosine distance to the running sum, in [0, 2].
    Lower filters more."""
    threshold: ThresholdName = "fixed"
    """For gaf: whether tau is fixed or follows past steps.
    See gaf.thresholds. auto: the recommended one."""
    threshold_by: float | None = None
    """kappa of signal, z of noise-floor, p of quantile, margin of moving-average.
    Without it, the threshold's own default. Higher filters more, except for p."""
    half_life: int = 0
    """For quantile: steps in which its p halves; 0: never."""
    start: Literal["first", "best", "worst"] = "first"
    """For gaf: the micro-gradient that the running sum starts from."""
    average: Literal["mean", "halving"] = "mean"
    """For gaf: the paper's mean, or the released code's halving."""
    min_accepted: int = 2
    """For gaf: a step with fewer accepted micro-gradients is skipped; at least 1.
    Higher skips more."""
    scope: Literal["all", "group", "layer"] = "all"
    """For gaf: one decision for the whole gradient, for each bucket, or for each layer.
    Buckets are those that DistributedDataParallel would make."""
    metric: MetricName = "euclidean"
    """For gaf: the inner product by which micro-gradients agree; see docs/metrics.md."""
    step_probability: float = 0.5
    """For random-skip: chance that a step is taken, in [0, 1].
    With `replay`: the share of steps that the recorded run took."""
    rho: float = 0.7
    """For until-agreement: share of the mean gradient that is to be signal, above 0 and below 1.
    Higher averages over more micro-batches."""
    at_most: int = 64
    """For until-agreement: micro-batches of a step, at least 2."""
    rate_by: Literal["constant", "linear", "sqrt"] = "constant"
    """How the learning rate grows with a step's micro-batches, where their number varies."""
    replay: Path | None = None
    """For controls: folder of a recorded run. Repeated are its steps (replay-skip, random-subset),
    acceptance (scaled-lr), micro-batches per step (replay-sizes), or their mean (mean-size)."""
    bn: Literal["all", "accepted"] = "all"
    """Which micro-batches move BatchNorm's running statistics."""

    seed: int = 0
    """Seed of noise, split, initial weights, sampling and augmentation.
    Runs with the same seed are paired."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Precision of the forward pass."""
    channels_last: bool = False
    """Memory layout of pictures and weights; changes the speed."""
    compile: bool = False
    """Whether the model is compiled by torch.compile.
    Takes a minute at the start and makes steps of some models faster."""
    engine: Literal["auto", "plain", "device"] = "auto"
    """plain: gaf.Accumulator, which waits for the decision.
    device: a step that never waits, on CUDA captured as a graph.
    auto takes device on CUDA if it supports the config.
    Both decide alike."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA if there is a CUDA device."""
    label: str = ""
    """Name of the arm in tables and figures; without it, the fields above give a name.
    Changes nothing else."""
