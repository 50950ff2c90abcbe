"""Similar: inner products of the updates that several adapters make to one weight, in factored form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loratool.ops.probe import COLUMNS, vectors
from loratool.ops.terms import Seen

if TYPE_CHECKING:
    from loratool.core.tensor import Array

EXACT_RANKS = 64 * 64
"""Up to this product of two ranks the inner product is computed exactly, beyond it from random vectors."""

SPARE_ROWS, STRETCHES = 32, 8
"""Rows beyond the number of columns that are looked at to see that columns are independent, in so many stretches."""

INDEPENDENT = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Squared distance of a column from the span of those before it, over its squared norm, above which it surely is
another direction: a hundred times what Gram matrices of a few hundred columns are off in this dtype."""


class Similar:
    """What the updates of one weight have to do with one another. `inner[i, j]` is the inner product of inputs i and j.

    Computed in the updates' dtype with float64 sums. For large ranks <D_i, D_j> is estimated from the images D_i X of
    random vectors X, good to a percent over the modules of a component; norms are, too.
    """

    def __init__(self, seen: Sequence[Seen]) -> None:
        self._terms = [one for one in seen if one.term is not None]
        self._images: dict[int, Tensor] = {}
        self.inner = torch.zeros(len(seen), len(seen), dtype=torch.float64)
        for i, one in enumerate(self._terms):
            for other in self._terms[: i + 1]:
                inner = self._product(one, other) * one.unit * other.unit
                self.inner[one.index, other.index] = self.inner[other.index, one.index] = inner

    def _product(self, one: Seen, other: Seen) -> float:
        if not (one.known and other.known):
            return math.nan
        if not (one.plain and other.plain):
            return float((one.dense().double() * other.dense()).sum())
        (left, right), (another, opposite) = one.pair(), other.pair()
        if left.shape[1] * another.shape[1] > EXACT_RANKS:
            return float((self._image(one).double() * self._image(other)).sum()) / COLUMNS
        return float(((left.T @ another).double() * (right @ opposite.T)).sum())

    def _image(self, one: Seen) -> Tensor:
        if one.index not in self._images:
            left, right = one.pair()
            self._images[one.index] = left @ (right @ torch.from_numpy(vectors(right.shape[1])).to(right))
        return self._images[one.index]

    def image(self, weights: Sequence[float]) -> Array | None:
        """The weighted sum times the random vectors, `(out, s)` in float32, where all of it is known already."""
        if not all(one.index in self._images for one in self._terms):
            return None
        images = [self._images[one.index] * (weights[one.index] * one.unit) for one in self._terms]
        made: Array = sum(images[1:], images[0]).float().cpu().numpy()
        return made

    def norm(self, weights: Sequence[float]) -> float:
        """Frobenius norm of the weighted sum."""
        strengths = torch.tensor(weights, dtype=torch.float64)
        return math.sqrt(max(float(strengths @ self.inner @ strengths), 0.0))


def independent(left: Tensor, right: Tensor) -> bool:
    """Whether the columns of left and the rows of right surely are linearly independent: their product has full rank.

    A sample of their entries tells. False says nothing.
    """
    return _columns_apart(left) and _columns_apart(right.T)


def _columns_apart(columns: Tensor) -> bool:
    height, width = columns.shape
    if height < width:
        return False
    # Stretches rather than single rows: every other one would touch all of the memory.
    size = -(-(width + SPARE_ROWS) // STRETCHES)
    starts = range(0, max(height - size, 1), max((height - size) // (STRETCHES - 1), 1))
    sample = (
        torch.cat([columns[start : start + size].T for start in starts], dim=1) if height > 2 * width else columns.T
    )
    return _rows_apart(sample.float()) or _rows_apart(sample.double())


def _rows_apart(rows: Tensor) -> bool:
    size = rows.norm(dim=1, keepdim=True)
    if not bool((size > 0).all()):
        return False
    rows = rows / size
    lower, failed = torch.linalg.cholesky_ex(rows @ rows.T)
    return not int(failed) and float(lower.diagonal().min()) ** 2 > INDEPENDENT[rows.dtype]
