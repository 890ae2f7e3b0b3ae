"""The evaluation of a model: its score on test set and held-out noisy labels, and memorisation."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gaf_lab.data.run_data import RunData
from gaf_lab.data.samples import Samples
from gaf_lab.data.trees import widen
from gaf_lab.training.objective import check_per_sample, check_scores

Line = dict[str, float | None]


@torch.no_grad()
def outputs(model: nn.Module, data: RunData, part: Samples) -> Iterator[tuple[Any, Any]]:
    """Outputs and observed targets, a batch at a time, in evaluation mode.

    At the end the model's mode is restored.
    """
    training = model.training
    model.eval()
    for x, y in part.batches(data.problem.batch, data.device):
        yield widen(model(data.inputs(x))), y
    model.train(training)


def logits(model: nn.Module, data: RunData, part: Samples) -> Tensor:
    """(N, classes) float32, in evaluation mode; the model's mode is restored."""
    return torch.cat([check_scores(found, data.classes) for found, _ in outputs(model, data, part)])


def share(hits: Tensor) -> float | None:
    return float(hits.double().mean()) if len(hits) else None


def measure(model: nn.Module, own: nn.Module | None, data: RunData) -> Line:
    """`evaluate` of a model; where it is an average, scores of the weights themselves too.

    own: the model that is averaged; None without an average.
    """
    rare = {"rarest": rarest(data)} if data.config.imbalance > 1 else {}
    measured = evaluate(model, data) | score_on(rare, model, data, "")
    if own is None:
        return measured
    parts = {"test": data.test, "heldout": data.heldout, **rare}
    return measured | score_on(parts, own, data, "own_")


def score_on(parts: dict[str, Samples], model: nn.Module, data: RunData, prefix: str) -> Line:
    """The accuracy by part; without classes, the score."""
    key = "accuracy" if data.classes else data.score.key
    return {
        f"{prefix}{name}_{key}": measure_part(model, data, part)[key]
        for name, part in parts.items()
        if len(part)
    }


def rarest(data: RunData) -> Samples:
    """The test samples of the last class, which is the rarest of a long tail."""
    return data.test[(data.test.truth == data.classes - 1).nonzero()[:, 0]]


def evaluate(model: nn.Module, data: RunData) -> Line:
    """The measured part of an evaluation line; see `gaf_lab.records.run` for the keys."""
    found = {
        f"{name}_{key}": value
        for name, part in (("test", data.test), ("heldout", data.heldout))
        for key, value in measure_part(model, data, part).items()
    }
    return found | memorisation(model, data)


def measure_part(model: nn.Module, data: RunData, part: Samples) -> Line:
    of = measure_classes if data.classes else measure_outputs
    return of(model, data, part)


def measure_classes(model: nn.Module, data: RunData, part: Samples) -> Line:
    """Accuracy and loss of samples with classes, and the task's metric; None without samples."""
    found: Line = {"accuracy": None, "loss": None}
    metric, loss = data.problem.metric, data.problem.loss
    if metric is not None:
        found["metric"] = None
    if not len(part):
        return found
    scores, labels = logits(model, data, part), part.labels
    found["accuracy"] = share(scores.argmax(1) == labels)
    if loss is None:
        found["loss"] = float(cross_entropy(scores, labels))
    else:
        found["loss"] = mean_over_samples("loss", loss(scores, labels), len(labels))
    if metric is not None:
        found["metric"] = mean_over_samples("metric", metric.of(scores, labels), len(labels))
    return found


def mean_over_samples(name: str, values: Any, n: int) -> float:
    check_per_sample(name, values, n)
    return float(values.double().mean())


@torch.no_grad()
def measure_outputs(model: nn.Module, data: RunData, part: Samples) -> Line:
    """The mean loss and the task's metric of any samples; None without samples."""
    found: Line = {"accuracy": None, "loss": None}
    measures = {"loss": data.problem.loss}
    if data.problem.metric is not None:
        measures["metric"] = data.problem.metric.of
    values: dict[str, list[Tensor]] = {name: [] for name in measures}
    sizes = iter(range(0, len(part), data.problem.batch))
    for output, y in outputs(model, data, part):
        b = min(data.problem.batch, len(part) - next(sizes))
        for name, of in measures.items():
            assert of is not None
            each = of(output, y)
            check_per_sample(name, each, b)
            values[name].append(each.double())
    return found | {name: share(torch.cat(each)) if each else None for name, each in values.items()}


def memorisation(model: nn.Module, data: RunData) -> Line:
    """What the model predicts of the probed samples with a wrong label, and of the others."""
    found: Line = {"memorised": None, "corrected": None, "clean_accuracy": None}
    probe = data.probe
    if not data.classes:
        return found
    predicted = logits(model, data, probe).argmax(1)
    flipped = probe.labels != probe.truth
    found["memorised"] = share((predicted == probe.labels)[flipped])
    found["corrected"] = share((predicted == probe.truth)[flipped])
    found["clean_accuracy"] = share((predicted == probe.truth)[~flipped])
    return found
