"""How far each sample's label is trusted, from one batch: higher is better.

    prototype   cos(h_i, P_y) - the largest other cos(h_i, P_c): h_i the input of the last layer,
                P_c the running mean of h / |h| over the samples labelled c, and both divided by
                the root mean square of each feature over the P_c
    vote        the mean cosine of the sample's gradient with those of the others that have its
                label, in the last layer or in all layers
    loss        minus the loss

The prototype margin is the agreement of last-layer gradients for a head that has learned nothing:
there (p = 1 / C) the inner product of two samples' gradients is <h_i, h_j> (1[y_i = y_j] - 1 / C).
A head that has memorised a wrong label cannot hide it. Cosines, in place of inner products, do not
favour a class of samples that are alike, and dividing by its root mean square keeps a feature that
is large in all classes from hiding those that differ.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from gaf.shapes import Float, Float64, Int

SMALLEST = 0.1  # of a feature's mean square, as a share of the mean over the features


def prototype_cosines(
    unit: Float[Tensor, "n p"], prototypes: Float[Tensor, "C p"]
) -> Float[Tensor, "n C"]:
    """cos(h / r, P_c / r) of each sample and class, in [-1, 1].

    r_j^2 is the mean of P_cj^2 over the classes, plus a tenth of its mean over the features.

    Args:
        unit: h, features of unit length.
        prototypes: P; a class without one is NaN, and so are its cosines.
    """
    square = prototypes.square().nanmean(0)
    r = (square + SMALLEST * square.mean()).sqrt().clamp_min(1e-6)  # 0 where all features are
    return normalize(unit / r, dim=1) @ normalize(prototypes / r, dim=1).T


def prototype_margins(
    similarity: Float[Tensor, "n C"], labels: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The margin of the label's prototype, in [-2, 2].

    similarity: to each class's prototype; NaN where a class has none. Then the margin of the
    class's own samples is NaN.
    """
    own = similarity.gather(1, labels[:, None])[:, 0]
    others = similarity.scatter(1, labels[:, None], math.nan).nan_to_num(nan=-math.inf).amax(1)
    return torch.where(others.isfinite(), own - others, math.nan)


def depths_in_others(
    scores: Float[Tensor, " n"],
    labels: Int[Tensor, " n"],
    guesses: Int[Tensor, " n"],
    usual: Float[Tensor, " C"],
) -> Float[Tensor, " n"]:
    """How far each sample looks like a usual one of the class that it seems to be of, in [0, 1].

    Minus its score, over the mean score of that class's own samples; 0 for one that seems to be of
    its label's class. A hard sample lies between two classes, a wrongly labelled one within one.
    """
    there = usual[guesses]
    return torch.where((guesses != labels) & (there > 0), -scores / there, 0).clamp(0, 1)


def head_cosines(
    features: Float[Tensor, "n p"], errors: Float[Tensor, "n C"]
) -> Float[Tensor, "n n"]:
    """Of the gradients of the head, errors_i x (features_i, 1): the product of two cosines.

    NaN for a sample without a gradient.
    """
    inputs = unit_rows(pad(features, (0, 1), value=1.0))
    directions = unit_rows(errors)
    return (inputs @ inputs.T) * (directions @ directions.T)


def unit_rows(x: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """NaN for a row of zeros."""
    return normalize(x, dim=1) / (x != 0).any(1, keepdim=True)


def gram_cosines(K: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """K_ij / sqrt(K_ii K_jj); NaN for a sample without a gradient."""
    norms = K.diagonal().sqrt()
    return K / norms / norms[:, None]


def class_votes(
    cosines: Float[Tensor, "n n"], labels: Int[Tensor, " n"], counted: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The mean cosine with the gradients of the label's other samples, in [-1, 1].

    NaN for the only sample of its label, and for one without a gradient.
    """
    votes = cosines.diagonal().isfinite() & (counted > 0)
    others = (labels == labels[:, None]) & votes
    others = others.fill_diagonal_(False)
    found = torch.where(others, cosines, 0).sum(1) / others.sum(1)  # 0 / 0 is NaN
    return torch.where(votes, found, math.nan)
