"""Interpolation along the arc between two vectors."""

from __future__ import annotations

import torch
from torch import Tensor

FLAT = 0.9995
"""From this |cosine| on, mergekit's slerp takes the straight line."""


def cosines(first: Tensor, second: Tensor, dim: int | None) -> Tensor:
    """The cosine of the angle between two matrices as vectors, or of each pair of vectors along `dim`; 0 beside zero.

    float64, with every dimension kept as 1 or as it was, so that it broadcasts.
    """
    dims = (0, 1) if dim is None else (dim,)
    sizes = [torch.linalg.vector_norm(v, dim=dims, keepdim=True, dtype=torch.float64) for v in (first, second)]
    size = sizes[0] * sizes[1]
    # einsum needs no matrix of products
    spelling = "ij,ij->" if dim is None else "ij,ij->j" if dim in (0, -2) else "ij,ij->i"
    product = torch.einsum(spelling, first, second).double().reshape(size.shape)
    return torch.where(size > 0, product / size.masked_fill(size == 0, 1), 0.0).clamp(-1, 1)


def shares(cosine: Tensor, t: float, straight: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the first and of the second vector makes the point `t` of the way along the arc.

    sin((1 - t) a) / sin(a) and sin(t a) / sin(a) for the angle a; 1 - t and t where `straight`. float64.
    """
    angle = torch.arccos(cosine)
    sine = torch.sin(angle).masked_fill(straight, 1)
    return (
        torch.where(straight, 1 - t, torch.sin((1 - t) * angle) / sine),
        torch.where(straight, t, torch.sin(t * angle) / sine),
    )


def blend(first: Tensor, second: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """by[0] * first + by[1] * second. Changes both."""
    return first.mul_(by[0].to(first.dtype)).add_(second.mul_(by[1].to(second.dtype)))
