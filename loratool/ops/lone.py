"""Lone modules: what a method leaves of an update that only one of several inputs has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratool.core.method import Method, Update


@dataclass(frozen=True)
class _Toy:
    """A small update (`core.method.Update`) of rank 1 with entries of one size, or a zero one."""

    index: int
    there: bool
    name: str = "toy"
    shape: tuple[int, int] = (4, 4)

    def pair(self) -> tuple[Tensor, Tensor]:
        """`(4, 1)` and `(1, 4)`; nothing if it is zero."""
        rank = int(self.there)
        return torch.ones(self.shape[0], rank), torch.ones(rank, self.shape[1])

    def dense(self) -> Tensor:
        """All ones, or all zeros."""
        return torch.full(self.shape, float(self.there))


def lone_share(method: Method, weights: Sequence[float], options: Mapping[str, Any], index: int) -> float:
    """The norm of a merged update that input `index` alone has, over what the method makes of that input by itself.

    Tried out on a toy, so that it is true of any method: a sum gives 1, half the way to a zero update less. 1 where the
    method makes nothing of the input by itself.
    """
    own = _norm(method, [_Toy(index, True)], [weights[index]], options)
    among = [_Toy(at, at == index) for at in range(len(weights))]
    return _norm(method, among, weights, options) / own if own else 1.0


def _norm(method: Method, updates: Sequence[Update], weights: Sequence[float], options: Mapping[str, Any]) -> float:
    made = method.apply(updates, weights, options)
    return float((made[0] @ made[1] if isinstance(made, tuple) else made).norm())
