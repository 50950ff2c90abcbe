"""linear: the sum of the factors, not of the updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from loratool.core.errors import UsageError
from loratool.core.method import Method, Update


def merge(updates: Sequence[Update], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`left` `(out, rank)` = sum_i sqrt|w_i| L_i, `right` `(rank, in)` = sum_i sign(w_i) sqrt|w_i| R_i; as PEFT.

    Inputs without the module take no part. Raises UsageError where the others differ in rank.
    """
    pairs = [(*update.pair(), weight) for update, weight in zip(updates, weights, strict=True)]
    present = [pair for pair in pairs if pair[0].shape[1]] or pairs[:1]
    ranks = [left.shape[1] for left, _, _ in present]
    if len(set(ranks)) > 1:
        raise UsageError(
            f"linear adds factors of one rank, these have ranks {', '.join(map(str, ranks))}",
            key=updates[0].name,
            hint="use concat, or resize the files to one rank first",
        )
    roots = [math.sqrt(abs(weight)) for _, _, weight in present]
    left, right = present[0][0] * roots[0], present[0][1] * math.copysign(roots[0], present[0][2])
    for (other, another, weight), root in zip(present[1:], roots[1:]):
        left.add_(other, alpha=root)
        right.add_(another, alpha=math.copysign(root, weight))
    return left, right


METHOD = Method(
    id="linear",
    title="Linear, on factors",
    formula="(sum_i sqrt|w_i| L_i) @ (sum_i sign(w_i) sqrt|w_i| R_i)",
    source="PEFT, add_weighted_adapter, combination_type=linear",
    when="To get what PEFT gives: the rank stays, but products of one input's left and another's right are added too.",
    merge=merge,
    stands_for_sum=True,
)
