"""The evaluation of a model: accuracy on test set and held-out noisy labels, and memorisation."""

import torch
from torch import Tensor, nn

from gaf_lab.data.pictures import Pictures
from gaf_lab.data.problem import Problem

# at most so many pictures, and pixels in all, go through the model at once
BATCH, PIXELS = 1000, 2**21


@torch.no_grad()
def logits(model: nn.Module, problem: Problem, part: Pictures) -> Tensor:
    """(N, classes) float32, in evaluation mode; the model's mode is restored."""
    training = model.training
    model.eval()
    _, height, width = problem.shape
    n = max(1, min(BATCH, PIXELS // (height * width)))
    found = [model(problem.inputs(x)).float() for x in part.batches(n)]
    model.train(training)
    return torch.cat(found)


def accuracy_and_loss(scores: Tensor, labels: Tensor) -> tuple[float | None, float | None]:
    if not len(labels):
        return None, None
    return share(scores.argmax(1) == labels), float(nn.functional.cross_entropy(scores, labels))


def share(hits: Tensor) -> float | None:
    return float(hits.double().mean()) if len(hits) else None


def measure(model: nn.Module, own: nn.Module | None, problem: Problem) -> dict[str, float | None]:
    """`evaluate` of a model; where it is an average, accuracies of the weights themselves too.

    own: the model that is averaged; None without an average.
    """
    rare = {"rarest": rarest(problem)} if problem.config.imbalance > 1 else {}
    measured = evaluate(model, problem) | accuracy_on(rare, model, problem, "")
    if own is None:
        return measured
    parts = {"test": problem.test, "heldout": problem.heldout, **rare}
    return measured | accuracy_on(parts, own, problem, "own_")


def accuracy_on(
    parts: dict[str, Pictures], model: nn.Module, problem: Problem, prefix: str
) -> dict[str, float | None]:
    """The share of observed labels that the model predicts, by part."""
    hits = {
        name: logits(model, problem, part).argmax(1) == part.observed
        for name, part in parts.items()
        if len(part)
    }
    return {f"{prefix}{name}_accuracy": share(hit) for name, hit in hits.items()}


def rarest(problem: Problem) -> Pictures:
    """The test pictures of the last class, which is the rarest of a long tail."""
    return problem.test[(problem.test.clean == problem.classes - 1).nonzero()[:, 0]]


def evaluate(model: nn.Module, problem: Problem) -> dict[str, float | None]:
    """The measured part of an evaluation line; see `gaf_lab.records.run` for the keys."""
    test = accuracy_and_loss(logits(model, problem, problem.test), problem.test.clean)
    heldout: tuple[float | None, float | None] = None, None
    probe = problem.probe
    if len(problem.heldout):
        scores = logits(model, problem, problem.heldout)
        heldout = accuracy_and_loss(scores, problem.heldout.observed)
    predicted = logits(model, problem, probe).argmax(1)
    flipped = probe.observed != probe.clean
    return {
        "test_accuracy": test[0],
        "test_loss": test[1],
        "heldout_accuracy": heldout[0],
        "heldout_loss": heldout[1],
        "memorised": share((predicted == probe.observed)[flipped]),
        "corrected": share((predicted == probe.clean)[flipped]),
        "clean_accuracy": share((predicted == probe.clean)[~flipped]),
    }
