"""Ranges: how large a value every dtype holds, and how a gain is spread over two factors where one cannot take it."""

from __future__ import annotations

import math
import sys

from loratool.core.errors import LoratoolError
from loratool.core.tensor import LazyTensor

LARGEST = {
    "F8_E4M3": 448.0,
    "F8_E5M2": 57344.0,
    "F16": 65504.0,
    "BF16": math.ldexp(2 - 2**-7, 127),
    "F32": math.ldexp(2 - 2**-23, 127),
    "F64": sys.float_info.max,
}
"""The largest finite value of every dtype that factors are stored in."""


class TooLarge(LoratoolError):
    """A dtype cannot hold the values, however they are spread over the factors."""

    def __init__(self, dtype: str) -> None:
        super().__init__(
            f"the values become too large for {dtype}",
            hint="choose a --dtype that holds them, such as fp32, or smaller strengths",
        )


def shift(outer: float, inner: float, dtype: str) -> float:
    """The power of two to multiply one factor by and divide the other by, so that `dtype` holds both.

    `outer` and `inner` are the largest magnitudes in them. 1 where nothing is at risk, so that every bit stays; else
    what makes them about equal. Raises TooLarge.
    """
    largest = LARGEST.get(dtype, math.inf)
    if outer <= largest and inner <= largest:
        return 1.0
    if math.isfinite(outer) and math.isfinite(inner):
        ratio = max(inner, 1 / largest) / max(outer, 1 / largest)
        found = math.ldexp(1.0, round(math.log2(ratio) / 2)) if 0 < ratio < math.inf else 0.0
        if found and outer * found <= largest and inner / found <= largest:
            return found
    raise TooLarge(dtype)


def spread(gain: float, outer: LazyTensor, inner: LazyTensor) -> tuple[float, float]:
    """`gain` as a gain for each of two factors of a product: all of it for `outer`, where its dtype holds the result.

    Reads them only for a gain that makes values larger. Raises TooLarge.
    """
    if abs(gain) <= 1:
        return gain, 1.0
    narrower = min(outer.dtype, inner.dtype, key=lambda dtype: LARGEST.get(dtype, math.inf))
    found = shift(peak(outer) * abs(gain), peak(inner), narrower)
    return gain * found, 1 / found


def check_gain(gain: float, vector: LazyTensor) -> None:
    """Raises TooLarge where the dtype of a vector does not hold it times `gain`."""
    if abs(gain) > 1 and not peak(vector) * abs(gain) <= LARGEST.get(vector.dtype, math.inf):
        raise TooLarge(vector.dtype)


def peak(tensor: LazyTensor) -> float:
    """The largest magnitude; reads the tensor."""
    return float(abs(tensor.array()).max()) if tensor.numel else 0.0
