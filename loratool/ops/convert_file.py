"""convert, from file to file, with its report as data."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratool.core.adapter import Adapter
from loratool.core.architecture import Architecture
from loratool.core.errors import LoratoolError, UsageError
from loratool.core.layout import Layout
from loratool.core.program import Program
from loratool.core.registry import layouts
from loratool.files.bundle import check_output
from loratool.ops.approximate import Approximated, Wish, as_lora
from loratool.ops.convert import Converted, convert
from loratool.ops.convert_for import converted_for, layout_for
from loratool.ops.headers import with_history
from loratool.ops.open import open_adapter
from loratool.ops.save import Progress, Proof, save


@dataclass(frozen=True)
class Report:
    """What a conversion did. Sizes in bytes, `seconds` of wall time; `proof` is None if it was not asked for.

    `program` is the id of the program that it was made for, which loads it fully.
    """

    source: str
    output: str
    program: str | None
    layout_before: str
    layout_after: str
    architecture: str
    architecture_title: str
    modules_before: int
    modules_after: int
    ranks_before: Mapping[int, int]
    ranks_after: Mapping[int, int]
    size_before: int
    size_after: int
    returned: bool
    carried: tuple[str, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    vanished: tuple[str, ...]
    unread_families: Mapping[str, int]
    approximated: tuple[Approximated, ...]
    notes: tuple[str, ...]
    proof: Proof | None
    seconds: float


def convert_file(
    path: str | os.PathLike[str],
    to: str | None,
    output: str | os.PathLike[str],
    *,
    program: Program | None = None,
    architecture: Architecture | str | None = None,
    dtype: str | None = None,
    approximate: Wish | None = None,
    drop_extras: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Converts the adapter at `path` into layout `to` at `output`; see `convert` and `save` for what is guaranteed.

    `program` chooses the layout where `to` is None. Nothing is written unless it loads the result fully.
    """
    started = time.perf_counter()
    layout = None if to is None else layouts()[to]
    if layout is not None:
        check_output(output, [os.fspath(path)], layout.folder, overwrite)
    source = open_adapter(path, architecture=architecture)
    try:
        if layout is None:
            layout = _layout_for(source, program, approximate, drop_extras)
            check_output(output, [os.fspath(path)], layout.folder, overwrite)
        adapted, approximated = _approximated(source, layout.id, approximate)
        if program is None:
            converted = convert(adapted, layout.id, dtype=dtype, drop_extras=drop_extras)
        else:
            kept = replace(adapted, extras={}) if drop_extras else adapted
            converted = converted_for(kept, layout.id, program, dtype=dtype, drop_extras=drop_extras)
            converted = replace(converted, dropped=tuple(source.extras) if drop_extras else ())
        proof = save(converted, adapted, output, overwrite=overwrite, verify=verify, progress=progress)
    except LoratoolError as error:
        raise error.with_file(str(path)) from error.__cause__
    seconds = time.perf_counter() - started
    return _report(source, converted, program, os.fspath(output), approximated, proof, seconds)


def _layout_for(source: Adapter, program: Program | None, wish: Wish | None, drop_extras: bool) -> Layout:
    if program is None:
        raise UsageError("neither a layout nor a program says what to convert to")
    return layout_for(source, program, approximate=wish is not None, drop_extras=drop_extras)


def _approximated(source: Adapter, to: str, wish: Wish | None) -> tuple[Adapter, tuple[Approximated, ...]]:
    if wish is None:
        return source, ()
    modules, report = as_lora(source.modules, wish, layouts()[to].obstacle)
    if not report:
        return source, ()
    worst = max(item.error for item in report)
    note = {"op": "approximate", "by": "lora", "modules": len(report), "largest_error": float(f"{worst:.3g}")}
    return replace(source, modules=modules, metadata=with_history(source.metadata, note)), report


def _report(
    source: Adapter,
    converted: Converted,
    program: Program | None,
    output: str,
    approximated: tuple[Approximated, ...],
    proof: Proof | None,
    seconds: float,
) -> Report:
    return Report(
        source=source.path,
        output=output,
        program=None if program is None else program.id,
        layout_before=source.layout,
        layout_after=converted.layout.id,
        architecture=source.architecture.id,
        architecture_title=source.architecture.title,
        modules_before=len(source.modules),
        modules_after=len(converted.adapter.modules),
        ranks_before=dict(source.ranks.most_common()),
        ranks_after=dict(converted.adapter.ranks.most_common()),
        size_before=source.size_bytes,
        size_after=_size(output),
        returned=converted.returned,
        carried=converted.carried,
        kept=tuple(converted.adapter.extras),
        dropped=converted.dropped,
        vanished=converted.vanished,
        unread_families=source.unread_families,
        approximated=approximated,
        notes=source.notes,
        proof=proof,
        seconds=seconds,
    )


def _size(path: str) -> int:
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(path) for name in names)
