"""Predict: what a weight was before an update was added, from what it became: the same bits on every device.

What is baked is rounded once from float32, whose sums differ from device to device. The way back must not: it is
computed from factors rounded to so few bits that float64 holds every sum of their products exactly, in any order. What
such a prediction misses is stored (see `frames`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from loratool.core.module import Module
from loratool.core.tensor import LazyTensor, torch_dtype
from loratool.ops.pool import each
from loratool.ops.rounding import FP8, largest, other_int
from loratool.ops.sites import Fixed, Part, Site
from loratool.ops.updates import Update, block_of, dora_gain, update_of

_MANTISSA = 53
_SINGLE = 24


def coarse(module: Module) -> Module:
    """The module with factors of so few bits that its update is exact in float64, but for its scale.

    A product of n factors with c terms in all its sums needs n * bits + log2(c) <= 53 bits. Factors keep their dtype
    where it holds them, else they are float32.
    """
    roles = [role for role in module.factors if role != "bias"]
    sums = math.prod(_inner(module, role) for role in roles)
    bits = min(_SINGLE, (_MANTISSA - math.ceil(math.log2(max(sums, 1)))) // len(roles))
    factors = {role: _coarse(factor, bits) if role in roles else factor for role, factor in module.factors.items()}
    return replace(module, factors=factors, keys={})


def _inner(module: Module, role: str) -> int:
    """The most terms that a sum over one side of a factor can have: its smallest side, or both of a core."""
    shape = module.factors[role].shape
    return math.prod(shape[:2]) if role in ("mid", "t1", "t2") else min(shape[:2])


def _coarse(factor: LazyTensor, bits: int) -> LazyTensor:
    values = factor.load().double()
    peak = float(values.abs().max()) if values.numel() else 0.0
    if not peak or not math.isfinite(peak):
        return factor
    unit = 2.0 ** (bits - math.frexp(peak)[1])
    values = (values * unit).round() / unit
    stored = values.to(torch_dtype(factor.dtype))
    return LazyTensor.from_torch(stored if bool((stored.double() == values).all()) else values.float())


@dataclass(frozen=True, eq=False)
class Back:
    """What has to be taken off one tensor's rows: its parts, with coarse modules, on a device."""

    parts: Sequence[Part | Fixed]
    dtype: str
    device: str
    norm: str = "paper"

    @cached_property
    def _updates(self) -> list[Update | None]:
        return [
            None if isinstance(part, Fixed) else update_of(part.module, self.device, torch.float64)
            for part in self.parts
        ]

    def gains(self, stored: Tensor, row: int, old: Tensor | None) -> list[Tensor]:
        """What DoRA parts multiply rows `row:` by, as float32, from the base's own rows (`old`: their fp8 scale)."""
        weight = stored.double() if old is None else stored.double() * old.double()
        return [
            dora_gain(part, update, weight, row, self.norm, self.device)
            for part, update in zip(self.parts, self._updates, strict=True)
            if isinstance(part, Part) and update is not None and part.module.magnitude is not None
        ]

    def rows(
        self, written: Tensor, row: int, gains: Sequence[Tensor], old: Tensor | None, new: Tensor | None
    ) -> Tensor:
        """The predicted rows `row:` of the base, in its dtype: what was written, less what was added.

        `old` and `new` are the fp8 scales before and after (columns for these rows). Float64 throughout.
        """
        total = written.to(torch.float64, copy=True)  # a copy: float64 is what it may be already
        if new is not None:
            total = total * new.double()
        share = torch.ones(1, 1, dtype=torch.float64, device=total.device)
        left = list(gains)
        for part, made in zip(self.parts, self._updates, strict=True):
            if isinstance(part, Fixed) or made is None:
                if isinstance(part, Fixed):
                    self._without(total, part, row)
                continue
            found = block_of(part, made, row, len(total))
            gain = None if part.module.magnitude is None else _shaped(left.pop(0), part).to(total)
            if found is None:
                continue
            update, here = found
            update = update.mul_(part.strength)
            if gain is not None:
                # base + strength * (gain * (base + delta) - base)
                update = update * gain
                share = share.expand(total.shape).clone() if share.numel() == 1 else share
                more = (gain - 1) * part.strength
                share[here] += (more.T if part.span.transposed else more).expand_as(share[here])
            total[here] -= update.T if part.span.transposed else update
        total = total / share
        if old is not None:
            total = total / old.double()
        if self.dtype in FP8:
            total = total.clamp(-largest(self.dtype), largest(self.dtype))
        # A NaN has many codes, and devices choose differently.
        near = (total if self.dtype == "F64" else total.float()).to(torch_dtype(self.dtype))
        kind = other_int(near)
        bits = torch.where(near.float().isfinite(), near.view(kind), written.view(kind))
        return bits.view(near.dtype)

    def _without(self, total: Tensor, fixed: Fixed, row: int) -> None:
        a, b = max(row, fixed.first), min(row + len(total), fixed.last)
        if a >= b or fixed.replaces:  # nothing is left of what was replaced
            return
        values = fixed.values.load(self.device).double()
        values = values.reshape(values.shape[0] if values.dim() else 1, -1)
        start = fixed.start + a - fixed.first
        total[a - row : b - row] -= values[start : start + b - a] * fixed.strength


def _shaped(gain: Tensor, part: Part) -> Tensor:
    """One value per row as a column, one per column as a row."""
    return gain.reshape((-1, 1) if part.module.magnitude_per_row else (1, -1))


def coarse_parts(sites: Sequence[Site]) -> dict[int, list[Part | Fixed]]:
    """id of a site -> its parts with coarse modules; parts of one module share it.

    Those of families that are not additive are left out: what they do to a weight cannot be told from what became of
    it, and so all of it is stored.
    """
    parts = {id(site): [part for part in site.parts if _told(part)] for site in sites}
    modules = {id(part.module): part.module for own in parts.values() for part in own if isinstance(part, Part)}
    made = dict(zip(modules, each(coarse, list(modules.values())), strict=True))
    return {
        id(site): [
            replace(part, module=made[id(part.module)]) if isinstance(part, Part) else part for part in parts[id(site)]
        ]
        for site in sites
    }


def _told(part: Part | Fixed) -> bool:
    return isinstance(part, Fixed) or part.module.family.additive
