"""A bake that is planned: what becomes of which file, and what its header will say. Nothing is computed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.core.adapter import Adapter
from loratool.core.architecture import Architecture
from loratool.core.errors import FormatError, LoratoolError, few
from loratool.files.bundle import PICKLES
from loratool.files.checkpoint import WEIGHTS, CheckpointFiles, WeightFile, read_checkpoint
from loratool.files.stream import Copy, Plan, copies, plan_like
from loratool.ops import recipe
from loratool.ops.base import known_model, model_of
from loratool.ops.headers import STALE
from loratool.ops.inputs import Asked, Input, weighed
from loratool.ops.open import open_adapter
from loratool.ops.sites import Site, Sites, Unmatched, find_sites
from loratool.ops.weights import check_model

ENTRY = "loratool.baked"
"""The header entry that says what was baked into a checkpoint: a JSON list, one object for every bake."""


@dataclass(frozen=True)
class Options:
    """How to bake; see `bake_file`."""

    dtype: str | None = None
    rounding: str = "nearest"
    seed: int = 0
    dora_norm: str = "paper"
    devices: Sequence[str] = ("cpu",)
    verify: bool = True
    allow_unmatched: bool = False
    overwrite: bool = False


@dataclass(frozen=True, eq=False)
class FileTask:
    """One file that is rewritten."""

    file: WeightFile
    plan: Plan
    copies: list[Copy]
    metadata: dict[str, str]


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that is known before anything is written."""

    checkpoint: CheckpointFiles
    model: Architecture
    inputs: tuple[Input, ...]
    found: Sites
    files: tuple[FileTask, ...]
    notes: tuple[str, ...]


def prepared(
    base: str | os.PathLike[str], asked: Sequence[Asked], options: Options, architecture: Architecture | str | None
) -> Task:
    """Opens everything and plans the bake; reads headers only. Raises what `bake_file` raises before it writes."""
    checkpoint = read_checkpoint(base)
    known = known_model(checkpoint)
    inputs = tuple(weighed(one, _opened(one.path, known, checkpoint, architecture)) for one in asked)
    found = find_sites(checkpoint, inputs, options.dtype)
    if found.unmatched and not options.allow_unmatched:
        raise _unmatched(found.unmatched, checkpoint.path)
    if not found.sites and not asked:
        raise FormatError(f"nothing to cast: all of it is {options.dtype} already", file=checkpoint.path)
    if not found.sites:
        raise FormatError(
            "nothing of the adapters has a place in it",
            file=checkpoint.path,
            hint="name a checkpoint of the adapter's model" if not found.silent else "every strength is 0",
        )
    files = tuple(_files(checkpoint, found.sites))
    return Task(
        checkpoint, known or _model(checkpoint, inputs), inputs, found, files, tuple(_notes(checkpoint, found.sites))
    )


def planned_size(task: Task) -> int:
    """Bytes of all weight files of the output, but for what its headers will say of the bake."""
    written = sum(one.file.header.header_bytes + one.plan.nbytes for one in task.files)
    rewritten = {one.file for one in task.files}
    files = (file for weights in task.checkpoint.sets for file in weights.files)
    return written + sum(file.header.size_bytes for file in files if file not in rewritten)


def _model(checkpoint: CheckpointFiles, inputs: Sequence[Input]) -> Architecture:
    """The model of a checkpoint that is too small a part of one to tell: what the adapters are for."""
    tables = [one.adapter.architecture for one in inputs if not one.adapter.architecture.open]
    return tables[0] if tables else model_of(checkpoint)


def _opened(
    path: str, known: Architecture | None, checkpoint: CheckpointFiles, architecture: Architecture | str | None
) -> Adapter:
    """The adapter, with the checkpoint's names for its targets where nothing else tells its model."""
    try:
        adapter = open_adapter(path, architecture=architecture)
    except LoratoolError:
        if known is None or architecture is not None:
            raise
        return open_adapter(path, architecture=known)
    check_model(checkpoint.path, known, adapter.architecture)
    if adapter.architecture.open and known is not None:
        return open_adapter(path, architecture=known)
    if adapter.architecture.id == "unknown":
        return open_adapter(path, architecture=model_of(checkpoint))
    return adapter


def _unmatched(found: Sequence[Unmatched], path: str) -> FormatError:
    names = [f"{one.title} {one.reason}" + (f", nearest: {one.nearest}" if one.nearest else "") for one in found]
    whose = few(sorted({one.adapter for one in found}))
    parts = f"{len(found)} part{'s' if len(found) > 1 else ''}"
    return FormatError(
        f"{parts} of {whose} cannot be baked into it: {'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''}",
        file=path,
        hint="--allow-unmatched leaves them out",
    )


def _files(checkpoint: CheckpointFiles, sites: Sequence[Site]) -> Iterator[FileTask]:
    changed: dict[WeightFile, dict[str, str]] = {}
    for site in sites:
        changed.setdefault(site.file, {})[site.key] = site.dtype
    for weights in checkpoint.sets:
        for file in weights.files:
            if file in changed:
                plan = plan_like(file.header, changed[file])
                scales = {site.scale_key for site in sites if site.file is file and site.scale_key}
                moved = frozenset({*changed[file], *scales})
                metadata = {key: value for key, value in file.header.metadata.items() if key not in STALE}
                yield FileTask(file, plan, copies(file.header, plan, moved), metadata)


def _notes(checkpoint: CheckpointFiles, sites: Sequence[Site]) -> Iterator[str]:
    """What a user should know about files that are not rewritten."""
    stale = {file for site in sites for file in site.file.header.metadata if file in STALE}
    if stale:
        yield f"left out of the header, as it would be false: {', '.join(sorted(stale))}"
    if not checkpoint.folder:
        return
    for folder in dict.fromkeys(site.file.name.rpartition("/")[0] for site in sites):
        pickles = [p.name for p in sorted(Path(checkpoint.path, folder).iterdir()) if p.suffix in PICKLES]
        if pickles:
            yield f"{folder or '.'}: {few(pickles)} still hold the old weights"
    if all(weights.folder for weights in checkpoint.sets):
        beside = [p.name for p in sorted(Path(checkpoint.path).iterdir()) if p.suffix in (WEIGHTS, *PICKLES)]
        if beside:
            yield f"{few(beside)} beside the components stay as they are"


def record(asked: Sequence[Asked], digests: Sequence[str], base: str, options: Options) -> dict[str, Any]:
    """What the header says of a bake: files with their sha256, strengths, and how."""
    adapters = [
        {
            "name": one.name or recipe.file_name(one.path),
            "sha256": digest,
            "strength": one.weight,
            **({"blocks": one.blocks} if one.blocks is not None else {}),
        }
        for one, digest in zip(asked, digests, strict=True)
    ]
    told: dict[str, Any] = {"version": __version__, "base": recipe.file_name(base), "adapters": adapters}
    if options.rounding != "nearest":
        told |= {"rounding": options.rounding, "seed": options.seed}
    if options.dtype is not None:
        told["dtype"] = options.dtype
    if options.dora_norm != "paper":
        told["dora_norm"] = options.dora_norm
    kinds = {kind for device in options.devices if (kind := recipe.device_kind(device)) is not None}
    return told | ({"device": "/".join(sorted(kinds))} if kinds else {})


def with_record(metadata: Mapping[str, str], told: Mapping[str, Any]) -> dict[str, str]:
    """The header with one more bake in its list."""
    try:
        before = json.loads(metadata.get(ENTRY, "[]"))
    except (ValueError, RecursionError):
        before = []
    return {**metadata, ENTRY: json.dumps([*(before if isinstance(before, list) else []), told])}
