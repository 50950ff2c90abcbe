"""merge, from files to a file, with its report as data."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.core.adapter import Adapter
from loratool.core.architecture import Architecture
from loratool.core.errors import FormatError, LoratoolError, UsageError, few
from loratool.core.method import Method
from loratool.core.module import Module
from loratool.core.registry import layouts
from loratool.core.tensor import LazyTensor, same_bytes
from loratool.files.bundle import check_output
from loratool.ops import recipe
from loratool.ops.blocks import block_label
from loratool.ops.finite import check_finite
from loratool.ops.headers import merged_metadata
from loratool.ops.inputs import Asked, Input, opened_together
from loratool.ops.lone import lone_share
from loratool.ops.made import Held, Made, Progress, make, save_made, told
from loratool.ops.merge import Merged, MergedModule, check_inputs, merge
from loratool.ops.ranks import Limits, Rule, check_limits
from loratool.ops.recipe import file_name
from loratool.ops.weights import base_weights

METADATA = ("first", "union", "none")
"""What of the inputs' header entries a merge keeps."""


NOTEWORTHY = 0.99
"""A module that one input alone has and that keeps less of its strength than this is worth a note."""


@dataclass(frozen=True)
class Source:
    """One input as it was read. `alone` counts the modules that no other input has."""

    path: str
    sha256: str
    weight: float
    blocks: str | None
    layout: str
    modules: int
    alone: int
    ranks: Mapping[int, int]
    size: int


