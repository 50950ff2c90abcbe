"""Probe: how far written updates are from what they should be, measured on random vectors.

For a random matrix X of s standard normal columns, ||D X|| / sqrt(s) estimates ||D|| (Frobenius) without forming D: of
a pair it takes a few thin products. What is estimated here is a check and a report, never a decision about ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from loratool.core.module import Module
from loratool.ops.pool import Tick, each

if TYPE_CHECKING:
    from loratool.core.tensor import Array

COLUMNS = 16
"""Random vectors per module: a few percent off over all modules, more for what is left of a low rank."""

Terms = Sequence[tuple[Module, float]]
"""Modules and strengths whose weighted sum is meant."""


@dataclass(frozen=True)
class Measured:
    """One written module: estimated norm of what it should be, and of the difference; both of the update."""

    title: str
    norm: float
    difference: float

    @property
    def error(self) -> float:
        """The relative error; 0 for zero, infinite for something where nothing should be."""
        return self.difference / self.norm if self.norm else (math.inf if self.difference else 0.0)


def measure(
    expected: Sequence[Terms],
    written: Sequence[Module],
    tick: Tick | None = None,
    images: Sequence[Array | None] | None = None,
) -> list[Measured]:
    """For every written module the distance from the sum of terms that is expected on its targets.

    All terms of one entry have the same targets; `images` are their sums times the random vectors, where these are
    known already. `written` may be grouped otherwise; its rows are put side by side. Behind them comes one entry for
    every target on which something is expected and nothing was written.
    Computed in float32 with float64 sums.
    """
    where: dict[tuple[str, str], tuple[int, int, int]] = {}
    for index, terms in enumerate(expected):
        module, start = terms[0][0], 0
        for target, height in zip(module.targets, module.heights(), strict=True):
            where[target.component, target.path] = (index, start, start + height)
            start += height

    def image(index: int) -> Array:
        known = images[index] if images is not None else None
        if known is not None:
            return known
        terms = expected[index]
        x = vectors(terms[0][0].delta_width)
        total: Array = np.zeros((terms[0][0].shape[0], x.shape[1]), np.float32)
        for term, strength in terms:
            if strength:
                total = total + np.float32(strength) * applied(term, x)
        return total

    def one(module: Module) -> Measured:
        if not module.family.additive:
            index = where.get((module.component, module.targets[0].path), (-1, 0, 0))[0]
            return _stored(module, expected[index][0][0] if index >= 0 else None)
        x = vectors(module.delta_width)
        made = applied(module, x)
        meant = np.zeros_like(made)
        row = 0
        for target, height in zip(module.targets, module.heights(), strict=True):
            found = where.get((target.component, target.path))
            if found is not None:
                index, start, stop = found
                meant[row : row + height] = image(index)[start:stop]
            row += height
        root = math.sqrt(x.shape[1])
        return Measured(module.title, _norm(meant) / root, _norm(made - meant) / root)

    found = each(one, written, tick)
    there = {(target.component, target.path) for module in written for target in module.targets}
    for (component, path), (index, start, stop) in where.items():
        if (component, path) not in there:
            norm = _norm(image(index)[start:stop]) / math.sqrt(COLUMNS)
            found += [Measured(f"{component}.{path}", norm, norm)] if norm else []
    return found


def _stored(module: Module, meant: Module | None) -> Measured:
    """How far the factors are from those that are meant, of a family whose update depends on the weight."""
    if meant is None or meant.family is not module.family or meant.shapes != module.shapes:
        return Measured(module.title, 0.0, math.inf)
    pairs = [(factor.array(), meant.factors[role].array()) for role, factor in module.factors.items()]
    norm, off = (math.sqrt(sum(_norm(one.reshape(-1)) ** 2 for one in side)) for side in (
        [wanted for _, wanted in pairs], [found - wanted for found, wanted in pairs]
    ))  # fmt: skip
    return Measured(module.title, norm, off)


def _norm(values: Array) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))


def applied(module: Module, x: Array) -> Array:
    """The update times `x` `(in * kh * kw, s)`, float32, without forming it where the module is a pair."""
    product = module.product
    if product is None or not product.whole or product.core is not None or product.right is None:
        dense: Array = module.delta().numpy()
        return dense.reshape(len(dense), -1) @ x
    left, right = product.left.array("float32"), product.right.array("float32")
    if product.transposed:
        left, right = right.T, left.T
    made: Array = left @ (right @ x)
    return made if module.scale == 1 else made * np.float32(module.scale)


@lru_cache(maxsize=64)
def vectors(width: int) -> Array:
    """The random vectors for updates of this width, `(width, COLUMNS)`, float32: always the same ones."""
    made: Array = np.random.Generator(np.random.Philox(width)).standard_normal((width, COLUMNS), np.float32)
    return made
