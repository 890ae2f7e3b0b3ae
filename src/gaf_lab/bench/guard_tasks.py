"""What `gaf bench guard` trains: two sets of pictures and a small transformer."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from gaf_lab.data.sets import load_dataset

Examples = tuple[Tensor, Tensor]

TOKENS, LENGTH, WIDTH = 17, 8, 16


class GuardTask(NamedTuple):
    """A network, its data, and how it is trained.

    Attributes:
        train, test: inputs and labels; labels may be several for an input.
        b: samples per micro-batch.
        rate: learning rate of SGD with a momentum of 0.9.
    """

    name: str
    network: Callable[[], nn.Module]
    train: Examples
    test: Examples
    classes: int
    rate: float
    b: int


def load_guard_tasks(b: int) -> list[GuardTask]:
    sequences = make_sequences(5000), make_sequences(1000)
    return [
        GuardTask("digits", lambda: small_mlp(64), *load_pictures("digits", 1), 10, 0.02, b),
        GuardTask("mnist5k", lambda: small_mlp(196), *load_pictures("mnist5k", 2), 10, 0.02, b),
        GuardTask("transformer", TinyTransformer, *sequences, TOKENS, 0.03, b),
    ]


def load_pictures(name: str, pool: int) -> tuple[Examples, Examples]:
    """Training and test pictures, averaged over squares of `pool` pixels, as vectors."""
    data = load_dataset(name)
    assert isinstance(data.train_x, Tensor)
    assert isinstance(data.test_x, Tensor)
    train, test = (
        avg_pool2d(x.float() / 255, pool).flatten(1) for x in (data.train_x, data.test_x)
    )
    return (train - train.mean(), data.train_y), (test - train.mean(), data.test_y)


def small_mlp(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 10))


def make_sequences(count: int) -> Examples:
    """Tokens that are the last but one plus 1; what comes next is to be told."""
    tokens = torch.randint(TOKENS, (count, 2))
    for _ in range(LENGTH - 1):
        tokens = torch.cat([tokens, (tokens[:, -2:-1] + 1) % TOKENS], 1)
    return tokens[:, 1:-1], tokens[:, 2:]


class TinyTransformer(nn.Module):
    """One layer, one head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH - 1, WIDTH))
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        later = torch.full((LENGTH - 1, LENGTH - 1), -1e9, device=x.device).triu(1)
        h = h + self.out((q @ k.transpose(-1, -2) / WIDTH**0.5 + later).softmax(-1) @ v)
        outputs: Tensor = self.head(h + self.mlp(h))
        return outputs


def mean_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs.flatten(0, -2), labels.flatten())
