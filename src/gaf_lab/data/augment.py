"""Augmentation and normalisation, a whole batch at once, on the batch's device."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad


def crop_and_flip(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each picture shifted by up to `padding` pixels either way, and mirrored with probability 1/2.

    The mirror swaps left and right. Pixels from outside are 0: shift uint8 pictures, before
    normalising, so that they are black.

    Args:
        x: pictures (b, C, H, W), any dtype and device.
        generator: on the CPU, so that all devices draw the same.
        padding: pixels, at least 0; more shifts further.

    Returns:
        pictures like x, new memory.
    """
    shifts = draw_shifts(len(x), generator, padding).to(x.device, non_blocking=True)
    return shift(x, shifts, padding)


def draw_shifts(b: int, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Random shifts of b pictures, (3, b, 1) int64 on the CPU.

    They are top and left in [0, 2 padding], and 1 for a mirrored picture.
    """
    offsets = torch.randint(2 * padding + 1, (2, b, 1), generator=generator)
    return torch.cat([offsets, torch.randint(2, (1, b, 1), generator=generator)])


def shift(x: Tensor, shifts: Tensor, padding: int = 4) -> Tensor:
    """`crop_and_flip` by the numbers of `draw_shifts`, on the pictures' device."""
    b, channels, height, width = x.shape
    top, left, mirror = shifts
    rows = top + torch.arange(height, device=x.device)
    across = torch.arange(width, device=x.device)
    columns = left + torch.where(mirror == 1, width - 1 - across, across)
    padded = pad(x, (padding,) * 4)
    # (b, H, W), into the padded picture laid flat
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    picked = padded.flatten(2).gather(2, pixels.view(b, 1, -1).expand(-1, channels, -1))
    return picked.view(b, channels, height, width)


def normalise(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x / 255 - mean) / std per channel, as float32.

    Args:
        x: pictures (b, C, H, W) in 0..255.
        mean: C numbers, of pictures in [0, 1].
        std: C numbers, above 0.
    """
    if not len(mean) == len(std) == x.shape[1]:
        raise ValueError(
            f"normalise: mean and std must have one number per channel, {x.shape[1]}; "
            f"got {len(mean)} and {len(std)}. Use those of the data set that the pictures are of."
        )
    scale, offset = affine(mean, std, x.device)
    return x.to(torch.float32, copy=True).mul_(scale).sub_(offset)


@lru_cache(maxsize=16)
def affine(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The factor for bytes, and what to subtract then. Kept: each copy to a device costs a wait."""
    scale = [1 / (255 * s) for s in std]
    offset = [m / s for m, s in zip(mean, std, strict=True)]
    per_channel = (-1, 1, 1)
    return (
        torch.tensor(scale, device=device).view(per_channel),
        torch.tensor(offset, device=device).view(per_channel),
    )
