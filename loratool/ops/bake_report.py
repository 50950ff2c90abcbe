"""What a bake did, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from loratool.core.tensor import DTYPES
from loratool.ops.bake_task import Options, Task
from loratool.ops.inputs import Asked
from loratool.ops.pool import threads
from loratool.ops.respell import title_of
from loratool.ops.sites import Site, Unmatched

if TYPE_CHECKING:
    from loratool.ops.bake_check import Checked
    from loratool.ops.bake_work import Survival

LOW = 0.9
"""A share of an update below which its loss to rounding is worth a warning."""


@dataclass(frozen=True)
class Baked:
    """One adapter that was baked: where it is from, its strength, and how many of its modules found their weights."""

    path: str
    sha256: str
    strength: float
    blocks: str | None
    layout: str
    modules: int
    matched: int
    dora: int


@dataclass(frozen=True)
class Component:
    """What became of one component: tensors changed, their bytes, and the share of the update that survived rounding
    (None where nothing was computed)."""

    component: str
    tensors: int
    bytes: int
    survived: float | None


@dataclass(frozen=True)
class Changed:
    """One tensor that was changed; `survived` as for components."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    survived: float | None


@dataclass(frozen=True)
class BakeReport:
    """What `loratool bake` did, or would do (`output` None). Sizes in bytes, `seconds` of wall time.

    `format` is the spelling that was asked for, if any. `memory` is an estimate of what is used at once, on the host
    and on each GPU. `linked` and `copied` count the other files of a folder.
    """

    base: str
    output: str | None
    architecture: str
    architecture_title: str
    adapters: tuple[Baked, ...]
    components: tuple[Component, ...]
    tensors: tuple[Changed, ...]
    unmatched: tuple[Unmatched, ...]
    files: tuple[str, ...]
    linked: int
    copied: int
    size: int
    untouched: int
    dtype: str | None
    format: str | None
    rounding: str
    seed: int
    dora_norm: str
    devices: tuple[str, ...]
    memory: Mapping[str, int]
    undo: str | None
    undo_size: int | None
    checked: Checked | None
    notes: tuple[str, ...]
    seconds: float


def bake_report(
    task: Task,
    asked: Sequence[Asked],
    digests: Sequence[str],
    options: Options,
    survivals: Sequence[Survival] | None,
) -> BakeReport:
    """The report of a bake, or of a plan (`survivals` None), without what only its writing tells."""
    sites = task.found.sites
    missing = {(one.adapter, one.title) for one in task.found.unmatched}
    return BakeReport(
        base=task.checkpoint.path,
        output=None,
        architecture=task.model.id,
        architecture_title=task.model.title,
        adapters=tuple(
            Baked(
                path=one.path,
                sha256=digest,
                strength=one.weight,
                blocks=one.blocks_told,
                layout=opened.adapter.layout,
                modules=len(opened.adapter.modules),
                matched=sum((opened.adapter.path, module.title) not in missing for module in opened.adapter.modules),
                dora=sum(module.magnitude is not None for module in opened.adapter.modules),
            )
            for one, opened, digest in zip(asked, task.inputs, digests, strict=True)
        ),
        components=tuple(_components(sites, survivals)),
        tensors=tuple(
            Changed(
                site.file.name,
                site.key,
                site.dtype,
                site.tensor.shape,
                None if survivals is None or not site.parts else survivals[index].share,
            )
            for index, site in enumerate(sites)
        ),
        unmatched=task.found.unmatched,
        files=tuple(one.file.name for one in task.files),
        linked=0,
        copied=0,
        size=0,
        untouched=_untouched(task),
        dtype=options.dtype,
        format=options.format,
        rounding=options.rounding,
        seed=options.seed,
        dora_norm=options.dora_norm,
        devices=tuple(options.devices),
        memory=_memory(sites, options),
        undo=None,
        undo_size=None,
        checked=None,
        notes=tuple(dict.fromkeys((*(note for one in task.inputs for note in one.adapter.notes), *task.notes))),
        seconds=0.0,
    )


def _untouched(task: Task) -> int:
    """Bytes of the files that are written which are the base's."""
    if task.planned is None:
        return sum(what.nbytes for one in task.files for what in one.copies)
    left_out = set(task.planned.left_out)
    baked = (
        prod(shape) * DTYPES[dtype] // 8
        for one in task.files
        for key, (dtype, shape, _) in one.plan.entries.items()
        if title_of(one.file.name.rpartition("/")[0], key) not in left_out
    )
    return sum(one.nbytes for one in task.planned.tensors.values()) - sum(baked)


def _components(sites: Sequence[Site], survivals: Sequence[Survival] | None) -> Iterator[Component]:
    for name in dict.fromkeys(site.component for site in sites if site.parts):
        mine = [index for index, site in enumerate(sites) if site.component == name and site.parts]
        share = None
        if survivals is not None:
            square = sum(survivals[index].square for index in mine)
            share = sum(survivals[index].along for index in mine) / square if square else 1.0
        yield Component(name, len(mine), sum(sites[index].nbytes for index in mine), share)


def _memory(sites: Sequence[Site], options: Options) -> dict[str, int]:
    """What is needed at once, in bytes: an estimate from the sizes of blocks and the largest factors."""
    factors = max(
        (
            sum(
                4 * tensor.numel
                for part in site.parts
                if hasattr(part, "module")
                for tensor in part.module.tensors.values()
            )
            for site in sites
        ),
        default=0,
    )
    gpus = sum(device != "cpu" for device in options.devices)
    if gpus:
        return {"host": (600 << 20) + gpus * 8 * (16 << 20), "device": (600 << 20) + 8 * (12 * (8 << 20) + factors)}
    return {"host": (300 << 20) + threads() * (12 * (1 << 20) + factors), "device": 0}
