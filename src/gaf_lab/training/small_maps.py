"""3x3 convolutions of small maps on a CPU.

With the ImageNet stem the last stages of a ResNet see a 32x32 picture as a map of 2x2 or 1x1. There
most of a convolution's terms are padding, and one matrix product takes less than half its time.
"""

import functools
import itertools

import torch
from torch import Tensor, nn


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d` of 3x3 with padding 1 and no bias; for maps up to 2x2, one matrix product.

    It replaces what `nn.Conv2d.forward` calls, and not `forward` itself, by which
    `gaf.ghost_gram` knows a convolution.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__(before, after, 3, stride, padding=1, bias=False)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        n, before, height, width = input.shape
        if max(height, width) > 2 or input.device.type != "cpu":
            usual: Tensor = super()._conv_forward(input, weight, bias)
            return usual
        (stride, _), after = self.stride, self.out_channels
        down, across = (height + stride - 1) // stride, (width + stride - 1) // stride
        places = kernel_places(height, width, stride).to(weight.dtype)
        spread = (weight.flatten(2) @ places).view(after, before, down * across, height * width)
        matrix = spread.transpose(1, 2).reshape(after * down * across, before * height * width)
        return nn.functional.linear(input.flatten(1), matrix).view(n, after, down, across)


@functools.cache
@torch.inference_mode(False)  # it is kept, and backward passes need it
def kernel_places(height: int, width: int, stride: int) -> Tensor:
    """(9, outputs * inputs): 1 where a place of the kernel joins an input pixel to an output.

    Both are counted by rows. An output reaches one pixel to each side of its centre.
    """
    outputs = -(-height // stride), -(-width // stride)
    places = torch.zeros(9, *outputs, height, width, device="cpu")
    for a, b, i, j in itertools.product(*map(range, places.shape[1:])):
        row, column = i - stride * a + 1, j - stride * b + 1
        if 0 <= row <= 2 and 0 <= column <= 2:
            places[3 * row + column, a, b, i, j] = 1
    return places.flatten(1)
