"""The networks of `gaf bench samples`, with GroupNorm: BatchNorm mixes the samples of a batch."""

import torch
from torch import Tensor, nn

from gaf_lab.training import models

LABELS = 10
WORDS, LENGTH, WIDTH, HEADS, DEPTH = 1000, 64, 128, 4, 4  # of the transformer


class Attention(nn.Module):
    """Self-attention, made of operations that vmap knows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / (WIDTH / HEADS) ** 0.5).softmax(-1)
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


class Residual(nn.Module):
    """x + layer(norm(x))"""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH), layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layer(self.norm(x))
        return out


class SmallTransformer(nn.Module):
    """Classifies sequences of `LENGTH` words: `DEPTH` layers of width `WIDTH`."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layers: list[nn.Module] = []
        for _ in range(DEPTH):
            wide = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
            layers += [Residual(Attention()), Residual(nn.Sequential(*wide))]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        out: Tensor = self.head(self.layers(self.word(x) + self.place(places)).mean(1))
        return out


def resnet18() -> nn.Module:
    """ResNet18 with the ImageNet stem, and GroupNorm in 32 groups."""
    model = models.make_model("resnet18", (3, 32, 32), LABELS, "imagenet")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(32, child.num_features))
    return model


def sample_problem(name: str, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, n inputs and n labels: "resnet18" or "transformer"."""
    torch.manual_seed(0)
    labels = torch.randint(LABELS, (n,))
    if name == "resnet18":
        return resnet18(), torch.randn(n, 3, 32, 32), labels
    return SmallTransformer(), torch.randint(WORDS, (n, LENGTH)), labels
