"""The other files of a folder that is baked into: linked or copied, configs and indices made true."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.core.errors import LoratoolError
from loratool.files.checkpoint import read_index
from loratool.ops.bake_task import Task

_LINKED = 1 << 20
"""Files from this size on are linked where that is possible; smaller ones, which people edit, are copied."""


_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class Others:
    """How many of the other files were linked, and how many copied."""

    linked: int
    copied: int


def bring_others(base: Path, folder: Path, rewritten: Collection[str]) -> Others:
    """Links or copies every file below `base`, but those rewritten and hidden folders, to the same place in `folder`.

    Large files are linked where that is possible. Raises LoratoolError for what is no regular file, and for a link to
    a folder that it is in.
    """
    linked = copied = 0
    for at, names in _others(base, rewritten):
        (folder / at).mkdir(exist_ok=True)
        for name in names:
            was_linked = _bring(base / at / name, folder / at / name)
            linked, copied = linked + was_linked, copied + (not was_linked)
    return Others(linked, copied)


def bytes_copied(base: Path, folder: Path, rewritten: Collection[str]) -> int:
    """Bytes of what `bring_others` will copy to `folder`, which may not be there yet: small files, and all files of
    another file system."""
    here = os.stat(folder.absolute().parent).st_dev
    found = (os.stat(base / at / name) for at, names in _others(base, rewritten) for name in names)
    return sum(one.st_size for one in found if one.st_size < _LINKED or one.st_dev != here)


def _others(base: Path, rewritten: Collection[str]) -> Iterator[tuple[Path, Sequence[str]]]:
    """Every folder below `base` with the names of its files that are not rewritten."""
    for place, folders, names in os.walk(base, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        _check_links(Path(place), folders)
        at = Path(place).relative_to(base)
        others = [name for name in sorted(names) if (at / name).as_posix() not in rewritten]
        for name in others:
            if not os.path.isfile(base / at / name):
                message = "is not a regular file"
                raise LoratoolError(message, file=str(base / at / name), hint="remove it from the folder")
        yield at, others


def _check_links(place: Path, folders: Sequence[str]) -> None:
    here = Path(os.path.realpath(place))
    for name in folders:
        if Path(os.path.realpath(place / name)) in (here, *here.parents):
            message = "is a link to a folder that it is in"
            raise LoratoolError(message, file=str(place / name), hint="remove it from the folder")


def _bring(source: Path, target: Path) -> bool:
    """Whether it was linked."""
    real = Path(os.path.realpath(source))
    if real.stat().st_size >= _LINKED:
        try:
            os.link(real, target)
            return True
        except OSError:
            pass  # another file system, or one without links
    try:
        shutil.copyfile(real, target)
    except OSError as error:
        read = error.errno in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EIO)
        file, what = (source, "read") if read else (target, "written")
        raise LoratoolError(f"cannot be {what}: {error.strerror}", file=str(file)) from error
    return False


def restate(folder: Path, task: Task, dtype: str) -> None:
    """Makes configs say the new dtype, and indices the size of all tensors."""
    rewritten = {one.file: one.plan.nbytes for one in task.files}
    base = Path(task.checkpoint.path)
    for weights in task.checkpoint.sets:
        if weights.index is not None:
            data = read_index(base / weights.index)
            old = {file: file.header.size_bytes - file.header.header_bytes for file in weights.files}
            total = sum(rewritten.get(file, old[file]) for file in weights.files)
            told = data.get("metadata")
            data["metadata"] = {**(told if isinstance(told, dict) else {}), "total_size": total}
            _replace_json(folder / weights.index, data)
        config = Path(weights.folder, "config.json")
        if (base / config).is_file() and dtype in _TORCH_NAMES:
            data = read_index(base / config)
            data |= dict.fromkeys({"dtype", "torch_dtype"} & data.keys(), _TORCH_NAMES[dtype])
            _replace_json(folder / config, data)


def _replace_json(path: Path, data: dict[str, Any]) -> None:
    path.unlink()  # it may be a link to the base's own file
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")
