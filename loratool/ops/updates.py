"""Updates: the rows that a module adds to a weight, block by block, float32, on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from loratool.core.errors import FormatError
from loratool.core.module import Module
from loratool.core.tensor import LazyTensor
from loratool.ops.finite import not_finite
from loratool.ops.sites import Fixed, Part
from loratool.ops.stored import blocks_of, weight_rows

NORMS = ("paper", "comfyui")
"""What a DoRA magnitude is divided by: the norm of W + delta, or per row that of W, as ComfyUI does."""


class Adder(Protocol):
    """Something that is added to the rows of one stored tensor."""

    def add(self, total: Tensor, base: Tensor, row: int) -> None:
        """Adds to `total`, rows `row:` of the stored tensor, float32, flattened to two dimensions; `base` are the
        rows before anything was added."""


Room = Callable[[tuple[int, int]], Tensor]
"""Gives memory for a matrix of that shape, the same each time: taking new memory costs more than computing in it."""


def adder(
    part: Part | Fixed,
    device: str,
    norm: str,
    work: torch.dtype = torch.float32,
    room: Room | None = None,
    few: bool = False,
) -> Adder:
    """What a part of a site adds, with its factors on `device` in `work`. NaN and infinity are not looked for.

    Products are made in `room`, if there is one: it must be free whenever `add` is called. Where only `few` rows will
    be asked for, of the factors no more is read each time than those rows need.
    """
    if isinstance(part, Fixed):
        return _Values(part, device, work)
    if not part.module.family.additive:
        return _Sum(replace(part, strength=1.0), _Change(part, device, work))
    if few and not part.span.transposed:
        update: Update = _Cut(part.module, device, work)
    else:
        update = update_of(part.module, device, work, room)
    if part.module.magnitude is None:
        return _Sum(part, update)
    return _Dora(part, update, norm, device, work)


# -- updates ----------------------------------------------------------------------------------------------------------


class Update(Protocol):
    """The dense update of a module, in parts. What is given may be written to, and holds until the next call."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start:stop`, all columns."""

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns `start:stop`, all rows."""


def update_of(module: Module, device: str, work: torch.dtype = torch.float32, room: Room | None = None) -> Update:
    """The update of a module, scale included, its factors on `device`."""
    pair = pair_of(module)
    if pair is None:
        return _Cut(module, device, work)
    left, right, turned = pair
    return _Pair(left.load(device).to(work), right.load(device).to(work), module.scale, turned, room)


def pair_of(module: Module) -> tuple[LazyTensor, LazyTensor, bool] | None:
    """The two matrices whose product times the scale is the update, or, if the third says so, its transpose."""
    product = module.product
    if product is None or not product.whole or product.core is not None or product.right is None:
        return None
    return product.left, product.right, product.transposed


def check_parts(parts: Sequence[Part | Fixed]) -> None:
    """Raises FormatError, with the adapter's file, for a part that holds NaN or infinite values, or has such an alpha.

    Asked when a result is not finite: looking at every factor beforehand would make a GPU wait for each.
    """
    for part in parts:
        if isinstance(part, Fixed):
            tensors, title, scale = [part.values], part.title, part.strength
        else:
            tensors, title, scale = list(part.module.tensors.values()), part.module.title, part.module.scale
        if not math.isfinite(scale):
            raise FormatError(
                "its alpha is NaN or infinite", file=part.adapter, key=title, hint="the file is broken: use another"
            )
        for tensor in tensors:
            if not bool(tensor.load().double().isfinite().all()):
                raise not_finite(title).with_file(part.adapter)


class _Pair:
    """left @ right times scale: the same operations in the same order as `Family.delta`, so the same bits."""

    def __init__(self, left: Tensor, right: Tensor, scale: float, turned: bool, room: Room | None) -> None:
        self._left, self._right, self._scale, self._turned = left, right, scale, turned
        self._room = room

    def rows(self, start: int, stop: int) -> Tensor:
        if self._turned:
            return self._times(self._left, self._right[:, start:stop]).T
        return self._times(self._left[start:stop], self._right)

    def columns(self, start: int, stop: int) -> Tensor:
        if self._turned:
            return self._times(self._left[start:stop], self._right).T
        return self._times(self._left, self._right[:, start:stop])

    def _times(self, left: Tensor, right: Tensor) -> Tensor:
        made = (
            left @ right if self._room is None else torch.mm(left, right, out=self._room((len(left), right.shape[1])))
        )
        return made if self._scale == 1 else made.mul_(self._scale)


class _Cut:
    """A family whose update is cut at multiples of its grain, or is made whole where it cannot be cut."""

    def __init__(self, module: Module, device: str, work: torch.dtype) -> None:
        self._module, self._device, self._work = module, device, work
        self._grain = module.family.grain(module.shapes)

    def rows(self, start: int, stop: int) -> Tensor:
        height = self._module.shape[0]
        first, last = (0, height) if not self._grain else (start - start % self._grain, height)
        if self._grain:
            last = min(-(-stop // self._grain) * self._grain, height)
        cut = (first, last) != (0, height)
        factors = self._module.family.rows(self._module.factors, first, last) if cut else self._module.factors
        loaded = {role: factor.load(self._device).to(self._work) for role, factor in factors.items()}
        delta = self._module.family.delta(loaded, self._module.scale)
        return delta.reshape(len(delta), -1)[start - first : stop - first]

    def columns(self, start: int, stop: int) -> Tensor:
        return self.rows(0, self._module.shape[0])[:, start:stop]


_ROWS = 4096
"""Rows that are made at once of what a family makes of a weight: rotations are computed for each such stretch."""


class _Change:
    """What a family that is not additive makes of the weight at a part's strength, less the weight.

    The base's own rows are read for it, in blocks that the family can cut, or all of them, which are then kept. What
    other adapters add to the weight has no part in it.
    """

    def __init__(self, part: Part, device: str, work: torch.dtype) -> None:
        self._part, self._device, self._work = part, device, work
        self._grain = part.module.family.grain(part.module.shapes)
        self._last: tuple[int, int, Tensor] | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        first, last = 0, self._part.module.shape[0]
        if self._grain:
            step = self._grain * max(_ROWS // self._grain, 1)
            first, last = start - start % step, min(-(-stop // step) * step, last)
        return self._made(first, last)[start - first : stop - first].clone()

    def columns(self, start: int, stop: int) -> Tensor:
        return self._made(0, self._part.module.shape[0])[:, start:stop].clone()

    def _made(self, first: int, last: int) -> Tensor:
        if self._last is None or self._last[:2] != (first, last):
            module = self._part.module
            cut = (first, last) != (0, module.shape[0])
            factors = module.family.rows(module.factors, first, last) if cut else module.factors
            loaded = {role: factor.load(self._device).to(self._work) for role, factor in factors.items()}
            weight = self._weight(first, last)
            made = module.family.apply(loaded, module.scale, weight, self._part.strength)
            self._last = first, last, made - weight
        return self._last[2]

    def _weight(self, first: int, last: int) -> Tensor:
        """Rows of the base's weight, wherever they are."""
        found = []
        for span, tensor, scale in self._part.places:
            a, b = max(first, span.start), min(last, span.stop)
            if a >= b:
                continue
            start, stop = span.first + a - span.start, span.first + b - span.start
            if span.transposed:
                whole = weight_rows(tensor, scale, 0, tensor.shape[0], self._device, self._work)
                found.append(whole[:, start:stop].T)
            else:
                found.append(weight_rows(tensor, scale, start, stop, self._device, self._work))
        return torch.cat(found)


