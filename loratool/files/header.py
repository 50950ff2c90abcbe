"""The JSON header of a safetensors file: a strict reader that goes on behind a fault and says at which byte it is.

It reads bytes, one string at a time, and never builds more of a value than is needed: a header of 100 MB takes no more
memory than its bytes and what it names. Stricter than safetensors: duplicate keys, unknown fields, structs spelled as
arrays and products of sizes that overflow as bits are faults. Where it finds none, safetensors finds none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from loratool.core.tensor import DTYPES

METADATA = "__metadata__"
LENGTH = 8
"""Bytes of the header's length; what is behind them is the header."""

DAMAGED = "the file is damaged or was written by a broken tool"
DOWNLOAD = "the download or copy is incomplete: fetch the file again"

MOST_FAULTS = 1000
"""So many faults are kept, the others are counted."""

MAX_U64 = (1 << 64) - 1
_DEEPEST = 32
_MOST_VALUES = 20_000
_SPELLED = 4096
"""So many spellings of dtype and shape are remembered."""

_FIELDS = ("dtype", "shape", "data_offsets")

FIRST = ("not-utf8", "nul-byte", "too-deep", "not-json", "duplicate-key", "duplicate-field")
"""What is told first where only one fault is told: the others may follow from it."""

LAST = "huge-number"
"""What is told last: where it matters, another fault names the field."""


class Fault(NamedTuple):
    """One thing that the format forbids: `byte` counts from the beginning of the file."""

    code: str
    byte: int
    message: str
    key: str | None = None
    hint: str = DAMAGED


