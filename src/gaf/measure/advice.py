"""Which tau to take, and why: from the noise of the micro-gradients."""

import math
from dataclasses import dataclass
from typing import Any

from gaf.arguments import is_number
from gaf.measure.acceptance import Acceptance
from gaf.rules.agreement import Noise

SHARE = 0.5  # of the compared rows accepted, at most
CHANCE = 0.05  # of pure noise passing one comparison, at most


@dataclass(frozen=True)
class Recommendation:
    """A tau and why.

    Attributes:
        tau: cosine distance in [0, 2].
        predicted: share of the compared rows that are accepted, from one half of the rows.
        measured: what GAF(tau) does with the other half.
        reason: in a sentence or two.
    """

    tau: float
    predicted: float
    measured: Acceptance
    reason: str


def check_chance(name: str, value: Any, default: float) -> None:
    """ValueError if an argument of `recommend` is not in (0, 1)."""
    if not is_number(value) or not 0 < value < 1:
        raise ValueError(
            f"recommend: {name} must lie in (0, 1); got {value!r}. The default is {default}."
        )


def reason_of_noise_floor(noise: Noise, b: int, tau: float, chance: float, predicted: float) -> str:
    """Why tau is at the noise floor. predicted: share of the compared rows accepted there."""
    return (
        f"Above tau = {tau:.3f} agreement means little: pure noise, whose cosines scatter by "
        f"{noise.dimension**-0.5:.3f} here (d_eff = {format_number(noise.dimension)}), would pass "
        f"in more than {100 * chance:g}% of the comparisons. At that tau {100 * predicted:.0f}% of "
        f"the compared micro-gradients should be accepted ({scale_in_words(noise)}, b = {b})."
    )


def reason_of_share(
    noise: Noise, b: int, floor: float, chance: float, passing: float, tau: float, predicted: float
) -> str:
    """Why tau is below the noise floor.

    passing: share of the compared rows accepted at the floor; predicted: the same at tau.
    """
    return (
        f"Micro-gradients agree by more than noise would ({scale_in_words(noise)}, b = {b}): at "
        f"tau = {floor:.3f}, which pure noise passes in {100 * chance:g}% of the comparisons, "
        f"{100 * passing:.0f}% of those compared would be accepted. "
        f"At tau = {tau:.3f} it should be {100 * predicted:.0f}%."
    )


def scale_in_words(noise: Noise) -> str:
    if math.isinf(noise.scale):
        return "no common direction can be made out"
    return f"B = {format_number(noise.scale)} samples"


def lines_of_advice(advice: Recommendation) -> list[tuple[str, str]]:
    """Name and value of each line that shows a recommendation."""
    return [
        ("recommended tau", f"{advice.tau:.3f}"),
        (
            "accepted, of those compared",
            f"{100 * advice.predicted:.1f}% predicted, "
            f"{100 * advice.measured.rows:.1f}% measured on other micro-gradients",
        ),
        ("steps taken there", f"{100 * advice.measured.steps:.1f}% measured"),
    ]


def format_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
