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
from loratool.ops.baking import Destination, How
from loratool.ops.pool import each
from loratool.ops.rounding import FP8, largest
from loratool.ops.sites import Site
from loratool.ops.stored import dequantised, size_of, weight_rows
from loratool.ops.updates import adder

ROWS = 2
"""Rows of every tensor that are computed anew."""

_WORK = 1e-5
"""What float32 may be off, relative to the largest value of a row: sums of some hundred products, and one DoRA norm."""


@dataclass(frozen=True)
class Checked:
    """What reading the output back showed: `bytes` of untouched data are the base's, `rows` of `tensors` are right.

    `worst` is the largest difference of a value from what float64 gives, in units of the last place of its dtype.
    """

    bytes: int
    tensors: int
    rows: int
    worst: float


class NotWritten(LoratoolError):
    """What was written is not what was computed."""


def check_rows(
    sites: Sequence[Site], destinations: Mapping[WeightFile, Destination], how: How, tick: Callable[[int], None]
) -> tuple[int, float]:
    """Computes random rows of every site in float64, and says how many, and how far off the worst value is (in ulp).

    Raises NotWritten for a value that is farther off than one rounding of a float32 result explains.
    """
    chance = random.Random()

    def look(site: Site) -> tuple[int, float]:
        rows = size_of(site.tensor)[0] if site.tensor.numel else 0
        chosen = sorted(chance.sample(range(rows), min(ROWS, rows)))
        found = max((_off(site, destinations[site.file], how, row) for row in chosen), default=0.0)
        tick(1)
        return len(chosen), found

    found = each(look, sites)
    return sum(count for count, _ in found), max((off for _, off in found), default=0.0)


def _off(site: Site, to: Destination, how: How, row: int) -> float:
    base = weight_rows(site.tensor, site.scale, row, row + 1, "cpu", torch.float64)
    exact = base.clone()
    for part in site.parts:
        adder(part, "cpu", how.norm, torch.float64).add(exact, base, row)
    stored, scale = _written(site, to, row)
    found = dequantised(stored, scale, 0, torch.float64)
    unit = torch.ones(1, dtype=torch.float64) if scale is None else scale.double()
    if site.dtype in FP8:  # what is larger becomes the largest number
        exact = exact.clamp(-largest(site.dtype) * unit, largest(site.dtype) * unit)
    ulp = _ulp(exact / unit, site.dtype) * unit
    slack = _WORK * float((base.abs() + (exact - base).abs()).max())
    limit = (1.0 if how.rounding == "stochastic" else 0.5) * ulp + slack
    finite = exact.isfinite()
    wrong = ((found - exact).abs() > limit) & finite | (found.isfinite() != finite)
    if bool(wrong.any()):
        at = int(wrong[0].nonzero()[0])
        raise NotWritten(
            f"row {row}, column {at} holds {float(found[0, at]):.8g}, expected {float(exact[0, at]):.8g}",
            file=site.file.path,
            key=site.key,
            hint="nothing was kept; please report this",
        )
    return float(((found - exact).abs() / ulp)[finite].max()) if bool(finite.any()) else 0.0


def _written(site: Site, to: Destination, row: int) -> tuple[Tensor, Tensor | None]:
    """One row of the output, and its scale."""
    _, columns = size_of(site.tensor)
    nbytes = columns * DTYPES[site.dtype] // 8
    room = bytearray(nbytes)
    to.output.read(memoryview(room), to.plan.start(site.key) + row * nbytes)
    stored = torch.frombuffer(room, dtype=torch_dtype(site.dtype)).reshape(1, columns)
    if site.scale is None or site.scale_key is None:
        return stored, None
    data = bytearray(site.scale.nbytes)
    to.output.read(memoryview(data), to.plan.start(site.scale_key))
    whole = torch.frombuffer(data, dtype=torch_dtype(site.scale.dtype)).float().reshape(-1, 1)
    return stored, whole if len(whole) == 1 else whole[row : row + 1]


def _ulp(values: Tensor, dtype: str) -> Tensor:
    """The distance of neighbouring numbers of a dtype around float64 values."""
    kind = torch.finfo(torch_dtype(dtype))
    size = values.abs().clamp(kind.smallest_normal, kind.max)
    return kind.eps * torch.exp2(torch.floor(torch.log2(size)))
