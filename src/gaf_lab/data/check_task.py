"""What a task must be to run under a config. Each message has the fix."""

from collections.abc import Sequence

from torch import Tensor, nn

from gaf_lab.data.problem import Problem, count_samples
from gaf_lab.data.samples import Samples
from gaf_lab.data.sources import DataError
from gaf_lab.own_code import misfit
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig


def check_task(
    config: TrainConfig, problem: Problem, train: Samples, test: Samples, classes: int
) -> None:
    """Refuses a task that does not go with the config.

    classes: how many there are; 0 if the targets are no classes.
    """
    check_functions(problem)
    check_loss_of(config, problem, classes)
    check_clean(problem)
    check_names("class_names", problem.class_names, classes, "classes")
    samples = count_samples(problem.train)
    check_names("sample_names", problem.sample_names, samples, "training samples")
    check_restart(config, problem)
    if not classes:
        check_without_classes(config, train)
        return
    check_label_range(train.observed, classes, "train")
    check_label_range(test.observed, classes, "test")


def check_functions(problem: Problem) -> None:
    """Refuses functions of the task that cannot be called as they will be."""
    metric = None if problem.metric is None else problem.metric.of
    for name, function in (("loss", problem.loss), ("metric", metric)):
        if function is not None and (seen := misfit(function, 2)):
            raise ConfigError(
                f"the task's {name} must take two arguments, (output, target); got {seen}. "
                "Give the others defaults."
            )


def check_trains(model: nn.Module) -> None:
    """Refuses a model of which nothing is trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        count = len(list(model.parameters()))
        raise ConfigError(
            "the task's model must have a parameter that requires grad; none of its "
            f"{count} parameters does. Leave one unfrozen."
        )


def check_loss_of(config: TrainConfig, problem: Problem, classes: int) -> None:
    if problem.loss is None and not classes:
        raise ConfigError(
            "the task must give a loss unless its targets are classes (N,) of int64 from 0 on; "
            "it gives none. Return Problem(loss=...): (output, target) -> one loss per sample."
        )
    replaced = {"loss": "cross-entropy", "label_smoothing": 0.0}
    for name, usual in replaced.items():
        if problem.loss is not None and getattr(config, name) != usual:
            raise ConfigError(
                f"{name} must be {usual!r} for a task with a loss of its own, which it would "
                f"replace; got {getattr(config, name)!r}. Set --{name.replace('_', '-')} {usual}, "
                "or let the task leave loss out."
            )


def check_restart(config: TrainConfig, problem: Problem) -> None:
    if config.audit_passes and isinstance(problem.model, nn.Module):
        raise ConfigError(
            "model must be a function that makes one for an audit, after which the run starts "
            "again from new weights; got a module. Return Problem(model=lambda: ...)."
        )


def check_clean(problem: Problem) -> None:
    """Refuses clean targets that are not those of the training samples."""
    if problem.clean is None:
        return
    like = problem.train[1] if isinstance(problem.train, tuple) else None
    n, clean = count_samples(problem.train), problem.clean
    alike = isinstance(clean, Tensor) and len(clean) == n
    if like is not None and isinstance(clean, Tensor):
        alike = (clean.shape, clean.dtype) == (like.shape, like.dtype)
    if alike:
        return
    seen = tuple(clean.shape) if isinstance(clean, Tensor) else type(clean).__name__
    raise ConfigError(
        "clean must be a tensor like the targets of train; "
        f"got {seen}. Leave it out if the true targets are not known."
    )


def check_names(field: str, names: Sequence[str], count: int, what: str) -> None:
    if len(names) not in (0, count):
        raise ConfigError(
            f"{field} must be as many as the {what}, {count:,}; got {len(names):,}. "
            "Give one for each, in their order, or leave them out."
        )


def check_without_classes(config: TrainConfig, train: Samples) -> None:
    if config.noise in ("symmetric", "asymmetric"):
        raise ConfigError(
            f"noise {config.noise!r} flips classes; the task's targets are no classes. "
            "Set --noise none, or --noise task if the task makes them wrong itself."
        )
    for name, usual in {"imbalance": 1.0, "agreement": "none", "audit_passes": 0.0}.items():
        if getattr(config, name) != usual:
            raise ConfigError(
                f"{name} needs classes; the task's targets are no classes. "
                f"Set --{name.replace('_', '-')} {usual}."
            )
    if config.sampler == "sharded" and train.observed is None:
        raise ConfigError(
            "sampler 'sharded' needs the training targets as a tensor; the task has a Dataset. "
            "Set --sampler iid."
        )
    if config.sampler.startswith("stratified"):
        raise ConfigError(
            f"sampler {config.sampler!r} draws by class; the task's targets are no classes. "
            "Set --sampler iid."
        )


def check_label_range(y: Tensor | None, classes: int, part: str) -> None:
    """Refuses labels out of range."""
    if y is None or y.dim() != 1 or y.is_floating_point() or y.dtype.is_complex:
        seen = "none" if y is None else f"{tuple(y.shape)} of {y.dtype}"
        raise ConfigError(
            f"{part}: targets must be int64 (N,), because the task has {classes} classes; "
            f"got {seen}. Set classes=0 if they are no classes."
        )
    if ((y < 0) | (y >= classes)).any():
        raise DataError(
            f"{part}: labels must lie in [0, {classes}); got {int(y.min())} to {int(y.max())}. "
            "Number the classes from 0 on."
        )
