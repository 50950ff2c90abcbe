"""Stream: a copy of a safetensors file with other bytes in some tensors, written piece by piece by many threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType

from loratool.core.errors import FormatError, LoratoolError
from loratool.core.tensor import DTYPES, LazyTensor
from loratool.files.ahead import Ahead, Behind
from loratool.files.libc import same
from loratool.files.safetensors import FileRange, Header, header_bytes

PIECE = 4 << 20
"""What is compared, or copied through memory, at once: large enough that Python's lock is seldom asked for, small
enough for the processor's cache."""


@dataclass(frozen=True)
class Plan:
    """Where the tensors of a new file stand: name -> (dtype, shape, first byte in the data), in the header's order."""

    entries: Mapping[str, tuple[str, tuple[int, ...], int]]
    nbytes: int

    def header(self, metadata: Mapping[str, str], beside: int | None = None, least: int = 0) -> bytes:
        """Length and header as they stand in the file; `beside` is the first byte of the data of that copied from,
        `least` what a header before this one took."""
        return header_bytes(self.entries, metadata, beside, least)

    def start(self, name: str) -> int:
        """The first byte of a tensor in the data."""
        return self.entries[name][2]


def plan_like(header: Header, dtypes: Mapping[str, str] | None = None) -> Plan:
    """The tensors of `header` in their order, those in `dtypes` with another dtype."""
    dtypes = dtypes or {}
    position = 0
    starts: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name in in_data_order(header):
        tensor = header.tensors[name]
        dtype = dtypes.get(name, tensor.dtype)
        starts[name] = (dtype, tensor.shape, position)
        position += tensor.numel * DTYPES[dtype] // 8
    return Plan({name: starts[name] for name in header.tensors}, position)


def in_data_order(header: Header) -> list[str]:
    """Names of the tensors as they follow one another in the data, which may differ from the header's order."""
    return sorted(header.tensors, key=lambda name: stretch(header.tensors[name]).start)


def stretch(tensor: LazyTensor) -> FileRange:
    """Where a tensor that was read from a file lies in it. Raises TypeError for any other."""
    if not isinstance(tensor.source, FileRange):
        raise TypeError("the tensor is not in a file")
    return tensor.source


@dataclass(frozen=True)
class Copy:
    """Bytes that are the same in both files: `nbytes` at `source` of the old and at `target` of the new one's data."""

    source: int
    target: int
    nbytes: int

    def parts(self, size: int) -> Iterator[Copy]:
        """The copy in parts of that size."""
        for at in range(0, self.nbytes, size):
            yield Copy(self.source + at, self.target + at, min(size, self.nbytes - at))


def copies(header: Header, plan: Plan, others: Sequence[str] | frozenset[str]) -> list[Copy]:
    """What is copied from the file of `header`: everything but the tensors `others`, neighbours in one stretch."""
    found: list[Copy] = []
    for name in in_data_order(header):
        if name in others:
            continue
        piece = Copy(stretch(header.tensors[name]).start, plan.start(name), header.tensors[name].nbytes)
        last = found[-1] if found else None
        if last and (last.source + last.nbytes, last.target + last.nbytes) == (piece.source, piece.target):
            found[-1] = Copy(last.source, last.target, last.nbytes + piece.nbytes)
        elif piece.nbytes:
            found.append(piece)
    return found


def _copy_file_range(source: int, target: int, nbytes: int, at: int, to: int) -> int:
    """Bytes that Linux has copied between two files; 0 elsewhere."""
    if sys.platform != "linux":
        return 0
    return os.copy_file_range(source, target, nbytes, at, to)


