"""Models, micro-batches, and the oracle: each rank computes all ranks' micro-gradients itself."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gaf
from typechecker import without_type_checks

BATCH = 6


class Odd(nn.Module):
    """Parameters of odd sizes, some smaller than the number of ranks; a branch may be left out."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(13, 31, dtype=dtype), nn.LayerNorm(31, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))
        self.side = nn.Linear(31, 31, dtype=dtype)
        self.last = nn.Linear(31, 5, dtype=dtype)

    def forward(self, x: Tensor, side: bool = True) -> Tensor:
        h = torch.tanh(self.norm(self.first(x))) * self.scale
        h = torch.tanh(self.side(h)) if side else h
        return self.last(h)


class Wide(nn.Module):
    """Large enough that buckets are cut into slices and not only joined."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(13, 257, dtype=dtype),
            nn.Tanh(),
            nn.Linear(257, 251, dtype=dtype),
            nn.Tanh(),
            nn.Linear(251, 5, dtype=dtype),
        )

    def forward(self, x: Tensor, side: bool = True) -> Tensor:
        return self.layers(x)


def batch(step: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Half of the labels follow from the input, half are random: micro-gradients agree somewhat."""
    rng = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(BATCH, 13, generator=rng)
    y = x[:, :5].argmax(1)
    noisy = torch.rand(BATCH, generator=rng) < 0.5
    return x.to(dtype), torch.where(noisy, torch.randint(5, y.shape, generator=rng), y)


Loss = Callable[[nn.Module, int, int], Tensor]


def plain_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    x, y = batch(step, rank, next(model.parameters()).dtype)
    return cross_entropy(model(x).float(), y)


def micro_gradients(model: nn.Module, step: int, W: int, loss: Loss = plain_loss) -> Tensor:
    """(W, n) float64; what a rank's loss does not depend on counts as zeros."""
    rows = []
    for rank in range(W):
        twin = copy.deepcopy(model)
        params = [p for p in twin.parameters() if p.requires_grad]
        for p in params:
            p.grad = None
        loss(twin, step, rank).backward()
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if p.grad is None else p.grad).double().reshape(-1)
                    for p in params
                ]
            )
        )
    return torch.stack(rows)


def flat_grad(model: nn.Module) -> Tensor:
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).double().reshape(-1) for p in params]
    )


def telling_tau(rows: Tensor, kind: str) -> float:
    """A tau, far from ties, by which the rows are accepted.

    kind: "all" of them; too few, for a "skip"; "some" but not all, for k > 2 and if there is such a
    tau.
    """
    if kind == "all":
        return 2.0
    products = gaf.gram(rows)
    with without_type_checks():  # they would take most of the time
        return max(
            judge_tau(tau, products, kind) for tau in torch.linspace(0.01, 1.8, 90).tolist()
        )[-1]


def judge_tau(tau: float, products: Tensor, kind: str) -> tuple[bool, bool, float, float]:
    """How well a tau serves the kind, then the tau."""
    decision = gaf.GAF(tau)(products)
    margin = (decision.distances[1:] - tau).abs().min().item()
    stepped = bool(decision.stepped)
    wanted = (2 <= decision.accepted.sum() < len(products)) if kind == "some" else not stepped
    return bool(wanted), stepped == (kind == "some"), margin, tau


KINDS = ("some", "skip", "all", "some", "skip", "some")


def close(actual: Tensor, expected: Tensor, rows: Tensor, tolerance: float = 1e-6) -> None:
    error = (actual - expected).norm() / rows.norm(dim=1)[rows.norm(dim=1).isfinite()].max()
    assert error <= tolerance, f"relative error {error:.2e}"


def same_everywhere(*tensors: Tensor) -> None:
    """The same bits on every rank."""
    mine = torch.cat([t.detach().double().reshape(-1).nan_to_num(nan=-7.0) for t in tensors])
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    assert all(torch.equal(other, mine) for other in others)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
