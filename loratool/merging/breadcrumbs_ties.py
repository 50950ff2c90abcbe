"""breadcrumbs_ties: updates without their largest and smallest entries, merged where their signs agree."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import scaled
from loratool.merging._options import check_number
from loratool.merging._signs import consensus
from loratool.merging._sparsify import prune_both_ends


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    gamma: float = 0.01,
    sign: str = "total",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """The updates pruned as in `breadcrumbs`, then summed where signs agree, times lambda, `(out, in)`."""
    check_number("lambda", lambda_)
    kept = [prune_both_ends(update.dense(), density, gamma) for update in updates]
    return scaled(consensus(kept, weights, sign, normalize), lambda_)


METHOD = Method(
    id="breadcrumbs_ties",
    title="Model Breadcrumbs with TIES",
    formula="lambda * sum_agreeing w_i middle(D_i, density, gamma)",
    source="Davari and Belilovsky 2023, arXiv:2312.06795; mergekit's breadcrumbs_ties",
    when="As breadcrumbs, for adapters that also contradict each other.",
    merge=merge,
)
