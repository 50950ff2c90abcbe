"""concat: the factors side by side. Exact, at the price of the rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratool.core.method import Method, Update


def merge(updates: Sequence[Update], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`left` `(out, sum of ranks)`, `right` `(sum of ranks, in)`: left @ right is the weighted sum. PEFT's `cat`.

    An input of weight 0 adds no rank.
    """
    lefts, rights = [], []
    for update, weight in zip(updates, weights, strict=True):
        left, right = update.pair()
        rank = left.shape[1] if weight else 0
        lefts.append(left[:, :rank])
        rights.append(right[:rank] if weight == 1 else right[:rank] * weight)
    return torch.cat(lefts, dim=1), torch.cat(rights)


METHOD = Method(
    id="concat",
    title="Concatenation",
    formula="[L1 ... Ln] @ [w1 R1; ...; wn Rn] = sum_i w_i D_i",
    source="PEFT, add_weighted_adapter, combination_type=cat",
    when="The exact weighted sum; the ranks add up.",
    merge=merge,
    exact=True,
)
