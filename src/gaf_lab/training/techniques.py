"""Other techniques against wrong labels: losses, mixed pictures, flat minima, averaged weights.

And early stopping. Each is the published formula and no more; a run takes them from its config
(`objective.Objective`, `sam_perturbation`, `ema_model`, `EarlyStopping`).
"""

import contextlib
import copy
import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, softmax
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gaf_lab.data.sampling import derive_seed, generator


def generalised_cross_entropy(scores: Tensor, y: Tensor, q: float) -> Tensor:
    """Mean of (1 - p_y^q) / q (Zhang and Sabuncu, arXiv 1805.07836, equation 6).

    Args:
        scores: (b, classes) logits.
        y: (b,) labels.
        q: in (0, 1].
    """
    return generalised_cross_entropies(scores, y, q).mean()


def generalised_cross_entropies(scores: Tensor, y: Tensor, q: float) -> Tensor:
    """The loss of each sample, (b,)."""
    log_p = log_softmax(scores, 1).gather(1, y[:, None])[:, 0]
    return -torch.expm1(q * log_p) / q


class EarlyLearning:
    """Cross-entropy + lambda log(1 - <p, t>) (Liu et al., arXiv 2007.00151).

    t is a running average of the model's predictions for the sample.

    Args:
        samples, classes: of the training set: t is (samples, classes).
        beta: weight of the past in t.
        weight: lambda.
    """

    def __init__(
        self, samples: int, classes: int, beta: float, weight: float, device: torch.device
    ) -> None:
        self.beta, self.weight = beta, weight
        self.targets = torch.zeros(samples, classes, device=device)

    def __call__(self, scores: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """The loss of samples `index` (b,).

        Their targets change whatever is decided about the micro-gradient.
        """
        return cross_entropy(scores, y) + self.weight * self.regulariser(scores, index).mean()

    def regulariser(self, scores: Tensor, index: Tensor) -> Tensor:
        """log(1 - <p, t>) of each sample, (b,); their targets change."""
        p = softmax(scores, 1).clamp(1e-4, 1 - 1e-4)  # as released
        with torch.no_grad():
            prediction = p / p.sum(1, keepdim=True)
            targets = self.beta * self.targets[index] + (1 - self.beta) * prediction
            self.targets[index] = targets
        return torch.log1p(-(targets * p).sum(1))


def mix(x: Tensor, y: Tensor, alpha: float, seed: int, *parts: int) -> tuple[Tensor, Tensor, float]:
    """m x + (1 - m) x', the labels y' of x', and m ~ Beta(alpha, alpha).

    x' is x in another order (Zhang et al., arXiv 1710.09412).
    """
    m = random.Random(derive_seed(seed, "mixup", *parts)).betavariate(alpha, alpha)
    order = torch.randperm(len(x), generator=generator(seed, "mixup order", *parts)).to(x.device)
    return m * x + (1 - m) * x[order], y[order], m


@contextlib.contextmanager
def sam_perturbation(model: nn.Module, loss: Tensor, radius: float) -> Iterator[None]:
    """Within, the weights are w + radius g / |g|; g is the gradient of `loss`.

    That is SAM (Foret et al., arXiv 2010.01412, equation 2). It is used on each micro-batch by
    itself, as data-parallel SAM does. BatchNorm's statistics and counts do not change within, and
    afterwards the weights are restored bit for bit.
    """
    weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, weights)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    kept = [p.detach().clone() for p in weights]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    with torch.no_grad():
        for p, g in zip(weights, grads, strict=True):
            p += g * (radius / (norm + 1e-12))
    for one in norms:
        one.track_running_stats = False
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, kept)
        for one in norms:
            one.track_running_stats = True


def ema_model(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the model's weights and BatchNorm statistics.

    An update makes them decay times themselves plus (1 - decay) times the model's. The first update
    copies the model's.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


@torch.no_grad()
def update_on_device(
    average: AveragedModel, model: nn.Module, decay: float, stepped: Tensor
) -> None:
    """`average.update_parameters(model)` if `stepped` (), without waiting for the device.

    Everything, the average's count of updates too, is on one device.
    """
    first = average.n_averaged == 0
    new = (torch.where(first, 1.0, 1 - decay) * stepped).float()
    ours = [p.detach() for p in average.module.parameters()]
    change = torch._foreach_sub([p.detach() for p in model.parameters()], ours)
    torch._foreach_mul_(change, new)
    torch._foreach_add_(ours, change)
    # a micro-batch that was rejected may have left infinities in them, which times 0 are NaN
    for mine, its in zip(average.module.buffers(), model.buffers(), strict=True):
        moved = mine * decay + its * (1 - decay)  # counts are rounded down, as by torch
        moved = torch.where(first, its, moved.to(mine.dtype))
        mine.copy_(torch.where(stepped, moved, mine))
    average.n_averaged += stepped


class EarlyStopping:
    """Ends a run after `patience` evaluations in a row without a better held-out score.

    See Prechelt 1998.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best, self.waited = -math.inf, 0
        self.weights: dict[str, Tensor] = {}

    @property
    def over(self) -> bool:
        return self.waited >= self.patience

    def look(self, score: float, model: nn.Module) -> None:
        """After an evaluation: keeps the model's weights if it is the best so far.

        score: higher is better. Of equals, the first is the best.
        """
        if score > self.best:
            self.best, self.waited, self.weights = score, 0, copy.deepcopy(model.state_dict())
        else:
            self.waited += 1

    def put_back(self, model: nn.Module) -> None:
        """Gives the model its best weights."""
        model.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited, self.weights = state["best"], state["waited"], state["weights"]