@dataclass(frozen=True)
class MergeReport:
    """What `loratool merge` did. Sizes in bytes, `seconds` of wall time.

    `error` is the relative error (Frobenius) of the whole adapter against what the method says, before rounding: 0 for
    an exact sum; `held` what reading the file back showed. `cosines[component][i][j]` is that between the updates of
    inputs i and j. `conflicts` of `shared` entries differ in sign (None where the method does not ask).
    """

    inputs: tuple[Source, ...]
    output: str
    method: str
    options: Mapping[str, Any]
    rule: str | None
    layout: str
    architecture: str
    architecture_title: str
    modules: tuple[MergedModule, ...]
    merged: int
    ranks_after: Mapping[int, int]
    size_after: int
    error: float
    cosines: Mapping[str, Sequence[Sequence[float]]]
    conflicts: int | None
    shared: int | None
    silent: tuple[str, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    held: Held | None
    seconds: float


def merge_files(
    asked: Sequence[Asked],
    output: str | os.PathLike[str],
    method: Method,
    options: Mapping[str, Any] | None = None,
    *,
    to: str | None = None,
    dtype: str | None = None,
    rule: Rule | None = None,
    limits: Limits | None = None,
    approximate: bool = False,
    base: str | None = None,
    base_name: str | None = None,
    metadata: str = "first",
    title: str | None = None,
    architecture: Architecture | str | None = None,
    drop_extras: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> MergeReport:
    """Merges the adapters at the asked paths into `output`; see `merge` for the mathematics, `save_made` for the proof.

    `title` and `base_name` are what the header calls the result and the base (their names, if None). Raises UsageError
    for what makes no sense, LoratoolError for an output that cannot be written, before anything is read.
    """
    started = time.perf_counter()
    options, limits = dict(options or {}), limits or Limits()
    check_limits(limits)
    if not asked:
        raise UsageError("nothing to merge", hint="name at least one LoRA file")
    if metadata not in METADATA:
        raise UsageError(f"--metadata is {metadata!r}", hint=f"one of: {', '.join(METADATA)}")
    inputs = opened_together(asked, architecture)
    layout = to or inputs[0].adapter.layout
    check_output(output, [one.path for one in asked], layouts()[layout].folder, overwrite)
    check_inputs(inputs, method, options)
    weights = base_weights(base, inputs[0].adapter) if base is not None else None
    hashes = recipe.hashing([one.path for one in asked], base)
    names = [one.name or file_name(one.path) for one in asked]
    title = title or file_name(Path(output).stem)
    extras, dropped = _extras(inputs, layout, drop_extras)
    header = merged_metadata([one.adapter.metadata for one in inputs], names, title, metadata)

    def made_by(digests: Sequence[str]) -> dict[str, Any]:
        settings = {
            "method": method.id,
            "options": {name: option.default for name, option in method.options.items()} | options,
            "rule": rule.title if rule is not None else None,
            **limits.settings(),
            "to": to,
            "dtype": dtype,
            "approximate": approximate or None,
            "base": None if base is None else {"name": base_name or file_name(base), "sha256": digests[-1]},
            "metadata": metadata,
            "title": title,
            "architecture": recipe.architecture_id(architecture),
            "drop_extras": drop_extras or None,
            "device": recipe.device_kind(device),
        }
        told_inputs = [
            {"name": name, "sha256": digest, "weight": one.weight}
            | ({"blocks": one.blocks.to_data()} if one.blocks is not None else {})
            for name, digest, one in zip(names, digests[: len(names)], inputs, strict=True)
        ]
        return recipe.recipe("merge", told_inputs, settings)

    def made(adapter: Adapter, digests: Sequence[str]) -> Made:
        whole = replace(adapter, metadata=header, extras=extras)
        return make(whole, layout, made_by(digests))

    first = inputs[0].adapter

    def written(modules: Sequence[Module]) -> int:
        adapter = Adapter(tuple(modules), first.architecture, layout)
        return made(adapter, ["0" * 64] * (len(asked) + 1)).size_bytes

    with _file_told(inputs):
        merged = merge(
            inputs,
            method,
            options,
            to=layout,
            dtype=dtype,
            rule=rule,
            limits=limits,
            approximate=approximate,
            base=weights,
            written=written,
            device=device,
            tick=told(progress, "merging"),
        )
    digests = hashes()
    result = made(merged.adapter, digests)
    held = save_made(
        result,
        merged.expected,
        merged.planned,
        output,
        images=merged.images,
        overwrite=overwrite,
        verify=verify,
        progress=progress,
    )
    sources = _sources(asked, inputs, digests[: len(asked)], merged)
    counted = [row for row in merged.modules if row.conflicts is not None]
    return MergeReport(
        inputs=sources,
        output=os.fspath(output),
        method=method.id,
        options=options,
        rule=rule.title if rule is not None else None,
        layout=layout,
        architecture=first.architecture.id,
        architecture_title=first.architecture.title,
        modules=merged.modules,
        merged=sum(sum(rank is not None for rank in row.ranks) > 1 for row in merged.modules),
        ranks_after=dict(result.adapter.ranks.most_common()),
        size_after=result.size_bytes,
        error=merged.error,
        cosines=merged.cosines,
        conflicts=sum(row.conflicts or 0 for row in counted) if counted else None,
        shared=sum(row.shared or 0 for row in counted) if counted else None,
        silent=merged.silent,
        kept=tuple(extras),
        dropped=dropped,
        notes=(*_notes(inputs), *_weakened(method, options, sources), *_cancelled(method, merged.modules)),
        held=held,
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _file_told(inputs: Sequence[Input]) -> Iterator[None]:
    """Names the input in an error about values that are not finite; a module's title does not say whose it is."""
    try:
        yield
    except FormatError as error:
        for one in inputs if error.file is None else ():
            for module in one.adapter.modules:
                try:
                    for tensor in module.tensors.values():
                        check_finite(module, tensor.load())
                except FormatError:
                    raise error.with_file(one.adapter.path) from None
        raise


def _sources(
    asked: Sequence[Asked], inputs: Sequence[Input], digests: Sequence[str], merged: Merged
) -> tuple[Source, ...]:
    alone = Counter(
        next(index for index, rank in enumerate(row.ranks) if rank is not None)
        for row in merged.modules
        if sum(rank is not None for rank in row.ranks) == 1
    )
    return tuple(
        Source(
            path=one.adapter.path,
            sha256=digest,
            weight=one.weight,
            blocks=what.blocks_told,
            layout=one.adapter.layout,
            modules=len(one.adapter.modules),
            alone=alone[index],
            ranks=dict(one.adapter.ranks.most_common()),
            size=one.adapter.size_bytes,
        )
        for index, (what, one, digest) in enumerate(zip(asked, inputs, digests, strict=True))
    )


def _extras(inputs: Sequence[Input], layout: str, drop: bool) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Tensors that are no modules, of all inputs, and the names of those left out.

    Raises LoratoolError for those that the output has no place for: of another layout, or one name for two tensors.
    """
    kept: dict[str, LazyTensor] = {}
    homeless: list[str] = []
    for one in inputs:
        for key, tensor in one.adapter.extras.items():
            if one.adapter.layout != layout or (key in kept and not same_bytes(kept[key], tensor)):
                homeless.append(key)
            else:
                kept[key] = tensor
    if homeless and not drop:
        raise LoratoolError(
            f"{len(homeless)} tensors of the inputs are no modules and have no place in the output ({few(homeless)})",
            hint="leave them out with --drop-extras",
        )
    return ({}, tuple(dict.fromkeys((*kept, *homeless)))) if drop else (kept, ())


def _weakened(method: Method, options: Mapping[str, Any], sources: Sequence[Source]) -> tuple[str, ...]:
    """A note where the method weakens modules that only one of several inputs has."""
    weights = [one.weight for one in sources]
    told = []
    for index, one in enumerate(sources):
        share = lone_share(method, weights, options, index) if one.alone and len(sources) > 1 else 1.0
        if share < NOTEWORTHY:
            to = "almost nothing" if share < 0.01 else f"{share:.0%}"
            told.append(f"{one.alone} of {file_name(one.path)} to {to}")
    if not told:
        return ()
    return (f"{method.id} weakens modules that only one input has: {', '.join(told)}; concat would not",)


def _cancelled(method: Method, rows: Sequence[MergedModule]) -> tuple[str, ...]:
    """A note where nothing is left of what several inputs say, so that no relative error can be told."""
    if not (method.exact or method.stands_for_sum):
        return ()
    gone = [row.title for row in rows if row.norm == 0 and sum(rank is not None for rank in row.ranks) > 1]
    return (f"the updates of {len(gone)} modules add up to zero: {few(gone)}",) if gone else ()


def _notes(inputs: Sequence[Input]) -> tuple[str, ...]:
    """What a user should know about the inputs."""
    notes = [note for one in inputs for note in one.adapter.notes]
    for one in inputs:
        if one.blocks is None or not one.blocks.left_out:
            continue
        off = {block_label(target, one.adapter.architecture) for m in one.adapter.modules for target in m.targets}
        silenced = [label for label in one.blocks.left_out if label in off]
        if silenced:
            notes.append(f"{one.adapter.path}: --blocks names no value for {', '.join(silenced)}, which are turned off")
    versions = {one.adapter.metadata.get("ss_base_model_version") for one in inputs} - {None}
    if len(versions) > 1:
        notes.append(f"the inputs were trained on different bases: {', '.join(sorted(map(str, versions)))}")
    return tuple(dict.fromkeys(notes))
