"""What `gaf.SampleAgreement` refuses; each message names a way that works."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gaf.arguments import one_of, whole_number

KINDS = ("prototype", "vote", "loss")
MISSED = 0.02  # by how much probabilities in bfloat16 may miss a sum of 1
LARGEST_INDEX = 10**9  # a table of 28 GB


def check_arguments(
    criterion: Any,
    head: Any,
    score: Any,
    model: Any,
    num_classes: Any,
    num_samples: Any,
    warmup: Any,
) -> None:
    subject = "SampleAgreement"
    if isinstance(criterion, type) or not callable(criterion):
        raise TypeError(
            f"{subject}: criterion must be a loss function of (outputs, targets); got "
            f"{criterion!r}. Use torch.nn.CrossEntropyLoss(reduction='none')."
        )
    if getattr(criterion, "reduction", "none") != "none":
        raise ValueError(
            f"{subject}: criterion must give a loss for each sample; it is a "
            f"{type(criterion).__name__} with reduction={criterion.reduction!r}. "
            "Make it with reduction='none'."
        )
    one_of(f"{subject}: score", score, KINDS)
    if head is None and score != "loss":
        raise ValueError(
            f"{subject}: the score {score!r} needs the head, the model's last Linear layer; got "
            "None. Pass such as model.fc, or use score='loss'."
        )
    if head is not None and not isinstance(head, nn.Linear):
        raise TypeError(
            f"{subject}: head must be the model's last layer, a torch.nn.Linear; got "
            f"{type(head).__name__}. Pass such as model.fc."
        )
    if head is not None and isinstance(head.weight, nn.UninitializedParameter):
        raise ValueError(
            f"{subject}: the head must know the number of its inputs; got a LazyLinear that has "
            "not run. Run the model once before, or use torch.nn.Linear."
        )
    if head is not None and head.out_features == 1 and score != "loss":
        raise ValueError(
            f"{subject}: the score {score!r} needs a head with an output for each class; got "
            "out_features=1. For two classes use two outputs and CrossEntropyLoss; for other "
            "targets score='loss' without head."
        )
    if model is not None and (score != "vote" or not isinstance(model, nn.Module)):
        raise ValueError(
            f"{subject}: model is a torch.nn.Module for the score 'vote', whose layers all vote; "
            f"got {type(model).__name__} and score={score!r}. Leave it out, or use score='vote'."
        )
    for name, value, least in (("num_classes", num_classes, 1), ("num_samples", num_samples, 1)):
        if value is not None:
            whole_number(f"{subject}: {name}", value, least, "None where it is not known.")
    if warmup is not None:
        whole_number(f"{subject}: warmup", warmup, 0, "It is a number of steps.")


def check_losses_of(losses: Any, outputs: Tensor) -> Tensor:
    """ValueError for what is not a loss for each sample."""
    if not isinstance(losses, Tensor) or losses.ndim == 0 or len(losses) != len(outputs):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        raise ValueError(
            f"SampleAgreement: criterion must give a loss for each of the {len(outputs)} samples; "
            f"got {got}. Use reduction='none'."
        )
    return losses


OTHER_TARGETS = "For other targets use score='loss' with neither head nor num_classes."


def check_targets(targets: Tensor, n: int, classes: int, ignored: int) -> None:
    """ValueError for what are neither classes nor their probabilities.

    Ranges of classes are looked at on a CPU alone: an accelerator would be waited for.
    """
    indices = targets.shape == (n,) and not targets.is_floating_point()
    if not indices and targets.shape != (n, classes):
        raise ValueError(
            f"SampleAgreement: targets must be classes ({n},) or probabilities ({n}, {classes}); "
            f"got shape {tuple(targets.shape)} of {targets.dtype}. {OTHER_TARGETS}"
        )
    if indices and targets.device.type == "cpu":
        wrong = targets[((targets < 0) | (targets >= classes)) & (targets != ignored)]
        if len(wrong):
            raise ValueError(
                f"SampleAgreement: targets must be classes in [0, {classes}), the head's outputs "
                f"or num_classes; got {int(wrong[0])}. Count the classes from 0, or set "
                "num_classes."
            )
    if not indices:
        low, sums = targets.amin(), targets.sum(1)
        if bool((low < 0) | ((sums - 1).abs() > MISSED).any()):
            raise ValueError(
                "SampleAgreement: targets of this shape must be probabilities of classes, that "
                f"sum to 1; the smallest is {float(low):.3g}, and sums range from "
                f"{float(sums.min()):.3g} to {float(sums.max()):.3g}. {OTHER_TARGETS}"
            )


def check_features(features: Tensor | None, n: int) -> Tensor:
    """RuntimeError where the head did not run for this batch; ValueError for other features."""
    if features is None:
        raise RuntimeError(
            "SampleAgreement: the head must run before each loss, to show its input; it did not "
            "since the last one. Pass the layer that the model calls, make this object before a "
            "compiled model's first run, and let the model compute its outputs anew for each loss. "
            "A copy of this object has no head: make a new one, and load its state_dict."
        )
    if features.ndim != 2 or len(features) != n:
        raise ValueError(
            f"SampleAgreement: the head's input must be features of the {n} samples, (n, p); got "
            f"shape {tuple(features.shape)}. Pass the layer that gives one output for each sample."
        )
    return features


def check_index(given: Any, n: int, limit: int | None) -> Tensor:
    """The index as a tensor on its device."""
    on_cpu = torch.device("cpu")
    try:
        index = given if isinstance(given, Tensor) else torch.as_tensor(given, device=on_cpu)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"SampleAgreement: index must be {n} whole numbers, one for each sample; {error}. Let "
            "the data set return each sample's place."
        ) from None
    if index.shape != (n,) or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"SampleAgreement: index must be {n} whole numbers, one for each sample; got shape "
            f"{tuple(index.shape)} of {index.dtype}. Let the data set return each sample's place."
        )
    index = index.long()
    if index.device.type == "cpu" and n:
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= (limit or LARGEST_INDEX):
            bound = f"in [0, num_samples = {limit})" if limit else f"in [0, {LARGEST_INDEX:,})"
            raise ValueError(
                f"SampleAgreement: index must be {bound}; got {low} to {high}. "
                "Count the samples from 0."
            )
    return index


def check_report(judged: bool) -> None:
    if not judged:
        raise RuntimeError(
            "SampleAgreement: report() needs samples that were judged; no call with index= in "
            "training mode, with gradients, has judged any. Call criterion(outputs, targets, "
            "index=i), with i the places of the samples in the data set. The very first batch is "
            "not judged, since no class has mean features yet."
        )


def warn_of_part(ranks: int) -> None:
    warnings.warn(
        f"gaf: report() covers what this one of {ranks} ranks has seen. For all samples call "
        "report(gather=True) on every rank.",
        stacklevel=4,
    )


def warn_of_most(looks_wrong: list[bool]) -> None:
    """If over half of the judged labels look wrong."""
    issues, judged = sum(looks_wrong), len(looks_wrong)
    if 2 * issues > judged:
        warnings.warn(
            f"gaf: {issues:,} of {judged:,} labels look wrong. Over half mostly means that the "
            "features do not tell the classes apart: rank by label_quality, use neither "
            "is_label_issue nor count_issues(), and train longer before you report.",
            stacklevel=4,
        )
