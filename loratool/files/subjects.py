"""What checks are given beside a file: the content of one or several, a folder, or a place where nothing is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loratool.core.adapter import Adapter, Bundle
from loratool.core.errors import LoratoolError
from loratool.core.tolerant import Reading
from loratool.files.look import File


@dataclass(frozen=True)
class Misfit:
    """A module, by one of its keys, that has no place in the base that was named: `missing`, or of another shape."""

    key: str
    message: str
    missing: bool


@dataclass(frozen=True, eq=False)
class Content:
    """What one file, or the files of one adapter or checkpoint, hold. `deep`: numbers are read; `skipped`: they
    are not, because they are too many.

    `part` says that it is a part of a checkpoint: then nobody expects an adapter. `many`: it has too many tensors for
    its modules to be looked at. `base` is the path of a base that was named, `misfits` what does not fit it.
    """

    path: str
    files: tuple[File, ...]
    bundle: Bundle
    reading: Reading
    deep: bool = False
    skipped: bool = False
    part: bool = False
    many: bool = False
    base: str | None = None
    misfits: tuple[Misfit, ...] = ()
    base_error: LoratoolError | None = None


def byte_of(content: Content, key: str | None) -> int | None:
    """At which byte of its file the header names a key; None where no file has it."""
    for file in content.files:
        if file.scan is not None and key is not None:
            entry = file.scan.entries.get(key) or file.scan.entries.get(key.rpartition("/")[2])
            if entry is not None:
                return entry.byte
    return None


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
    """A path at which nothing could be read, and the error that says why. `pickled`: it is a pickle."""

    path: str
    error: LoratoolError
    pickled: bool = False
