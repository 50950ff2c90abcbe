"""Safetensors files: a strict, lazy reader and a streaming writer. The format is that of safetensors 0.8."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from loratool.core.errors import FormatError, LoratoolError
from loratool.core.tensor import CHUNK, DTYPES, SERIAL_ORDER, LazyTensor
from loratool.files.header import DOWNLOAD, LENGTH, METADATA, Scan, scan
from loratool.files.header import short as _short
from loratool.files.kinds import HEAD, MAX_HEADER, PICKLED, TAIL, ZIP, Kind, kind_of

MODEL_HASH = "sshs_model_hash"
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""The hash of nothing, which a broken writer stores as that of its data."""

LEGACY_HASH = "sshs_legacy_hash"

_LENGTH = LENGTH
_ALIGNED, _PAGE = 8, 4096
# Pieces below this are gathered, so that a thousand alphas are one write and one step of the hash.
_GATHER = 1 << 20
# sd-scripts' legacy hash covers this stretch of the file.
_LEGACY_START, _LEGACY_STOP = 0x100000, 0x110000


class Header(NamedTuple):
    """What stands before the data: `tensors` in header order, `metadata` (empty when there is none).

    `header_bytes` is where the data begin (the 8 bytes of the length included), `size_bytes` the size of the file.
    """

    tensors: dict[str, LazyTensor]
    metadata: dict[str, str]
    header_bytes: int
    size_bytes: int


# ---------------------------------------------------------------- reading


def read_header(path: str | os.PathLike[str]) -> Header:
    """Opens a safetensors file and checks its header; the tensors stay on the disk.

    All tensors share one file descriptor, closed when the last of them is gone. As strict as safetensors, and
    stricter: duplicate keys, unknown fields and white space in front are refused too. Raises FormatError, which
    names the file and says what it is instead.
    """
    try:
        return _read_header(path)
    except LoratoolError as error:
        raise error.with_file(path) from error.__cause__


def _read_header(path: str | os.PathLike[str]) -> Header:
    file = OpenFile(os.fspath(path))
    length = _header_length(file)
    begin = _LENGTH + length
    found = scan(file.pread(length, _LENGTH), file.size - begin)
    if found.first is not None:
        raise FormatError(found.first.message, key=found.first.key, hint=found.first.hint)
    return Header(_tensors(found, file, begin), found.metadata, begin, file.size)


def check_quick(path: str | os.PathLike[str], header_bytes: int, tensors: int) -> None:
    """Raises FormatError for a file whose header is too large to be read at once: in bytes, or in tensors.

    What is no safetensors file passes: reading it will say so.
    """
    file = OpenFile(os.fspath(path))
    kind, length = announced(file)
    if kind is not None or length > file.size - _LENGTH:
        return
    hint = "`loratool validate` looks at files of any size"
    if length > header_bytes:
        raise FormatError(f"has a header of {length:,} bytes, at most {header_bytes:,} are shown", hint=hint)
    # The shortest entry there can be takes 48 bytes of it.
    count = file.pread(length, _LENGTH).count(b'"data_offsets"') if length > 48 * tensors else 0
    if count > tensors:
        raise FormatError(f"holds {count:,} tensors, at most {tensors:,} are shown", hint=hint)


