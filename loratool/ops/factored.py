"""Factored: a module's update as the product of two matrices, or as one, with its scale on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loratool.core.module import Module
from loratool.ops.finite import check_finite
from loratool.ops.weights import BaseWeights


def pair_update(
    module: Module, work: torch.dtype, device: str = "cpu", unit: float = 1.0
) -> tuple[Tensor, Tensor] | None:
    """`left` `(out, rank)` and `right` `(rank, in * kh * kw)`, in `work`, whose product is the update / unit of a LoRA.

    The square root of the scale / unit is on either side, its sign on the left; a Tucker core becomes part of the
    right. None for families whose update is no such product, and for DoRA. Raises FormatError for NaN or infinity.
    """
    product = module.ranked
    if product is None or not product.whole or product.right is None or module.needs_base:
        return None
    left, right = product.left.load(device).to(work), product.right.load(device).to(work)
    check_finite(module, left)
    check_finite(module, right)
    if product.core is not None:
        core = product.core.load(device).to(work)
        check_finite(module, core)
        right = torch.einsum("pqk,qn->pnk", core.flatten(2), right).flatten(1)
    if product.transposed:
        left, right = right.T, left.T
    scale = module.scale / unit
    if scale != 1:
        root = math.sqrt(abs(scale))
        left, right = left * math.copysign(root, scale), right * root
    return left, right


def dense_update(module: Module, work: torch.dtype, device: str = "cpu", base: BaseWeights | None = None) -> Tensor:
    """The update as one matrix `(out, in * kh * kw)` in `work`; of a DoRA module `m (W + delta) / ||W + delta|| - W`
    (Liu et al. 2024, arXiv:2402.09353), of a family that is not additive what it makes of W at strength 1, less W: for
    both `base` is needed. Raises FormatError for NaN or infinite values."""
    loaded = {role: factor.load(device).to(work) for role, factor in module.factors.items()}
    for values in loaded.values():
        check_finite(module, values)
    if not module.family.additive:
        weight = _base_of(module, base, device).to(work)
        return module.family.apply(loaded, module.scale, weight, 1.0) - weight
    delta = module.family.delta(loaded, module.scale)
    delta = delta.reshape(len(delta), -1)
    if module.magnitude is None:
        return delta
    magnitude = module.magnitude.load(device).to(work)
    weight = _base_of(module, base, device).to(work)
    whole = weight + delta
    if module.magnitude_per_row:
        rows: Tensor = whole * (magnitude.reshape(-1, 1) / torch.linalg.vector_norm(whole, dim=1, keepdim=True))
        return rows - weight
    columns = whole.reshape(whole.shape[0], module.shape[1], -1)
    norms = torch.linalg.vector_norm(columns, dim=(0, 2), keepdim=True)
    scaled: Tensor = columns * (magnitude.reshape(1, -1, 1) / norms)
    return scaled.flatten(1) - weight


def _base_of(module: Module, base: BaseWeights | None, device: str) -> Tensor:
    if base is None:
        raise ValueError(f"{module.title}: the base weight is needed")
    return base.load(module, device)
