"""Small networks on the 8 x 8 digits, and their micro-gradients, computed one by one."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gaf
from typechecker import without_type_checks

BATCH = 12
Batch = tuple[Tensor, Tensor]


def noisy_digits() -> Batch:
    """The digits, 40% of the labels replaced."""
    from sklearn.datasets import load_digits  # imports much

    data = load_digits()
    rng = torch.Generator().manual_seed(1)
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    flipped = torch.rand(len(y), generator=rng) < 0.4
    return x, torch.where(flipped, torch.randint(10, y.shape, generator=rng), y)


def micro_batches(digits: Batch, k: int, macro: int = 0) -> list[Batch]:
    x, y = digits
    first = macro * k * BATCH
    return [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(first, first + k * BATCH, BATCH)]


def conv_net() -> nn.Module:
    first = [nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    second = [nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32, 10))


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).to(dtype)


NETS = {"conv and batch norm": conv_net, "mlp": mlp}


def micro_gradients(model: nn.Module, batches: Sequence[Batch], scale: float = 1.0) -> Tensor:
    """Each on a copy, so that no state is shared: (k, n) in float64."""
    rows = []
    for x, y in batches:
        twin = copy.deepcopy(model)
        loss = scale * cross_entropy(twin(x).float(), y)
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        rows.append(torch.cat([g.double().reshape(-1) / scale for g in grads]))
    return torch.stack(rows)


def flat_grad(model: nn.Module) -> Tensor:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([g.double().reshape(-1) for g in grads])


def mixed_tau(rows: Tensor) -> float:
    """A threshold that accepts some rows and, for k > 2, rejects some.

    No row is near enough for rounding to decide.
    """
    products, taus = gaf.gram(rows), torch.linspace(0.02, 1.5, 75).tolist()
    with without_type_checks():  # they would take most of the time
        _, stepped, margin, tau = max(judge_tau(tau, products) for tau in taus)
    assert stepped
    assert margin > 1e-4  # float32 inner products are good to 1e-5
    return tau


def judge_tau(tau: float, products: Tensor) -> tuple[bool, bool, float, float]:
    """Whether it accepts some rows but not all, and steps; how clearly; then the tau."""
    decision = gaf.GAF(tau)(products)
    margin = (decision.distances[1:] - tau).abs().min().item()
    mixed = bool(2 <= decision.accepted.sum() < len(products))
    return mixed, bool(decision.stepped), margin, tau


def close_to_sum(actual: Tensor, expected: Tensor, rows: Tensor, eps: float = 2**-24) -> None:
    """Equal up to eight roundings of the largest entry: sums of at most eight float32 rows."""
    largest = rows.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=8 * eps * largest)
