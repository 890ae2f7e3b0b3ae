"""Prototypes of the classes that leave out the labels that they contradict."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gaf_lab.data.problem import Problem
from gaf_lab.training.evaluate import logits

ROUNDS = 8


def last_linear(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def unit_features(model: nn.Module, problem: Problem) -> Tensor:
    """The input of the model's last layer for each training sample (N, p), at length 1."""
    caught: list[Tensor] = []
    hook = last_linear(model).register_forward_pre_hook(
        lambda module, given: caught.append(given[0])
    )
    logits(model, problem, problem.train)
    hook.remove()
    return normalize(torch.cat(caught).float(), dim=1)


def refined_similarities(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How near each sample is to each class's prototype, (N, classes); -1 for a class without one.

    The first prototype of a class is the mean of the samples with its label. In each round it
    becomes the mean of those of them that are nearest to it, so that a minority of wrong labels
    drops out.

    Args:
        features: (N, p), of length 1.
        labels: (N,) in [0, classes), wrong for less than half of each class.
        classes: how many there are.
    """
    given = torch.nn.functional.one_hot(labels, classes).to(features)
    kept = given
    prototypes = features.new_zeros(classes, features.shape[1])
    for _ in range(ROUNDS + 1):
        counts = kept.sum(0)[:, None]
        prototypes = torch.where(counts > 0, kept.T @ features / counts.clamp(min=1), prototypes)
        similarity = features @ prototypes.T
        similarity = similarity.masked_fill(given.sum(0) == 0, -1)
        kept = given * (similarity.argmax(1) == labels)[:, None]
    return similarity
