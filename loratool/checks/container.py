"""The container: everything that the format forbids, and what programs read in different ways."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.checks._zeros import zero_tail
from loratool.core.finding import ERROR, NOTE, WARNING, Check, Code, Finding, codes
from loratool.core.tensor import DTYPES
from loratool.files.header import DAMAGED, DOWNLOAD, LENGTH, METADATA
from loratool.files.look import File

_ALIGNMENT = 8
HIDDEN = 5
"""So many names with hidden characters are told one by one."""

LARGE_METADATA = 16 << 20
"""Bytes of metadata past which programs get slow or fail."""

MANY_ENTRIES = 10_000

_RESAVE = "load it and save it again with safetensors"

_CODES = codes(
    Code("too-short", ERROR, "The file is shorter than the 8 bytes of a header's length.", DOWNLOAD),
    Code("header-length", ERROR, "The length of the header is 0 or beyond the 100 MB of the format.", DAMAGED),
    Code("header-cut", ERROR, "The file ends inside its header.", DOWNLOAD),
    Code("header-start", ERROR, "The header does not begin with `{`.", DAMAGED),
    Code("bom", ERROR, "The header begins with a byte order mark.", DAMAGED),
    Code("not-utf8", ERROR, "The header is not UTF-8 text.", DAMAGED),
    Code("nul-byte", ERROR, "The header holds a NUL byte.", DAMAGED),
    Code("not-json", ERROR, "The header is not JSON.", DAMAGED),
    Code("too-deep", ERROR, "The header is nested more than 32 levels deep.", DAMAGED),
    Code("too-many-values", ERROR, "One entry of the header holds more than 20,000 values.", DAMAGED),
    Code("huge-number", ERROR, "The header holds a whole number of more than 64 bits.", DAMAGED),
    Code("duplicate-key", ERROR, "A tensor stands twice in the header: programs read different ones.", DAMAGED),
    Code("duplicate-field", ERROR, "A field, or an entry of the metadata, stands twice.", DAMAGED),
    Code("unknown-field", ERROR, "A tensor has fields beyond dtype, shape and data_offsets.", DAMAGED),
    Code("bad-entry", ERROR, "What should describe a tensor does not.", DAMAGED),
    Code("bad-dtype", ERROR, "A tensor has a dtype that the format does not know."),
    Code("bad-shape", ERROR, "A size is negative, a fraction, true or false, a text or beyond 64 bits.", DAMAGED),
    Code("shape-overflow", ERROR, "A shape has more bits than fit 64 bits.", DAMAGED),
    Code("bad-offsets", ERROR, "data_offsets are not two numbers, the first not above the second.", DAMAGED),
    Code("size-mismatch", ERROR, "The bytes of a tensor are not what its dtype and shape take.", DAMAGED),
    Code("hole", ERROR, "Bytes between tensors belong to none.", DAMAGED),
    Code("overlap", ERROR, "Two tensors share bytes.", DAMAGED),
    Code("truncated", ERROR, "The file ends before its data do.", DOWNLOAD),
    Code("trailing-bytes", ERROR, "Bytes follow the last tensor: the file may be two files in one.", DAMAGED),
    Code("metadata-not-text", ERROR, "The metadata hold something that is no text.", "the writer must use str(value)"),
    Code("misaligned", WARNING, "Data begin where no number of their dtype may begin in memory.", _RESAVE),
    Code("unsorted", NOTE, "The header names tensors in another order than they have in the data."),
    Code("hidden-characters", WARNING, "A name holds control, bidi or invisible characters."),
    Code("metadata-large", WARNING, "More than 16 MiB or 10,000 entries of metadata.", "convert it with fewer"),
    Code(
        "zero-tail", WARNING, "The data end in zeros that begin inside a tensor: a download that broke off?", DOWNLOAD
    ),
)


def _run(file: File) -> Iterator[Finding]:
    if file.kind is not None:
        if file.kind.id in _CODES:
            message = f"is not a safetensors file: {file.kind.what}"
            yield CHECK.finding(file.kind.id, message, file.path, byte=0, hint=file.kind.hint)
        return
    if file.scan is None:
        message = f"is truncated inside the header: the header has {file.length} bytes, {file.cut} of them missing"
        yield CHECK.finding("header-cut", message, file.path, byte=file.handle.size)
        return
    for fault in file.scan.faults:
        yield CHECK.finding(fault.code, fault.message, file.path, key=fault.key, byte=fault.byte, hint=fault.hint)
    if file.scan.more:
        last = file.scan.faults[-1]
        message = f"{file.scan.more} more faults of the header are not listed"
        yield CHECK.finding(last.code, message, file.path, byte=last.byte)
    yield from _order(file)
    yield from _names(file)
    yield from _metadata(file)
    if file.sound:
        tail = zero_tail(file)
        if tail is not None:
            start, key = tail
            message = f"its last {file.handle.size - start} bytes are zero, from inside a tensor on"
            yield CHECK.finding("zero-tail", message, file.path, key=key, byte=start)


def _order(file: File) -> Iterator[Finding]:
    """Where the data are not as safetensors writes them."""
    assert file.scan is not None
    if file.begin % _ALIGNMENT and file.scan.entries:
        message = f"the data begin at byte {file.begin}, expected a multiple of {_ALIGNMENT}"
        yield CHECK.finding("misaligned", message, file.path, byte=LENGTH)
    odd = [
        (key, entry)
        for key, entry in file.scan.entries.items()
        if entry.start % max(DTYPES[entry.dtype] // 8, 1) and entry.stop > entry.start
    ]
    if odd:
        key, entry = odd[0]
        more = f", and {len(odd) - 1} more" if len(odd) > 1 else ""
        message = f"begins at byte {entry.start} of the data, no multiple of its numbers' size{more}"
        yield CHECK.finding("misaligned", message, file.path, key=key, byte=entry.byte)
    position = 0
    for key, entry in file.scan.entries.items():
        if entry.start < position and file.sound:
            message = "stands behind tensors whose data come later"
            yield CHECK.finding("unsorted", message, file.path, key=key, byte=entry.byte)
            return
        position = entry.start


def _names(file: File) -> Iterator[Finding]:
    assert file.scan is not None
    odd = [key for key in file.scan.entries if not key.isprintable()]
    for key in odd[:HIDDEN]:
        entry = file.scan.entries[key]
        yield CHECK.finding(
            "hidden-characters", "the name is not what it looks like", file.path, key=key, byte=entry.byte
        )
    if len(odd) > HIDDEN:
        message = f"{len(odd) - HIDDEN} more names hold hidden characters"
        yield CHECK.finding("hidden-characters", message, file.path)


def _metadata(file: File) -> Iterator[Finding]:
    assert file.scan is not None
    size = sum(len(name.encode()) + len(value.encode()) for name, value in file.scan.metadata.items())
    if size > LARGE_METADATA or len(file.scan.metadata) > MANY_ENTRIES:
        message = f"{len(file.scan.metadata):,} entries with {size:,} bytes"
        yield CHECK.finding("metadata-large", message, file.path, key=METADATA, byte=LENGTH)


CHECK = Check("container", "The container", "file", _CODES, _run)
