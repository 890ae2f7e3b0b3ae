"""How far micro-gradients agree, from K: gradient noise scale and effective dimension, and the acceptance that follows from both.

g_i = g + e_i with Cov(e_i) = Sigma / b, and rho = B / b. Whether a row is accepted depends on cosines alone, and these on
rho and on d_eff: the mean cosine falls as rho grows, and it scatters by about 1 / sqrt(d_eff).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gaf.rules.gram import present
from gaf.shapes import Float64

NORMAL_95 = 1.96


@dataclass(frozen=True)
class Noise:
    """Signal and noise of the micro-gradients.

    Attributes:
        b: samples per micro-batch.
        signal: |g|^2, the squared norm of what the rows have in common; an unbiased estimate, which noise can make negative.
        trace: tr(Sigma), the variance of one sample's gradient, over all coordinates.
        scale: the gradient noise scale B = tr(Sigma) / |g|^2 in samples (arXiv 1812.06162); infinite where no signal is made out.
        low, high: 95% interval of the scale; high is infinite where the rows could be noise alone.
        dimension: d_eff = tr(Sigma)^2 / tr(Sigma^2) of the rows' directions, at least 1 and at most n; infinite where the
            rows are too few to tell.
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

    The interval is of signal over noise, from leaving out one row after the other (jackknife). d_eff is that of the rows at
    unit length (`dimension_of`), for a cosine knows no lengths, and a few long rows would otherwise be all of tr(Sigma^2).

    Args:
        gram: (r, r). Absent rows are left out; fewer than 4 present ones give NaN.
        b: samples per micro-batch.
    """
    sound = present(gram.diagonal())
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
    scale, low, high = (
        b / x if x > 0 else math.inf for x in (ratio, ratio + margin, ratio - margin)
    )
    return Noise(b, signal, b * (norm2 - signal), scale, low, high, dimension_of(cosines_of(gram)))


def mean_off_diagonal(gram: Float64[Tensor, "k k"]) -> Float64[Tensor, ""]:
    """An estimate of |g|^2: the mean over pairs of present rows. NaN without such a pair."""
    sound = present(gram.diagonal())
    pairs = (sound & sound[:, None]).triu(1)
    return torch.where(pairs, gram, 0.0).sum() / pairs.sum()


def mean_of_others(gram: Float64[Tensor, "k k"], r: Tensor | int) -> Float64[Tensor, ""]:
    """The same where the rows that are absent are zeros; r: how many rows are present."""
    return (gram.sum() - gram.diagonal().sum()) / (r * (r - 1))


def cosines_of(gram: Float64[Tensor, "r r"]) -> Float64[Tensor, "r r"]:
    """K of the rows at unit length; NaN for an absent row."""
    norms = torch.where(present(gram.diagonal()), gram.diagonal().sqrt(), math.nan)
    return gram / norms / norms[:, None]


def dimension_of(gram: Float64[Tensor, "r r"]) -> float:
    """The effective dimension of the noise from r >= 4 rows.

    d_eff = (mean diagonal - mean off-diagonal)^2 / E[(K13 - K14 - K23 + K24)^2 / 4]

    """
    r = len(gram)
    noise = gram.diagonal().mean() - mean_of_others(gram, r)
    square = float(noise_squared(gram))
    return float(noise) ** 2 / square if square > 0 else math.inf


def noise_squared(
    gram: Float64[Tensor, "k k"], r: Tensor | int | None = None
) -> Float64[Tensor, ""]:
    """tr(Sigma^2) / b^2 from r >= 4 present rows: the mean of (K13 - K14 - K23 + K24)^2 / 4 over all quadruples of different rows.

    Unbiased, whatever g: (g_1 - g_2)'(g_3 - g_4) holds none of it, and each difference has covariance 2 Sigma / b. Multiplied out it
    needs only sums over pairs that share two, one or no index (Chen, Zhang and Zhong, J. Amer. Statist. Assoc. 105, 2010).

    Args:
        gram: (k, k).
        r: (), how many rows are present, where the others are zeros; None for all k.
    """
    r = len(gram) if r is None else r
    off = gram - gram.diagonal().diag()
    rows, total, squares = off.sum(1), off.sum(), off.square().sum()
    chains = rows.square().sum()
    pairs = squares / (r * (r - 1))
    triples = (chains - squares) / (r * (r - 1) * (r - 2))
    quadruples = (total**2 - 4 * chains + 2 * squares) / (r * (r - 1) * (r - 2) * (r - 3))
    return pairs - 2 * triples + quadruples


def expected_cosine(rho: float, c: float) -> float:
    """Of a row with the sum of c others: 1 / sqrt((1 + rho/c)(1 + rho)); with one other b / (b + B)."""
    rho = min(rho, 1e9)
    return 1 / math.sqrt((1 + rho / c) * (1 + rho))


def spread_of_cosine(rho: float, dimension: float, c: float) -> float:
    """Standard deviation of that cosine; 1 / sqrt(d_eff) where all is noise.

    To first order in the noise of both, with E the noise of the sum, the relative deviation has these independent parts,
    variance times d_eff at the right, where noise is normal and g'Sigma g = |g|^2 tr(Sigma) / d_eff, as for a g of the noise's own
    kind; where g lies in directions of more noise, the cosine scatters more:

        <g, e>     rho^3 / (1 + rho)^2           <E, e>            rho^2 / c
        <g, E>     rho^3 / (c (c + rho)^2)       |e|^2, |E|^2      rho^2 / (2 (1 + rho)^2),  rho^2 / (2 (c + rho)^2)
    """
    rho = min(rho, 1e9)
    along = rho**3 / (1 + rho) ** 2 + rho**3 / (c * (c + rho) ** 2)
    across = rho**2 / c
    lengths = rho**2 / (2 * (1 + rho) ** 2) + rho**2 / (2 * (c + rho) ** 2)
    return expected_cosine(rho, c) * math.sqrt((along + across + lengths) / dimension)


def accepted_by(tau: float, rho: float, dimension: float, c: float) -> float:
    """Chance that a row is accepted by the sum of c accepted ones: the cosine is at least 1 - tau, taken as normal."""
    above = expected_cosine(rho, c) - (1 - tau)
    deviations = above / max(spread_of_cosine(rho, dimension, c), 1e-12)
    return 0.5 * math.erfc(-deviations / math.sqrt(2))


def predicted_acceptance(tau: float, k: int, rho: float, dimension: float) -> float:
    """Expected share of the k - 1 compared rows that GAF(tau) accepts, in [0, 1].

    Walks through the rows with the chances of having accepted c = 1, 2, ... so far. Rows are taken to be independent given c,
    though rows that were accepted agree a little more than others, and all are compared with the same start.

    Args:
        tau: cosine distance in [0, 2].
        k: micro-gradients per step, at least 2.
        rho: B / b.
        dimension: d_eff.

    >>> round(predicted_acceptance(0.9, k=2, rho=9.0, dimension=100.0), 3)  # the mean distance: half of the rows
    0.5
    """
    chances = [1.0] + [0.0] * (k - 1)  # of having accepted 1, 2, ..., k rows
    joins = [accepted_by(tau, rho, dimension, c) for c in range(1, k)]
    for _ in range(k - 1):
        stays = [chance * (1 - join) for chance, join in zip(chances, [*joins, 0.0], strict=True)]
        moves = [0.0] + [chance * join for chance, join in zip(chances, joins, strict=False)]
        chances = [stay + move for stay, move in zip(stays, moves, strict=True)]
    return sum(c * chance for c, chance in enumerate(chances)) / (k - 1)


def tau_for(share: float, k: int, rho: float, dimension: float) -> float:
    """The tau in [0, 2] at which the predicted acceptance is `share`, in (0, 1)."""
    low, high = 0.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if predicted_acceptance(middle, k, rho, dimension) < share
            else (low, middle)
        )
    return high


def noise_floor(chance: float, dimension: float) -> float:
    """The tau that a comparison of pure noise passes with this chance: 1 - z / sqrt(d_eff), z the normal quantile; whatever b."""
    z = math.sqrt(2) * float(
        torch.erfinv(torch.tensor(1 - 2 * chance, dtype=torch.float64, device="cpu"))
    )
    return min(max(1 - z / math.sqrt(dimension), 0.0), 2.0)
