"""Similar: inner products of the updates that several adapters make to one weight, in factored form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
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


CANCELLED = 1e-6
"""Share of the sum of squared norms below which the squared norm of a sum is rounding as much as anything else."""


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
            dense = one.dense().double()
            return float((dense * (dense if other is one else other.dense())).sum())
        (left, right), (another, opposite) = one.pair(), other.pair()
        if left.shape[1] * another.shape[1] > EXACT_RANKS:
            return float((self._image(one).double() * self._image(other)).sum()) / COLUMNS
        return float(((left.T @ another).double() * (right @ opposite.T)).sum())

    def _image(self, one: Seen) -> Tensor:
        if one.index not in self._images:
            self._images[one.index] = _applied(one)
        return self._images[one.index]

    def image(self, weights: Sequence[float]) -> Array | None:
        """The weighted sum times the random vectors, `(out, s)` in float32, where all of it is known already, or where
        float32 would not be enough to compute it again."""
        if self.cancels(weights):
            images = {one.index: _applied(one) for one in self._wide(weights)} if self.norm(weights) else {}
        elif all(one.index in self._images for one in self._terms):
            images = self._images
        else:
            return None
        total = torch.zeros(self._terms[0].shape[0], COLUMNS, dtype=torch.float64)
        for one in self._terms:
            if one.index in images:
                total += images[one.index].cpu() * (weights[one.index] * one.unit)
        made: Array = total.float().numpy()
        return made

    def cancels(self, weights: Sequence[float]) -> bool:
        """Whether next to nothing is left of the terms in their weighted sum."""
        strengths = torch.tensor(weights, dtype=torch.float64)
        terms = float(strengths.square() @ self.inner.diagonal())
        return len(self._terms) > 1 and float(strengths @ self.inner @ strengths) <= CANCELLED * terms

    def norm(self, weights: Sequence[float]) -> float:
        """Frobenius norm of the weighted sum; 0 where it is zero to the rounding of float64."""
        strengths = torch.tensor(weights, dtype=torch.float64)
        if not self.cancels(weights):
            return math.sqrt(max(float(strengths @ self.inner @ strengths), 0.0))
        wide = self._wide(weights)
        norm = abs(wide[0].unit) * norm_of_sum(wide, [weights[one.index] for one in wide]) if wide else 0.0
        floor = torch.finfo(torch.float64).eps * max(self._terms[0].shape)
        return norm if norm > floor * float(strengths.abs() @ self.inner.diagonal().sqrt()) else 0.0

    def _wide(self, weights: Sequence[float]) -> list[Seen]:
        """The terms in float64."""
        return [replace(one, work=torch.float64) for one in self._terms if weights[one.index]]


def norm_of_sum(seen: Sequence[Seen], weights: Sequence[float], less: tuple[Tensor, Tensor] | None = None) -> float:
    """||sum of weighted updates - less||, `less` a pair of factors, in float64 from QRs of all factors side by side:
    good where Gram matrices cancel."""
    if not all(one.plain or one.term is None for one in seen):
        whole = sum((one.dense().double() * weight for one, weight in zip(seen, weights, strict=True)), torch.zeros(()))
        return float((whole if less is None else whole - less[0].double() @ less[1].double()).norm())
    pairs = [(weight, *one.pair()) for one, weight in zip(seen, weights, strict=True)]
    pairs += [(-1.0, *less)] if less is not None else []
    left = torch.cat([part.double() * weight for weight, part, _ in pairs], dim=1)
    right = torch.cat([part.double() for _, _, part in pairs])
    return float((torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T).norm())


def _applied(one: Seen) -> Tensor:
    """An update times the random vectors."""
    left, right = one.pair() if one.plain else (one.dense(), None)
    x = torch.from_numpy(vectors(one.shape[1])).to(left)
    return left @ x if right is None else left @ (right @ x)


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
