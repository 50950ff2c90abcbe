"""Orthogonal matrices from what OFT and BOFT train: the Cayley transform, its series, its constraint."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def eye_like(blocks: Tensor) -> Tensor:
    """The identity of the size of the last dimension."""
    return blocks.new_zeros(blocks.shape[-1], blocks.shape[-1]).fill_diagonal_(1)


def cayley(skew: Tensor) -> Tensor:
    """(I + Q) (I - Q)^-1 of skew-symmetric matrices."""
    one = eye_like(skew)
    return (one + skew) @ (one - skew).inverse()


def series(skew: Tensor, terms: int) -> Tensor:
    """PEFT's Cayley-Neumann series of (I + Q) (I - Q)^-1: I + 2Q + 2Q^2 + ... + Q^(terms - 1), the last one once.

    As PEFT computes it: 3 terms are what 4 are.
    """
    whole, power = eye_like(skew).expand_as(skew).clone(), skew
    last = terms - 1 if terms < 3 else max(terms - 1, 3)
    for term in range(1, last + 1):
        whole = whole + power * (1.0 if term == last and term > 1 else 2.0)
        power = power @ skew
    return whole


def constrained(skew: Tensor, limit: float) -> Tensor:
    """`skew` shrunk to a norm of `limit`, over all blocks, where it is larger; 0: as it is."""
    norm = float(skew.square().sum().sqrt()) + 1e-8
    return skew * (limit / norm) if 0 < limit < norm else skew


def skew_of(vectors: Tensor) -> Tensor:
    """Skew-symmetric matrices whose upper triangles, row by row, are the rows of `vectors`."""
    size = block_size(vectors.shape[1])
    upper = vectors.new_zeros(len(vectors), size, size)
    rows, columns = vectors.new_ones(size, size).triu(1).nonzero().T
    upper[:, rows, columns] = vectors
    return upper - upper.mT


def block_size(entries: int) -> int:
    """The size of a matrix whose strict upper triangle has so many entries; 0 if there is none."""
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    return size if size * (size - 1) // 2 == entries else 0
