"""della_linear: the weighted sum of updates that were thinned at random, small entries more than large ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import scaled, weighted_sum
from loratool.merging._options import check_number
from loratool.merging._sparsify import drop_by_rank


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    epsilon: float = 0.15,
    lambda_: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """The weighted sum of the updates, entries kept with probability p and divided by it, `(out, in)`."""
    check_number("lambda", lambda_)
    thinned = (drop_by_rank(update, density, epsilon, seed) for update in updates)
    return scaled(weighted_sum(thinned, weights), lambda_)


METHOD = Method(
    id="della_linear",
    title="DELLA without sign election",
    formula="lambda * sum_i w_i B_i * D_i / p_i, B_i 1 with chance p_i = density +- epsilon by rank in the row",
    source="Deep et al. 2024, arXiv:2406.11617; mergekit's della_linear",
    when="As dare_linear, but large entries are likelier to stay.",
    merge=merge,
    symmetric=False,
)
