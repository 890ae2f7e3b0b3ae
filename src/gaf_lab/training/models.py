"""The networks of the experiments, for pictures (b, channels, height, width).

They are initialised from torch's global generator.
"""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gaf_lab.settings.checks import ConfigError
from gaf_lab.training.small_maps import Conv3x3

Stem = Literal["imagenet", "cifar"]


def mlp(pixels: int, classes: int, width: int = 512) -> nn.Module:
    """Two hidden layers of `width`, as in the demo: pixels-512-512-classes."""
    hidden = [nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))


def convnet(channels: int, classes: int, width: int = 32) -> nn.Module:
    """Three convolutions with BatchNorm, halved in size twice.

    A baseline that trains in minutes on a CPU.
    """
    widths = (channels, width, 2 * width, 4 * width)
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
        if i < 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)
    )


def conv(before: int, after: int, size: int, stride: int = 1) -> nn.Conv2d:
    layer = (
        Conv3x3(before, after, stride)
        if size == 3
        else nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
    )
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(before, after, 3, stride),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            conv(after, after, 3),
            nn.BatchNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(conv(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each convolution (He et al., arXiv 1603.05027)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.body = nn.Sequential(
            conv(before, after, 3, stride), nn.BatchNorm2d(after), nn.ReLU(), conv(after, after, 3)
        )
        self.plain = stride == 1 and before == after
        self.shortcut = nn.Identity() if self.plain else conv(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.body(y)
        return out + (x if self.plain else self.shortcut(y))


def stages(block: Callable[[int, int, int], nn.Module], depths: tuple[int, ...]) -> list[nn.Module]:
    layers, before = [], 64
    for i, depth in enumerate(depths):
        after = 64 * 2**i
        for j in range(depth):
            layers.append(block(before, after, 2 if i > 0 and j == 0 else 1))
            before = after
    return layers


def stem_layers(stem: Stem, channels: int) -> list[nn.Module]:
    """The first layers of a ResNet.

    "imagenet": 7x7 with stride 2 and max-pool, which makes 8x8 of a 32x32 picture.
    "cifar": 3x3, which keeps its size.
    """
    if stem == "imagenet":
        return [
            conv(channels, 64, 7, 2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
        ]
    return [conv(channels, 64, 3), nn.BatchNorm2d(64), nn.ReLU()]


def resnet(depths: tuple[int, ...], channels: int, classes: int, stem: Stem) -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
    return nn.Sequential(*stem_layers(stem, channels), *stages(BasicBlock, depths), *head)


def preact_resnet(depths: tuple[int, ...], channels: int, classes: int, stem: Stem) -> nn.Module:
    start = stem_layers(stem, channels)
    # the first block brings its own BatchNorm
    start = [start[0], start[3]] if stem == "imagenet" else start[:1]
    head = [
        nn.BatchNorm2d(512),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, classes),
    ]
    return nn.Sequential(*start, *stages(PreActBlock, depths), *head)


class Logits(nn.Module):
    """A classifier of the library transformers that returns its scores (b, classes) alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(x).logits
        return scores


def vit(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A vision transformer (Dosovitskiy et al., arXiv 2010.11929, table 1) for square pictures.

    Its weights are drawn anew. "vit-l16" is ViT-L/16: 24 layers, width 1024, 304,326,632 parameters
    for 224 x 224 pictures and 1,000 classes. "vit-tiny" has nothing of its quality: 2 layers, width
    64, patches of 8 x 8, to try a run out within seconds on a CPU.

    Raises:
        ConfigError: if pictures do not divide into patches, or transformers is not installed.
    """
    channels, height, width = shape
    patch = 16 if name == "vit-l16" else 8
    if height != width or height % patch:
        near = max(round(height / patch), 1) * patch
        raise ConfigError(
            f"size must be a multiple of the patches' {patch} pixels for {name}, "
            f"and pictures square; got pictures of {height} x {width}. "
            f"Set --dataset imagenet --size {near}."
        )
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ModuleNotFoundError:
        raise ConfigError(
            f"model {name!r} needs transformers, which is not installed. Install gaf[vit]."
        ) from None
    hidden, layers, heads = (1024, 24, 16) if name == "vit-l16" else (64, 2, 4)
    sizes: dict[str, Any] = {
        "image_size": height,
        "patch_size": patch,
        "num_channels": channels,
        "num_labels": classes,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return Logits(ViTForImageClassification(ViTConfig(**sizes)))


def make_model(name: str, shape: tuple[int, int, int], classes: int, stem: Stem) -> nn.Module:
    """The model called `name` for pictures of `shape` (channels, height, width)."""
    channels, height, width = shape
    depths = (2, 2, 2, 2) if name == "resnet18" else (3, 4, 6, 3)
    if name.startswith("mlp"):
        return mlp(channels * height * width, classes, 512 if name == "mlp" else 128)
    if name == "convnet":
        return convnet(channels, classes)
    if name.startswith("vit"):
        return vit(name, shape, classes)
    make = preact_resnet if name.startswith("preact") else resnet
    return make(depths, channels, classes, stem)
