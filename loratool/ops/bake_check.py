"""Checking what was baked: random rows of every tensor computed anew, in float64."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from loratool.core.errors import LoratoolError
from loratool.core.tensor import DTYPES, LazyTensor, torch_dtype
from loratool.files.checkpoint import WeightFile
from loratool.files.stream import stretch
from loratool.ops.bake_work import How
from loratool.ops.baking import Destination
from loratool.ops.pool import alone, each
from loratool.ops.rounding import FP8, largest, ulp
from loratool.ops.sites import Part, Site
from loratool.ops.stored import scale_column, size_of
from loratool.ops.updates import adder, pair_of

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


class RowCheck:
    """Looks at random rows of tensors that were written, computed anew in float64: nothing untouched is looked at.

    Rows to which only products are added are looked at in a thread of its own while others are baked, many together:
    small steps would mostly wait for Python's lock. The rest has to wait for `result`. Leaving the block ends the
    thread, also if not all is done.
    """

    def __init__(self, destinations: Mapping[WeightFile, Destination], how: How) -> None:
        self._destinations, self._how = destinations, how
        self._chance = random.Random()
        self._lock = threading.Lock()
        self._waiting: dict[tuple[bool, str, str, int], list[_Sample]] = {}
        self._pool = ThreadPoolExecutor(1, "loratool-rows", initializer=alone)
        self._begun: list[Future[_Seen]] = []

    def __enter__(self) -> RowCheck:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, site: Site) -> None:
        """A site of which everything is written. From any thread."""
        height, width = size_of(site.tensor)
        first = self._chance.randrange(max(1, height - ROWS + 1))
        rows = range(first, min(first + ROWS, height if site.tensor.numel else 0))
        sample = _Sample(site, rows, _products(site, rows))
        kind = sample.products is None, site.tensor.dtype, site.dtype, width
        with self._lock:
            waiting = self._waiting.setdefault(kind, [])
            waiting.append(sample)
            if len(waiting) == _BATCH and sample.products is not None:
                self._begin(self._waiting.pop(kind))

    def result(self, tick: Callable[[int], None]) -> Checked:
        """What was found in all sites; `tick` is called with numbers of them.

        Raises NotWritten for a value that is farther off than one rounding of a float32 result explains.
        """
        slow = []
        for kind, waiting in self._waiting.items():
            if kind[0]:
                slow += [waiting[at : at + _BATCH] for at in range(0, len(waiting), _BATCH)]
            else:
                self._begin(waiting)
        found = []
        for future in self._begun:
            found.append(future.result())
            tick(found[-1].sites)

        def look(batch: Sequence[_Sample]) -> _Seen:
            seen = self._look(batch)
            tick(seen.sites)
            return seen

        found += each(look, slow)
        sites, rows = sum(one.sites for one in found), sum(one.rows for one in found)
        return Checked(0, sites, rows, max((one.worst for one in found), default=0.0))

    def _begin(self, batch: Sequence[_Sample]) -> None:
        self._begun.append(self._pool.submit(self._look, batch))

    def _look(self, batch: Sequence[_Sample]) -> _Seen:
        samples = [sample for sample in batch if sample.rows]
        off = _off(samples, self._destinations, self._how) if samples else 0.0
        return _Seen(len(batch), sum(len(sample.rows) for sample in samples), off)


class _Seen(NamedTuple):
    """What was seen of some sites."""

    sites: int
    rows: int
    worst: float


class _Product(NamedTuple):
    """What two matrices add to rows `row:` of a sample: `left @ right * scale`."""

    row: int
    left: LazyTensor
    right: LazyTensor
    scale: float


class _Sample(NamedTuple):
    """Rows of a site that are looked at, and what is added to them, if that is nothing but products."""

    site: Site
    rows: range
    products: Sequence[_Product] | None


def _products(site: Site, rows: range) -> list[_Product] | None:
    """All that is added to rows of a site; None where a part adds something else, or whole columns."""
    found = []
    for part in site.parts:
        if not isinstance(part, Part) or part.span.transposed or part.module.magnitude is not None:
            return None
        pair = pair_of(part.module) if part.module.family.additive else None
        if pair is None or pair[2]:
            return None
        first, last = max(rows.start, part.first), min(rows.stop, part.last)
        if first < last:
            start = part.span.start + first - part.first
            left = pair[0].rows(start, start + last - first)
            found.append(_Product(first - rows.start, left, pair[1], part.module.scale * part.strength))
    return found


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
    return _judged(samples, base, _exact(samples, base, how), found, unit, how)


def _exact(samples: Sequence[_Sample], base: Tensor, how: How) -> Tensor:
    """What the rows become, in float64. Products of one shape are made together."""
    exact = base.clone()
    alike: dict[object, list[tuple[int, _Product]]] = {}
    at = 0
    for sample in samples:
        here = slice(at, at + len(sample.rows))
        if sample.products is None:
            for part in sample.site.parts:
                one = adder(part, "cpu", how.norm, torch.float64, few=True)
                one.add(exact[here], base[here], sample.rows.start)
        for product in sample.products or ():
            kind = product.left.dtype, product.left.shape, product.right.dtype
            alike.setdefault(kind, []).append((at + product.row, product))
        at += len(sample.rows)
    for some in alike.values():
        left = torch.stack([product.left.load() for _, product in some]).double()
        right = torch.stack([product.right.load() for _, product in some]).double()
        scales = torch.tensor([product.scale for _, product in some], dtype=torch.float64)
        made = (left @ right) * scales.reshape(-1, 1, 1)
        rows = torch.tensor([at for at, _ in some]).unsqueeze(1) + torch.arange(made.shape[1])
        exact.index_add_(0, rows.flatten(), made.flatten(0, 1))
    return exact


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
