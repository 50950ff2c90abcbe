"""Rounding: float32 results to the dtype they are stored in, to nearest or stochastically, and fp8 with its scale."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from loratool.core.tensor import torch_dtype

FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
WIDE = frozenset({"F32", "F64"})
"""dtypes that hold what is computed: nothing is rounded."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIX, _MASK = -7046029254386353131, (1 << 33) - 1


def rounded(values: Tensor, dtype: str, noise: Tensor | None = None) -> Tensor:
    """`values` (float32) as `dtype` (safetensors' code), to nearest, ties to even; fp8 stays within its range.

    With `noise`, uniform in [0, 1) and of the shape of `values`, stochastically: to either neighbour, with the
    probability that makes the mean exact.
    """
    kind = torch_dtype(dtype)
    if dtype in FP8:
        values = values.clamp(-largest(dtype), largest(dtype))  # beyond, the cast gives NaN
    near = values.to(kind)
    if noise is None or dtype in WIDE:
        return near
    off = values - near.float()
    other = _neighbour(near, off > 0)
    # An infinite neighbour is never taken: there the share is 0. No rest: the share is 0, too.
    share = torch.where(off == 0, 0.0, off / (other.float() - near.float()))
    return torch.where(noise < share, other.view(_INTEGERS[near.element_size()]), near.view(other_int(near))).view(kind)


def other_int(values: Tensor) -> torch.dtype:
    """The integer dtype of the same width."""
    return _INTEGERS[values.element_size()]


def largest(dtype: str) -> float:
    """The largest finite number of a dtype."""
    return float(torch.finfo(torch_dtype(dtype)).max)


@cache
def beyond(dtype: str) -> float:
    """What is larger than this is too large for a dtype: half a step above its largest number."""
    top = torch.tensor(largest(dtype), dtype=torch.float64)
    return float(top + ulp(top, dtype) / 2)


def ulp(values: Tensor, dtype: str) -> Tensor:
    """The distance of neighbouring numbers of a dtype around values (float32 or float64)."""
    kind = torch.finfo(torch_dtype(dtype))
    size = values.abs().clamp(kind.smallest_normal, kind.max)
    return kind.eps * torch.exp2(torch.floor(torch.log2(size)))


def fresh_scale(peak: Tensor, old: Tensor, dtype: str) -> Tensor:
    """The scale, in the dtype of `old`, at which `peak` (the largest |value|, float32) is the largest fp8 number.

    Where everything is zero the old scale stays.
    """
    new = (peak / largest(dtype)).to(old.dtype)
    return torch.where(new > 0, new, old)


def uniform(shape: tuple[int, int], first: int, seed: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) for elements `first:` of a tensor, the same on every device: a hash of seed and place.

    The mixing steps are those of SplitMix64 (Steele et al. 2014).
    """
    x = torch.arange(first, first + shape[0] * shape[1], dtype=torch.int64, device=device)
    x = (x + seed) * _MIX
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & _MASK)
    return ((x >> 40) & 0xFFFFFF).float().mul_(2.0**-24).reshape(shape)


def _neighbour(near: Tensor, above: Tensor) -> Tensor:
    """The next number of the dtype, upward where `above`, else downward."""
    bits = near.view(other_int(near))
    wide = near.float()
    away = above == (wide > 0)  # a larger magnitude is a larger code, but for the sign bit
    step = torch.where(away, 1, -1).to(bits.dtype)
    sign = torch.tensor(torch.iinfo(bits.dtype).min, dtype=bits.dtype, device=bits.device)
    smallest = torch.where(above, torch.ones_like(bits), sign + 1)
    return torch.where(wide == 0, smallest, bits + step).view(near.dtype)
