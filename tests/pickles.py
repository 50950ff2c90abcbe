"""Pickles and PyTorch files for tests, spelled opcode by opcode: also such as no program writes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FLOAT = "torch.FloatStorage"


@dataclass(frozen=True)
class Name:
    """A global."""

    name: str


@dataclass(frozen=True)
class Called:
    """A call of a global."""

    name: str
    arguments: Any


@dataclass(frozen=True)
class Kept:
    """An object by its persistent id."""

    told: Any


@dataclass(frozen=True)
class With:
    """An object with a state set on it."""

    value: Any
    state: Any


@dataclass(frozen=True)
class Code:
    """Opcodes as they are."""

    raw: bytes


def spelled(value: Any) -> bytes:
    """The opcodes (protocol 2) that leave `value` on the stack."""
    if isinstance(value, Code):
        return value.raw
    if isinstance(value, Name):
        module, _, name = value.name.rpartition(".")
        return b"c%s\n%s\n" % (module.encode(), name.encode())
    if isinstance(value, Called):
        return spelled(Name(value.name)) + spelled(value.arguments) + b"R"
    if isinstance(value, Kept):
        return spelled(value.told) + b"Q"
    if isinstance(value, With):
        return spelled(value.value) + spelled(value.state) + b"b"
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(spelled, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(spelled, value)) + b"e"
    return b"}(" + b"".join(spelled(key) + spelled(one) for key, one in value.items()) + b"u"


def pickled(value: Any) -> bytes:
    """A whole pickle of protocol 2."""
    return b"\x80\x02" + spelled(value) + b"."


def storage(key: Any = "0", numel: Any = 6, kind: str = FLOAT, *more: Any) -> Kept:
    """A storage by its persistent id."""
    return Kept(("storage", Name(kind), key, "cpu", numel, *more))


EMPTY = Called("collections.OrderedDict", ())


def tensor(size: Any = (2, 3), stride: Any = (3, 1), offset: Any = 0, kept: Any = None, hooks: Any = EMPTY) -> Called:
    """A tensor as torch.save spells it; of the storage "0" of six float32 if none is given."""
    arguments = (storage() if kept is None else kept, offset, size, stride, False, hooks)
    return Called("torch._utils._rebuild_tensor_v2", arguments)


SIX = struct.pack("<6f", *range(6))


@dataclass
class Record:
    """One record of a zip file; `local` and `central` are lies in its two headers. A ghost is in the directory only."""

    name: bytes
    data: bytes
    method: int = 0
    flags: int = 0
    local: Mapping[str, Any] = field(default_factory=dict)
    central: Mapping[str, Any] = field(default_factory=dict)
    behind: bytes = b""
    before: bytes = b""
    ghost: bool = False


def _header(record: Record, told: Mapping[str, Any], local: bool, offset: int) -> bytes:
    crc = told.get("crc", zlib.crc32(record.data))
    packed, nbytes = told.get("packed", len(record.data)), told.get("nbytes", len(record.data))
    flags, method = told.get("flags", record.flags), told.get("method", record.method)
    name, extra = told.get("name", record.name), told.get("extra", b"")
    parts = (flags, method, 0, 0, crc, packed, nbytes, len(name), told.get("extra_size", len(extra)))
    if local:
        return struct.pack("<4s5H3I2H", told.get("magic", b"PK\x03\x04"), 20, *parts) + name + extra
    rest = (len(told.get("comment", b"")), told.get("disk", 0), 0, 0, told.get("offset", offset))
    head = struct.pack("<4s6H3I2H3H2I", told.get("magic", b"PK\x01\x02"), 20, 20, *parts, *rest)
    return head + name + extra + told.get("comment", b"")


def zip_of(
    records: Sequence[Record], end: Mapping[str, Any] | None = None, wide: Mapping[str, Any] | None = None
) -> bytes:
    """A zip file of these records; `end` are lies of its end record. With `wide`, it has a zip64 end, with its lies."""
    told = dict(end or {})
    body, directory = b"", b""
    for record in records:
        body += record.before
        directory += _header(record, record.central, False, len(body))
        if not record.ghost:
            body += _header(record, record.local, True, 0) + record.data + record.behind
    directory += told.get("directory_tail", b"")
    facts = {"here": len(records), "count": len(records), "nbytes": len(directory), "begin": len(body)}
    tail = b""
    if wide is not None:
        w = {**facts, "size": 44, "disk": 0, "disks": 1, "place": len(body) + len(directory), **wide}
        tail = struct.pack(
            "<4sQ2H2I4Q",
            *(wide.get("magic", b"PK\x06\x06"), w["size"], 45, 45, w["disk"], 0),
            *(w["here"], w["count"], w["nbytes"], w["begin"]),
        )
        tail += struct.pack("<4sIQI", b"PK\x06\x07", 0, w["place"], w["disks"])
    e = {**facts, "disk": 0, "comment": 0, "magic": b"PK\x05\x06", **told}
    last = (e["magic"], e["disk"], 0, e["here"], e["count"], e["nbytes"], e["begin"], e["comment"])
    return body + directory + tail + struct.pack("<4s4H2IH", *last) + told.get("behind", b"")


def torch_zip(value: Any, storages: Mapping[str, bytes] | None = None, **more: bytes) -> bytes:
    """A file as torch.save writes it: `value` pickled (or bytes as they are), storages, and other records by name."""
    data = value if isinstance(value, bytes) else pickled(value)
    kept = {"0": SIX} if storages is None else storages
    records = [Record(b"a/data.pkl", data), Record(b"a/byteorder", more.pop("byteorder", b"little"))]
    records += [Record(f"a/data/{key}".encode(), one) for key, one in kept.items()]
    records += [Record(name.encode(), one) for name, one in more.items()]
    return zip_of(records)


FACTS = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def legacy(
    value: Any,
    keys: Any = ("0",),
    behind: bytes = (6).to_bytes(8, "little") + SIX,
    protocol: Any = 1001,
    facts: Any = None,
) -> bytes:
    """A file as torch.save wrote it before 1.6: five pickles, then the storages."""
    parts = (0x1950A86A20F9469CFC6C, protocol, FACTS if facts is None else facts, value, keys)
    listed = [list(part) if part is keys and isinstance(keys, tuple) else part for part in parts]
    return b"".join(map(pickled, listed)) + behind
