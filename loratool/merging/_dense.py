"""Sums of dense updates that hold one of them at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def weighted_sum(updates: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i D_i, where `updates` may be a generator: one update and the sum are in memory together."""
    merged: Tensor | None = None
    for values, weight in zip(updates, weights):
        if merged is None:
            merged = torch.zeros_like(values)
        merged.add_(values, alpha=weight)
    if merged is None:
        raise ValueError("nothing to merge")
    return merged


def scaled(values: Tensor, factor: float) -> Tensor:
    """factor * values, in place."""
    return values if factor == 1 else values.mul_(factor)
