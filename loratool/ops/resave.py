"""Resave: the tensors of a PyTorch file as safetensors, with the same keys and the same bytes."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loratool.core.adapter import Bundle
from loratool.core.errors import LoratoolError, UsageError
from loratool.core.tensor import same_bytes
from loratool.files.bundle import adapter_files, bundle_size, check_output, read_bundle, write_bundle
from loratool.files.safetensors import is_pickle
from loratool.ops.headers import with_history
from loratool.ops.save import NotTheSame

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Resaved:
    """What was written. Sizes in bytes, `seconds` of wall time; `notes` name what has no place in safetensors.

    `compared` is the number of tensors that were read back, all the same; None if that was not asked for.
    """

    source: str
    output: str
    tensors: int
    dtypes: Mapping[str, int]
    metadata: Mapping[str, str]
    size_before: int
    size_after: int
    notes: tuple[str, ...]
    compared: int | None
    seconds: float


def resave_file(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Resaved:
    """Writes the tensors of a PyTorch file of any kind (LoRA, checkpoint, embedding) to a safetensors file.

    Keys, shapes, dtypes and bytes stay; a storage that several tensors share is written for each. A PEFT folder
    becomes a folder. Nothing in the file is run. Raises UsageError for what is safetensors already, FormatError for
    files that ask for more than tensors, and NotTheSame, with nothing written, if what was read back differs.
    """
    started = time.perf_counter()
    try:
        bundle = _opened(path)
        made, folder = _made(bundle, output)
        check_output(output, [os.fspath(path)], folder, overwrite)
        nbytes = bundle_size(made, folder)
        compared = _write(made, output, folder, overwrite, verify, progress)
    except LoratoolError as error:
        raise error.with_file(path) from error.__cause__
    return Resaved(
        source=os.fspath(path),
        output=os.fspath(output),
        tensors=len(bundle.tensors),
        dtypes=dict(Counter(tensor.dtype for tensor in bundle.tensors.values()).most_common()),
        metadata=bundle.metadata,
        size_before=bundle.size_bytes,
        size_after=nbytes,
        notes=bundle.notes,
        compared=compared,
        seconds=time.perf_counter() - started,
    )


def _made(bundle: Bundle, output: str | os.PathLike[str]) -> tuple[Bundle, bool]:
    """What is written, and whether as a folder."""
    folder = bool(bundle.side_files)
    if folder and os.fspath(output).endswith(".safetensors"):
        raise UsageError(
            "is a PEFT folder, whose config has no place in one file",
            hint="name a folder with -o, or a layout of one file with --to",
        )
    metadata = with_history({"format": "pt", **bundle.metadata}, {"op": "resave", "from": "pickle"})
    return replace(bundle, metadata=metadata), folder


def _write(
    made: Bundle,
    output: str | os.PathLike[str],
    folder: bool,
    overwrite: bool,
    verify: bool,
    progress: Progress | None,
) -> int | None:
    """Writes it, reads it back, and gives the number of tensors compared."""
    compared: list[int] = []

    def check(written: str) -> None:
        compared.append(_compare(made, read_bundle(written), progress))

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress("writing", done, total)

    write_bundle(output, made, folder=folder, overwrite=overwrite, progress=told, check=check if verify else None)
    return compared[0] if compared else None


def _opened(path: str | os.PathLike[str]) -> Bundle:
    bundle = read_bundle(path)
    if not any(is_pickle(file) for file in adapter_files(Path(path))):
        raise UsageError(
            "is safetensors already: there is nothing to convert",
            hint="say in which layout with --to, or for which program with --for",
        )
    return bundle


def _compare(made: Bundle, again: Bundle, progress: Progress | None) -> int:
    """The number of tensors, all of which are the same in both."""
    if made.tensors.keys() != again.tensors.keys():
        raise NotTheSame("the written file does not hold the same keys", hint="nothing was written")
    for done, (key, tensor) in enumerate(made.tensors.items(), 1):
        if not same_bytes(tensor, again.tensors[key]):
            raise NotTheSame("the written file does not hold the same bytes", key=key, hint="nothing was written")
        if progress is not None:
            progress("verifying", done, len(made.tensors))
    return len(made.tensors)