# -- adders -----------------------------------------------------------------------------------------------------------


class _Values:
    """A bias, or a whole tensor that replaces the base's."""

    def __init__(self, fixed: Fixed, device: str, work: torch.dtype) -> None:
        self._fixed = fixed
        values = fixed.values.load(device).to(work)
        self._values = values.reshape(values.shape[0] if values.dim() else 1, -1)

    def add(self, total: Tensor, base: Tensor, row: int) -> None:
        a, b = max(row, self._fixed.first), min(row + len(total), self._fixed.last)
        if a >= b:
            return
        start = self._fixed.start + a - self._fixed.first
        values, here = self._values[start : start + b - a], slice(a - row, b - row)
        if not self._fixed.replaces:
            total[here].add_(values * self._fixed.strength)
        elif self._fixed.strength == 1:
            total[here] = values + (total[here] - base[here])  # where nothing else was added, the very values
        else:
            total[here].add_((values - base[here]) * self._fixed.strength)


class _Sum:
    """strength * delta."""

    def __init__(self, part: Part, update: Update) -> None:
        self._part, self._update = part, update

    def add(self, total: Tensor, base: Tensor, row: int) -> None:
        found = self._made(row, len(total))
        if found is not None:
            update, here = found
            total[here].add_(update.T if self._part.span.transposed else update)

    def whole(self, row: int, height: int) -> Tensor | None:
        """What is added to rows of the stored tensor, if it is something to all of them, in the tensor's own shape."""
        part = self._part
        if part.span.transposed or row < part.first or row + height > part.last:
            return None
        found = self._made(row, height)
        return None if found is None else found[0]

    def _made(self, row: int, height: int) -> tuple[Tensor, tuple[slice, slice]] | None:
        found = block_of(self._part, self._update, row, height)
        if found is not None and self._part.strength != 1:
            found[0].mul_(self._part.strength)
        return found


