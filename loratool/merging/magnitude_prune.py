"""magnitude_prune: the weighted sum of what is large in each update."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import weighted_sum
from loratool.merging._sparsify import prune_small


def merge(updates: Sequence[Update], weights: Sequence[float], *, density: float = 1.0) -> Tensor:
    """The weighted sum of the updates, each with its `density` share of largest entries only, `(out, in)`."""
    return weighted_sum((prune_small(update.dense(), density) for update in updates), weights)


METHOD = Method(
    id="magnitude_prune",
    title="Magnitude pruning",
    formula="sum_i w_i top(D_i, density)",
    source="PEFT, add_weighted_adapter, combination_type=magnitude_prune_svd",
    when="A sum without the many small entries of each update.",
    merge=merge,
)
