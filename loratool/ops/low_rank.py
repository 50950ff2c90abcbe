"""Low rank: the largest singular values of a dense matrix and their vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

OVERSAMPLED, ROUNDS, RANDOMISED = 16, 24, 6
"""Vectors beyond those wanted, iterations at most, and how much smaller than the matrix the subspace has to be."""


def low_rank(matrix: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `limit` largest singular values of a dense matrix and their vectors: x `(m, k)`, values, y `(k, n)`.

    By a dense SVD, or, where few of many are wanted, by randomised subspace iteration (Halko et al. 2011,
    arXiv:0909.4061), which goes on until the error of the approximation is settled to 1e-6 of itself. Values that are
    zero to rounding are left out. In the dtype of `matrix`.
    """
    found = _randomised(matrix, limit) if RANDOMISED * (limit + OVERSAMPLED) <= min(matrix.shape) else None
    x, values, y = found or torch.linalg.svd(matrix, full_matrices=False)
    floor = torch.finfo(matrix.dtype).eps * max(matrix.shape) * values[0]
    kept = min(limit, max(int((values > floor).sum()), 1))
    return x[:, :kept], values[:kept], y[:kept]


def _randomised(matrix: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """None if it does not settle."""
    total = float(matrix.double().square().sum())
    start = torch.randn(matrix.shape[1], limit + OVERSAMPLED, generator=torch.Generator().manual_seed(0))
    basis = matrix @ start.to(matrix)
    left = math.inf
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(basis).Q
        projected = basis.mT @ matrix
        inner, values, y = torch.linalg.svd(projected, full_matrices=False)
        before, left = left, max(total - float(values[:limit].double().square().sum()), 0.0)
        # What remains can only shrink from round to round: a step that changes nothing has found the optimum.
        if before - left <= 2e-6 * left or left <= 1e-12 * total:
            return basis @ inner, values, y
        basis = matrix @ projected.mT
    return None
