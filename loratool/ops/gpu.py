"""GPU: decomposing modules of equal shapes in batches, and making their factors, on a device that torch knows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loratool.core.module import Module
from loratool.core.tensor import LazyTensor, torch_dtype
from loratool.ops.finite import check_finite
from loratool.ops.pool import Tick, each, threads
from loratool.ops.spectrum import Core, Spectrum, by_qr, from_core, outer_scale, spectrum, trusted, turned

BATCH_BYTES = 2 << 30
"""What is decomposed at once, as float64."""


def decompose_on(device: str, modules: Sequence[Module], tick: Tick | None = None) -> list[Spectrum]:
    """What `decompose` does, with the products of large matrices on `device`, in float64.

    Factors are made there, too, when they are written.
    """
    found: dict[int, Spectrum] = {}
    groups: dict[object, list[int]] = {}
    for index, module in enumerate(modules):
        product = module.ranks()
        pair = (product.left, product.right) if product.core is None and product.right is not None else ()
        groups.setdefault(tuple((side.shape, side.dtype) for side in pair) or index, []).append(index)
    for indices in groups.values():
        for batch in _batches(modules, indices):
            found |= _batch({index: modules[index] for index in batch}, device)
            if tick is not None:
                tick(len(found), len(modules))
    return [found[index] for index in range(len(modules))]


def _batches(modules: Sequence[Module], indices: Sequence[int]) -> Iterator[Sequence[int]]:
    size = max(1, BATCH_BYTES // (8 * max(modules[indices[0]].parameters, 1)))
    return (indices[start : start + size] for start in range(0, len(indices), size))


def _batch(batch: Mapping[int, Module], device: str) -> dict[int, Spectrum]:
    products = [module.ranks() for module in batch.values()]
    rights = [product.right for product in products if product.right is not None and product.core is None]
    if len(rights) < len(batch):
        return {index: spectrum(module) for index, module in batch.items()}
    left = torch.stack(each(lambda product: product.left.load(device), products)).double()
    right = torch.stack(each(lambda factor: factor.load(device), rights)).double()
    sums = (left.sum((1, 2)) + right.sum((1, 2))).tolist()
    for at, (module, total) in enumerate(zip(batch.values(), sums, strict=True)):
        if not math.isfinite(total):
            check_finite(module, left[at])
            check_finite(module, right[at])
    cores = _cores(left, right)

    def one(item: tuple[int, Module]) -> Spectrum:
        at, module = item
        core = cores[at] or by_qr(left[at].cpu().numpy(), right[at].cpu().numpy())
        return from_core(module.ranks(), core, outer_scale(module), multiply)

    def multiply(one: Any, other: Any, dtype: str, work: str) -> LazyTensor:
        def there(side: Any) -> Tensor:
            stored = side.load(device) if isinstance(side, LazyTensor) else torch.as_tensor(side, device=device)
            return stored.to(getattr(torch, work))

        return LazyTensor.computed(
            (one.shape[0], other.shape[1]), dtype, lambda: (there(one) @ there(other)).to(torch_dtype(dtype)).cpu()
        )

    return dict(zip(batch, each(one, list(enumerate(batch.values()))), strict=True))


def _cores(left: Tensor, right: Tensor) -> list[Core | None]:
    """`by_grams` of a batch. The eigenvalues of the small matrices are found on the CPU: ten times faster there."""
    outer, inner = left.mT @ left, right @ right.mT
    lower, failed = torch.linalg.cholesky_ex(outer)
    found = each(torch.linalg.eigh, (lower.mT @ inner @ lower).cpu().tensor_split(threads()))
    squares, vectors = (torch.cat(side).to(left.device) for side in zip(*found, strict=True))
    sizes = outer.diagonal(dim1=1, dim2=2), inner.diagonal(dim1=1, dim2=2)
    good = ((failed == 0) & trusted(squares, sizes[0].sum(1), sizes[1].sum(1))).tolist()
    to_left, to_right = turned(inner, lower, squares, vectors)
    gross = (sizes[0] * sizes[1]).sqrt().sum(1).tolist()
    values = squares.clamp_min(0).sqrt().flip(1).cpu().numpy()
    return [Core(values[at], to_left[at], to_right[at], gross[at]) if good[at] else None for at in range(len(left))]
