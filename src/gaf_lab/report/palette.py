"""Colours. Those of methods are the same on every page.

Averaging is grey, GAF and its variants are blue, controls are warm, other methods green and violet.
"""

import math
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

CROWD = 8  # arms: with more, single runs would hide the means


INK, SOFT, GRID = "#1b1d21", "#5c6370", "#e6e7ea"


class Shade(NamedTuple):
    """A colour on a light and on a dark ground."""

    light: str
    dark: str


KNOWN = {
    "averaging": Shade("#808080", "#9a9a9a"),
    "averaging, AdamW": Shade("#3f3f3f", "#dedede"),
    "averaging, scaled rate": Shade("#a9744a", "#8a5a33"),
    "GAF": Shade("#1559c9", "#4f93ff"),
    "GAF, start best": Shade("#2aa7c4", "#49c0d9"),
    "GAF, start worst": Shade("#0b2a6b", "#2b4fc4"),
    "GAF, halving": Shade("#79a8f5", "#a9c4ff"),
    "GAF, per bucket": Shade("#5b6fa8", "#7183bd"),
    "GAF, k = 4": Shade("#006b8f", "#1787a8"),
    "GAF, k = 2": Shade("#86d3f2", "#9fe4f7"),
    "GAF, AdamW": Shade("#4a35d9", "#7a6bff"),
    "random subset": Shade("#e0561b", "#f2672a"),
    "replay skip": Shade("#e2a800", "#ffd166"),
    "random skip": Shade("#8c1d4f", "#b8336f"),
    "early stopping": Shade("#7a7a12", "#a8a52a"),
    "EMA of weights": Shade("#2f9e63", "#3ecf85"),
    "label smoothing": Shade("#0f5a3c", "#17805a"),
    "GCE": Shade("#8fbf26", "#c3ea5b"),
    "ELR": Shade("#7a1fa8", "#9a35cf"),
    "mixup": Shade("#a86be0", "#c08cff"),
    "SAM": Shade("#d99bea", "#f6b8ff"),
    "until agreement": Shade("#2c1414", "#403f5b"),
    "replayed sizes": Shade("#b7ad9b", "#faa396"),
    "mean size": Shade("#7f4a1a", "#74548b"),
    "larger batch": Shade("#c22fa0", "#ee5ac8"),
}
HUES = 150  # degrees of hue that a method's variants take up
# from linear sRGB to cones, from their cube roots to OKLab: bottosson.github.io/posts/oklab
CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
OPPONENTS = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def palette(names: Sequence[str]) -> dict[str, Shade]:
    """A colour for each arm. It depends on the name alone, so it is the same on every page."""
    return {name: shade_of(name) for name in names}


def shade_of(name: str) -> Shade:
    """The colour of a known arm; of a variant, such as "GAF, tau 0.5", one near its method's.

    Any other arm has one by the checksum of its name.
    """
    if name in KNOWN:
        return KNOWN[name]
    number = zlib.crc32(name.encode())
    tau = re.search(r"\btau (\d+(?:\.\d+)?)", name)
    place = (
        number % 1009 / 1009 if tau is None else 1 / (1 + math.exp((0.8 - float(tau[1])) / 0.12))
    )
    family = next((KNOWN[kind] for kind in families(name) if kind in KNOWN), None)
    hue = number // 1009 % 360 if family is None else hue_of(family) + HUES * (place - 0.5)
    return Shade(oklch(0.72 - 0.32 * place, 0.15, hue), oklch(0.88 - 0.3 * place, 0.13, hue))


def families(name: str) -> list[str]:
    """The methods that an arm may be a variant of, the nearest first."""
    words = name.split(", ")
    ours = ["GAF"] if name.lower().startswith("gaf") else []
    return [", ".join(words[:n]) for n in range(len(words) - 1, 0, -1)] + ours


def hue_of(shade: Shade) -> float:
    """In degrees, of OKLCH."""
    from matplotlib.colors import to_rgb

    linear = [
        ((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in to_rgb(shade.light)
    ]
    cones = [dot(row, linear) ** (1 / 3) for row in CONES]
    return math.degrees(math.atan2(dot(OPPONENTS[2], cones), dot(OPPONENTS[1], cones)))


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """A colour of OKLCH, in which equal steps look about equal (Ottosson 2020).

    Clipped to what a screen can show.
    """
    import numpy as np
    from matplotlib.colors import to_hex

    turn = math.radians(hue)
    lab = np.array([lightness, chroma * math.cos(turn), chroma * math.sin(turn)])
    linear = np.linalg.solve(CONES, np.linalg.solve(OPPONENTS, lab) ** 3)
    srgb = np.where(
        linear > 0.0031308, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055, 12.92 * linear
    )
    red, green, blue = srgb.clip(0, 1).tolist()
    return str(to_hex((red, green, blue)))


def dot(row: Sequence[float], values: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(row, values, strict=True))


def darker(colour: str) -> str:
    """A colour as text: dark enough to be read on white."""
    return "#" + "".join(f"{int(int(colour[i : i + 2], 16) * 0.8):02x}" for i in (1, 3, 5))
