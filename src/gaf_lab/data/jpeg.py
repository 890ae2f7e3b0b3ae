"""From a JPEG or PNG file to an upright picture of one size: decoding, random crops, the middle."""

import math
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from gaf_lab.data.sources import DataError

# of a random crop: share of the picture, width over height (arXiv 1409.4842, section 6)
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
CROP_TRIES = 10  # crops drawn before the middle of the picture is taken
MIDDLE = 224 / 256  # a test picture shows this share of the shorter side

# of a picture stored with this EXIF orientation, to what a viewer shows
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Box = tuple[float, float, float, float]  # left, top, right, bottom


def decode(path: Path) -> Image.Image:
    """A JPEG or PNG file as RGB, even if it is grey or CMYK, and upright.

    Raises:
        DataError: if it is missing, cut off or something else.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            return upright(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"imagenet: {path} must be a whole JPEG or PNG file; it cannot be read ({error}). "
            "Unpack it again."
        ) from None


def upright(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: turned as its EXIF data say, if they can be read."""
    image.load()  # of a PNG, EXIF data may follow the pixels
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, struct.error):
        return image
    return image if turn is None else image.transpose(turn)


def draw_crops(n: int, generator: torch.Generator) -> Tensor:
    """Random numbers for n crops, (n, CROP_TRIES + 1, 4) float64 in [0, 1).

    As many are drawn whatever the pictures are.
    """
    return torch.rand(n, CROP_TRIES + 1, 4, generator=generator, dtype=torch.float64)


def crop(image: Image.Image, size: int, draw: Tensor | None) -> Tensor:
    """A part of the picture, (3, size, size) uint8.

    Args:
        image: of any size.
        size: height and width of the result.
        draw: (CROP_TRIES + 1, 4) from `draw_crops`: a random crop, perhaps mirrored.
            None: the middle.
    """
    if draw is None:
        return _resize(image, size, middle_box(*image.size))
    pixels = _resize(image, size, random_box(*image.size, draw[:-1].tolist()))
    return pixels.flip(2) if draw[-1, 0] < 0.5 else pixels


def _resize(image: Image.Image, size: int, box: Box) -> Tensor:
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def middle_box(width: int, height: int) -> Box:
    """The middle square of a picture.

    It is what remains after scaling the shorter side to size * 256 / 224 and cropping to size.
    """
    side = min(width, height) * MIDDLE
    return centre_box(width, height, side, side)


def centre_box(width: int, height: int, across: float, down: float) -> Box:
    """A box of `across` x `down` in the middle of a picture of `width` x `height`."""
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def random_box(width: int, height: int, tries: list[list[float]]) -> Box:
    """A crop of AREA and RATIO anywhere in the picture: the first try that fits.

    If none fits, the largest box in the middle with an allowed ratio.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        tries: for each the area, the logarithm of the ratio, the place across and the place down,
            as shares in [0, 1) of their ranges.
    """
    for area, ratio, x, y in tries:
        pixels = width * height * (AREA[0] + area * (AREA[1] - AREA[0]))
        shape = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
        across, down = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < across <= width and 0 < down <= height:
            left, top = math.floor(x * (width - across + 1)), math.floor(y * (height - down + 1))
            return left, top, left + across, top + down
    return centre_box(width, height, min(width, height * RATIO[1]), min(height, width / RATIO[0]))
