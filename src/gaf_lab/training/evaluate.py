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
