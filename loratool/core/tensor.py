"""LazyTensor: a shape, a dtype and bytes that are read when somebody asks."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple, Protocol

from loratool.core.errors import FormatError, LoratoolError

if TYPE_CHECKING:
    import numpy
    import torch
    from numpy.typing import NDArray

    Array = NDArray[numpy.floating]

# The order is that of the Dtype enum in the Rust crate safetensors 0.8: the serialiser sorts by it.
DTYPES: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element of every dtype that safetensors 0.8 knows, by its code."""

SERIAL_ORDER: dict[str, int] = {code: rank for rank, code in enumerate(reversed(DTYPES))}
"""Rank of a dtype in a file: the serialiser writes tensors by ascending `(SERIAL_ORDER[dtype], name)`."""

CHUNK = 8 << 20

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_CODES = {name: code for code, name in _TORCH_NAMES.items()}


class Source(Protocol):
    """Where the bytes of a tensor come from. Nothing is read before one of the methods is called."""

    @property
    def nbytes(self) -> int:
        """Number of bytes."""

    def chunks(self, size: int = CHUNK) -> Iterator[memoryview]:
        """The bytes in pieces of `size`, the last one shorter. A piece stays valid and unchanged after the next."""

    def read(self) -> memoryview:
        """All bytes at once."""

    def slice(self, start: int, stop: int) -> Source:
        """The bytes `start:stop`, just as lazily."""


class Held:
    """A source in memory. `view` is kept, not copied."""

    __slots__ = ("_view",)

    def __init__(self, view: memoryview | bytes | bytearray) -> None:
        self._view = _flat(view)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self._view.nbytes

    def chunks(self, size: int = CHUNK) -> Iterator[memoryview]:
        """The bytes in pieces of `size`, the last one shorter."""
        return _pieces(self._view, size)

    def read(self) -> memoryview:
        """All bytes at once: the very memory that is held."""
        return self._view

    def slice(self, start: int, stop: int) -> Held:
        """The bytes `start:stop`; no copy."""
        return Held(self._view[start:stop])


class Computed:
    """A source that is computed each time it is asked for and never kept."""

    __slots__ = ("_make", "_start", "_stop", "_total")

    def __init__(self, nbytes: int, make: Callable[[], memoryview | bytes]) -> None:
        self._make = make
        self._total = nbytes
        self._start = 0
        self._stop = nbytes

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self._stop - self._start

    def chunks(self, size: int = CHUNK) -> Iterator[memoryview]:
        """The bytes in pieces of `size`, the last one shorter; computed once for all pieces."""
        return _pieces(self.read(), size)

    def read(self) -> memoryview:
        """All bytes at once. Raises ValueError when the function makes another number of bytes than announced."""
        made = _flat(self._make())
        if made.nbytes != self._total:
            raise ValueError(f"computed {made.nbytes} bytes, announced {self._total}")
        return made[self._start : self._stop]

    def slice(self, start: int, stop: int) -> Computed:
        """The bytes `start:stop`; reading them computes the whole."""
        part = Computed(self._total, self._make)
        part._start, part._stop = self._start + start, self._start + stop
        return part


class Joined:
    """Several sources one behind the other."""

    __slots__ = ("_parts", "nbytes")

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = tuple(parts)
        self.nbytes: int = sum(part.nbytes for part in parts)

    def chunks(self, size: int = CHUNK) -> Iterator[memoryview]:
        """The bytes in pieces of `size`, the last one shorter, across the borders of the parts."""
        rest: list[memoryview] = []
        missing = size
        for part in self._parts:
            for piece in part.chunks(size):
                while piece.nbytes >= missing:
                    rest.append(piece[:missing])
                    piece = piece[missing:]
                    yield rest[0] if len(rest) == 1 else memoryview(b"".join(rest))
                    rest, missing = [], size
                if piece.nbytes:
                    rest.append(piece)
                    missing -= piece.nbytes
        if rest:
            yield memoryview(b"".join(rest))

    def read(self) -> memoryview:
        """All bytes at once, in new memory."""
        whole = memoryview(bytearray(self.nbytes))
        position = 0
        for part in self._parts:
            for piece in part.chunks():
                whole[position : position + piece.nbytes] = piece
                position += piece.nbytes
        return whole

    def slice(self, start: int, stop: int) -> Joined:
        """The bytes `start:stop`; parts outside are never read."""
        kept: list[Source] = []
        position = 0
        for part in self._parts:
            first, last = max(start - position, 0), min(stop - position, part.nbytes)
            if first < last:
                kept.append(part.slice(first, last))
            position += part.nbytes
        return Joined(kept)