def alone(adders: Sequence[Adder], row: int, height: int) -> Tensor | None:
    """The update of stored rows, if one sum is all that is added to them; it holds until the next is made."""
    only = adders[0] if len(adders) == 1 else None
    return only.whole(row, height) if isinstance(only, _Sum) else None


def block_of(part: Part, update: Update, row: int, height: int) -> tuple[Tensor, tuple[slice, slice]] | None:
    """The part of an update, as (out, in), that falls on stored rows `row:row + height`, and where it goes there."""
    span = part.span
    if span.transposed:
        columns = update.columns(row, row + height)[span.start : span.stop]
        return columns, (slice(None), slice(part.first, part.last))
    a, b = max(row, part.first), min(row + height, part.last)
    if a >= b:
        return None
    start = span.start + a - part.first
    return update.rows(start, start + b - a), (slice(a - row, b - row), slice(None))


def dora_gain(part: Part, update: Update, weight: Tensor, row: int, norm: str, device: str) -> Tensor:
    """What a DoRA part multiplies W + delta by, in stored rows `row:` whose base values are `weight` (float64).

    A column with one value per row, or a row with one per column, of the block as `(out, in)`; float32. Empty where the
    part changes none of these rows.
    """
    found = block_of(part, update, row, len(weight))
    if found is None:
        return torch.zeros(0, 1)
    delta, here = found
    rows = weight[here].T if part.span.transposed else weight[here]
    return _Dora(part, update, norm, device, torch.float64).gain(part, row, rows, rows + delta).float()


class _Dora:
    """strength * (m (W + delta) / norm - W); Liu et al. 2024, arXiv:2402.09353."""

    def __init__(self, part: Part, update: Update, norm: str, device: str, work: torch.dtype) -> None:
        module = part.module
        assert module.magnitude is not None
        self._part, self._update, self._work = part, update, work
        self._magnitude = module.magnitude.load(device).to(work).flatten()
        self._of_base = norm == "comfyui" and module.magnitude_per_row
        # One norm per row of a weight that is stored by rows needs no other rows.
        alone = module.magnitude_per_row and not part.span.transposed
        self._norms = None if alone else _norms(part, update, device, work, self._of_base)

    def add(self, total: Tensor, base: Tensor, row: int) -> None:
        part = self._part
        found = block_of(part, self._update, row, len(total))
        if found is None:
            return
        update, here = found
        weight = base[here].T if part.span.transposed else base[here]
        whole = weight + update
        change = whole * self.gain(part, row, weight, whole) - weight
        if part.strength != 1:
            change = change * part.strength
        total[here].add_(change.T if part.span.transposed else change)

    def gain(self, part: Part, row: int, weight: Tensor, whole: Tensor) -> Tensor:
        """magnitude / norm of the rows or columns of a block."""
        span, module = part.span, part.module
        if self._norms is None:
            start = span.start + max(row - part.first, 0)
            magnitude = self._magnitude[start : start + len(whole)]
            norms = torch.linalg.vector_norm(weight if self._of_base else whole, dim=1)
            return (magnitude / self._kept(norms)).unsqueeze(1)
        ratio = self._magnitude / self._kept(self._norms)
        if module.magnitude_per_row:
            return ratio[span.start : span.stop].unsqueeze(1)
        ratio = ratio.repeat_interleave(module.delta_width // len(ratio))
        return ratio[row : row + whole.shape[1]] if span.transposed else ratio

    def _kept(self, norms: Tensor) -> Tensor:
        # ComfyUI's guard against rows of zeros.
        return norms + torch.finfo(torch.float32).eps if self._of_base else norms


def _norms(part: Part, update: Update, device: str, work: torch.dtype, of_base: bool) -> Tensor:
    """The norms that a magnitude is divided by, over all spans of its module, with float64 sums; reads the base."""
    module = part.module
    assert module.magnitude is not None
    out, width = module.shape[0], module.delta_width
    sums = torch.zeros(out if module.magnitude_per_row else width, dtype=torch.float64, device=device)
    for span, tensor, scale in part.places:
        whole = Part(module, 1.0, span, ())
        for row, block in blocks_of(tensor, scale, device, work):
            here = block_of(whole, update, row, len(block))
            if here is None:
                continue
            values, at = here
            weight = block[at].T if span.transposed else block[at]
            squares = (weight if of_base else weight + values).double().square()
            if module.magnitude_per_row:
                start = span.start if span.transposed else span.start + max(row - span.first, 0)
                sums[start : start + len(squares)] += squares.sum(1)
            else:
                first = row if span.transposed else 0
                sums[first : first + squares.shape[1]] += squares.sum(0)
    if not module.magnitude_per_row:
        sums = sums.reshape(module.magnitude.numel, -1).sum(1)
    return sums.sqrt().to(work)
