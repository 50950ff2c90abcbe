"""Strided: a tensor that is a view of a storage with gaps, or turned. Its elements are gathered when it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from loratool.core.tensor import CHUNK, Held, Source

BLOCK = 16 << 20
"""Bytes of the storage that are held at once while elements are gathered."""

# Elements are moved, never looked at: any format of their size will do.
_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class Strided:
    """A source: elements of `width` bytes at `offset + sum(index * stride)` of a storage, in row order.

    `storage`, `offset` and `strides` count bytes of the storage and elements. The caller has checked that all elements
    lie inside. Reading takes the memory of the result and at most `BLOCK` more.
    """

    __slots__ = ("_offset", "_shape", "_storage", "_strides", "_width", "nbytes")

    def __init__(self, storage: Source, width: int, offset: int, shape: Sequence[int], strides: Sequence[int]) -> None:
        self._storage, self._width, self._offset = storage, width, offset
        self._shape, self._strides = tuple(shape), tuple(strides)
        self.nbytes = width
        for size in shape:
            self.nbytes *= size

    def chunks(self, size: int = CHUNK) -> Iterator[memoryview]:
        """The bytes in pieces of `size`, the last one shorter; gathered once for all pieces."""
        return Held(self.read()).chunks(size)

    def read(self) -> memoryview:
        """All bytes, in new memory."""
        whole = memoryview(bytearray(self.nbytes))
        if not self.nbytes:
            return whole
        target = 1
        dimensions = []
        for size, stride in reversed(tuple(zip(self._shape, self._strides))):
            if size > 1:
                dimensions.append((size, stride, target))
            target *= size
        dimensions.sort(key=lambda one: -one[1])
        self._gather(whole.cast(_FORMATS[self._width]), 0, self._offset, dimensions)
        return whole

    def slice(self, start: int, stop: int) -> Source:
        """The bytes `start:stop`; reading them gathers the whole."""
        return _Part(self, start, stop)

    def _gather(self, out: memoryview, at: int, offset: int, dimensions: list[tuple[int, int, int]]) -> None:
        """Copies the elements of `dimensions` (size, step in the storage, step in the output), far steps first.

        What lies in more than a block is halved: elements do not overlap, so no byte is read much more than once.
        """
        span = 1 + sum((size - 1) * stride for size, stride, _ in dimensions)
        if span * self._width > BLOCK and dimensions:
            (size, stride, step), *rest = dimensions
            half = size // 2
            for start, count in ((0, half), (half, size - half)):
                near = [(count, stride, step), *rest] if count > 1 else rest
                self._gather(out, at + start * step, offset + start * stride, near)
            return
        block = self._storage.slice(offset * self._width, (offset + span) * self._width).read()
        _copy(out, at, block.cast(_FORMATS[self._width]), 0, sorted(dimensions))


def _copy(out: memoryview, at: int, block: memoryview, first: int, dimensions: list[tuple[int, int, int]]) -> None:
    """The same within memory: the longest dimension, the last one, in one step each."""
    if not dimensions:
        out[at] = block[first]
        return
    if len(dimensions) > 1:
        size, stride, step = dimensions[0]
        for index in range(size):
            _copy(out, at + index * step, block, first + index * stride, dimensions[1:])
        return
    ((size, stride, step),) = dimensions
    stop = at + (size - 1) * step + 1
    if stride:
        out[at:stop:step] = block[first : first + (size - 1) * stride + 1 : stride]
    else:
        one = bytes(block[first : first + 1])
        out[at:stop:step] = memoryview(one * size).cast(block.format)  # type: ignore[call-overload]


class _Part:
    """A stretch of a strided source."""

    __slots__ = ("_start", "_stop", "_whole")

    def __init__(self, whole: Source, start: int, stop: int) -> None:
        self._whole, self._start, self._stop = whole, start, stop

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self._stop - self._start

    def chunks(self, size: int = CHUNK) -> Iterator[memoryview]:
        """The bytes in pieces of `size`, the last one shorter."""
        return Held(self.read()).chunks(size)

    def read(self) -> memoryview:
        """All bytes at once."""
        return self._whole.read()[self._start : self._stop]

    def slice(self, start: int, stop: int) -> Source:
        """The bytes `start:stop`."""
        return _Part(self._whole, self._start + start, self._start + stop)


class Swapped:
    """A source in the other byte order: each `width` bytes turned round when they are read."""

    __slots__ = ("_source", "_width", "nbytes")

    def __init__(self, source: Source, width: int) -> None:
        self._source, self._width, self.nbytes = source, width, source.nbytes

    def chunks(self, size: int = CHUNK) -> Iterator[memoryview]:
        """The bytes in pieces of `size`, the last one shorter."""
        return Held(self.read()).chunks(size)

    def read(self) -> memoryview:
        """All bytes, in new memory."""
        data = bytearray(self._source.read())
        turned = bytearray(len(data))
        for byte in range(self._width):
            turned[byte :: self._width] = data[self._width - 1 - byte :: self._width]
        return memoryview(turned)

    def slice(self, start: int, stop: int) -> Source:
        """The bytes `start:stop`; reading them reads the whole."""
        return _Part(self, start, stop)
