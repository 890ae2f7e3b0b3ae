"""Which share of the rows GAF accepts at which tau, predicted from B and d_eff alone.

rho = B / b is noise over signal in one micro-gradient, d_eff the effective dimension of the noise;
see `gaf.rules.agreement`.
"""

import math

import torch


def expected_cosine(rho: float, c: float) -> float:
    """Of a row with the sum of c others: 1 / sqrt((1 + rho/c)(1 + rho)). For c = 1 b / (b + B)."""
    rho = min(rho, 1e9)
    return 1 / math.sqrt((1 + rho / c) * (1 + rho))


def spread_of_cosine(rho: float, dimension: float, c: float) -> float:
    """Standard deviation of that cosine; 1 / sqrt(d_eff) if all is noise.

    To first order in the noise of both, with E the noise of the sum, the relative deviation has
    these independent parts. At the right is their variance times d_eff, for normal noise and
    g'Sigma g = |g|^2 tr(Sigma) / d_eff, as for a g of the noise's own kind; if g lies in directions
    of more noise, the cosine scatters more:

        <g, e>     rho^3 / (1 + rho)^2           <E, e>            rho^2 / c
        <g, E>     rho^3 / (c (c + rho)^2)       |e|^2, |E|^2      rho^2 / (2 (1 + rho)^2),
                                                                   rho^2 / (2 (c + rho)^2)
    """
    rho = min(rho, 1e9)
    along = rho**3 / (1 + rho) ** 2 + rho**3 / (c * (c + rho) ** 2)
    across = rho**2 / c
    lengths = rho**2 / (2 * (1 + rho) ** 2) + rho**2 / (2 * (c + rho) ** 2)
    return expected_cosine(rho, c) * math.sqrt((along + across + lengths) / dimension)


def chance_to_join(tau: float, rho: float, dimension: float, c: float) -> float:
    """Chance that the sum of c accepted rows accepts another: its cosine is at least 1 - tau.

    The cosine is taken as normal.
    """
    above = expected_cosine(rho, c) - (1 - tau)
    deviations = above / max(spread_of_cosine(rho, dimension, c), 1e-12)
    return 0.5 * math.erfc(-deviations / math.sqrt(2))


def predicted_acceptance(tau: float, k: int, rho: float, dimension: float) -> float:
    """Expected share of the k - 1 compared rows that GAF(tau) accepts, in [0, 1].

    Walks through the rows with the chances of having accepted c = 1, 2, ... so far. Rows are taken
    to be independent given c. In truth rows that were accepted agree a little more than others, and
    all are compared with the same start.

    Args:
        tau: cosine distance in [0, 2].
        k: micro-gradients per step, at least 2.
        rho: B / b.
        dimension: d_eff.

    >>> round(predicted_acceptance(0.9, k=2, rho=9.0, dimension=100.0), 3)  # the mean: half
    0.5
    """
    chances = [1.0] + [0.0] * (k - 1)  # of having accepted 1, 2, ..., k rows
    joins = [chance_to_join(tau, rho, dimension, c) for c in range(1, k)]
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
        if predicted_acceptance(middle, k, rho, dimension) < share:
            low = middle
        else:
            high = middle
    return high


def noise_floor(chance: float, dimension: float) -> float:
    """The tau that a comparison of pure noise passes with this chance, whatever b.

    1 - z / sqrt(d_eff), z the normal quantile.
    """
    quantile = torch.erfinv(torch.tensor(1 - 2 * chance, dtype=torch.float64, device="cpu"))
    z = math.sqrt(2) * float(quantile)
    return min(max(1 - z / math.sqrt(dimension), 0.0), 2.0)
