"""Looking at a file as it is, however broken: what is at a path, what it is, what its header says."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from loratool.core.adapter import Bundle
from loratool.core.tensor import LazyTensor
from loratool.files.header import LENGTH, Scan, scan
from loratool.files.kinds import Kind
from loratool.files.safetensors import FileRange, OpenFile, announced

_SPECIAL = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, eq=False)
class File:
    """A file as it is: what it is if not safetensors (`kind`), or its header's length and content, faults and all.

    `cut` says how many bytes of the header are missing. `scan` is None where there is no header to read. `unpickled` is
    what a PyTorch file holds.
    """

    path: str
    handle: OpenFile
    kind: Kind | None = None
    length: int = 0
    cut: int = 0
    scan: Scan | None = None
    unpickled: Bundle | None = None

    @property
    def begin(self) -> int:
        """Where the data begin."""
        return LENGTH + self.length

    @property
    def sound(self) -> bool:
        """Whether it is what the format allows."""
        return self.unpickled is not None or (self.scan is not None and not self.scan.faults)

    @property
    def usable(self) -> bool:
        """Whether something of it can be read."""
        return self.scan is not None or self.unpickled is not None

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's entries."""
        held = self.unpickled if self.unpickled is not None else self.scan
        return held.metadata if held is not None else {}

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """The tensors whose entries make sense and whose data are there."""
        if self.unpickled is not None:
            return dict(self.unpickled.tensors)
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
    kind, length = announced(handle)
    if kind is not None:
        return File(path, handle, kind)
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
