"""karcher: the mean direction of any number of updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import scaled, weighted_sum
from loratool.merging._options import check_number

MOST_STEPS = 1000
"""Iterations that may be asked for. A mean that has not settled by then does not: a recipe must not run for ever."""


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
    normalize: bool = True,
) -> Tensor:
    """The Riemannian mean of the updates' directions, times the mean of their norms, `(out, in)`.

    Means are weighted by |w_i|; a negative weight turns its update round. `normalize` False: times sum |w_i|.
    Updates that are zero have no direction, but count in the mean of the norms. Where directions cancel there is no
    mean direction, and the weighted mean of the updates is returned.
    """
    check_number("max_iter", max_iter, 0, MOST_STEPS)
    check_number("tol", tol, 0, 1)
    total = sum(abs(weight) for weight in weights)
    units = [update.dense() for update in updates]
    if not total:
        return units[0].zero_()
    signed = [weight / total for weight in weights]
    norms = [float(torch.linalg.vector_norm(unit, dtype=torch.float64)) for unit in units]
    size = sum(abs(share) * norm for share, norm in zip(signed, norms))
    directed = [(u, s, n) for u, s, n in zip(units, signed, norms) if s and n]
    if not directed:
        return units[0].zero_()
    parts = [abs(s) for _, s, _ in directed]
    shares = [part / sum(parts) for part in parts]
    directions = [unit.div_(math.copysign(norm, share)) for unit, share, norm in directed]
    mean = _mean_direction(directions, shares, max_iter, tol)
    if mean is None:
        mean, size = weighted_sum(directions, [part * norm for part, (_, _, norm) in zip(parts, directed)]), 1.0
    return scaled(mean, size if normalize else size * total)


def _mean_direction(units: Sequence[Tensor], shares: Sequence[float], max_iter: int, tol: float) -> Tensor | None:
    """The unit vector with the least sum of shares times squared angles to the units. None where they cancel.

    Fixed-point iteration from the weighted sum's direction: the mean in the tangent space, then back to the sphere.
    """
    mean = weighted_sum(units, shares)
    size = _norm(mean)
    if size < tol:
        return None
    mean.div_(size)
    for _ in range(max_iter):
        pulls = [_pull(mean, unit, share, tol) for unit, share in zip(units, shares)]
        step = weighted_sum([*units, mean], [*(p for p, _ in pulls), -sum(p * cosine for p, cosine in pulls)])
        length = _norm(step)
        if length < tol:
            break
        mean.mul_(math.cos(length)).add_(step, alpha=math.sin(length) / length)
        mean.div_(_norm(mean))
    return mean


def _pull(mean: Tensor, unit: Tensor, share: float, tol: float) -> tuple[float, float]:
    """(share * angle / sin(angle), cosine): the logarithm of `unit` at `mean` is the first times (unit - cosine mean).

    No pull from the opposite side: no direction there is nearer than another.
    """
    cosine = max(-1.0, min(1.0, float(torch.vdot(mean.view(-1), unit.view(-1)))))
    angle = math.acos(cosine)
    if angle < tol or math.pi - angle < 1e-3:
        return 0.0, cosine
    return share * angle / math.sin(angle), cosine


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


METHOD = Method(
    id="karcher",
    title="Karcher mean",
    formula="(sum_i a_i |D_i|) * argmin_u sum_i a_i angle(u, D_i)^2, a_i = w_i / sum w, u of length 1",
    source="Karcher 1977; mergekit's karcher",
    when="SLERP for more than two adapters.",
    merge=merge,
)