class OpenFile:
    """An open regular file. The descriptor `fd` lives as long as somebody refers to this object."""

    __slots__ = ("__weakref__", "_lock", "fd", "identity", "path", "size")

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.path = path
        self._lock = threading.Lock()
        try:
            # Looked at before it is opened: opening a FIFO can wait forever, opening a device can move a tape.
            _check_regular(os.stat(path).st_mode, path)
            self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            found = os.fstat(self.fd)
        except FileNotFoundError:
            raise FormatError("there is no such file", file=path) from None
        except OSError as error:
            raise FormatError(f"cannot be opened: {error.strerror}", file=path) from error
        except ValueError as error:
            raise FormatError(f"is not a file name: {error}", file=path) from error
        _check_regular(found.st_mode, path)
        self.size = found.st_size
        self.identity = found.st_dev, found.st_ino

    def pread(self, size: int, offset: int) -> bytes:
        """`size` bytes at `offset`. Raises FormatError when the file has become shorter."""
        data = self._pread(size, offset)
        if len(data) == size:
            return data
        buffer = bytearray(size)
        self.readinto(memoryview(buffer), offset)
        return bytes(buffer)

    def readinto(self, view: memoryview, offset: int) -> None:
        """Fills `view` from `offset` on. Raises FormatError when the file has become shorter."""
        done = 0
        while done < view.nbytes:
            count = self._fill(view[done : done + CHUNK], offset + done)
            if not count:
                raise FormatError(
                    f"became shorter while it was read: no data at byte {offset + done}, expected {self.size} bytes",
                    file=self.path,
                    hint="something else is writing to the file",
                )
            done += count

    def _fill(self, view: memoryview, offset: int) -> int:
        if sys.platform == "linux":
            try:
                return os.preadv(self.fd, [view], offset)
            except OSError as error:
                raise self._unreadable(error) from error
        data = self._pread(view.nbytes, offset)
        view[: len(data)] = data
        return len(data)

    def _pread(self, size: int, offset: int) -> bytes:
        try:
            if sys.platform != "win32":
                return os.pread(self.fd, size, offset)
            with self._lock:
                os.lseek(self.fd, offset, os.SEEK_SET)
                return os.read(self.fd, size)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> FormatError:
        return FormatError(f"cannot be read: {error.strerror}", file=self.path)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class FileRange:
    """A stretch of an open file: `nbytes` from `start` on."""

    __slots__ = ("file", "nbytes", "start")

    def __init__(self, file: OpenFile, start: int, nbytes: int) -> None:
        self.file = file
        self.start = start
        self.nbytes = nbytes

    def chunks(self, size: int = CHUNK) -> Iterator[memoryview]:
        """The bytes in pieces of `size`, each in memory of its own."""
        stop = self.start + self.nbytes
        for position in range(self.start, stop, size):
            yield memoryview(self.file.pread(min(size, stop - position), position))

    def read(self) -> memoryview:
        """All bytes, in new memory that nobody else writes to or reads."""
        view = memoryview(bytearray(self.nbytes))
        self.file.readinto(view, self.start)
        return view

    def slice(self, start: int, stop: int) -> FileRange:
        """The bytes `start:stop`, lazily."""
        return FileRange(self.file, self.start + start, stop - start)


def _check_regular(mode: int, path: str) -> None:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    if not stat.S_ISREG(mode):
        kind = kinds.get(stat.S_IFMT(mode), "something else")
        raise FormatError(f"is {kind}, expected a safetensors file", file=path, hint="name a file on disk")


def announced(file: OpenFile) -> tuple[Kind | None, int]:
    """What a file is by its bytes, None if it begins like safetensors; and the length of the header it announces."""
    head = file.pread(min(file.size, HEAD), 0)
    tail = b""
    if head.startswith(ZIP):
        size = min(file.size, TAIL)
        tail = file.pread(size, file.size - size)
    return kind_of(head, file.size, tail), int.from_bytes(head[:_LENGTH], "little")


