"""How far micro-gradients agree, from K: gradient noise scale and effective dimension.

g_i = g + e_i with Cov(e_i) = Sigma / b, and rho = B / b. Whether a row is accepted depends on
cosines alone, and these on rho and d_eff: the mean cosine falls as rho grows, and it scatters by
about 1 / sqrt(d_eff). `gaf.rules.prediction` derives acceptance from both.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gaf.rules.gram import is_present
from gaf.shapes import Float64

NORMAL_95 = 1.96


@dataclass(frozen=True)
class Noise:
    """Signal and noise of the micro-gradients.

    Attributes:
        b: samples per micro-batch.
        signal: |g|^2, the squared norm of what the rows have in common; an unbiased estimate, which
            noise can make negative.
        trace: tr(Sigma), the variance of one sample's gradient, over all coordinates.
        scale: the gradient noise scale B = tr(Sigma) / |g|^2 in samples (arXiv 1812.06162);
            infinite if no signal can be made out.
        low, high: 95% interval of the scale; high is infinite if the rows could be noise alone.
        dimension: d_eff = tr(Sigma)^2 / tr(Sigma^2) of the rows' directions, at least 1 and at most
            n; infinite if the rows are too few to show it.
    """

    b: float
    signal: float
    trace: float
    scale: float
    low: float
    high: float
    dimension: float

    @property
    def rho(self) -> float:
        """Noise over signal in one micro-gradient, B / b."""
        return self.scale / self.b


def noise_of(gram: Float64[Tensor, "r r"], b: float) -> Noise:
    """Signal and noise from the Gram matrix of r micro-gradients.

        |g|^2 ~ mean off-diagonal        tr(Sigma) ~ b (mean diagonal - mean off-diagonal)

    The interval is that of signal over noise, from leaving out one row after the other (jackknife).
    d_eff is that of the rows at unit length (`dimension_of`), because a cosine is blind to lengths,
    and a few long rows would otherwise be all of tr(Sigma^2).

    Args:
        gram: (r, r). Absent rows are left out; fewer than 4 present ones give NaN.
        b: samples per micro-batch.
    """
    sound = is_present(gram.diagonal())
    gram = gram[sound][:, sound]
    r = len(gram)
    if r < 4:
        return Noise(b, *[math.nan] * 6)
    own, others = gram.diagonal(), gram.sum(1) - gram.diagonal()
    signal, norm2 = float(others.sum() / (r * (r - 1))), float(own.mean())
    without = (others.sum() - 2 * others) / ((r - 1) * (r - 2))
    ratios = without / ((own.sum() - own) / (r - 1) - without)
    margin = NORMAL_95 * float(((r - 1) / r * (ratios - ratios.mean()).square().sum()).sqrt())
    ratio = signal / (norm2 - signal) if norm2 > signal else math.inf
    bounds = (ratio, ratio + margin, ratio - margin)
    scale, low, high = (b / x if x > 0 else math.inf for x in bounds)
    return Noise(b, signal, b * (norm2 - signal), scale, low, high, dimension_of(cosines_of(gram)))


def mean_off_diagonal(gram: Float64[Tensor, "k k"]) -> Float64[Tensor, ""]:
    """An estimate of |g|^2: the mean over pairs of present rows. NaN without such a pair."""
    sound = is_present(gram.diagonal())
    pairs = (sound & sound[:, None]).triu(1)
    return torch.where(pairs, gram, 0.0).sum() / pairs.sum()


def mean_of_others(gram: Float64[Tensor, "k k"], r: Tensor | int) -> Float64[Tensor, ""]:
    """The same, up to rounding, if absent rows are zeros. r: how many rows are present."""
    return (gram.sum() - gram.diagonal().sum()) / (r * (r - 1))


def cosines_of(gram: Float64[Tensor, "r r"]) -> Float64[Tensor, "r r"]:
    """K of the rows at unit length; NaN for an absent row."""
    norms = torch.where(is_present(gram.diagonal()), gram.diagonal().sqrt(), math.nan)
    return gram / norms / norms[:, None]


def dimension_of(gram: Float64[Tensor, "r r"]) -> float:
    """The effective dimension of the noise from r >= 4 rows.

    d_eff = (mean diagonal - mean off-diagonal)^2 / E[(K13 - K14 - K23 + K24)^2 / 4]
    """
    noise = gram.diagonal().mean() - mean_of_others(gram, len(gram))
    square = float(noise_squared(gram))
    return float(noise) ** 2 / square if square > 0 else math.inf


def noise_squared(
    gram: Float64[Tensor, "k k"], r: Tensor | int | None = None
) -> Float64[Tensor, ""]:
    """tr(Sigma^2) / b^2 from r >= 4 present rows.

    It is the mean of (K13 - K14 - K23 + K24)^2 / 4 over all quadruples of different rows, and
    unbiased, whatever g: (g_1 - g_2)'(g_3 - g_4) holds none of it, and each difference has
    covariance 2 Sigma / b. Multiplied out it needs only sums over pairs that share two, one or no
    index (Chen, Zhang and Zhong, J. Amer. Statist. Assoc. 105, 2010).

    Args:
        gram: (k, k).
        r: (), how many rows are present, if the others are zeros; None for all k.
    """
    r = len(gram) if r is None else r
    off = gram - gram.diagonal().diag()
    rows, total, squares = off.sum(1), off.sum(), off.square().sum()
    chains = rows.square().sum()
    pairs = squares / (r * (r - 1))
    triples = (chains - squares) / (r * (r - 1) * (r - 2))
    quadruples = (total**2 - 4 * chains + 2 * squares) / (r * (r - 1) * (r - 2) * (r - 3))
    return pairs - 2 * triples + quadruples
