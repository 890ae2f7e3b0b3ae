"""A task as its function gives it: a model, a loss, and samples to train and test on."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from gaf_lab.data.trees import tensors_in
from gaf_lab.records.score import Score
from gaf_lab.settings.checks import ConfigError

Loss = Callable[[Any, Any], Tensor]
Part = tuple[Any, Tensor] | Dataset[Any]


class Augment(Protocol):
    """Changes the inputs of a micro-batch at random."""

    def __call__(self, inputs: Any, generator: torch.Generator) -> Any: ...


@dataclass(frozen=True)
class Augmentation:
    """Random changes in two parts, so that the device engine can draw ahead.

    Attributes:
        draw: (b, generator) -> numbers, a tensor on the CPU.
        apply: (inputs, numbers) -> inputs, on the inputs' device.
    """

    draw: Callable[[int, torch.Generator], Tensor]
    apply: Callable[[Any, Tensor], Any]

    def __call__(self, inputs: Any, generator: torch.Generator) -> Any:
        first = tensors_in(inputs)[0]
        numbers = self.draw(len(first), generator)
        return self.apply(inputs, numbers.to(first.device, non_blocking=True))


@dataclass(frozen=True)
class Metric:
    """The number that runs are judged by, averaged over samples.

    Attributes:
        name: in tables and figures.
        of: (output, target) -> one number for each sample (b,).
        higher_is_better: the direction in which an evaluation is selected.
        share: whether it lies in [0, 1] and is shown in percent.
    """

    name: str
    of: Loss
    higher_is_better: bool = True
    share: bool = False

    @property
    def score(self) -> Score:
        return Score(self.name, "metric", self.higher_is_better, self.share)


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """What a task's function returns. See docs/your-task.md.

    A part of the data is a tuple (inputs, targets), or a Dataset whose items are such tuples.
    inputs are a tensor with a row for each sample, or a tuple, list or dict of such; targets are a
    tensor with a row for each sample. A Dataset may have an attribute `targets`, and a method
    `read(indices, generator)` that returns the inputs and targets of a whole micro-batch; the
    generator is None outside of training.

    Attributes:
        model: a module, or a function that makes one. torch's global generator has been seeded.
        train, test: as above; of train a share is held out (`heldout` in the config).
        loss: (output, target) -> one loss for each sample (b,). None: cross-entropy, for targets
            that are classes; then the config's losses against wrong labels can be used.
        clean: true targets of `train`, if its own are known to be wrong in part.
        metric: None: the accuracy for classes, the mean loss otherwise.
        classes: how many there are. None: one more than the largest target, if targets are int64
            (N,) from 0 on. 0: targets are no classes.
        collate: makes a micro-batch of a Dataset's items.
        augment: changes the inputs of a micro-batch in training, by the generator alone.
        prepare: changes inputs on their device before the model, in training and evaluation.
        superclasses: super-class of each class (classes,), for asymmetric label noise.
        batch: samples that an evaluation puts through the model at once; fewer need less memory.
        read_ahead: whether worker processes read a Dataset ahead.
        captures: whether nothing here waits for the device, so that engine "auto" may capture it.
        name: of the data; changes which samples `limit` takes.
        class_names: by number, for `gaf audit`; empty if they have none.
        sample_names: of the training samples, such as files, for `gaf audit`; empty as above.
    """

    model: nn.Module | Callable[[], nn.Module]
    train: Part
    test: Part
    loss: Loss | None = None
    clean: Tensor | None = None
    metric: Metric | None = None
    classes: int | None = None
    collate: Callable[[list[Any]], Any] = default_collate
    augment: Augment | None = None
    prepare: Callable[[Any], Any] | None = None
    superclasses: Tensor | None = None
    batch: int = 1000
    read_ahead: bool = False
    captures: bool = False
    name: str = ""
    class_names: Sequence[str] = ()
    sample_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise ConfigError(
                "model must be a torch.nn.Module, or a function that makes one; "
                f"got {type(self.model).__name__}."
            )
        check_part("train", self.train)
        check_part("test", self.test)
        if self.batch < 1:
            raise ConfigError(f"batch must be at least 1; got {self.batch}. 1000 is usual.")

    def new_model(self) -> nn.Module:
        """A copy of the module that was given, or a new one."""
        if isinstance(self.model, nn.Module):
            return copy.deepcopy(self.model)
        model = self.model()
        if not isinstance(model, nn.Module):
            raise ConfigError(
                "model must be a torch.nn.Module, or a function that makes one; "
                f"the function made a {type(model).__name__}."
            )
        return model


def check_part(name: str, part: Any) -> None:
    """Refuses what is neither a tuple of tensors nor a Dataset, and what is empty."""
    if isinstance(part, tuple):
        check_tuple(name, part)
    elif not isinstance(part, Dataset) or not hasattr(part, "__len__"):
        raise ConfigError(
            f"{name} must be a tuple of tensors (inputs, targets), or a Dataset with a length; "
            f"got {type(part).__name__}. Read the samples of another kind into tensors."
        )
    if not count_samples(part):
        raise ConfigError(f"{name} must have at least one sample; it is empty. Is the path right?")


def check_tuple(name: str, part: tuple[Any, ...]) -> None:
    if len(part) != 2 or not tensors_in(part[0]) or not isinstance(part[1], Tensor):
        kinds = ", ".join(type(value).__name__ for value in part)
        raise ConfigError(
            f"{name} must be a tuple of tensors (inputs, targets); got ({kinds}). "
            "torch.as_tensor makes tensors of arrays and lists."
        )
    counts = [len(tensor) if tensor.dim() else 0 for tensor in [*tensors_in(part[0]), part[1]]]
    if len(set(counts)) > 1:
        raise ConfigError(
            f"{name} must have a target for each input; got "
            f"{' and '.join(map(str, dict.fromkeys(counts)))} rows. Is a sample in each row?"
        )
    check_finite(name, part[1])


def check_finite(name: str, targets: Tensor) -> None:
    if targets.is_floating_point() and not (finite := targets.isfinite()).all():
        row = int((~finite).reshape(len(targets), -1).any(1).nonzero()[0])
        raise ConfigError(
            f"{name}: targets must be finite; that of sample {row} is not. "
            "Leave such samples out, or fill them."
        )


def count_samples(part: Part) -> int:
    return len(tensors_in(part)[0]) if isinstance(part, tuple) else len(part)  # type: ignore[arg-type]
