"""Sparsifiers: each sets a part of one update to zero, in place, and returns it. density 1 changes nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loratool.core.errors import UsageError
from loratool.core.method import Update
from loratool.merging import _noise
from loratool.merging._options import check_number, check_share

_BLOCK = 1 << 20
"""Entries that `della` ranks at a time: positions take 8 bytes each."""


def largest(size: Tensor, count: int) -> Tensor:
    """Where the `count` largest of non-negative values are, bool of the same shape. Of equals, those that come first.

    Where fewer than `count` values are above zero, zeros are left out: nobody can tell which of them are kept.
    """
    if count >= size.numel():
        return torch.ones_like(size, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(size, dtype=torch.bool)
    limit = _order_statistic(size, size.numel() - count)
    chosen = size > limit
    if limit > 0:
        missing = count - int(chosen.sum())
        chosen.view(-1)[(size.reshape(-1) == limit).nonzero().view(-1)[:missing]] = True
    return chosen


def _order_statistic(values: Tensor, position: int) -> float:
    """The value at a position (from 0) of the sorted values. On the CPU numpy selects far faster than torch."""
    flat = values.reshape(-1)
    if flat.device.type == "cpu":
        return float(np.partition(flat.numpy(), position)[position])
    return float(flat.kthvalue(position + 1).values)


def prune_small(values: Tensor, density: float) -> Tensor:
    """Keeps the int(density * n) entries of largest magnitude. TIES' trimming, PEFT's magnitude_prune."""
    check_share("density", density)
    if density >= 1:
        return values
    return values.masked_fill_(~largest(values.abs(), int(density * values.numel())), 0)


def prune_both_ends(values: Tensor, density: float, gamma: float) -> Tensor:
    """Drops the int(gamma * n) largest entries, then the smallest, so that int(density * n) are left.

    Where gamma and density leave no room for both, fewer of the largest go. mergekit's `magnitude_outliers`.
    """
    check_share("density", density)
    check_share("gamma", gamma)
    if density >= 1:
        return values
    total = values.numel()
    kept = int(density * total)
    outliers = min(int(gamma * total), total - kept)
    size = values.abs()
    keep = largest(size, kept + outliers)
    if outliers:
        keep &= ~largest(size, outliers)
    return values.masked_fill_(~keep, 0)


def drop(update: Update, density: float, seed: int) -> Tensor:
    """The dense update with each entry kept with probability density, and then divided by it. DARE."""
    check_share("density", density)
    values = update.dense()
    if density >= 1:
        return values
    if density <= 0:
        return values.zero_()
    noise = _noise.uniform(update, seed, values.device)
    return values.masked_fill_(noise >= density, 0).div_(density)


def drop_by_rank(update: Update, density: float, epsilon: float, seed: int) -> Tensor:
    """The dense update with each entry kept with a probability p, and then divided by it. DELLA's MagPrune.

    p grows linearly with the rank of the entry's magnitude in its row, from density - epsilon for the smallest to
    density + epsilon for the largest. Both must be inside 0..1, as in mergekit: else UsageError.
    """
    check_share("density", density)
    check_number("epsilon", epsilon, 0)
    values = update.dense()
    if density >= 1:
        return values
    if density <= 0:
        return values.zero_()
    if not 0 < density - epsilon <= density + epsilon < 1:
        raise UsageError(
            f"density {density} and epsilon {epsilon} give probabilities outside of 0..1",
            hint=f"with this density, epsilon must be below {min(density, 1 - density):.3g}",
        )
    noise = _noise.uniform(update, seed, values.device)
    columns = values.shape[1]
    step = max(1, _BLOCK // columns)
    for rows, chance in zip(torch.split(values, step), torch.split(noise, step)):
        order = rows.abs().argsort(dim=1, stable=True)
        rising = torch.linspace(density - epsilon, density + epsilon, columns, dtype=rows.dtype, device=rows.device)
        if columns == 1:  # neither the smallest nor the largest
            rising.fill_(density)
        probability = torch.empty_like(rows).scatter_(1, order, rising.expand_as(rows))
        rows.masked_fill_(chance >= probability, 0).div_(probability)
    return values
