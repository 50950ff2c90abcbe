"""Numbers looked at without a tensor library: what is in the bytes, in whole pieces at a time.

The last byte of a little-endian float has its sign and the upper bits of its exponent. Slicing those bytes out and
deleting the small ones (`bytes.translate`) leaves what may be large, infinite or NaN; both run at memory speed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from loratool.core.tensor import LazyTensor, decoded

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "C64")
"""dtypes that have NaN."""

FP16_OVERFLOW = 65520.0
"""What fp16 rounds to infinity: halfway between its largest number, 65504, and the next."""

_SIZES = {"F64": 8, "F32": 4, "C64": 4, "F16": 2, "BF16": 2}
# Of these, the upper byte alone does not tell NaN from large: (the byte below, what of it must be set).
_BELOW = {"F64": 0xF0, "F32": 0x80, "C64": 0x80, "BF16": 0x80}


@dataclass(frozen=True, slots=True)
class Seen:
    """What is in a tensor: `odd` numbers are NaN or infinite, the first of them at `first` (by its number in row
    order). `zero`: all are 0. No finite magnitude is above `bound`; it is 1 if none is."""

    odd: int
    first: int
    zero: bool
    bound: float


def seen(tensor: LazyTensor) -> Seen:
    """Reads a tensor once, piece by piece."""
    odd, first, zero, bound, done = 0, -1, True, 1.0, 0
    size = _SIZES.get(tensor.dtype, 1)
    for piece in tensor.source.chunks():
        data = bytes(piece)
        zero = zero and not data.strip(b"\0")
        if tensor.dtype in FLOATS and not zero:
            upper = data[size - 1 :: size]
            large = upper.translate(None, _small(tensor.dtype))
            if large:
                marks = _marks(data, upper, tensor.dtype, size)
                if marks:
                    odd += marks.bit_count()
                    where = marks.to_bytes(len(upper), "big").find(1)
                    first = done + where if first < 0 else first
                bound = max(bound, _bound(large, tensor.dtype))
        done += len(data) // size
    return Seen(odd, first, zero and tensor.numel > 0, bound)


def _marks(data: bytes, upper: bytes, dtype: str, size: int) -> int:
    """A number with one byte for each element: 1 where it is NaN or infinite, 0 elsewhere."""
    marks = int.from_bytes(upper.translate(_odd_upper(dtype)), "big")
    if dtype in _BELOW and marks:
        needed = _BELOW[dtype]
        table = bytes((byte & needed) == needed for byte in range(256))
        marks &= int.from_bytes(data[size - 2 :: size].translate(table), "big")
    return marks


@cache
def _magnitudes(dtype: str) -> tuple[float, ...]:
    """The largest magnitude of a number with each upper byte; NaN and infinity as infinity."""
    size = _SIZES.get(dtype, 1)
    code = "F32" if dtype == "C64" else dtype
    found = []
    for byte in range(256):
        if size > 1 and byte & 0x7F == 0x7F and dtype in _BELOW:
            found.append(math.inf)
            continue
        value = abs(decoded(b"\xff" * (size - 1) + bytes([byte]), code))
        found.append(value if math.isfinite(value) else math.inf)
    return tuple(found)


@cache
def _small(dtype: str) -> bytes:
    """Upper bytes of numbers up to 1 in magnitude."""
    return bytes(byte for byte, most in enumerate(_magnitudes(dtype)) if most <= 1.0)


@cache
def _odd_upper(dtype: str) -> bytes:
    return bytes(math.isinf(most) for most in _magnitudes(dtype))


def _bound(large: bytes, dtype: str) -> float:
    magnitudes = _magnitudes(dtype)
    finite = sorted({(most, byte) for byte, most in enumerate(magnitudes) if 1.0 < most < math.inf}, reverse=True)
    if dtype in _BELOW and any(byte in large for byte in (0x7F, 0xFF)):
        return 1.8e308 if dtype == "F64" else 3.41e38
    return next((most for most, byte in finite if byte in large), 1.0)


def numbers(data: bytes, dtype: str) -> Sequence[float]:
    """The values of a few bytes. Only of the dtypes in FLOATS but C64."""
    if dtype == "BF16":
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        data, dtype = bytes(wide), "F32"
    form = {"F64": "d", "F32": "f", "F16": "e"}.get(dtype)
    if form is not None:
        return struct.unpack(f"<{len(data) // _SIZES[dtype]}{form}", data)
    return [_table(dtype)[byte] for byte in data]


@cache
def _table(dtype: str) -> tuple[float, ...]:
    return tuple(decoded(bytes([byte]), dtype) for byte in range(256))


def largest(tensor: LazyTensor) -> tuple[float, int]:
    """The largest finite magnitude, and its number in row order. Slow: for what `bound` leaves open."""
    best, at, done = 0.0, 0, 0
    for piece in tensor.source.chunks(1 << 20):
        values = numbers(bytes(piece), tensor.dtype)
        for index, value in enumerate(values):
            if abs(value) > best and math.isfinite(value):
                best, at = abs(value), done + index
        done += len(values)
    return best, at
