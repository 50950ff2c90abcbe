"""Pickles: the tensors of PyTorch files (`.pt`, `.bin`, `.ckpt`, `.pth`), without PyTorch and without running them.

Two containers: a zip file with `data.pkl` and one record for each storage (PyTorch 1.6 and later), and a row of pickles
with the storages behind it (before). Tensors stay in the file until somebody asks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.core.adapter import Bundle
from loratool.core.errors import FormatError, LoratoolError
from loratool.files.archive import read_archive
from loratool.files.flatten import Flat, flatten, left_out
from loratool.files.kinds import ZIP
from loratool.files.safetensors import FileRange, OpenFile
from loratool.files.torch_names import Storage, meanings
from loratool.files.torch_tensors import Room, tensor_of
from loratool.files.unpickle import MAX_PICKLE, MAX_STEPS, Table, unpickle

_OBJECT = "data.pkl"
_PROGRAM = ("constants.pkl", "code/")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LONGEST_MAGIC = 64  # bytes of its pickle
_FEW = 1000  # opcodes
_COUNT = 8
_DAMAGED = "the file is damaged or was made to do harm"
_DOWNLOAD = "the download or copy is incomplete: fetch the file again"


@dataclass(frozen=True)
class _Contents:
    """What a container holds: the object, storages by key, byte order, and records that nothing reads."""

    root: Any
    storages: Mapping[str, FileRange]
    big_endian: bool
    unknown: tuple[str, ...] = ()


def read_pickle(path: str | os.PathLike[str]) -> Bundle:
    """The tensors of a PyTorch file by name, nested dicts joined with dots; simple values as metadata.

    Lightning's `state_dict.` in front is dropped. All that safetensors has no place for is named in the notes. Nothing
    that the file names is imported or called; tensors are stretches of the file, read when asked for. Raises
    FormatError for a file that asks for more than tensors, which names it, and for any that is broken.
    """
    try:
        return _read(OpenFile(os.fspath(path)))
    except LoratoolError as error:
        raise error.with_file(path) from error.__cause__


def _read(file: OpenFile) -> Bundle:
    zipped = file.pread(min(file.size, len(ZIP)), 0) == ZIP
    contents = _zipped(file) if zipped else _legacy(file)
    flat = flatten(contents.root)
    if not flat.tensors:
        raise FormatError("is a pickle without tensors", hint="name a file of weights")
    room = Room.for_file(file.size)
    tensors = {}
    for key, rebuilt in flat.tensors.items():
        try:
            tensors[key] = tensor_of(rebuilt, contents.storages, contents.big_endian, room)
        except LoratoolError as error:
            error.key = key
            raise
    return Bundle(tensors, flat.metadata, {}, file.path, file.size, notes=_notes(contents, flat))


def _notes(contents: _Contents, flat: Flat) -> tuple[str, ...]:
    used = {rebuilt.storage.key for rebuilt in flat.tensors.values()}
    unused = [f"storage {key}" for key in contents.storages if key not in used]
    return left_out([*flat.dropped, *unused, *contents.unknown])


# ---------------------------------------------------------------- zip


def _zipped(file: OpenFile) -> _Contents:
    records = read_archive(file)
    found = [name for name in records if name.count("/") == 1 and name.endswith(f"/{_OBJECT}")]
    if len(found) != 1:
        raise FormatError(f"is a zip archive with {len(found)} {_OBJECT}, expected one", hint="unpack it first")
    folder = found[0].removesuffix(_OBJECT)
    inside = {name.removeprefix(folder): record for name, record in records.items() if name.startswith(folder)}
    if any(name.startswith(_PROGRAM) for name in inside):
        raise FormatError("is a TorchScript program, not only weights", hint="save its state_dict() instead")
    record = inside[_OBJECT]
    if record.nbytes > MAX_PICKLE:
        raise FormatError(f"has {record.nbytes} bytes, expected at most {MAX_PICKLE}", key=found[0], hint=_DAMAGED)
    data = bytes(record.read())
    root, end = unpickle(data, meanings({}))
    if end != len(data):
        raise FormatError(f"has {len(data) - end} bytes behind its pickle", key=found[0], hint=_DAMAGED)
    storages = {name.removeprefix("data/"): one for name, one in inside.items() if name.startswith("data/")}
    known = {_OBJECT, "version", "byteorder", *(f"data/{key}" for key in storages)}
    outside = [name for name in records if not name.startswith(folder)]
    unknown = [name for name in inside if name not in known and not name.startswith(".")]
    return _Contents(root, storages, _big_endian(inside.get("byteorder")), (*unknown, *outside))


def _big_endian(record: FileRange | None) -> bool:
    if record is None:
        return False
    told = bytes(record.slice(0, min(record.nbytes, 16)).read())
    if told not in (b"little", b"big"):
        raise FormatError(f"has byte order {told!r}, expected little or big", hint=_DAMAGED)
    return told == b"big"


# ---------------------------------------------------------------- legacy


def _legacy(file: OpenFile) -> _Contents:
    """A row of pickles: PyTorch's number, its protocol, facts of the machine, the object, keys; then the storages.

    Any other file is one pickle, which then can have no tensors.
    """
    data = file.pread(min(file.size, MAX_PICKLE), 0)
    told: dict[str, Storage] = {}
    names = meanings(told)
    magic, at = unpickle(data, names)
    if type(magic) is not int or magic != _LEGACY_MAGIC or at > _LONGEST_MAGIC:
        if at != file.size:
            raise FormatError(f"has {file.size - at} bytes behind its pickle", hint=_DAMAGED)
        return _Contents(magic, {}, False)
    protocol, at = unpickle(data, names, at, _FEW)
    if type(protocol) is not int or protocol != _LEGACY_PROTOCOL:
        raise FormatError(f"is of a protocol that is not {_LEGACY_PROTOCOL}", hint=_DAMAGED)
    facts, at = unpickle(data, names, at, _FEW)
    root, at = unpickle(data, names, at)
    keys, at = unpickle(data, names, at, MAX_STEPS // 4)
    pairs = facts.pairs if type(facts) is Table else []
    little = [value for key, value in pairs if type(key) is str and key == "little_endian"]
    if any(value is not True and value is not False for value in little):
        raise FormatError("does not tell its byte order", hint=_DAMAGED)
    big = little == [False]
    return _Contents(root, _behind(file, keys, told, at, big), big)


def _behind(file: OpenFile, keys: Any, told: Mapping[str, Storage], at: int, big: bool) -> dict[str, FileRange]:
    """The storages behind the pickles, in the order of `keys`: for each 8 bytes with its number of elements, and them.

    They must be those of which the pickle tells, and end with the file.
    """
    if type(keys) is not list or any(type(key) is not str or key not in told for key in keys):
        raise FormatError("has a list of storages that is none", hint=_DAMAGED)
    found: dict[str, FileRange] = {}
    for key in keys:
        storage = told[key]
        if at + _COUNT > file.size:
            raise FormatError(f"is cut off before storage {key}", hint=_DOWNLOAD)
        numel = int.from_bytes(file.pread(_COUNT, at), "big" if big else "little")
        if numel != storage.numel or key in found:
            raise FormatError(f"has {numel} elements in storage {key}, expected {storage.numel}", hint=_DAMAGED)
        at += _COUNT
        if at + storage.nbytes > file.size:
            missing = at + storage.nbytes - file.size
            raise FormatError(f"is cut off in storage {key}: {missing} bytes are missing", hint=_DOWNLOAD)
        found[key] = FileRange(file, at, storage.nbytes)
        at += storage.nbytes
    if at != file.size:
        raise FormatError(f"has {file.size - at} bytes behind its last storage", hint=_DAMAGED)
    return found
