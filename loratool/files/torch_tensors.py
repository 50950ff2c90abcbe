"""From what a pickle tells of a tensor to a lazy tensor: storages, sizes, strides and offsets, all checked first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.core.errors import FormatError
from loratool.core.tensor import Held, LazyTensor, Source
from loratool.files.safetensors import FileRange
from loratool.files.strided import Strided, Swapped
from loratool.files.torch_names import TORCH_DTYPES, Rebuilt, Storage, item_size
from loratool.files.unpickle import Global, Table

MAX_DIMENSIONS = 64
_MORE = 64
_AT_LEAST = 64 << 20
_LARGEST = 1 << 62
_DAMAGED = "the file is damaged or was made to do harm"


@dataclass
class Room:
    """How many bytes all tensors of a file may have, and have to be read for: views can make much of little."""

    limit: int
    taken: int = 0

    @staticmethod
    def for_file(nbytes: int) -> Room:
        """64 times the file and 64 MiB: tied and sliced weights need a few times."""
        return Room(nbytes * _MORE + _AT_LEAST)

    def take(self, nbytes: int) -> None:
        """Raises FormatError beyond the limit."""
        self.taken += nbytes
        if self.taken > self.limit:
            raise FormatError(
                f"and the tensors before it have {self.taken} bytes as views of a smaller file, expected at most "
                f"{self.limit}",
                hint=_DAMAGED,
            )


def tensor_of(rebuilt: Rebuilt, storages: Mapping[str, FileRange], big_endian: bool, room: Room) -> LazyTensor:
    """The lazy tensor, little-endian and in row order. Nothing is read or allocated here.

    Raises FormatError for a storage that is not there or of another size, for sizes, strides and offsets that leave
    it, for elements that overlap, and for what safetensors cannot say (hooks, conjugated views).
    """
    storage, dtype = _storage(rebuilt)
    shape, strides = _numbers(rebuilt.size, "a size"), _numbers(rebuilt.stride, "a stride")
    offset = _numbers((rebuilt.offset,), "an offset")[0]
    if len(shape) != len(strides):
        raise FormatError(f"has {len(shape)} sizes and {len(strides)} strides", hint=_DAMAGED)
    kept = storages.get(storage.key)
    if kept is None:
        raise FormatError(f"lacks its storage {storage.key}", hint=_DAMAGED)
    if kept.nbytes != storage.nbytes:
        raise FormatError(
            f"has a storage {storage.key} of {kept.nbytes} bytes, expected {storage.nbytes}", hint=_DAMAGED
        )
    width = item_size(dtype)
    first, count = (number * item_size(storage.dtype) for number in storage.view)
    source = _gathered(kept.slice(first, first + count), width, offset, shape, strides, room)
    if big_endian and width > 1 and source.nbytes:
        source = Swapped(source, 4 if dtype == "C64" else width)
    return LazyTensor(shape, dtype, source)


def _storage(rebuilt: Rebuilt) -> tuple[Storage, str]:
    storage = rebuilt.storage
    if type(storage) is not Storage:
        raise FormatError("has no storage", hint=_DAMAGED)
    if any(one is not None and not (type(one) is Table and not one.pairs) for one in rebuilt.odd):
        raise FormatError(
            "has hooks or flags (a conjugated or negated view), which safetensors cannot hold",
            hint="save a plain copy of it",
        )
    if rebuilt.dtype is None:
        return storage, storage.dtype
    dtype = TORCH_DTYPES.get(rebuilt.dtype.name) if type(rebuilt.dtype) is Global else None
    if dtype is None:
        raise FormatError("has a dtype that is none", hint=_DAMAGED)
    return storage, dtype


def _numbers(told: Any, what: str) -> tuple[int, ...]:
    """Sizes, strides or an offset: integers, none of them negative or beyond what a file can have."""
    if type(told) not in (tuple, list) or len(told) > MAX_DIMENSIONS:
        raise FormatError(f"has {what} that is none, expected a list of at most {MAX_DIMENSIONS}", hint=_DAMAGED)
    for number in told:
        if type(number) is not int or not 0 <= number <= _LARGEST:
            found = number if type(number) is int else f"a {type(number).__name__}"
            raise FormatError(f"has {what} of {found}, expected 0 to {_LARGEST}", hint=_DAMAGED)
    return tuple(told)


def _gathered(
    storage: Source, width: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], room: Room
) -> Source:
    """The elements as a source: a stretch of the storage, or gathered from it."""
    numel = 1
    for size in shape:
        numel *= size
        if numel * width > _LARGEST:  # step by step: a zero later does not undo it
            raise FormatError(f"has shape {list(shape)}: more bytes than a file can have", hint=_DAMAGED)
    if not numel:
        return Held(b"")
    steps = sorted((stride, size) for size, stride in zip(shape, strides) if size > 1)
    reach = 1
    for stride, size in steps:
        if stride and stride < reach:
            raise FormatError("has elements that overlap one another in its storage", hint="save a plain copy of it")
        reach += (size - 1) * stride
    if (offset + reach) * width > storage.nbytes:
        raise FormatError(
            f"reaches to byte {(offset + reach) * width} of its storage, which has {storage.nbytes}", hint=_DAMAGED
        )
    room.take(max(numel, reach) * width)
    expected = 1
    plain = True
    for size, stride in reversed(tuple(zip(shape, strides))):
        plain = plain and (size == 1 or stride == expected)
        expected *= size
    if plain:
        return storage.slice(offset * width, (offset + numel) * width)
    return Strided(storage, width, offset, shape, strides)
