"""Losses and schedules used by several models; those of a single model are in its file.

Shapes: B and C rows, D dimensions of a point, Z latent.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

# kernel scales of the code released by JFSE's authors (the group behind LCALE and CFSA); they are not squared
MMD_SCALES: Final[tuple[float, ...]] = (
    *(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    *(1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 100.0),
    *(1e3, 1e4, 1e5, 1e6),
)
MMD_FLOOR: Final = 1e-4  # in the same code


def warm_up(epoch: float, start: float, end: float) -> float:
    """clip((epoch - start) / (end - start), 0, 1): fraction of a loss weight in `epoch`, counted from 0."""
    if end <= start:
        return float(epoch >= start)
    return min(max((epoch - start) / (end - start), 0.0), 1.0)


def reparameterise(mean: Tensor, log_var: Tensor) -> Tensor:
    """A sample of N(mean, exp(log_var)), all (B, Z), with gradient into both; every entry has its own noise."""
    return mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)


def gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)) = 1/2 (exp(log_var) + mean^2 - 1 - log_var), all (B, Z).

    Summed over Z, averaged over B.
    """
    return 0.5 * (log_var.exp() + mean.square() - 1.0 - log_var).sum(1).mean()


def squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """|l_i - r_j|^2 of rows (B, D) and (C, D), as (B, C).

    Not computed as |l|^2 - 2 lr + |r|^2, whose rounding errors make distances negative, and those of equal rows
    nonzero, which would affect the narrow kernels above.
    """
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist").square()


def mmd(left: Tensor, right: Tensor, scales: Sequence[float] = MMD_SCALES, floor: float = 0.0) -> Tensor:
    """Squared maximum mean discrepancy of samples (B, D) and (C, D): mean k(l, l') + mean k(r, r') - 2 mean k(l, r).

    k(a, b) = sum over scales s of exp(-|a - b|^2 / (2 s)). The means include the pairs of a row with itself, so equal
    samples give 0 and independent ones a little more than 0. Clamped to at least `floor`, where the gradient is 0.
    Batch-dependent: the caller gathers over ranks.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = squared_distances(a, b)
        return torch.stack([torch.exp(distance / (-2.0 * scale)).mean() for scale in scales]).sum()

    return (kernel(left, left) + kernel(right, right) - 2.0 * kernel(left, right)).clamp(min=floor)
