"""Writing what was baked in another spelling: one file, of the baked tensors and of those that stay the base's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.core.errors import FormatError
from loratool.core.tensor import LazyTensor, same_bytes
from loratool.files.checkpoint import WeightFile
from loratool.files.safetensors import read_header, write_safetensors
from loratool.ops.bake_task import Task, parts_with, with_record
from loratool.ops.bake_write import Progress, Ticker
from loratool.ops.respell import Respelled, respelled


def write_respelled(
    task: Task,
    baked: Mapping[WeightFile, Path],
    file: Path,
    told: Mapping[str, Any],
    verify: bool,
    progress: Progress | None,
) -> int:
    """Writes the output of a task with another spelling to `file`; `baked` are the files with what was baked.

    With `verify` every tensor is read back and compared with where it is from; returns how many bytes those are.
    Raises FormatError for a difference.
    """
    new = _made(task, baked)

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("respelling", done, total)

    write_safetensors(file, new.tensors, with_record(task.metadata, told), progress=tell)
    return _compared(new.tensors, file, task.checkpoint.path, progress) if verify else 0


def _made(task: Task, baked: Mapping[WeightFile, Path]) -> Respelled:
    assert task.target is not None
    tensors = {place: read_header(path).tensors for place, path in baked.items()}
    sites = task.found.sites
    made = {(one.file, one.key): tensors[one.file][one.key] for one in sites}
    made |= {(one.file, key): tensors[one.file][key] for one in sites if (key := one.scale_key) is not None}
    return respelled(task.checkpoint.path, parts_with(task.checkpoint, made), task.model, task.target)


def _compared(tensors: Mapping[str, LazyTensor], file: Path, base: str, progress: Progress | None) -> int:
    written = read_header(file).tensors
    tick = Ticker(progress, "comparing", sum(tensor.nbytes for tensor in tensors.values()))
    for key, tensor in tensors.items():
        if not same_bytes(tensor, written[key]):
            raise FormatError(
                "is not the same in what was written",
                file=base,
                key=key,
                hint="the disk may be bad: nothing was kept",
            )
        tick(tensor.nbytes)
    return sum(tensor.nbytes for tensor in tensors.values())
