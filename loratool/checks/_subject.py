"""What checks are given: a file, the content of one or several, or a folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

from loratool.core.adapter import Adapter, Bundle
from loratool.core.detect import Detection
from loratool.core.errors import LoratoolError
from loratool.core.layout import Group
from loratool.core.tensor import LazyTensor
from loratool.files.header import LENGTH, Scan, scan
from loratool.files.kinds import HEAD, Kind, kind_of
from loratool.files.safetensors import FileRange, OpenFile

PLACE_HINT = "name a file on disk"
_SPECIAL = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, eq=False)
class File:
    """A file as it is: what it is if not safetensors (`kind`), or its header's length and content, faults and all.

    `cut` says how many bytes of the header are missing. `scan` is None where there is no header to read.
    """

    path: str
    handle: OpenFile
    kind: Kind | None = None
    length: int = 0
    cut: int = 0
    scan: Scan | None = None

    @property
    def begin(self) -> int:
        """Where the data begin."""
        return LENGTH + self.length

    @property
    def sound(self) -> bool:
        """Whether it is what the format allows."""
        return self.scan is not None and not self.scan.faults

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """The tensors whose entries make sense and whose data are there."""
        if self.scan is None:
            return {}
        held = {}
        for key, entry in self.scan.entries.items():
            if self.begin + entry.stop <= self.handle.size:
                source = FileRange(self.handle, self.begin + entry.start, entry.stop - entry.start)
                held[key] = LazyTensor(entry.shape, entry.dtype, source)
        return held


def look(path: str) -> File:
    """Opens a file and reads its header, however broken. Raises FormatError for what is no file to be read."""
    handle = OpenFile(path)
    head = handle.pread(min(handle.size, HEAD), 0)
    kind = kind_of(head, handle.size)
    if kind is not None:
        return File(path, handle, kind)
    length = int.from_bytes(head[:LENGTH], "little")
    cut = max(length + LENGTH - handle.size, 0)
    if cut:
        return File(path, handle, None, length, cut)
    return File(path, handle, None, length, 0, scan(handle.pread(length, LENGTH), handle.size - LENGTH - length))


def special(path: str) -> str | None:
    """What stands at a path if it is no file and no folder: a pipe, a device, a socket; None for anything else."""
    try:
        return _SPECIAL.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True, eq=False)
class Reading:
    """How keys are understood, however broken the modules are.

    `groups` has every stem that the layout knows, `unknown` the keys that it does not, `twice` pairs of keys that say
    the same, `problems` what is wrong with a module, `refused` what else reading says of one. `adapter` holds the
    modules that are whole; `error` says why there is none.
    """

    detection: Detection | None = None
    groups: Mapping[str, Group] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    twice: tuple[tuple[str, str], ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, LoratoolError] = field(default_factory=dict)
    adapter: Adapter | None = None
    error: LoratoolError | None = None


@dataclass(frozen=True)
class Misfit:
    """A module, by one of its keys, that has no place in the base that was named: `missing`, or of another shape."""

    key: str
    message: str
    missing: bool


@dataclass(frozen=True, eq=False)
class Content:
    """What one file, or the files of one adapter or checkpoint, hold. `deep`: numbers may be read.

    `part` says that it is a part of a checkpoint: then nobody expects an adapter. `many`: it has too many tensors for
    its modules to be looked at. `base` is the path of a base that was named, `misfits` what does not fit it.
    """

    path: str
    files: tuple[File, ...]
    bundle: Bundle
    reading: Reading
    deep: bool = False
    part: bool = False
    many: bool = False
    base: str | None = None
    misfits: tuple[Misfit, ...] = ()
    base_error: LoratoolError | None = None


@dataclass(frozen=True, eq=False)
class Folder:
    """An adapter's or a checkpoint's folder: where its configs and indices are, and what its files hold.

    `configs` maps what stands in front of a component's keys to the path of its config, be it there or not; `keys` the
    name of each file to its keys.
    """

    path: str
    configs: Mapping[str, str] = field(default_factory=dict)
    indices: tuple[str, ...] = ()
    keys: Mapping[str, frozenset[str]] = field(default_factory=dict)
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Place:
    """A path at which nothing could be read, and the error that says why."""

    path: str
    error: LoratoolError
