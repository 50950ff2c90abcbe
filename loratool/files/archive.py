"""Archive: the zip file in which PyTorch keeps a pickle and its storages. Records are stretches of the file.

A reader of its own, because zip readers differ in what they believe: here the central directory, the local headers and
the file's size must all tell the same. Nothing is ever unpacked: a compressed record is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from loratool.core.errors import FormatError
from loratool.files.kinds import ZIP
from loratool.files.safetensors import FileRange, OpenFile

MAX_RECORDS = 40_000
"""One for every storage: more than the opcodes of a pickle can ask for."""

MAX_DIRECTORY = 16 << 20


_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTOR, _UTF8 = 1 << 3, 1 << 11
# What may stand behind a record's data: nothing, or its checksum and sizes once more, of 4 or 8 bytes each.
_BEHIND = {False: (0,), True: (0, 12, 16, 20, 24)}
_ZIP64 = 1
_DAMAGED = "the file is damaged, or made to be read in two ways: do not use it"
_DOWNLOAD = "the download or copy is incomplete: fetch the file again"


@dataclass(frozen=True)
class _Entry:
    """One entry of the central directory."""

    name: bytes
    flags: int
    crc: int
    nbytes: int
    start: int


def read_archive(file: OpenFile) -> dict[str, FileRange]:
    """The records of a zip file by name, in the order of the data.

    Raises FormatError for records that are compressed, encrypted, named twice or overlap, for bytes that belong to
    nothing, and wherever two places of the file tell different things.
    """
    begin, stop, count = _directory(file)
    entries = sorted(_entries(file.pread(stop - begin, begin), count), key=lambda entry: entry.start)
    records: dict[str, FileRange] = {}
    position, gaps = 0, _BEHIND[False]
    for entry in entries:
        name = _text(entry.name)
        if name in records:
            raise FormatError("stands twice in the zip archive", key=name, hint=_DAMAGED)
        if entry.start - position not in gaps:
            raise _gap(position, entry.start, name)
        data = _data_start(file, entry, name, begin)
        position, gaps = data + entry.nbytes, _BEHIND[bool(entry.flags & _DESCRIPTOR)]
        if position > begin:
            raise FormatError(
                f"ends at byte {position}, behind the last record's end at {begin}", key=name, hint=_DAMAGED
            )
        records[name] = FileRange(file, data, entry.nbytes)
    if begin - position not in gaps:
        raise _gap(position, begin, "the zip archive's directory")
    return records


def _gap(position: int, start: int, name: str) -> FormatError:
    what = "overlaps the record before it" if start < position else "has bytes before it that belong to nothing"
    return FormatError(f"{what}: begins at {start}, expected {position}", key=name, hint=_DAMAGED)


def _directory(file: OpenFile) -> tuple[int, int, int]:
    """First byte of the central directory, the byte behind it, and its number of entries."""
    at = file.size - _END.size
    if at < 0:
        raise FormatError("is a zip archive that is cut off", hint=_DOWNLOAD)
    magic, disk, first_disk, here, count, nbytes, begin, comment = _END.unpack(file.pread(_END.size, at))
    if magic != b"PK\x05\x06" or comment:
        raise FormatError("is a zip archive without its end: it is cut off, or something follows it", hint=_DOWNLOAD)
    stop = at
    wide = _wide_end(file, at)
    if wide is not None:
        stop = at - _LOCATOR.size - _END64.size
        told = zip((here, count, nbytes, begin), wide, (_FULL16, _FULL16, _FULL32, _FULL32))
        if any(value not in (one, full) for value, one, full in told):
            raise FormatError("has two ends that tell different things (zip64)", hint=_DAMAGED)
        here, count, nbytes, begin = wide
    if disk or first_disk or here != count:
        raise FormatError("is one part of a zip archive in several", hint="join the parts first")
    if count > MAX_RECORDS or nbytes > MAX_DIRECTORY:
        raise FormatError(
            f"is a zip archive of {count} records (directory: {nbytes} bytes), expected at most {MAX_RECORDS}",
            hint=_DAMAGED,
        )
    if begin + nbytes != stop:
        raise FormatError(f"has a zip directory at {begin} of {nbytes} bytes, expected to end at {stop}", hint=_DAMAGED)
    return begin, stop, count


def _wide_end(file: OpenFile, at: int) -> tuple[int, int, int, int] | None:
    """Both counts, size and place of the directory by the end record of zip64; None if there is none."""
    at -= _LOCATOR.size
    if at < 0:
        return None
    magic, disk, place, disks = _LOCATOR.unpack(file.pread(_LOCATOR.size, at))
    if magic != b"PK\x06\x07":
        return None
    if disk or disks > 1 or place != at - _END64.size:
        raise FormatError(f"has its zip64 end at {place}, expected {at - _END64.size}", hint=_DAMAGED)
    magic, size, _, _, disk, first, here, count, nbytes, begin = _END64.unpack(file.pread(_END64.size, place))
    if magic != b"PK\x06\x06" or size != _END64.size - 12 or disk or first:
        raise FormatError("has a broken zip64 end", hint=_DAMAGED)
    return here, count, nbytes, begin


def _entries(directory: bytes, count: int) -> Iterator[_Entry]:
    position = 0
    for number in range(count):
        if position + _CENTRAL.size > len(directory):
            raise FormatError(f"has {number} entries in its zip directory, expected {count}", hint=_DAMAGED)
        fields = _CENTRAL.unpack_from(directory, position)
        magic, _, _, flags, method, _, _, crc, packed, nbytes, named, extra, comment, disk, _, _, start = fields
        position += _CENTRAL.size
        name = directory[position : position + named]
        more = directory[position + named : position + named + extra]
        position += named + extra + comment
        if magic != b"PK\x01\x02" or disk or comment or position > len(directory):
            raise FormatError(f"has a broken entry {number} in its zip directory", hint=_DAMAGED)
        if flags & ~(_DESCRIPTOR | _UTF8):
            raise FormatError("is encrypted, or zipped in a way that PyTorch never does", key=_text(name))
        if method:
            raise FormatError(
                f"is compressed (method {method}), which PyTorch never does",
                key=_text(name),
                hint="it may be a zip bomb; if you trust the file, unpack it and zip it again with `zip -0 -r`",
            )
        nbytes, packed, start = _widened((nbytes, packed, start), more, _text(name))
        if nbytes != packed:
            raise FormatError(f"has {packed} bytes and unpacks to {nbytes}", key=_text(name), hint=_DAMAGED)
        yield _Entry(name, flags, crc, nbytes, start)
    if position != len(directory):
        raise FormatError(f"has {len(directory) - position} bytes behind its zip directory", hint=_DAMAGED)


def _widened(values: tuple[int, ...], extra: bytes, name: str) -> list[int]:
    """The values, those that do not fit 32 bits from the extra field of zip64, which must hold just them."""
    wide = _zip64(extra, name)
    lacking = [value == _FULL32 for value in values]
    if len(wide) != sum(lacking):
        raise FormatError(f"has {len(wide)} sizes in its zip64 field, expected {sum(lacking)}", key=name, hint=_DAMAGED)
    rest = iter(wide)
    return [next(rest) if lacks else value for value, lacks in zip(values, lacking)]


def _zip64(extra: bytes, name: str) -> tuple[int, ...]:
    """The numbers in the extra field of zip64; none without one."""
    found: tuple[int, ...] | None = None
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        at += 4 + size
        if at > len(extra):
            raise FormatError("has an extra field that is cut off", key=name, hint=_DAMAGED)
        if kind == _ZIP64:
            if found is not None or size % 8:
                raise FormatError("has a broken zip64 field", key=name, hint=_DAMAGED)
            found = struct.unpack_from(f"<{size // 8}Q", extra, at - size)
    return found or ()


def _data_start(file: OpenFile, entry: _Entry, name: str, limit: int) -> int:
    """Where a record's data begin. Its local header must tell what the directory tells."""
    head = entry.start + _LOCAL.size + len(entry.name)
    if head > limit:
        raise FormatError(f"begins at byte {entry.start}, in the zip directory at {limit}", key=name, hint=_DAMAGED)
    raw = file.pread(head - entry.start, entry.start)
    magic, _, flags, method, _, _, crc, packed, nbytes, named, extra = _LOCAL.unpack_from(raw)
    if magic != ZIP or named != len(entry.name) or raw[_LOCAL.size :] != entry.name:
        raise FormatError("has another name in its local header, or none", key=name, hint=_DAMAGED)
    if method or flags & ~_UTF8 != entry.flags & ~_UTF8 or head + extra > limit:
        raise FormatError("has a local header that tells other things than the directory", key=name, hint=_DAMAGED)
    sizes = [packed, nbytes]
    if _FULL32 in sizes and entry.nbytes != _FULL32:
        sizes = [*(size for size in sizes if size != _FULL32), *_zip64(file.pread(extra, head), name)]
    later = (0,) if flags & _DESCRIPTOR else ()  # told behind the data
    if any(size not in (entry.nbytes, *later) for size in sizes) or crc not in (entry.crc, *later):
        raise FormatError(
            f"has sizes {sizes} in its local header, {entry.nbytes} in the directory", key=name, hint=_DAMAGED
        )
    return head + int(extra)


def _text(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"has a record with the name {name[:80]!r}, which is not UTF-8", hint=_DAMAGED) from None