class LazyTensor(NamedTuple):
    """A tensor whose bytes are read when asked for; `dtype` is safetensors' code (`"BF16"`).

    The bytes are little-endian, row by row. What `read` and `load` return may share memory with the source:
    do not write into it.
    """

    shape: tuple[int, ...]
    dtype: str
    source: Source

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.source.nbytes

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    def read(self) -> memoryview:
        """All bytes."""
        return self.source.read()

    def load(self, device: str | torch.device = "cpu") -> torch.Tensor:
        """The torch tensor, in its own dtype. Raises FormatError when torch has no such dtype."""
        import torch

        dtype = torch_dtype(self.dtype)
        if self.numel == 0:
            return torch.empty(self.shape, dtype=dtype, device=device)
        view = self.source.read()
        # torch warns about memory it must not write to, and a tensor over it would break whoever owns it.
        buffer = bytearray(view) if view.readonly else view
        tensor: torch.Tensor = torch.frombuffer(buffer, dtype=dtype).reshape(self.shape)
        return tensor.to(device)

    def array(self, dtype: str = "float64") -> Array:
        """The values as a numpy array of `dtype` (float32 or float64), without torch where numpy can read them.

        Raises FormatError for dtypes without real numbers.
        """
        import numpy

        name = _TORCH_NAMES.get(self.dtype, "")
        if self.dtype == "BF16":  # the upper half of a float32
            bits = numpy.frombuffer(self.source.read(), "<u2").astype("<u4") << 16
            values = bits.view("<f4")
        elif hasattr(numpy, name) and self.dtype not in ("C64", "BOOL"):
            values = numpy.frombuffer(self.source.read(), numpy.dtype(name).newbyteorder("<"))
        else:
            values = self.load().float().numpy()
        return values.reshape(self.shape).astype(dtype)

    def octets(self) -> Array:
        """The stored bytes as an array of uint8, `(bytes,)`."""
        import numpy

        return numpy.frombuffer(bytes(self.read()), "u1")

    def item(self) -> float:
        """The value of a one-element tensor, without torch. Raises FormatError for other sizes and dtypes."""
        if self.numel != 1:
            raise FormatError(f"expected one number, found shape {list(self.shape)}")
        return decoded(b"".join(self.source.chunks()), self.dtype)

    def numbers(self) -> list[float]:
        """All values in row order, without torch: for a few of them. Raises FormatError for the dtypes of `item`."""
        data, size = b"".join(self.source.chunks()), max(DTYPES[self.dtype] // 8, 1)
        return [decoded(data[start : start + size], self.dtype) for start in range(0, len(data), size)]

    def reshape(self, shape: Sequence[int]) -> LazyTensor:
        """The same bytes under another shape. Raises ValueError when the number of elements differs."""
        if math.prod(shape) != self.numel:
            raise ValueError(f"cannot reshape {list(self.shape)} to {list(shape)}")
        return LazyTensor(tuple(shape), self.dtype, self.source)

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Rows `start:stop` of the first dimension, lazily.

        Raises IndexError outside the tensor, FormatError when rows of a dtype below 8 bits end inside a byte.
        """
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}:{stop} of shape {list(self.shape)}")
        bits = math.prod(self.shape[1:]) * DTYPES[self.dtype]
        if start * bits % 8 or stop * bits % 8:
            raise FormatError(f"rows {start}:{stop} of {self.dtype} data begin or end inside a byte")
        part = self.source.slice(start * bits // 8, stop * bits // 8)
        return LazyTensor((stop - start, *self.shape[1:]), self.dtype, part)

    @staticmethod
    def scalar(value: float, dtype: str) -> LazyTensor:
        """A 0-d tensor in memory, rounded to nearest, ties to even; see `encoded` for what does not fit."""
        return LazyTensor((), dtype, Held(encoded(value, dtype)))

    @staticmethod
    def from_torch(tensor: torch.Tensor) -> LazyTensor:
        """A tensor in memory; shares the memory of a contiguous CPU tensor, copies any other."""
        return LazyTensor(tuple(tensor.shape), code_of(tensor.dtype), Held(_bytes_of(tensor)))

    @staticmethod
    def rounded(shape: Sequence[int], dtype: str, make_array: Callable[[], Array]) -> LazyTensor:
        """A tensor of the values that `make_array` makes (float32 or float64) whenever it is read, rounded to `dtype`.

        Each value is rounded once, to nearest, ties to even; what is too large becomes infinite. Never kept. Reading
        raises ValueError when the array made has another shape than announced.
        """
        announced = tuple(shape)

        def make() -> memoryview:
            made = make_array()
            if made.shape != announced:
                raise ValueError(f"computed {list(made.shape)}, announced {list(announced)}")
            return _rounded_bytes(made, dtype)

        return LazyTensor(announced, dtype, Computed(math.prod(announced) * DTYPES[dtype] // 8, make))

    @staticmethod
    def computed(shape: Sequence[int], dtype: str, make_tensor: Callable[[], torch.Tensor]) -> LazyTensor:
        """A tensor that `make_tensor` makes whenever it is read; never kept.

        Reading raises ValueError when the tensor made has another shape or dtype than announced.
        """
        announced = tuple(shape)

        def make() -> memoryview:
            made = make_tensor()
            found = tuple(made.shape), code_of(made.dtype)
            if found != (announced, dtype):
                raise ValueError(f"computed {found[1]} {list(found[0])}, announced {dtype} {list(announced)}")
            return _bytes_of(made)

        bits = math.prod(announced) * DTYPES[dtype]
        return LazyTensor(announced, dtype, Computed(bits // 8, make))


def same_bytes(left: LazyTensor, right: LazyTensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes; reads both piece by piece, up to a difference."""
    if left.shape != right.shape or left.dtype != right.dtype or left.nbytes != right.nbytes:
        return False
    if left.source is right.source:
        return True
    pieces = zip_longest(left.source.chunks(), right.source.chunks(), fillvalue=memoryview(b""))
    # As bytes: comparing memoryviews goes element by element, bytes go through memcmp.
    return all(bytes(ours) == bytes(theirs) for ours, theirs in pieces)


def concatenated(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """The tensors one below the other along the first dimension, lazily.

    Raises ValueError unless they have one dtype and one shape behind the first dimension.
    """
    first = tensors[0]
    if any(not t.shape or t.shape[1:] != first.shape[1:] or t.dtype != first.dtype for t in tensors):
        kinds = ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors)
        raise ValueError(f"cannot concatenate {kinds}")
    if len(tensors) == 1:
        return first
    rows = sum(t.shape[0] for t in tensors)
    return LazyTensor((rows, *first.shape[1:]), first.dtype, Joined([t.source for t in tensors]))


def scaled(tensor: LazyTensor, gain: float) -> LazyTensor:
    """The tensor times `gain`, computed in float64 and rounded once to its dtype; itself if `gain` is 1."""
    if gain == 1.0:
        return tensor
    dtype = tensor.dtype
    return LazyTensor.computed(tensor.shape, dtype, lambda: (tensor.load().double() * gain).to(torch_dtype(dtype)))


def transposed(tensor: LazyTensor) -> LazyTensor:
    """A matrix with rows and columns exchanged, lazily; the matrix itself when done twice."""
    if isinstance(tensor.source, _Transposed):
        return tensor.source.matrix
    turned = LazyTensor.computed(tensor.shape[::-1], tensor.dtype, lambda: tensor.load().T.contiguous())
    return LazyTensor(turned.shape, turned.dtype, _Transposed(turned.nbytes, turned.read, tensor))


class _Transposed(Computed):
    """Remembers what it is the transpose of."""

    def __init__(self, nbytes: int, make: Callable[[], memoryview | bytes], matrix: LazyTensor) -> None:
        super().__init__(nbytes, make)
        self.matrix = matrix


def torch_dtype(code: str) -> torch.dtype:
    """torch's dtype for a safetensors code. Raises FormatError when torch has none."""
    import torch

    found = getattr(torch, _TORCH_NAMES.get(code, ""), None)
    if not isinstance(found, torch.dtype):
        raise FormatError(f"torch {torch.__version__} has no dtype for {code}")
    return found


def code_of(dtype: torch.dtype) -> str:
    """The safetensors code of torch's dtype. Raises FormatError when safetensors has none."""
    name = str(dtype).removeprefix("torch.")
    if name not in _CODES:
        raise FormatError(f"safetensors has no dtype for torch's {name}")
    return _CODES[name]


def code_named(name: str) -> str | None:
    """The safetensors code of the dtype that torch calls `name` (`"bfloat16"`), without torch; None if it has none."""
    return _CODES.get(name)


class _SmallFloat(NamedTuple):
    """A binary float of at most 16 bits, as codes without the sign. `infinity` is None where there is none."""

    bits: int
    mantissa: int
    bias: int
    largest: int
    infinity: int | None
    nan: int
    unsigned_zero: bool = False


_SMALL_FLOATS = {
    "BF16": _SmallFloat(16, 7, 127, 0x7F7F, 0x7F80, 0x7FC0),
    "F16": _SmallFloat(16, 10, 15, 0x7BFF, 0x7C00, 0x7E00),
    "F8_E5M2": _SmallFloat(8, 2, 15, 0x7B, 0x7C, 0x7F),
    "F8_E4M3": _SmallFloat(8, 3, 7, 0x7E, None, 0x7F),
    # "FNUZ": finite, unsigned zero; the code of minus zero is the only NaN.
    "F8_E5M2FNUZ": _SmallFloat(8, 2, 16, 0x7F, None, 0x80, unsigned_zero=True),
    "F8_E4M3FNUZ": _SmallFloat(8, 3, 8, 0x7F, None, 0x80, unsigned_zero=True),
}
_PLAIN = {
    "BOOL": "<?",
    "U8": "<B",
    "I8": "<b",
    "I16": "<h",
    "U16": "<H",
    "I32": "<i",
    "U32": "<I",
    "I64": "<q",
    "U64": "<Q",
    "F32": "<f",
    "F64": "<d",
}


def decoded(data: bytes, dtype: str) -> float:
    """The number that the bytes of one element spell; exact, except integers beyond 2**53 (rounded to a double).

    Raises FormatError for dtypes without a single real number per element (C64, F4, F6).
    """
    plain = "<e" if dtype == "F16" else _PLAIN.get(dtype)
    if plain is not None:
        return float(struct.unpack(plain, data)[0])
    code = int.from_bytes(data, "little")
    if dtype == "F8_E8M0":
        return math.nan if code == 0xFF else math.ldexp(1.0, code - 127)
    if dtype not in _SMALL_FLOATS:
        raise FormatError(f"expected a real number, found dtype {dtype}")
    return _decoded_small(code, _SMALL_FLOATS[dtype])


def encoded(value: float, dtype: str) -> bytes:
    """The bytes of one element, rounded to nearest, ties to even: the inverse of `decoded`.

    Too large a number becomes infinity, or NaN where the dtype has no infinity (some versions of torch write the
    largest F8_E4M3 instead, which would pass for a number that was meant). Raises LoratoolError for a fraction or
    too large a number in an integer dtype, FormatError for F8_E8M0, C64, F4 and F6.
    """
    if dtype in _SMALL_FLOATS:
        layout = _SMALL_FLOATS[dtype]
        return _encoded_small(value, layout).to_bytes(layout.bits // 8, "little")
    if dtype not in _PLAIN:
        raise FormatError(f"cannot write a number as {dtype}")
    if dtype in ("F32", "F64"):
        try:
            return struct.pack(_PLAIN[dtype], value)
        except OverflowError:
            return struct.pack(_PLAIN[dtype], math.copysign(math.inf, value))
    fits = math.isfinite(value) and value == int(value) and (dtype != "BOOL" or value in (0, 1))
    try:
        if fits:
            return struct.pack(_PLAIN[dtype], int(value))
    except struct.error:
        pass
    raise LoratoolError(f"{value!r} does not fit dtype {dtype}", hint="choose another dtype")


def _decoded_small(code: int, layout: _SmallFloat) -> float:
    sign_bit = 1 << (layout.bits - 1)
    magnitude = code & (sign_bit - 1)
    sign = -1.0 if code & sign_bit else 1.0
    if layout.unsigned_zero and code == layout.nan:
        return math.nan
    if magnitude > layout.largest:
        return sign * math.inf if magnitude == layout.infinity else math.nan
    exponent, fraction = magnitude >> layout.mantissa, magnitude & ((1 << layout.mantissa) - 1)
    if exponent:
        fraction += 1 << layout.mantissa
    return sign * math.ldexp(fraction, max(exponent, 1) - layout.bias - layout.mantissa)


def _encoded_small(value: float, layout: _SmallFloat) -> int:
    if math.isnan(value):
        return layout.nan
    sign = 1 << (layout.bits - 1) if math.copysign(1.0, value) < 0 else 0
    beyond = layout.nan if layout.infinity is None else layout.infinity
    magnitude = beyond if math.isinf(value) else _rounded(abs(value), layout)
    if magnitude > layout.largest:
        magnitude = beyond
    if layout.unsigned_zero and magnitude in (0, layout.nan):
        return magnitude
    return sign | magnitude


def _rounded(value: float, layout: _SmallFloat) -> int:
    """The code of a finite number that is not negative, were there no largest one."""
    lowest = 1 - layout.bias
    exponent = max(math.frexp(value)[1] - 1, lowest) if value else lowest
    # round() of a float is exact and ties to even. The implicit bit of a normal number carries into the exponent.
    steps = round(math.ldexp(value, layout.mantissa - exponent))
    return ((exponent - lowest) << layout.mantissa) + steps


def _rounded_bytes(values: Array, dtype: str) -> memoryview:
    """The bytes of an array's values in `dtype`."""
    import numpy

    if dtype in ("F64", "F32", "F16"):
        with numpy.errstate(over="ignore"):
            return _flat(numpy.ascontiguousarray(values, _PLAIN_NUMPY[dtype]).data)
    if dtype == "BF16":
        bits = numpy.ascontiguousarray(_toward_odd(values), "<f4").view("<u4")
        # To nearest, ties to even, on the upper half; a NaN stays one.
        upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        upper[numpy.isnan(values)] = 0x7FC0
        return _flat(upper.data)
    import torch

    return _bytes_of(torch.from_numpy(numpy.ascontiguousarray(values)).to(torch_dtype(dtype)))


_PLAIN_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def _toward_odd(values: Array) -> Array:
    """float32 of float64 values, rounded to odd: rounding that again to fewer bits gives what rounding once would."""
    import numpy

    if values.dtype == numpy.float32:
        return values
    with numpy.errstate(over="ignore"):
        near = values.astype("f4")
    above = numpy.abs(near.astype("f8")) > numpy.abs(values)
    near = numpy.where(above, numpy.nextafter(near, numpy.float32(0)), near)
    inexact = near.astype("f8") != values
    odd: Array = (near.view("u4") | (inexact & numpy.isfinite(values)).astype("u4")).view("f4")
    return odd


def _flat(view: memoryview | bytes | bytearray) -> memoryview:
    """`view` as a one-dimensional view of bytes."""
    view = memoryview(view)
    # cast() refuses views with a zero in their shape.
    return view.cast("B") if view.nbytes else memoryview(b"")


def _pieces(view: memoryview, size: int) -> Iterator[memoryview]:
    return (view[start : start + size] for start in range(0, view.nbytes, size))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor, kept alive by the view; a copy where it is not contiguous or not on the CPU."""
    # resolve_*: a conjugated or negated view has other bits in memory than values.
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return memoryview(b"")
    import ctypes

    array = (ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # the array does not own the memory: tie its life to the tensor's
    return memoryview(array).cast("B")
