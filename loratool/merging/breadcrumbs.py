"""breadcrumbs: the weighted sum of updates without their largest and their smallest entries."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import scaled, weighted_sum
from loratool.merging._options import check_number
from loratool.merging._sparsify import prune_both_ends


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    gamma: float = 0.01,
    lambda_: float = 1.0,
) -> Tensor:
    """The weighted sum of the updates without the `gamma` share of largest entries and the smallest, `(out, in)`."""
    check_number("lambda", lambda_)
    kept = (prune_both_ends(update.dense(), density, gamma) for update in updates)
    return scaled(weighted_sum(kept, weights), lambda_)


METHOD = Method(
    id="breadcrumbs",
    title="Model Breadcrumbs",
    formula="lambda * sum_i w_i middle(D_i, density, gamma)",
    source="Davari and Belilovsky 2023, arXiv:2312.06795; mergekit's breadcrumbs",
    when="Adapters with a few extreme entries that spoil a sum.",
    merge=merge,
)
