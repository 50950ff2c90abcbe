"""Conflicts: how often the updates of one weight pull the same entry in different directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sign_conflicts(updates: Sequence[Tensor], weights: Sequence[float]) -> tuple[int, int]:
    """(entries with weighted values of both signs, entries where at least two are not zero).

    `updates` are dense and of one shape; they stay as they are. Both counts are 0 for fewer than two updates.
    """
    if not updates:
        return 0, 0
    rises, falls, touched, shared = (torch.zeros_like(updates[0], dtype=torch.bool) for _ in range(4))
    for values, weight in zip(updates, weights, strict=True):
        if not weight:
            continue
        up, down = (values > 0, values < 0) if weight > 0 else (values < 0, values > 0)
        rises |= up
        falls |= down
        moved = up | down
        shared |= touched & moved
        touched |= moved
    return int((rises & falls).sum()), int(shared.sum())
