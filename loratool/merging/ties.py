"""ties: trim, elect a sign for each entry, and average those that agree with it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import scaled
from loratool.merging._options import check_number
from loratool.merging._signs import ties_mean
from loratool.merging._sparsify import prune_small


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    sign: str = "total",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """The trimmed updates, merged where their signs agree with the majority's, times lambda, `(out, in)`.

    `normalize` False: PEFT's mean. True: mergekit's.
    """
    check_number("lambda", lambda_)
    trimmed = [prune_small(update.dense(), density) for update in updates]
    return scaled(ties_mean(trimmed, weights, sign, normalize), lambda_)


METHOD = Method(
    id="ties",
    title="TIES",
    formula="lambda * sum_agreeing w_i top(D_i, density) / number of agreeing",
    source="Yadav et al. 2023, arXiv:2306.01708; PEFT's ties_svd",
    when="Several adapters that pull the same entries in different directions.",
    merge=merge,
)
