"""Sign election: where updates disagree about a sign, the majority's side alone is merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratool.merging._dense import scaled
from loratool.merging._options import check_choice

ELECTIONS = ("total", "frequency")
"""`total`: the sign of the sum of the values. `frequency`: the sign of the sum of their signs."""


def majority(updates: Sequence[Tensor], sign: str) -> Tensor:
    """Where the majority of the updates is positive, bool. A draw is positive, as in PEFT and mergekit."""
    check_choice("sign", sign, ELECTIONS)
    votes = torch.zeros_like(updates[0])
    for values in updates:
        votes.add_(values if sign == "total" else values.sign())
    return votes >= 0


def sum_agreeing(
    updates: Sequence[Tensor], weights: Sequence[float], positive: Tensor, shares: Sequence[float] | None
) -> Tensor:
    """The weighted sum of the entries with the majority's sign. Changes the updates.

    It is divided by the sum of the `shares` of the entries that agree, where that is not 0.
    """
    merged = torch.zeros_like(updates[0])
    total = torch.zeros_like(merged) if shares else None
    for number, (values, weight) in enumerate(zip(updates, weights, strict=True)):
        agrees = torch.where(positive, values > 0, values < 0)
        merged.add_(values.masked_fill_(~agrees, 0), alpha=weight)
        if total is not None and shares is not None:
            total.add_(agrees, alpha=shares[number])
    return merged if total is None else merged.div_(total.masked_fill_(total == 0, 1))


def disjoint_mean(updates: Sequence[Tensor], weights: Sequence[float], sign: str) -> Tensor:
    """The weighted entries that agree, divided by how many these are. Changes the updates.

    The election is on the values without their weights. PEFT's `ties`, and Yadav et al. 2023 where all weights are 1.
    """
    return sum_agreeing(updates, weights, majority(updates, sign), [1.0] * len(updates))


def consensus(updates: Sequence[Tensor], weights: Sequence[float], sign: str, normalize: bool) -> Tensor:
    """The sum of the weighted entries that agree; with `normalize` divided by their weights. Changes the updates.

    The election is on the weighted values. mergekit's sign consensus.
    """
    voters = [scaled(values, weight) for values, weight in zip(updates, weights, strict=True)]
    return sum_agreeing(voters, [1.0] * len(voters), majority(voters, sign), weights if normalize else None)


def ties_mean(updates: Sequence[Tensor], weights: Sequence[float], sign: str, normalize: bool) -> Tensor:
    """PEFT's disjoint mean, or with `normalize` mergekit's normalized consensus. Changes the updates."""
    return consensus(updates, weights, sign, True) if normalize else disjoint_mean(updates, weights, sign)
