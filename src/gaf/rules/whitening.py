"""Mahalanobis products of the rows, in their own span, from K alone: `GAF(metric="whitened")`."""

import torch
from torch import Tensor

from gaf.rules.gram import is_present
from gaf.shapes import Float64

ALIKE = 1e-12  # scatter over mean squared norm, up to which rows are equal but for rounding


def whiten(gram: Float64[Tensor, "k k"], ridge: float) -> Float64[Tensor, "k k"]:
    """The inner products of the rows by the inverse of their own scatter.

        G (l I + S)^-1 G'  =  (1/l) [K - K H (l (k-1) I + H K H)^-1 H K]

        H = I - 11'/k      S = G' H G / (k - 1)      l = ridge * mean diag(H K H) / (k - 1)

    The first form inverts an (n, n) matrix, the second one a (k, k) (Woodbury): directions in which
    the rows scatter widely count less than those in which they do not. Does not wait for the
    device.

    Args:
        gram: K, (k, k). Absent rows (zero, NaN or infinite) take no part.
        ridge: above 0. Higher is nearer to K itself.

    Returns:
        (k, k), zeros for absent rows. Where the rows do not scatter (all are equal, or one is
        present), so that l is 0: K in units of the mean squared norm.
    """
    sound = is_present(gram.diagonal())
    both, r = sound & sound[:, None], sound.sum()
    K = torch.where(both, gram, 0.0)
    K = K / torch.where(r > 0, K.trace() / r, 1.0)
    KH = torch.where(both, K - (K.sum(1) / r)[:, None], 0.0)
    HKH = torch.where(both, KH - (KH.sum(0) / r), 0.0)
    scatter = HKH.trace() / r
    scattered = (r > 1) & (scatter > ALIKE)
    l = torch.where(scattered, ridge * scatter / (r - 1), 1.0)  # noqa: E741
    inner = HKH + (l * (r - 1).clamp_min(1)) * torch.eye(len(K), dtype=K.dtype, device=K.device)
    whitened = (K - KH @ torch.linalg.solve_ex(inner, KH.T)[0]) / l
    # rounding of K can leave nothing of a row where the scatter is small
    sane = ((whitened.diagonal() > 0) | ~sound).all()
    return torch.where(scattered & sane, (whitened + whitened.T) / 2, K)
