"""Made: a merged or resized adapter on its way into a file, and the proof that the file holds it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loratool.core.adapter import Adapter, Bundle
from loratool.core.layout import Layout
from loratool.core.registry import layouts
from loratool.core.tensor import same_bytes
from loratool.files.bundle import bundle_size, read_bundle, write_bundle
from loratool.ops.compare import EXACT, ROUNDING
from loratool.ops.headers import made_header
from loratool.ops.probe import Measured, Terms, measure
from loratool.ops.save import NotTheSame
from loratool.ops.spell import spell

if TYPE_CHECKING:
    from loratool.core.tensor import Array

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total): bytes while writing, modules otherwise."""

ROOM = 3.0
"""How much larger than computed an error may be when it is estimated from random vectors: even what is left of rank 1,
the noisiest case, never exceeds this."""


@dataclass(frozen=True)
class Made:
    """A bundle ready to be written and the adapter it spells; `carried` extras ride in the header, `dropped` do not."""

    bundle: Bundle
    adapter: Adapter
    layout: Layout
    dropped: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Size of the file, or of all files of the folder."""
        return bundle_size(self.bundle, self.layout.folder)


@dataclass(frozen=True)
class Held:
    """What reading the output back showed: the relative error against what was asked for, measured on random vectors.

    `error` is that of the whole adapter, rounding included; `worst` that of the worst module; `coarse` are modules
    whose values the dtype holds less precisely than usual (too small for it).
    """

    modules: int
    error: float
    worst: float
    worst_module: str | None
    coarse: tuple[str, ...]


def make(adapter: Adapter, to: str, recipe: Mapping[str, Any], *, drop_extras: bool = False) -> Made:
    """The adapter in layout `to` with a header that is true of it, `recipe` in it. Nothing is computed yet."""
    spelled = spell(adapter, to, drop_extras=drop_extras)
    source = layouts()[adapter.layout]
    header = made_header(spelled.adapter, source, spelled.layout, spelled.bundle.metadata, recipe)
    tensors = {**spelled.bundle.tensors, **spelled.extras.in_file}
    bundle = replace(spelled.bundle, tensors=tensors, metadata=header)
    return Made(bundle, spelled.adapter, spelled.layout, spelled.extras.dropped)


def save_made(
    made: Made,
    expected: Sequence[Terms],
    errors: Sequence[float],
    path: str | os.PathLike[str],
    *,
    images: Sequence[Array | None] | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Held | None:
    """Writes `made` to `path` and, with `verify`, reads it back and measures it against the sums `expected`.

    `errors` are the relative errors that truncation explains, entry by entry. Raises NotTheSame, with nothing written,
    if the adapter as a whole is farther off than these and rounding explain, if anything in it is not finite, or an
    extra does not have its bytes.
    """
    held: list[Held] = []

    def check(written: str) -> None:
        bundle = read_bundle(written)
        again = layouts()[made.layout.id].read(bundle, made.adapter.architecture)
        for key, tensor in made.adapter.extras.items():
            if key not in bundle.tensors or not same_bytes(tensor, bundle.tensors[key]):
                raise NotTheSame("is not in the written file as it should be", key=key, hint="nothing was written")
        # Full differences that were handed over as tensors are modules to the reader; they are no part of `expected`.
        modules = [one for one in again.modules if not made.adapter.extras.keys() >= set(one.keys.values())]
        measured = measure(expected, modules, told(progress, "verifying"), images)
        held.append(_judged(measured, modules, expected, errors))

    write_bundle(
        path,
        made.bundle,
        folder=made.layout.folder,
        overwrite=overwrite,
        hashes="sshs_model_hash" in made.bundle.metadata,
        progress=told(progress, "writing"),
        check=check if verify else None,
    )
    return held[0] if held else None


def told(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    """`progress` for one stage."""
    if progress is None:
        return None
    tell = progress
    return lambda done, total: tell(stage, done, total)


def _judged(
    measured: Sequence[Measured], written: Sequence[Any], expected: Sequence[Terms], errors: Sequence[float]
) -> Held:
    for one in measured:
        if not math.isfinite(one.difference):
            raise NotTheSame(
                "the written update is not finite",
                key=one.title,
                hint="nothing was written: the dtype cannot hold the values; choose another --dtype",
            )
    if len(measured) > len(written):
        raise NotTheSame(
            "is not in the written file", key=measured[-1].title, hint="nothing was written; please report these files"
        )
    rounding = max((ROUNDING.get(module.dtype, EXACT) for module in written), default=EXACT)
    planned = {
        (target.component, target.path): error
        for terms, error in zip(expected, errors, strict=True)
        for target in terms[0][0].targets
    }
    off = math.sqrt(math.fsum(one.difference**2 for one in measured))
    norm = math.sqrt(math.fsum(one.norm**2 for one in measured))
    allowed, coarse = 0.0, []
    for one, module in zip(measured, written, strict=True):
        own = max(planned.get((target.component, target.path), 0.0) for target in module.targets)
        room = ROOM * own + ROUNDING.get(module.dtype, EXACT)
        allowed += (room * one.norm) ** 2
        if one.error > room:
            coarse.append(one.title)
    if off > math.sqrt(allowed) + rounding * norm:
        raise NotTheSame(
            f"the written update differs by {off / norm if norm else math.inf:.2g} from what was asked for",
            hint="nothing was written; choose another --dtype, or please report these files",
        )
    worst = max(measured, key=lambda one: one.error, default=None)
    return Held(
        modules=len(measured),
        error=off / norm if norm else 0.0,
        worst=worst.error if worst else 0.0,
        worst_module=worst.title if worst and worst.error else None,
        coarse=tuple(coarse),
    )
