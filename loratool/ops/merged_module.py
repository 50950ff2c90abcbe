"""Merged module: two matrices as a module, in the form and at the scale of the inputs' modules, within its dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loratool.core.family import Product
from loratool.core.module import Module
from loratool.core.ranges import LARGEST, TooLarge, peak, shift
from loratool.core.tensor import LazyTensor, torch_dtype
from loratool.ops.spectrum import Spectrum
from loratool.ops.terms import Group, plain_pair

FAR = 4096.0
"""From this ratio on, two scales alpha / rank do not fit into one."""


def scale_of(one: Group) -> float:
    """alpha / rank of the merged module: the first input's, so that its factors keep their values.

    The largest where that is far larger: beside it, the factors of others would leave the range of float16.
    """
    template = _template(one)
    first = template.scale if template is not None else 1.0
    largest = max((term.module.scale if term.kind is None else 1.0 for term in one.terms), key=abs)
    return first if abs(largest) <= FAR * abs(first) and first else largest or 1.0


def pair_module(one: Group, left: LazyTensor, right: LazyTensor, dtype: str) -> Module:
    """A LoRA module whose update is scale * left @ right, in the form and with the scale of the first that is one.

    `dtype` is what it will be stored in. Raises TooLarge for a bias that does not fit.
    """
    scale, template = scale_of(one), _template(one)
    if template is None:
        pair = plain_pair(one.first, left, right)
        if any("bias" in term.module.factors for term in one.terms):
            pair = replace(pair, factors={**pair.factors, "bias": _bias(one, 1.0, left.dtype)})
        return pair
    product = Product(left, right)
    if template.ranks().transposed:
        product = Product(_transposed(right), _transposed(left), transposed=True)
    factors = dict(template.family.with_product(template.factors, product))
    if any("bias" in term.module.factors for term in one.terms):
        factors["bias"] = _bias(one, scale, left.dtype)
        if not peak(factors["bias"]) <= LARGEST.get(dtype, math.inf):
            raise TooLarge(dtype)
    module = replace(template, factors=factors, alpha=None, magnitude=None, keys={})
    if template.alpha is None and scale == 1:
        return module
    return replace(module, alpha=template.family.alpha(module.shapes, scale))


def _template(one: Group) -> Module | None:
    """The first module of the group whose form a plain pair can take."""
    pairs = (term.module for term in one.terms if term.stands_for is None and term.kind is None)
    return next(pairs, None)


def _transposed(matrix: LazyTensor) -> LazyTensor:
    return LazyTensor.computed(matrix.shape[::-1], matrix.dtype, lambda: matrix.load().T.contiguous())


def _bias(one: Group, scale: float, dtype: str) -> LazyTensor:
    """The weighted sum of the biases, each with the scale that its module gives it."""
    total = torch.zeros(one.shape[0], dtype=torch.float64)
    for term in one.terms:
        if "bias" in term.module.factors:
            bias = term.module.factors["bias"].load().double()
            total += term.weight * term.module.scale / scale * term.gained(bias)
    return LazyTensor.from_torch(total.to(torch_dtype(dtype)))


# -- within the range of a dtype --------------------------------------------------------------------------------------


def in_scale(one: Group, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of an update, in the scale of the merged module."""
    scale = scale_of(one)
    if scale == 1:
        return left, right
    root = math.sqrt(abs(scale))
    return left / math.copysign(root, scale), right / root


def shifts(left: Tensor, right: Tensor, dtype: str) -> Tensor | None:
    """What to multiply each column of left and divide each row of right by, so that `dtype` holds both.

    Powers of two, and 1 where nothing is at risk, so that no bit is lost. None if all are 1. Raises TooLarge.
    """
    largest = LARGEST.get(dtype, math.inf)
    if all(_peak(side) <= largest for side in (left, right)):
        return None
    outer, inner = left.abs().amax(dim=0).tolist(), right.abs().amax(dim=1).tolist()
    found = [shift(a, b, dtype) for a, b in zip(outer, inner, strict=True)]
    return torch.tensor(found, dtype=left.dtype, device=left.device)


def shifted(left: Tensor, right: Tensor, by: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factors times what `shifts` found."""
    return (left, right) if by is None else (left * by, right / by[:, None])


def _peak(values: Tensor) -> float:
    return float(torch.stack(values.aminmax()).abs().max()) if values.numel() else 0.0


def check_range(module: Module, norm: float) -> None:
    """Raises TooLarge where the dtype of a module, whose update has this norm, does not hold its values.

    Reads it only where the norm leaves that open.
    """
    largest = LARGEST.get(module.dtype, math.inf)
    # The factors of a decomposition hold nothing larger than the root of the largest singular value.
    if norm <= largest * largest * abs(module.scale):
        return
    if not all(peak(factor) <= largest for factor in module.factors.values()):
        error = TooLarge(module.dtype)
        error.key = module.title
        raise error


# -- a known decomposition --------------------------------------------------------------------------------------------


def of_balanced(module: Module, values: Sequence[float]) -> Spectrum:
    """The spectrum of a module whose factors are singular vectors, each times the root of one of these `values`."""
    product = module.ranks()
    left, right = product.left, product.right
    assert right is not None

    def cut(rank: int, dtype: str) -> Product:
        kept, work = min(rank, right.shape[0]), torch_dtype(dtype)
        return product._replace(
            left=LazyTensor.computed((left.shape[0], kept), dtype, lambda: left.load()[:, :kept].to(work)),
            right=LazyTensor.computed((kept, right.shape[1]), dtype, lambda: right.load()[:kept].to(work)),
        )

    return Spectrum(tuple(values), math.sqrt(math.fsum(value * value for value in values)), cut)
