"""What an extraction found, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loratool.core.layout import Layout
from loratool.ops.extract import BIAS, Extraction, Rest, Wish
from loratool.ops.made import Held
from loratool.ops.resize import Cut
from loratool.ops.sides import LINEAR, Places, Sides


@dataclass(frozen=True)
class Others:
    """Norms, biases, embeddings or other parameters that differ: how many, the Frobenius norm of all their differences
    together, and how many of them the output holds in full."""

    kind: str
    count: int
    norm: float
    kept: int


@dataclass(frozen=True)
class ExtractReport:
    """What `loratool extract` did. `output` is None in a dry run; sizes in bytes, of the tuned checkpoint and of the
    output. `modules` count truncation and the rounding of the stored factors; `norm`, `energy` and `error` are those
    of all linears and convolutions, skipped ones included. `exact` counts modules whose SVD is not randomised;
    `unchanged` weights without a difference, `below` those under `min_norm`, `missing` those that one checkpoint has
    not, `misshapen` those of two shapes. `seconds` of wall time."""

    base: str
    tuned: str
    output: str | None
    layout: str
    architecture: str
    architecture_title: str
    rule: str
    dtype: str
    modules: tuple[Cut, ...]
    exact: int
    unchanged: int
    below: tuple[str, ...]
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]
    others: tuple[Others, ...]
    ranks_after: Mapping[int, int]
    size_before: int
    size_after: int
    norm: float
    energy: float
    error: float
    held: Held | None
    notes: tuple[str, ...]
    seconds: float


def extract_report(
    sides: Sides, layout: Layout, wish: Wish, places: Places, rest: Sequence[Rest], full: bool, done: Extraction
) -> ExtractReport:
    """The report of an extraction, without what only its writing tells."""
    return ExtractReport(
        base=sides.base.path,
        tuned=sides.tuned.path,
        output=None,
        layout=layout.id,
        architecture=sides.architecture.id,
        architecture_title=sides.architecture.title,
        rule=wish.rule.title,
        dtype=wish.dtype,
        modules=tuple(one.cut for one in done.found),
        exact=sum(one.exact for one in done.found),
        unchanged=sum(not one.norm for one in done.skipped),
        below=tuple(one.title for one in done.skipped if one.norm),
        missing=places.missing,
        misshapen=places.misshapen,
        others=_others(rest, full),
        ranks_after=dict(Counter(one.module.rank for one in done.found).most_common()),
        size_before=sides.tuned_files.size_bytes,
        size_after=0,
        norm=done.norm,
        energy=max(1 - done.error**2, 0.0),
        error=done.error,
        held=None,
        notes=(*_notes(sides, places, layout), *_apart(rest, layout, full)),
        seconds=0.0,
    )


def _others(rest: Sequence[Rest], full: bool) -> tuple[Others, ...]:
    found = []
    for kind in dict.fromkeys(one.kind for one in rest):
        own = [one for one in rest if one.kind == kind]
        norm = sum(one.norm**2 for one in own) ** 0.5
        found.append(Others(kind, len(own), norm, sum(one.tensor is not None for one in own) if full else 0))
    return tuple(found)


def _apart(rest: Sequence[Rest], layout: Layout, full: bool) -> Iterator[str]:
    """What `full` leaves out."""
    lost = sum(one.kind == BIAS and one.key is None for one in rest) if full else 0
    if lost:
        what = f"{layout.id} has no spelling for the bias of a linear or convolution"
        yield f"{what}, {lost} are left out: --to comfyui keeps them"


def _notes(sides: Sides, places: Places, layout: Layout) -> tuple[str, ...]:
    notes = []
    if sides.unmatched:
        notes.append(f"only one of the two has {', '.join(sides.unmatched)}")
    unspoken = [c for c in sides.components if c not in layout.written(sides.architecture)]
    if unspoken:
        notes.append(f"{layout.id} has no spelling for {', '.join(unspoken)}: left out")
    if sides.outside:
        what = f"{sides.outside} weights outside of the diffusion model (text encoders, a VAE) were not compared"
        notes.append(f"{what}: if the model is a known one, name it with --architecture")
    ignored = [c for c in sides.base.components if c in sides.tuned.components and c not in sides.components]
    if ignored:
        notes.append(f"no LoRA is made for {', '.join(ignored)}")
    before, after = sides.dtypes([place for place in places.both if place.kind == LINEAR])
    if before != after:
        kinds = [" and ".join(sorted(found)) for found in (before, after)]
        notes.append(f"stored as {kinds[0]} and as {kinds[1]}: the rounding of the coarser is part of the difference")
    return tuple(notes)
