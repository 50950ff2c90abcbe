"""Checking what was baked: random rows of every tensor computed anew, in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from loratool.core.errors import LoratoolError
from loratool.core.tensor import DTYPES, torch_dtype
from loratool.files.checkpoint import WeightFile
from loratool.ops.baking import Destination, How
from loratool.ops.pool import alone
from loratool.ops.rounding import FP8, largest, ulp
from loratool.ops.sites import Site
from loratool.ops.stored import dequantised, size_of, weight_rows
from loratool.ops.updates import adder

ROWS = 2
"""Rows of every tensor that are computed anew."""

_CHECKERS = 2

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
    """Computes random rows of sites in float64, each as soon as it is written, in a few threads of its own.

    `tick` is called with 1 for each. Leaving the block ends the threads, also if not all is done.
    """

    def __init__(self, destinations: Mapping[WeightFile, Destination], how: How, tick: Callable[[int], None]) -> None:
        self._destinations, self._how, self._tick = destinations, how, tick
        self._chance = random.Random()
        self._pool = ThreadPoolExecutor(_CHECKERS, "loratool-check", initializer=alone)
        self._futures: list[Future[tuple[int, float]]] = []

    def __enter__(self) -> RowCheck:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def written(self, site: Site) -> None:
        """Looks at a site, which is written."""
        self._futures.append(self._pool.submit(self._look, site))

    def result(self, compared: int) -> Checked:
        """What was found, when all is done. Raises NotWritten for a value that is farther off than one rounding of a
        float32 result explains."""
        found = [future.result() for future in self._futures]
        worst = max((off for _, off in found), default=0.0)
        return Checked(compared, len(found), sum(count for count, _ in found), worst)

    def _look(self, site: Site) -> tuple[int, float]:
        rows = size_of(site.tensor)[0] if site.tensor.numel else 0
        chosen = sorted(self._chance.sample(range(rows), min(ROWS, rows)))
        off = _off(site, self._destinations[site.file], self._how, chosen) if chosen else 0.0
        self._tick(1)
        return len(chosen), off


def _off(site: Site, to: Destination, how: How, rows: Sequence[int]) -> float:
    """How far off the worst value of some rows is, in ulp."""
    base = torch.cat([weight_rows(site.tensor, site.scale, row, row + 1, "cpu", torch.float64) for row in rows])
    exact = base.clone()
    for part in site.parts:
        one = adder(part, "cpu", how.norm, torch.float64)
        for at, row in enumerate(rows):
            one.add(exact[at : at + 1], base[at : at + 1], row)
    stored, scale = _written(site, to, rows)
    found = dequantised(stored, scale, 0, torch.float64)
    unit = torch.ones(1, dtype=torch.float64) if scale is None else scale.double()
    if site.dtype in FP8:  # what is larger becomes the largest number
        exact = exact.clamp(-largest(site.dtype) * unit, largest(site.dtype) * unit)
    step = ulp(exact / unit, site.dtype) * unit
    finite = exact.isfinite()
    slack = _WORK * torch.where(finite, base.abs() + (exact - base).abs(), 0.0).amax(1, keepdim=True)
    limit = (1.0 if how.rounding == "stochastic" else 0.5) * step + slack
    off = (found - exact).abs()
    # Written so that NaN is wrong, too.
    wrong = ~(off <= limit) & finite | (found.isfinite() != finite)
    if bool(wrong.any()):
        at, column = (int(index) for index in wrong.nonzero()[0])
        raise NotWritten(
            f"row {rows[at]}, column {column} holds {float(found[at, column]):.8g}, "
            f"expected {float(exact[at, column]):.8g}",
            file=site.file.path,
            key=site.key,
            hint="nothing was kept; please report this",
        )
    # In units of the larger of what was added: where two numbers cancel, their own rounding errors are what is left.
    terms = torch.maximum(exact.abs(), torch.maximum(base.abs(), (exact - base).abs()))
    units = ulp(terms / unit, site.dtype) * unit
    return float((off / units)[finite].max()) if bool(finite.any()) else 0.0


def _written(site: Site, to: Destination, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Rows of the output, and their scale."""
    _, columns = size_of(site.tensor)
    nbytes = columns * DTYPES[site.dtype] // 8
    room = bytearray(nbytes * len(rows))
    for at, row in enumerate(rows):
        to.output.read(memoryview(room)[at * nbytes : (at + 1) * nbytes], to.plan.start(site.key) + row * nbytes)
    stored = torch.frombuffer(room, dtype=torch_dtype(site.dtype)).reshape(len(rows), columns)
    if site.scale is None or site.scale_key is None:
        return stored, None
    data = bytearray(site.scale.nbytes)
    to.output.read(memoryview(data), to.plan.start(site.scale_key))
    whole = torch.frombuffer(data, dtype=torch_dtype(site.scale.dtype)).float().reshape(-1, 1)
    return stored, whole if len(whole) == 1 else whole[list(rows)]