class Entry(NamedTuple):
    """What the header says of one tensor. `start` and `stop` count from the first byte of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    byte: int


@dataclass
class Scan:
    """What a header says, and what is wrong with it. Of a key that stands twice, the first entry is kept."""

    entries: dict[str, Entry] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    more: int = 0

    def fault(self, code: str, byte: int, message: str, key: str | None = None, hint: str = DAMAGED) -> None:
        """Notes a fault."""
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(Fault(code, byte, message, key, hint))
        else:
            self.more += 1

    @property
    def first(self) -> Fault | None:
        """The one to tell where only one is told."""
        order = {code: rank for rank, code in enumerate(FIRST)} | {LAST: len(FIRST) + 1}
        return min(self.faults, key=lambda fault: order.get(fault.code, len(FIRST)), default=None)


class _Broken(Exception):
    """The text ends to be JSON here; nothing behind it can be read."""

    def __init__(self, code: str, at: int, message: str) -> None:
        super().__init__(message)
        self.code, self.at, self.message = code, at, message


def scan(raw: bytes, data: int | None) -> Scan:
    """Everything that the header `raw` (without its length) says; `data` bytes follow it, None if that is not known."""
    found = Scan()
    try:
        _Reader(raw, found).header()
    except _Broken as broken:
        found.fault(broken.code, LENGTH + broken.at, broken.message)
    else:
        if data is not None and not found.faults:
            cover(found, data, LENGTH + len(raw))
    return found


def cover(found: Scan, data: int, begin: int) -> None:
    """Notes where the tensors do not cover the `data` bytes from `begin` on exactly once."""
    spans = sorted((entry.start, entry.stop, name) for name, entry in found.entries.items())
    position = 0
    for start, stop, name in spans:
        if start != position:
            code, what = ("hole", "unused bytes before it") if start > position else ("overlap", "overlaps another")
            what += "" if start > position else " tensor"
            found.fault(code, found.entries[name].byte, f"{what}: begins at {start}, expected {position}", name)
        position = max(position, stop)
    if position > data:
        found.fault("truncated", LENGTH, f"is truncated: {data} bytes of data, expected {position}", None, DOWNLOAD)
    elif position < data:
        message = f"{data - position} bytes follow the last tensor, expected none"
        found.fault("trailing-bytes", begin + position, message)


_N = rb"(?:0|[1-9][0-9]{0,19})"
_PLAIN = rb'"([^"\\\x00-\x1f]*)"'
_ENTRY = re.compile(
    _PLAIN + rb': ?\{"dtype": ?"([A-Z0-9_]{1,20})", ?"shape": ?\[((?:' + _N + rb"(?:, ?" + _N + rb"){0,7})?)\], ?"
    rb'"data_offsets": ?\[(' + _N + rb"), ?(" + _N + rb')\]\}, ?(?=")'
)
"""A tensor as all writers spell it, with another member behind it: read in one step."""

_PAIR = re.compile(_PLAIN + rb": ?" + _PLAIN + rb', ?(?=")')
_SPACE = re.compile(rb"[ \t\n\r]*")
_TEXT = re.compile(rb'[^"\\\x00-\x1f]*(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*){0,1000}')
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WORD = re.compile(rb"true|false|null|-?Infinity|NaN")
_WHOLE = re.compile(rb"0|[1-9][0-9]{0,19}")


class _Value(NamedTuple):
    """A value: what kind it is (`{`, `[`, `"`, `0` for numbers, `w` for words), and where it stands."""

    kind: str
    start: int
    stop: int
    content: Any = None


def _times(bits: int, shape: Sequence[int]) -> int | None:
    """Bits of a tensor, from those of an element; None for more than fit 64 bits."""
    for size in shape:
        bits *= size
        # Step by step: a zero later does not undo an overflow.
        if bits > MAX_U64 or size > MAX_U64:
            return None
    return bits


class _Reader:
    """Goes through the bytes of one header."""

    def __init__(self, raw: bytes, found: Scan) -> None:
        self.raw, self.found = raw, found
        self.at = 0
        self.values = 0
        self.lost: set[str] = set()  # keys whose entry is no good
        self.spelled: dict[tuple[bytes, bytes], tuple[str, tuple[int, ...], int | None]] = {}

    # -- what a header holds

    def header(self) -> None:
        """The whole of it."""
        if self.next_byte() != b"{":
            self.not_json("the header is not a JSON object")
        seen_metadata = False
        for key, byte in self.members(self.entries):
            if key == METADATA:
                if seen_metadata:
                    self.fault("duplicate-key", byte, "stands twice in the header", key)
                seen_metadata = True
                self.metadata()
                continue
            value = self.value(1)
            entry = self.checked(key, byte, value)
            self.note(key, byte, entry)
        if self.next_byte():
            self.not_json("text behind the end of the JSON")

    def members(self, quick: Callable[[], None] | None = None) -> Iterator[tuple[str, int]]:
        """Key and its byte of each member of the object that begins here; the value is left to the caller. `quick`
        reads what it can in one step each; those members are not given."""
        self.at += 1
        if self.next_byte() == b"}":
            self.at += 1
            return
        while True:
            if quick is not None:
                quick()
            if self.next_byte() != b'"':
                self.not_json("a name in quotes is expected")
            byte = self.at
            key = self.string()
            if self.next_byte() != b":":
                self.not_json("a colon is expected")
            self.at += 1
            self.next_byte()
            yield key, byte
            end = self.next_byte()
            self.at += 1
            if end == b"}":
                return
            if end != b",":
                self.at -= 1
                self.not_json("a comma or the end of the object is expected")
            self.next_byte()

    def entries(self) -> None:
        """Reads tensors that are spelled as usual, up to one that is not, at which something is wrong, or the last."""
        raw, entries, spelled, lost, at = self.raw, self.found.entries, self.spelled, self.lost, self.at
        read = _ENTRY.match
        while (match := read(raw, at)) is not None:
            name, dtype, shape, start, stop = match.groups()
            code, sizes, nbytes = spelled.get((dtype, shape)) or self.sized(dtype, shape)
            begin, end = int(start), int(stop)
            try:
                key = name.decode()
            except UnicodeDecodeError:
                break
            if end - begin != nbytes or end > MAX_U64 or key in entries or key in lost or key == METADATA:
                break
            entries[key] = Entry(code, sizes, begin, end, LENGTH + at)
            at = match.end()
        self.at = at

    def sized(self, dtype: bytes, shape: bytes) -> tuple[str, tuple[int, ...], int | None]:
        """dtype, shape and bytes (None where something is wrong) of a spelling, which most tensors share."""
        code, sizes = dtype.decode(), tuple(map(int, shape.split(b","))) if shape else ()
        bits = _times(DTYPES[code], sizes) if code in DTYPES else None
        if len(self.spelled) >= _SPELLED:
            self.spelled.clear()
        said = self.spelled[dtype, shape] = code, sizes, None if bits is None or bits % 8 else bits // 8
        return said

    def note(self, key: str, byte: int, entry: Entry | None) -> None:
        entries = self.found.entries
        if key in entries or key in self.lost:
            self.fault("duplicate-key", byte, "stands twice in the header", key)
        elif entry is not None:
            entries[key] = entry
        else:
            self.lost.add(key)

    def metadata(self) -> None:
        """The value of `__metadata__`: an object of texts, or null."""
        byte = self.at
        if self.next_byte() != b"{":
            if self.raw[self.at : self.at + 4] == b"null":
                self.at += 4
                return
            self.value(1)
            self.fault("metadata-not-text", byte, "is not a JSON object", METADATA)
            return
        found = self.found.metadata
        for name, byte in self.members(self.pairs):
            if name in found:
                self.fault("duplicate-field", byte, "stands twice in the header", name)
            value = self.value(1)
            if value.kind == '"':
                found.setdefault(name, value.content)
                continue
            message = f"{short(name)} is {self.told(value)}, expected text in quotes"
            self.fault("metadata-not-text", byte, message, METADATA, "the writer must use str(value)")
            found.setdefault(name, "")

    def pairs(self) -> None:
        """Reads entries of the metadata without escapes, up to one with some, a name that stood before, or the last."""
        raw, found, at = self.raw, self.found.metadata, self.at
        while (match := _PAIR.match(raw, at)) is not None:
            try:
                name, text = match[1].decode(), match[2].decode()
            except UnicodeDecodeError:
                break
            if name in found:
                break
            found[name] = text
            at = match.end()
        self.at = at

    # -- one tensor

    def checked(self, key: str, byte: int, value: _Value) -> Entry | None:
        """The entry in a value that was read in full; None, and faults, where it is none."""
        if value.kind != "{":
            self.fault("bad-entry", value.start, f"has {self.told(value)}, expected dtype, shape and data_offsets", key)
            return None
        fields: dict[str, _Value] = {}
        good = True
        for name, at, inner in value.content:
            if name in fields:
                self.fault("duplicate-field", at, f"has {short(name)} twice", key)
                good = False
            fields.setdefault(name, inner)
        if set(fields) != set(_FIELDS):
            code = "unknown-field" if set(fields) > set(_FIELDS) else "bad-entry"
            named = [short(name) for name in sorted(fields)[:8]]
            self.fault(code, value.start, f"has {', '.join(named)}, expected dtype, shape and data_offsets", key)
            good = False
        dtype = self.dtype(key, fields.get("dtype"))
        shape = self.sizes(key, fields.get("shape"), "bad-shape", "shape", "sizes")
        offsets = self.sizes(key, fields.get("data_offsets"), "bad-offsets", "data_offsets", "[begin, end]")
        if offsets is not None and len(offsets) != 2:
            self.fault("bad-offsets", fields["data_offsets"].start, f"has {len(offsets)} data_offsets, expected 2", key)
            return None
        if dtype is None or shape is None or offsets is None or not good:
            return None
        return self.measured(key, byte, dtype, shape, *offsets, fields["shape"].start)

    def dtype(self, key: str, value: _Value | None) -> str | None:
        if value is None:
            return None
        if value.kind == '"' and value.content in DTYPES:
            return str(value.content)
        found = short(value.content) if value.kind == '"' else self.told(value)
        message = f"has dtype {found}, expected one of {', '.join(DTYPES)}"
        self.fault("bad-dtype", value.start, message, key, "a newer loratool may know it")
        return None

    def sizes(self, key: str, value: _Value | None, code: str, name: str, expected: str) -> tuple[int, ...] | None:
        """A list of whole numbers below 2^64."""
        if value is None:
            return None
        found: list[int] = []
        for inner in value.content if value.kind == "[" else ():
            literal = self.raw[inner.start : inner.stop]
            if inner.kind == "0" and _WHOLE.fullmatch(literal) and int(literal) <= MAX_U64:
                found.append(int(literal))
        if value.kind == "[" and len(found) == len(value.content):
            return tuple(found)
        self.fault(code, value.start, f"has {name} {self.told(value)}, expected {expected}", key)
        return None

    def measured(
        self, key: str, byte: int, dtype: str, shape: tuple[int, ...], start: int, stop: int, at: int
    ) -> Entry | None:
        """The entry, if its numbers agree."""
        bits = _times(DTYPES[dtype], shape)
        if bits is None:
            text = short(list(shape))
            self.fault("shape-overflow", at, f"has shape {text}: more bits than fit 64 bits", key)
            return None
        if not start <= stop <= MAX_U64:
            message = f"has data_offsets {short([start, stop])}, expected [begin, end]"
            self.fault("bad-offsets", at, message, key)
            return None
        if bits % 8:
            self.fault("size-mismatch", at, f"has {bits} bits of {dtype}, expected whole bytes", key)
            return None
        if stop - start != bits // 8:
            shown = short(list(shape))
            message = f"has {stop - start} bytes, expected {bits // 8} for {dtype} {shown}"
            self.fault("size-mismatch", at, message, key)
            return None
        return Entry(dtype, shape, start, stop, LENGTH + byte)

    # -- JSON

    def value(self, depth: int) -> _Value:
        """The value that begins here, of at most so many values and so deep."""
        if depth > _DEEPEST:
            raise _Broken("too-deep", self.at, "the header is nested too deeply")
        self.values = 0 if depth == 1 else self.values + 1
        if self.values > _MOST_VALUES:
            raise _Broken("too-many-values", self.at, f"one entry holds more than {_MOST_VALUES} values")
        begins = self.next_byte()
        start = self.at
        if begins == b'"':
            text = self.string()
            return _Value('"', start, self.at, text)
        if begins == b"{":
            members = [(key, byte, self.value(depth + 1)) for key, byte in self.members()]
            return _Value("{", start, self.at, members)
        if begins == b"[":
            elements = self.elements(depth)
            return _Value("[", start, self.at, elements)
        match = _NUMBER.match(self.raw, start)
        if match is not None and _WORD.match(self.raw, start) is None:
            self.at = match.end()
            self.huge(match)
            return _Value("0", start, self.at)
        match = _WORD.match(self.raw, start)
        if match is None:
            self.not_json("a value is expected")
        if match[0] not in (b"true", b"false", b"null"):
            raise _Broken("not-json", start, f"the header holds {match[0].decode()}, which is not JSON")
        self.at = match.end()
        return _Value("w", start, self.at)

    def elements(self, depth: int) -> list[_Value]:
        self.at += 1
        found: list[_Value] = []
        if self.next_byte() == b"]":
            self.at += 1
            return found
        while True:
            found.append(self.value(depth + 1))
            end = self.next_byte()
            if end not in (b"]", b","):
                self.not_json("a comma or the end of the list is expected")
            self.at += 1
            if end == b"]":
                return found

    def huge(self, match: re.Match[bytes]) -> None:
        """Readers disagree about whole numbers beyond 64 bits."""
        literal = match[0].lstrip(b"-")
        if literal.isdigit() and (len(literal) > 20 or int(literal) > MAX_U64):
            self.fault("huge-number", match.start(), f"the header holds {short_bytes(literal)}: more than 64 bits")

    def string(self) -> str:
        """The text in quotes that begins here."""
        start = self.at
        stop = start + 1
        plain = True
        while True:
            match = _TEXT.match(self.raw, stop)
            assert match is not None
            plain = plain and b"\\" not in match[0]
            stop = match.end()
            ends = self.raw[stop : stop + 1]
            if ends == b'"':
                break
            if ends == b"\\" and stop + 1 < len(self.raw) and self.raw[stop + 1] >= 0x20:
                continue
            self.at = stop + (ends == b"\\")
            self.not_json("a text does not end" if self.at >= len(self.raw) else "a control character in a text")
        self.at = stop + 1
        text = self.decoded(start + 1, stop)
        if plain:
            return text
        try:
            text = str(json.loads(f'"{text}"'))
        except ValueError:
            self.at = start
            self.not_json("a text holds an escape that is none")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise _Broken("not-json", start, "the header holds half a surrogate pair, which is not text") from None
        return text

    def decoded(self, start: int, stop: int) -> str:
        try:
            return self.raw[start:stop].decode("utf-8")
        except UnicodeDecodeError as error:
            at = start + error.start
            raise _Broken("not-utf8", at, f"the header is not UTF-8 text (byte {LENGTH + at})") from None

    def next_byte(self) -> bytes:
        """The next byte that is no blank; nothing at the end."""
        match = _SPACE.match(self.raw, self.at)
        assert match is not None
        self.at = match.end()
        return self.raw[self.at : self.at + 1]

    def not_json(self, why: str) -> NoReturn:
        """Ends the reading: what is here is no JSON."""
        here = self.raw[self.at : self.at + 1]
        if here == b"\0":
            raise _Broken("nul-byte", self.at, f"the header is not valid JSON: a NUL byte at byte {LENGTH + self.at}")
        if here and here >= b"\x80":
            try:
                self.raw[self.at : self.at + 4].decode("utf-8")
            except UnicodeDecodeError as error:
                if not error.start and error.reason != "unexpected end of data":
                    message = f"the header is not UTF-8 text (byte {LENGTH + self.at})"
                    raise _Broken("not-utf8", self.at, message) from None
        found = ascii(here.decode("latin-1")) if here else "its end"
        message = f"the header is not valid JSON: {why}, found {found} at byte {LENGTH + self.at}"
        raise _Broken("not-json", self.at, message)

    def fault(self, code: str, at: int, message: str, key: str | None = None, hint: str = DAMAGED) -> None:
        self.found.fault(code, LENGTH + at, message, key, hint)

    def told(self, value: _Value) -> str:
        """The beginning of a value, as the file has it."""
        return short_bytes(self.raw[value.start : min(value.stop, value.start + 100)])


def short(value: Any) -> str:
    """A value for a message: as Python writes it, and not too long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def short_bytes(raw: bytes) -> str:
    """Text of a file for a message."""
    text = raw.decode("utf-8", "backslashreplace")
    return text if len(text) <= 80 else text[:80] + "..."