def is_pickle(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a PyTorch file or another pickle, by its bytes.

    Raises FormatError for what is no regular file or cannot be opened.
    """
    return announced(OpenFile(os.fspath(path)))[0] in PICKLED


def _header_length(file: OpenFile) -> int:
    """The length of the JSON, checked. Raises FormatError that says what the file is if not safetensors."""
    kind, length = announced(file)
    if kind is not None:
        raise FormatError(f"is not a safetensors file: {kind.what}", hint=kind.hint)
    if length > file.size - _LENGTH:
        missing = length + _LENGTH - file.size
        raise FormatError(
            f"is truncated inside the header: the header has {length} bytes, {missing} of them missing", hint=DOWNLOAD
        )
    return length


def _tensors(found: Scan, file: OpenFile, begin: int) -> dict[str, LazyTensor]:
    return {
        name: LazyTensor(shape, dtype, FileRange(file, begin + start, stop - start))
        for name, (dtype, shape, start, stop, _) in found.entries.items()
    }


# ---------------------------------------------------------------- writing


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None,
    *,
    hashes: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a file with the very bytes that safetensors would write, piece by piece: memory stays at some 50 MiB.

    Tensors come in the serialiser's order (widest dtype first, then by name), metadata in the given order; no
    metadata, or none in it, leaves `__metadata__` out. `hashes` puts true `sshs_model_hash` and `sshs_legacy_hash`
    into the metadata, as sd-scripts defines them. `progress(done, total)` counts bytes of data.

    Writes straight to `path` and replaces what it holds; `files.atomic` makes that safe. Raises LoratoolError
    before anything is written for what the format cannot hold and for tensors that live in `path` itself.
    """
    ordered = _in_order(tensors)
    entries = _entries_json(ordered)
    final = dict(metadata or {})
    if hashes:
        # Same width as the real ones, which are known when the data have been written.
        final |= {MODEL_HASH: "0" * 64, LEGACY_HASH: "0" * 8}
    header = _header_json(entries, final or None)
    training = {name: value for name, value in final.items() if name.startswith("ss_")}
    digest = _Hashes(_header_json(entries, training)) if hashes else None
    total = sum(tensor.nbytes for tensor in ordered.values())
    try:
        with _Output(path, ordered) as output:
            output.write(header)
            done = 0
            for piece in _gathered(ordered):
                if digest is not None:
                    digest.update(piece)
                output.write(piece)
                done += piece.nbytes
                if progress is not None:
                    progress(done, total)
            if digest is not None:
                final[MODEL_HASH], final[LEGACY_HASH] = digest.finish()
                output.restart()
                output.write(_header_json(entries, final))
    except OSError as error:
        raise LoratoolError(f"cannot be written: {error.strerror}", file=os.fspath(path)) from error
    finally:
        if digest is not None:
            digest.close()


def file_size(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None) -> int:
    """Bytes of the file that `write_safetensors` would write. Nothing is read or computed."""
    header = _header_json(_entries_json(_in_order(tensors)), dict(metadata or {}) or None)
    return len(header) + sum(tensor.nbytes for tensor in tensors.values())


def _in_order(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """As the serialiser sorts them."""
    return dict(sorted(tensors.items(), key=lambda item: (SERIAL_ORDER.get(item[1].dtype, 0), item[0])))


def _entries_json(ordered: Mapping[str, LazyTensor]) -> str:
    """The tensors' part of the header, without the braces. Refuses what the format cannot hold."""
    parts: list[str] = []
    position = 0
    for name, tensor in ordered.items():
        if name == METADATA:
            raise LoratoolError(f"a tensor cannot be called {METADATA}", hint="rename it")
        bits = math.prod(tensor.shape) * DTYPES.get(tensor.dtype, 0)
        if tensor.dtype not in DTYPES:
            raise LoratoolError(f"has dtype {tensor.dtype}, which safetensors does not know", key=name)
        if bits != tensor.nbytes * 8:
            raise LoratoolError(
                f"has {tensor.nbytes} bytes, but {tensor.dtype} {list(tensor.shape)} takes {bits} bits", key=name
            )
        parts.append(_entry_json(name, tensor.dtype, tensor.shape, position))
        position += tensor.nbytes
    return ",".join(parts)


def _entry_json(name: str, dtype: str, shape: Sequence[int], start: int) -> str:
    stop = start + math.prod(shape) * DTYPES[dtype] // 8
    sizes = ",".join(map(str, shape))
    return f'{_quoted(name)}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{start},{stop}]}}'


def header_bytes(
    entries: Mapping[str, tuple[str, Sequence[int], int]],
    metadata: Mapping[str, str],
    beside: int | None = None,
    least: int = 0,
) -> bytes:
    """Length and header of a file whose tensors (name -> dtype, shape, first byte in the data) have any order.

    With `beside`, the first byte of the data of another file, these begin at the same place within a page: bytes are
    copied from there in as little as three fifths of the time. As long as `least`, if that was the length of another
    header beside the same file. Raises LoratoolError for what the format cannot hold.
    """
    text = ",".join(_entry_json(name, *entry) for name, entry in entries.items())
    step, after = (_ALIGNED, _LENGTH) if beside is None or beside % _ALIGNED else (_PAGE, beside)
    return _header_json(text, dict(metadata) or None, step, max(after, least))


def _header_json(
    entries: str, metadata: Mapping[str, str] | None, step: int = _ALIGNED, beside: int = _LENGTH
) -> bytes:
    """Length and header as they stand in the file; `metadata` None leaves `__metadata__` out, `{}` does not.

    They end at `beside`, or so many times `step` behind it.
    """
    parts = [entries] if entries else []
    if metadata is not None:
        pairs = ",".join(f"{_quoted(name)}:{_quoted(value)}" for name, value in metadata.items())
        parts.insert(0, f'"{METADATA}":{{{pairs}}}')
    text = f"{{{','.join(parts)}}}".encode()
    missing = beside - _LENGTH - len(text)
    text += b" " * (missing if missing > 0 else missing % step)
    if len(text) > MAX_HEADER:
        raise LoratoolError(
            f"the header would have {len(text)} bytes, at most {MAX_HEADER} are allowed", hint="drop metadata"
        )
    return len(text).to_bytes(_LENGTH, "little") + text


def _quoted(text: str) -> str:
    if type(text) is not str:
        raise LoratoolError(f"{_short(text)} in the header is not text", hint="use str(value)")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LoratoolError(f"{_short(text)} is not valid Unicode text") from error
    # The same escapes as serde_json's: quote, backslash and control characters, everything else as it is.
    return json.dumps(text, ensure_ascii=False)


def _gathered(ordered: Mapping[str, LazyTensor]) -> Iterator[memoryview]:
    """All data in order: large pieces as they are, small ones gathered."""
    # Copied, not kept as views: the view of a small end keeps a large computed tensor alive.
    small = bytearray()
    for name, tensor in ordered.items():
        written = 0
        for piece in tensor.source.chunks(CHUNK):
            written += piece.nbytes
            if piece.nbytes < _GATHER:
                small += piece
            if len(small) >= _GATHER or (small and piece.nbytes >= _GATHER):
                yield memoryview(small)
                small = bytearray()
            if piece.nbytes >= _GATHER:
                yield piece
        if written != tensor.nbytes:
            raise LoratoolError(f"gave {written} bytes, expected {tensor.nbytes}", key=name)
    if small:
        yield memoryview(small)


class _Output:
    """A file to write to."""

    def __init__(self, path: str | os.PathLike[str], tensors: Mapping[str, LazyTensor]) -> None:
        self._path = os.fspath(path)
        self._inputs = {t.source.file.identity for t in tensors.values() if isinstance(t.source, FileRange)}

    def __enter__(self) -> _Output:
        # Not truncated at once: the file might be where the tensors are.
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        self._fd = os.open(self._path, flags, 0o666)
        found = os.fstat(self._fd)
        problem = None
        if not stat.S_ISREG(found.st_mode):
            problem = "the output is not a regular file"
        elif (found.st_dev, found.st_ino) in self._inputs:
            problem = "the output is an input"
        if problem is not None:
            os.close(self._fd)
            raise LoratoolError(problem, file=self._path, hint="choose another output")
        os.ftruncate(self._fd, 0)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def write(self, data: memoryview | bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def restart(self) -> None:
        """The next write replaces the beginning of the file."""
        os.lseek(self._fd, 0, os.SEEK_SET)


class _Hashes:
    """sd-scripts' two hashes of the data, computed in a thread beside the writing.

    sd-scripts serialises the tensors with only the `ss_*` metadata and hashes that: `sshs_model_hash` everything
    behind the header, `sshs_legacy_hash` the bytes 0x100000:0x110000. `header` is the header of that file.
    """

    def __init__(self, header: bytes) -> None:
        # Here, not above: most of what opens a file never hashes one.
        import hashlib
        import queue

        self._model = hashlib.sha256()
        self._legacy = hashlib.sha256(header[_LEGACY_START:_LEGACY_STOP])
        self._position = len(header)
        # Bounded: a disk faster than the hash must not pile up the file in memory.
        self._queue: queue.Queue[memoryview | None] = queue.Queue(maxsize=4)
        self._thread = threading.Thread(target=self._run, name="loratool-sha256", daemon=True)
        self._thread.start()

    def update(self, piece: memoryview) -> None:
        """Adds the next bytes of data."""
        first, last = _LEGACY_START - self._position, _LEGACY_STOP - self._position
        if first < piece.nbytes and last > 0:
            self._legacy.update(piece[max(first, 0) : last])
        self._position += piece.nbytes
        self._queue.put(piece)

    def finish(self) -> tuple[str, str]:
        """Both hashes: 64 and 8 hexadecimal digits."""
        self.close()
        return self._model.hexdigest(), self._legacy.hexdigest()[:8]

    def close(self) -> None:
        """Ends the thread, whatever happened; may be called twice."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (piece := self._queue.get()) is not None:
            self._model.update(piece)
