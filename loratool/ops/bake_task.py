"""A bake that is planned: what becomes of which file, and what its header will say. Nothing is computed."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from loratool import __version__
from loratool.core.adapter import Adapter
from loratool.core.architecture import Architecture, Checkpoint
from loratool.core.errors import FormatError, LoratoolError, UnknownModel, few
from loratool.core.tensor import DTYPES, LazyTensor
from loratool.files.bundle import PICKLES
from loratool.files.checkpoint import WEIGHTS, CheckpointFiles, WeightFile, read_checkpoint
from loratool.files.safetensors import file_size
from loratool.files.stream import Copy, Plan, copies, plan_like
from loratool.ops import recipe
from loratool.ops.base import known_model, model_of
from loratool.ops.headers import STALE
from loratool.ops.inputs import Asked, Input, weighed
from loratool.ops.open import open_adapter
from loratool.ops.respell import Respelled, one_copy, respelled, spelling_asked
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
    format: str | None = None


@dataclass(frozen=True, eq=False)
class FileTask:
    """One file that is rewritten. Where the output is spelled anew, `plan` holds but the tensors that change."""

    file: WeightFile
    plan: Plan
    copies: list[Copy]
    metadata: dict[str, str]


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that is known before anything is written.

    `target` is the spelling of the output, None where it stays what it is; `planned` then the output's tensors, those
    that are baked without their values.
    """

    checkpoint: CheckpointFiles
    model: Architecture
    inputs: tuple[Input, ...]
    found: Sites
    files: tuple[FileTask, ...]
    notes: tuple[str, ...]
    target: Checkpoint | None = None
    planned: Respelled | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """The header of an output of one file: that of the base's one file; of a folder what was baked before."""
        if not self.checkpoint.folder:
            return self.files[0].metadata
        headers = [file.header.metadata for weights in self.checkpoint.sets for file in weights.files]
        told: list[Any] = []
        for entry in (one for header in headers for one in bakes_in(header)):
            told += [entry] if entry not in told else []
        return {"format": "pt", **({ENTRY: json.dumps(told)} if told else {})}


def prepared(
    base: str | os.PathLike[str], asked: Sequence[Asked], options: Options, architecture: Architecture | str | None
) -> Task:
    """Opens everything and plans the bake; reads headers only. Raises what `bake_file` raises before it writes."""
    checkpoint = read_checkpoint(base)
    known = known_model(checkpoint)
    inputs = tuple(weighed(one, _opened(one.path, known, checkpoint, architecture)) for one in asked)
    target = None
    copies_told: tuple[str, ...] = ()
    if options.format is not None:
        target = spelling_asked(checkpoint, known or _model(checkpoint, inputs), options.format)
    if target is not None:
        checkpoint, copies_told = one_copy(checkpoint)
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
    model = known or _model(checkpoint, inputs)
    files = tuple(_files(checkpoint, found.sites, alone=target is not None))
    if target is None:
        notes = tuple(_notes(checkpoint, found.sites))
        same = (f"it is spelled as {options.format} already",) if options.format is not None else ()
        return Task(checkpoint, model, inputs, found, files, (*notes, *same))
    made = {(one.file, one.key): LazyTensor.computed(one.tensor.shape, one.dtype, _unknown) for one in found.sites}
    planned = respelled(checkpoint.path, parts_with(checkpoint, made), model, target)
    told = (*copies_told, *_told(target, planned, found.sites))
    return Task(checkpoint, model, inputs, found, files, told, target, planned)


def parts_with(
    checkpoint: CheckpointFiles, made: Mapping[tuple[WeightFile, str], LazyTensor]
) -> dict[str, dict[str, LazyTensor]]:
    """The tensors of a checkpoint by sub-folder and key, those in `made` (by file and key) instead of its own."""
    return {
        one.folder: {key: made.get((one.homes[key], key), tensor) for key, tensor in one.tensors.items()}
        for one in checkpoint.sets
    }


def _unknown() -> Any:
    raise ValueError("this tensor is not baked yet")


def _only(plan: Plan, names: Collection[str]) -> Plan:
    """Some of the tensors, one behind the other."""
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    position = 0
    for name, (dtype, shape, _) in plan.entries.items():
        if name in names:
            entries[name] = (dtype, shape, position)
            position += prod(shape) * DTYPES[dtype] // 8
    return Plan(entries, position)


def _told(target: Checkpoint, planned: Respelled, sites: Sequence[Site]) -> Iterator[str]:
    """What a user should know about an output that is spelled anew."""
    if planned.left_out:
        yield f"left out, as {target.id} has no place for them: {few(planned.left_out)}"
    stale = {name for site in sites for name in site.file.header.metadata if name in STALE}
    if stale:
        yield _without(stale)


def planned_size(task: Task) -> int:
    """Bytes of all weight files of the output, but for what its headers will say of the bake."""
    if task.planned is not None:
        return file_size(task.planned.tensors, task.metadata)
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
        return _opened_as(path, known)
    check_model(checkpoint.path, known, adapter.architecture)
    if adapter.architecture.open and known is not None:
        return _opened_as(path, known)
    if adapter.architecture.id == "unknown":
        return open_adapter(path, architecture=model_of(checkpoint))
    return adapter


def _opened_as(path: str, known: Architecture) -> Adapter:
    """The adapter for the checkpoint's model. Raises FormatError where not one key is a name of that."""
    try:
        return open_adapter(path, architecture=known)
    except UnknownModel as error:
        message = f"is for another model than the checkpoint's: {error.message}"
        raise FormatError(message, file=path, hint="name a checkpoint of the adapter's model") from error


def _unmatched(found: Sequence[Unmatched], path: str) -> FormatError:
    names = [f"{one.title} {one.reason}" + (f", nearest: {one.nearest}" if one.nearest else "") for one in found]
    whose = few(sorted({one.adapter for one in found}))
    parts = f"{len(found)} part{'s' if len(found) > 1 else ''}"
    return FormatError(
        f"{parts} of {whose} cannot be baked into it: {'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''}",
        file=path,
        hint="--allow-unmatched leaves them out",
    )


def _files(checkpoint: CheckpointFiles, sites: Sequence[Site], alone: bool) -> Iterator[FileTask]:
    """The files with changes; `alone` plans but the tensors that change."""
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
                if alone:
                    yield FileTask(file, _only(plan, moved), [], metadata)
                else:
                    yield FileTask(file, plan, copies(file.header, plan, moved), metadata)


def _notes(checkpoint: CheckpointFiles, sites: Sequence[Site]) -> Iterator[str]:
    """What a user should know about files that are not rewritten."""
    stale = {file for site in sites for file in site.file.header.metadata if file in STALE}
    if stale:
        yield _without(stale)
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


def _without(stale: Collection[str]) -> str:
    return f"left out of the header, as it would be false: {', '.join(sorted(stale))}"


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
    if options.format is not None:
        told["format"] = options.format
    if options.dora_norm != "paper":
        told["dora_norm"] = options.dora_norm
    kinds = {kind for device in options.devices if (kind := recipe.device_kind(device)) is not None}
    return told | ({"device": "/".join(sorted(kinds))} if kinds else {})


def with_record(metadata: Mapping[str, str], told: Mapping[str, Any]) -> dict[str, str]:
    """The header with one more bake in its list."""
    return {**metadata, ENTRY: json.dumps([*bakes_in(metadata), told])}


def bakes_in(metadata: Mapping[str, str]) -> list[Any]:
    """What a header says of the bakes before."""
    try:
        before = json.loads(metadata.get(ENTRY, "[]"))
    except (ValueError, RecursionError):
        before = []
    return before if isinstance(before, list) else []