class Output:
    """A file that threads fill in any order. Its header is written last, when what it tells is known.

    `head` is the number of bytes of the header. Raises LoratoolError for what the system refuses.
    """

    def __init__(self, path: str | os.PathLike[str], head: int, plan: Plan) -> None:
        self._path = os.fspath(path)
        self.head = head
        try:
            self.fd = os.open(self._path, os.O_RDWR | getattr(os, "O_BINARY", 0))
            try:
                os.ftruncate(self.fd, head + plan.nbytes)
            except OSError:
                os.close(self.fd)
                raise
        except OSError as error:
            raise self._failed(error) from error
        self._ahead, self._behind = Ahead(self.fd), Behind(self.fd)

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._behind.close()
        os.close(self.fd)

    @property
    def fills(self) -> bool:
        """Whether it is best filled in place, by many threads, where its pages were made ready."""
        return self._ahead.fills

    def hurry(self) -> None:
        """From now on it may take all processors to make ready and to copy."""
        self._ahead.hurry()

    def reserve(self, at: int, nbytes: int) -> bool:
        """Reserves space from byte `at` of the file on; False where there is something better to do, or nothing."""
        return self._ahead.reserve(at, nbytes)

    def make_ready(self, at: int, nbytes: int) -> None:
        """Makes it faster to write so many bytes of the data region from byte `at` of it on."""
        self._ahead.make(self.head + at, nbytes)

    def write(self, data: memoryview, at: int) -> None:
        """Writes bytes of the data region from byte `at` of it on."""
        self._write(data, self.head + at)

    def read(self, data: memoryview, at: int) -> None:
        """Reads back what was written to the data region from byte `at` on."""
        done = 0
        while done < data.nbytes:
            try:
                count = os.preadv(self.fd, [data[done:]], self.head + at + done)
            except OSError as error:
                raise LoratoolError(f"cannot be read back: {error.strerror}", file=self._path) from error
            if not count:
                raise LoratoolError("became shorter while it was written", file=self._path)
            done += count

    def finish(self, header: bytes) -> None:
        """Writes the header, which must be as long as announced."""
        if len(header) != self.head:
            raise ValueError(f"the header has {len(header)} bytes, announced {self.head}")
        self._write(memoryview(header), 0)

    def copy(self, source: FileRange, what: Copy, buffers: tuple[bytearray, bytearray], verify: bool) -> None:
        """Copies bytes of an open file: in place or by the system, where it can, else through buffers of one size.

        With `verify` they are read back piece by piece and compared. Raises FormatError for a difference.
        """
        done = 0 if self.fills else self._copied(source.file.fd, what)
        for part in what.parts(len(buffers[0])):
            lacking = part.target + part.nbytes > what.target + done
            with self._ahead.opened(self.head + part.target, part.nbytes) if lacking else nullcontext() as place:
                ours, theirs = (memoryview(room)[: part.nbytes] for room in buffers)
                if lacking:
                    source.file.readinto(ours if place is None else place, part.source)
                    if place is None:
                        self.write(ours, part.target)
                if verify:
                    self._compare(source, part, ours, theirs, place)

    def _compare(
        self, source: FileRange, part: Copy, ours: memoryview, theirs: memoryview, place: memoryview | None
    ) -> None:
        """Reads the bytes anew, and what is in the new file, unless its `place` is there to be seen."""
        source.file.readinto(ours, part.source)
        if place is None:
            self.read(theirs, part.target)
        if not same(ours, theirs if place is None else place, part.nbytes):
            raise FormatError(
                f"bytes {part.source} to {part.source + part.nbytes} are not the same in what was written",
                file=source.file.path,
                hint="the disk may be bad: nothing was kept",
            )

    def _copied(self, fd: int, what: Copy) -> int:
        """How many bytes of it the system has copied: it takes a third less time than two passes through memory. What
        it refuses, or cannot do, is left."""
        done = 0
        try:
            while done < what.nbytes:
                count = _copy_file_range(
                    fd, self.fd, what.nbytes - done, what.source + done, self.head + what.target + done
                )
                if not count:
                    break
                done += count
        except OSError:
            pass  # writing it says what is wrong
        self._behind.wrote(done)
        return done

    def _write(self, data: memoryview, at: int) -> None:
        try:
            done = 0
            while done < data.nbytes:
                done += os.pwrite(self.fd, data[done:], at + done)
            self._behind.wrote(done)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> LoratoolError:
        return LoratoolError(f"cannot be written: {error.strerror}", file=self._path)
