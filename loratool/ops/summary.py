"""Summary: what a resize did to a component, or to the whole adapter. Plain numbers, no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median_low

from loratool.ops.resize import Cut, total_error


@dataclass(frozen=True)
class Summary:
    """Several modules together; sizes in bytes. `component` is empty where all components are meant.

    `ranks_before` and `ranks_after` are the smallest, the median and the largest; `energy` and `error` those of the
    truncation (Frobenius); `importance` is the norm of the update over that of the base weights, None if not measured.
    """

    component: str
    modules: int
    ranks_before: tuple[int, int, int]
    ranks_after: tuple[int, int, int]
    energy: float
    error: float
    bytes_before: int
    bytes_after: int
    importance: float | None


def summaries(cuts: Sequence[Cut]) -> list[Summary]:
    """One summary per component, in order of appearance."""
    return [summary([cut for cut in cuts if cut.component == name], name) for name in components(cuts)]


def components(cuts: Iterable[Cut]) -> list[str]:
    """The components of modules, in order of appearance."""
    return list(dict.fromkeys(cut.component for cut in cuts))


def summary(cuts: Sequence[Cut], component: str = "") -> Summary:
    """The summary of at least one module."""
    error = total_error(cuts)
    return Summary(
        component=component,
        modules=len(cuts),
        ranks_before=spread([cut.rank_before for cut in cuts]),
        ranks_after=spread([cut.rank_after for cut in cuts]),
        energy=1 - error * error,
        error=error,
        bytes_before=sum(cut.bytes_before for cut in cuts),
        bytes_after=sum(cut.bytes_after for cut in cuts),
        importance=_importance(cuts),
    )


def spread(ranks: Sequence[int]) -> tuple[int, int, int]:
    """The least, the median and the most."""
    return min(ranks), median_low(ranks), max(ranks)


def _importance(cuts: Sequence[Cut]) -> float | None:
    measured = [(cut.norm, cut.norm / cut.importance) for cut in cuts if cut.importance]
    if not measured:
        return None
    return math.hypot(*(norm for norm, _ in measured)) / math.hypot(*(base for _, base in measured))


@dataclass(frozen=True)
class Curve:
    """Singular values of several modules by index: the mean, the smallest and the largest. Zeros are not counted."""

    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def curve(spectra: Sequence[Sequence[float]], relative: bool = False) -> Curve:
    """The curve of modules with these singular values, `relative` to each one's largest; up to the last that is not 0.

    A module whose values end earlier does not count from there on.
    """
    alive = [[value for value in values if value > 0] for values in spectra]
    scaled = [[value / values[0] for value in values] if relative else values for values in alive if values]
    columns = [
        [values[index] for values in scaled if index < len(values)] for index in range(max(map(len, scaled), default=0))
    ]
    return Curve(
        tuple(math.fsum(column) / len(column) for column in columns),
        tuple(map(min, columns)),
        tuple(map(max, columns)),
    )
