"""Checking what was baked: random rows of every tensor computed anew, in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.core.errors import LoratoolError
from loratool.core.tensor import DTYPES, torch_dtype
from loratool.files.checkpoint import WeightFile
from loratool.files.stream import stretch
from loratool.ops.bake_work import How
from loratool.ops.baking import Destination
from loratool.ops.pool import each
from loratool.ops.rounding import FP8, largest, ulp
from loratool.ops.sites import Site
from loratool.ops.stored import scale_column, size_of
from loratool.ops.updates import adder

ROWS = 2
"""Rows of every tensor, one below the other, that are computed anew: two in one place take as long as one."""

_BATCH = 16
"""Tensors of one width that are looked at together: each step of Python for one alone would take as long."""

_WORK = 1e-5
"""What float32 may be off, relative to the largest value of a row: sums of some hundred products, and one DoRA norm."""


@dataclass(frozen=True)
class Checked:
    """What reading the output back showed: `bytes` of untouched data are the base's, `rows` of `tensors` are right.

    `worst` is the largest difference of a value from what float64 gives, in units of the last place of its dtype, or of
    what it is the sum of, where that is larger.
    """

    bytes: int
    tensors: int
    rows: int
    worst: float


class NotWritten(LoratoolError):
    """What was written is not what was computed."""


def check_rows(
    sites: Sequence[Site], destinations: Mapping[WeightFile, Destination], how: How, tick: Callable[[int], None]
) -> Checked:
    """Random rows of all sites, computed anew; `tick` is called with 1 for each site. Nothing untouched is looked at.

    When all is written: beside the baking each small step of this would wait for its turn. Raises NotWritten for a
    value that is farther off than one rounding of a float32 result explains.
    """
    chance = random.Random()
    alike: dict[object, list[_Sample]] = {}
    for site in sites:
        height = size_of(site.tensor)[0] if site.tensor.numel else 0
        first = chance.randrange(max(1, height - ROWS + 1))
        kind = site.tensor.dtype, site.dtype, size_of(site.tensor)[1]
        alike.setdefault(kind, []).append(_Sample(site, range(first, min(first + ROWS, height))))

    def look(batch: Sequence[_Sample]) -> tuple[int, float]:
        samples = [sample for sample in batch if sample.rows]
        off = _off(samples, destinations, how) if samples else 0.0
        tick(len(batch))
        return sum(len(sample.rows) for sample in samples), off

    found = each(look, [some[at : at + _BATCH] for some in alike.values() for at in range(0, len(some), _BATCH)])
    return Checked(0, len(sites), sum(rows for rows, _ in found), max((off for _, off in found), default=0.0))


@dataclass(frozen=True, eq=False)
class _Sample:
    """Rows of a site that are looked at."""

    site: Site
    rows: range


def _off(samples: Sequence[_Sample], destinations: Mapping[WeightFile, Destination], how: How) -> float:
    """How far off the worst value of some rows of tensors of the same dtypes and width is, in ulp."""
    dtype = samples[0].site.dtype
    base = _rows_of(samples, samples[0].site.tensor.dtype, _read_base)
    found = _rows_of(samples, dtype, lambda sample, at, room: _read_written(sample, at, room, destinations))
    old, unit = torch.ones(len(base), 1, dtype=torch.float64), torch.ones(len(base), 1, dtype=torch.float64)
    at = 0
    for sample in samples:
        if sample.site.scale is not None:
            here = slice(at, at + len(sample.rows))
            old[here] = _of_rows(scale_column(sample.site.scale, "cpu"), sample.rows)
            unit[here] = _of_rows(_scale_written(sample.site, destinations[sample.site.file]), sample.rows)
        at += len(sample.rows)
    base, found = base * old, found * unit
    exact = base.clone()
    at = 0
    for sample in samples:
        here = slice(at, at + len(sample.rows))
        for part in sample.site.parts:
            one = adder(part, "cpu", how.norm, torch.float64, few=True)
            one.add(exact[here], base[here], sample.rows.start)
        at += len(sample.rows)
    return _judged(samples, base, exact, found, unit, how)


def _judged(samples: Sequence[_Sample], base: Tensor, exact: Tensor, found: Tensor, unit: Tensor, how: How) -> float:
    """The worst value, in ulp. Raises NotWritten for one that is wrong."""
    dtype = samples[0].site.dtype
    if dtype in FP8:  # what is larger becomes the largest number
        exact = torch.maximum(torch.minimum(exact, largest(dtype) * unit), -largest(dtype) * unit)
    step = ulp(exact / unit, dtype) * unit
    finite = exact.isfinite()
    slack = _WORK * torch.where(finite, base.abs() + (exact - base).abs(), 0.0).amax(1, keepdim=True)
    limit = (1.0 if how.rounding == "stochastic" else 0.5) * step + slack
    off = (found - exact).abs()
    # Written so that NaN is wrong, too.
    wrong = ~(off <= limit) & finite | (found.isfinite() != finite)
    if bool(wrong.any()):
        at, column = (int(index) for index in wrong.nonzero()[0])
        site, row = [(sample.site, row) for sample in samples for row in sample.rows][at]
        raise NotWritten(
            f"row {row}, column {column} holds {float(found[at, column]):.8g}, expected {float(exact[at, column]):.8g}",
            file=site.file.path,
            key=site.key,
            hint="nothing was kept; please report this",
        )
    # In units of the larger of what was added: where two numbers cancel, their own rounding errors are what is left.
    terms = torch.maximum(exact.abs(), torch.maximum(base.abs(), (exact - base).abs()))
    units = ulp(terms / unit, dtype) * unit
    return float((off / units)[finite].max()) if bool(finite.any()) else 0.0


# -- reading ----------------------------------------------------------------------------------------------------------


def _rows_of(samples: Sequence[_Sample], dtype: str, read: Callable[[_Sample, int, memoryview], None]) -> Tensor:
    """All rows of the samples below one another, as they are stored, in float64.

    `read` fills memory with the bytes of a sample's tensor from one on.
    """
    _, columns = size_of(samples[0].site.tensor)
    nbytes = columns * DTYPES[dtype] // 8
    count = sum(len(sample.rows) for sample in samples)
    data = bytearray(nbytes * count)
    room, at = memoryview(data), 0
    for sample in samples:
        size = nbytes * len(sample.rows)
        read(sample, nbytes * sample.rows.start, room[at : at + size])
        at += size
    return torch.frombuffer(data, dtype=torch_dtype(dtype)).reshape(count, columns).double()


def _read_base(sample: _Sample, at: int, room: memoryview) -> None:
    source = stretch(sample.site.tensor)
    source.file.readinto(room, source.start + at)


def _read_written(sample: _Sample, at: int, room: memoryview, destinations: Mapping[WeightFile, Destination]) -> None:
    to = destinations[sample.site.file]
    to.output.read(room, to.plan.start(sample.site.key) + at)


def _scale_written(site: Site, to: Destination) -> Tensor:
    """The scale of the output, as a column."""
    assert site.scale is not None and site.scale_key is not None
    data = bytearray(site.scale.nbytes)
    to.output.read(memoryview(data), to.plan.start(site.scale_key))
    return torch.frombuffer(data, dtype=torch_dtype(site.scale.dtype)).float().reshape(-1, 1)


def _of_rows(scale: Tensor, rows: Sequence[int]) -> Tensor:
    return (scale if len(scale) == 1 else scale[list(rows)]).double()
