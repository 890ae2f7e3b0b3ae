"""Per-sample gradients, one by one: what tests of gaf.samples compare with."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cosine_similarity, cross_entropy


def per_sample_rows(model: nn.Module, x: Tensor, y: Tensor, prefix: str = "") -> Tensor:
    """(n, coordinates): each sample's gradient, computed alone, of the parameters named."""
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    params = {k: p for k, p in trained.items() if k.startswith(prefix)}
    rest = {k: p for k, p in model.named_parameters() if k not in params}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out = functional_call(model, params | rest, (x[None],), tie_weights=True)
        return cross_entropy(out.flatten(1), y[None])

    rows = vmap(grad(loss), in_dims=(None, 0, 0), randomness="error")(params, x, y)
    return torch.cat([g.flatten(1) for g in rows.values()], 1)


C = 3


class Net(nn.Module):
    """Features of width 8, then a head for `C` classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh())
        self.head = nn.Linear(8, C)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def clusters(n: int, wrong: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Points around a centre for each class, labels of which a share is wrong, and which are."""
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(C, (n,), generator=rng)
    x = torch.randn(n, 4, generator=rng) + 4 * torch.eye(C, 4)[y]
    flipped = torch.rand(n, generator=rng) < wrong
    shift = torch.randint(1, C, (n,), generator=rng)
    return x, torch.where(flipped, (y + shift) % C, y), flipped


def train(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, passes: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(passes):
        for i in torch.randperm(len(x)).split(20):
            loss = criterion(model(x[i]), y[i], index=i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def auroc(quality: Tensor, wrong: Tensor) -> float:
    """The chance that a right label has a higher quality than a wrong one."""
    return (quality[~wrong][:, None] > quality[wrong]).double().mean().item()


def cosines(h: Tensor, prototypes: Tensor) -> Tensor:
    """With each prototype, features divided by their root mean square over the prototypes."""
    known = prototypes[~prototypes.isnan().any(1)].double()
    square = known.square().sum(0) / max(len(known), 1)
    r = (square + square.mean() / 10).sqrt()
    pairs = [cosine_similarity(h / r, prototype / r) for prototype in prototypes]
    return torch.stack(pairs, 1).float()
