"""della: updates thinned at random, small entries more than large ones, merged where their signs agree."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import scaled
from loratool.merging._options import check_number
from loratool.merging._signs import consensus
from loratool.merging._sparsify import drop_by_rank


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    epsilon: float = 0.15,
    sign: str = "total",
    normalize: bool = False,
    lambda_: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Entries kept with probability p and divided by it, then summed where signs agree, times lambda, `(out, in)`."""
    check_number("lambda", lambda_)
    thinned = [drop_by_rank(update, density, epsilon, seed) for update in updates]
    return scaled(consensus(thinned, weights, sign, normalize), lambda_)


METHOD = Method(
    id="della",
    title="DELLA",
    formula="lambda * sum_agreeing w_i B_i * D_i / p_i, B_i 1 with chance p_i = density +- epsilon by rank in the row",
    source="Deep et al. 2024, arXiv:2406.11617; mergekit's della",
    when="As dare_ties, but large entries are likelier to stay.",
    merge=merge,
    symmetric=False,
)
