"""regroup: the one function that splits, fuses or reorders modules to fit another naming."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise

from loratool.core.errors import NotExact
from loratool.core.family import Part
from loratool.core.module import Module
from loratool.core.naming import Naming
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor, concatenated

Blocks = Mapping[str, Sequence[Sequence[float]]]
"""Of a stacked module, by its targets: (rank components, scale) of what came from each of them (rank 0: nothing)."""


@dataclass(frozen=True)
class Regrouped:
    """Modules of another naming; `blocks` says how stacked ones were put together, `vanished` which parts were zero."""

    modules: tuple[Module, ...]
    blocks: dict[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    vanished: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Piece:
    """Rows of one source module that belong to one target."""

    source: Module
    index: int
    start: int
    stop: int
    live: Callable[[], list[frozenset[int]] | None]
    """`_live_sets` of the source: the same function for all of its pieces, which reads the factors once."""


def regroup(modules: Sequence[Module], namings: Mapping[str, Naming], blocks: Blocks | None = None) -> Regrouped:
    """Modules whose targets are exactly those of names in `namings` (component -> naming).

    A module that already is keeps being the very same object. Splitting takes rows of up and shares down; rank
    components that reach none of a part's rows, but others of the module, are dropped. Fusing puts equal downs
    together and makes different ones block-diagonal, which a later split undoes; `blocks` of an earlier regroup
    lets it be undone exactly even where factors are zero, or had other scales. Updates and dtypes are kept.
    Raises NotExact where a family's structure cannot be cut or stacked there.
    """
    kept: list[Module | None] = []
    pieces: dict[Target, _Piece] = {}
    for module in modules:
        naming = namings[module.component]
        if naming.name_of(module.targets) is not None:
            kept.append(module)
            continue
        kept.append(None)
        start = 0
        live = cache(partial(_live_sets, module))
        for index, (target, height) in enumerate(zip(module.targets, module.heights(), strict=True)):
            pieces[target] = _Piece(module, index, start, start + height, live)
            start += height
    if not pieces:
        return Regrouped(tuple(modules))
    return _assemble(modules, kept, pieces, namings, blocks or {})


def _assemble(
    modules: Sequence[Module],
    kept: Sequence[Module | None],
    pieces: Mapping[Target, _Piece],
    namings: Mapping[str, Naming],
    blocks: Blocks,
) -> Regrouped:
    result: list[Module] = []
    made: set[tuple[str, str]] = set()
    record: dict[str, tuple[tuple[int, float], ...]] = {}
    vanished: list[str] = []
    source_names = {id(piece.source): "+".join(t.path for t in piece.source.targets) for piece in pieces.values()}
    for module, same in zip(modules, kept, strict=True):
        if same is not None:
            result.append(same)
            continue
        naming = namings[module.component]
        for target in module.targets:
            name = naming.home(target).name
            if (module.component, name) in made:
                continue
            made.add((module.component, name))
            targets = naming[name]
            present = [pieces.get(target) for target in targets]
            whole = _join(targets, present, blocks.get(source_names[id(module)]))
            if whole is None:
                vanished.append(f"{module.component}.{name}")
                continue
            if len(targets) > 1:
                record["+".join(t.path for t in targets)] = _blocks(present)
            result.append(whole)
    return Regrouped(tuple(result), record, tuple(vanished))


def _join(
    targets: tuple[Target, ...], pieces: Sequence[_Piece | None], blocks: Sequence[Sequence[float]] | None
) -> Module | None:
    """One module over `targets` from the pieces there are; None if nothing reaches its rows."""
    found = [piece for piece in pieces if piece is not None]
    first = found[0].source
    whole_source = {id(piece.source) for piece in found} == {id(first)} and len(found) == len(first.targets)
    if len({id(piece.source) for piece in found}) == 1 and len(found) == len(targets) and _in_order(found):
        part = first.rows(found[0].start, found[-1].stop, targets)
    else:
        part = _stack(targets, pieces)
    if whole_source:
        return part
    if blocks is None or len(blocks) != len(first.targets):
        return _without_dead(part, found, None)
    alive = _without_dead(part, found, [int(rank) for rank, _ in blocks])
    return alive if alive is None or len(found) > 1 else _at_scale(alive, blocks[found[0].index][1])


def _at_scale(module: Module, scale: float) -> Module:
    """The module with this scale and the same update: its factors take up the difference."""
    if not scale or module.scale == scale:
        return module
    gain = module.scale / scale
    factors = module.family.stacked([Part(module.shape[0], module.factors, gain)])
    return replace(module, factors=factors, alpha=module.family.alpha(module.shapes, scale))


def _in_order(pieces: Sequence[_Piece]) -> bool:
    return all(left.stop == right.start for left, right in pairwise(pieces))


def _without_dead(part: Module, pieces: Sequence[_Piece], ranks: Sequence[int] | None) -> Module | None:
    """A cut-off part without the rank components that belong to other parts of its source."""
    source = pieces[0].source
    if any(piece.source is not source for piece in pieces):
        return part
    if ranks is not None and sum(ranks) == source.rank:
        starts = [sum(ranks[:i]) for i in range(len(ranks))]
        keep: list[int] = []
        for piece in pieces:
            keep += range(starts[piece.index], starts[piece.index] + ranks[piece.index])
    else:
        live = pieces[0].live()
        if live is None:
            return part
        keep = sorted({i for piece in pieces for i in live[piece.index]})
    if len(keep) == part.rank:
        return part
    if not keep:
        bias = part.factors.get("bias")
        if bias is None or not bool((bias.load().float() != 0).any()):
            return None
        keep = [0]
    return replace(part, factors=part.family.keep(part.factors, keep), alpha=None).with_scale_of(part)


def _live_sets(source: Module) -> list[frozenset[int]] | None:
    """Per target of a module the rank components that reach its rows, if the module was put together from parts.

    That is so if every component reaches some row, and any two targets share all of their components or none.
    Otherwise (None) the components belong to the whole: an untrained module, up all zero, splits into untrained
    modules and does not vanish, and splitting what was trained in one piece is undone by fusing it again.
    """
    sets: list[frozenset[int]] = []
    start = 0
    for height in source.heights():
        live = source.family.live(source.family.rows(source.factors, start, start + height))
        if live is None:
            return None
        sets.append(frozenset(live))
        start += height
    apart = all(not (a & b) or a == b for i, a in enumerate(sets) for b in sets[:i])
    return sets if apart and len(frozenset().union(*sets)) == source.rank else None


def _stack(targets: tuple[Target, ...], pieces: Sequence[_Piece | None]) -> Module:
    """Pieces of several modules, or of one in another order, one below the other."""
    found = [piece for piece in pieces if piece is not None]
    cuts = {
        id(p): p.source.rows(p.start, p.stop, (p.source.targets[p.index],)) if len(p.source.targets) > 1 else p.source
        for p in found
    }
    modules = [None if piece is None else cuts[id(piece)] for piece in pieces]
    present = [module for module in modules if module is not None]
    families = {module.family.id for module in present}
    names = ", ".join(module.title for module in present)
    if len(families) > 1:
        raise NotExact(f"{names}: modules of different families ({', '.join(sorted(families))}) share one fused weight")
    magnitude = _stack_magnitudes(modules, names)
    scale = _stack_scale(present)
    unit = present[0].shape[0] / targets[next(i for i, m in enumerate(modules) if m is not None)].rows
    parts = [
        Part(
            round(target.rows * unit) if module is None else module.shape[0],
            None if module is None else module.factors,
            1.0 if module is None else module.scale / scale if scale else 1.0,
        )
        for target, module in zip(targets, modules, strict=True)
    ]
    try:
        factors = present[0].family.stacked(parts)
    except NotExact as error:
        raise NotExact(f"{names}: {error.message}") from error
    stacked = Module(targets, present[0].family, factors, None, magnitude)
    if all(module.alpha is None for module in present):
        return stacked
    return replace(stacked, alpha=stacked.family.alpha(stacked.shapes, scale))


def _stack_scale(present: Sequence[Module]) -> float:
    """The scale of the stack: of its parts' scales the one that rounds fewest of them, then the commonest."""
    scales = [module.scale for module in present if module.scale != 0]
    if not scales:
        return 0.0

    def exact(scale: float) -> int:
        # Growing by a power of two rounds nothing; shrinking by one may, next to zero.
        gains = [other / scale for other in scales]
        return sum(gain >= 1 and math.frexp(gain)[0] == 0.5 for gain in gains)

    return max(scales, key=lambda scale: (exact(scale), scales.count(scale), -scale))


def _stack_magnitudes(modules: Sequence[Module | None], names: str) -> LazyTensor | None:
    magnitudes = [None if module is None else module.magnitude for module in modules]
    if all(magnitude is None for magnitude in magnitudes):
        return None
    if any(magnitude is None for magnitude in magnitudes):
        raise NotExact(f"{names}: only some parts of one fused weight have a DoRA magnitude")
    if not all(module is not None and module.magnitude_per_row for module in modules):
        raise NotExact(f"{names}: DoRA magnitudes per input column cannot be stacked by rows")
    return concatenated([magnitude for magnitude in magnitudes if magnitude is not None])


def _blocks(pieces: Sequence[_Piece | None]) -> tuple[tuple[int, float], ...]:
    return tuple((0, 0.0) if piece is None else (piece.source.rank, piece.source.scale) for piece in pieces)
