"""BOFT: the weight is rotated in several stages of block-diagonal rotations (Liu et al. 2023, arXiv:2311.06243).

By rows, as LyCORIS trains it (`modules/boft.py`): `blocks` `(m, n, b, b)`, `Q = blocks - blocks.T`,
`R = (I + Q) (I - Q)^-1`. Stage i takes the rows in groups of 2 * 2^i * b/2, swaps the two halves' pieces (`(c g k) ->
(c k g)`, g = 2, k = 2^i * b/2), multiplies each block of b rows by `strength * R + (1 - strength) * I`, and swaps them
back. The stored alpha is a `constraint` as OFT's, over the blocks of all stages; `rescale` `(out, 1, ...)` multiplies
the rows of the result. Strength is LyCORIS' (and ComfyUI's, which applies it a second time to the whole change).

By columns, as PEFT trains it (`tuners/boft/layer.py`): `R` `(m, n, b, b)`, `Q = (R - R.T) / 2`,
`C = (I - Q) (I + Q)^-1`, `B = prod_i P_i blockdiag(C_i) P_i.T` with the butterfly permutations P_i (none where m is
1), and `W @ B.T` times `s` `(out, 1)` by rows is the new weight. PEFT knows no strength; each stage is weakened as
LyCORIS does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loratool.core.family import Factors, Part, Shapes
from loratool.families._base import Changing, cut_rows, stacked_rows, uncut
from loratool.families._rotation import cayley, constrained, eye_like

if TYPE_CHECKING:
    from torch import Tensor


class Boft(Changing):
    """A product of block-diagonal rotations of the rows, or of the input columns, of the weight."""

    id = "boft"
    title = "BOFT"
    alpha_role = "constraint"

    def problem(self, shapes: Shapes) -> str | None:
        """No blocks, or factors that do not fit them."""
        if ("blocks" in shapes) == ("R" in shapes):
            return "has its blocks twice" if "R" in shapes else "has no blocks: part of the module is missing"
        role = "blocks" if "blocks" in shapes else "R"
        shape = shapes[role]
        if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
            return f"{role} has shape {list(shape)}, expected stages of square blocks"
        size = shape[1] * shape[2]
        if (role == "blocks" or shape[0] > 1) and (shape[2] % 2 or size % (shape[2] << (shape[0] - 1))):
            return f"{role} has shape {list(shape)}: {shape[0]} stages cannot be made of {size} rows"
        if role == "R" and "s" not in shapes:
            return "has no s: part of the module is missing"
        for other, wanted in (("rescale", size), ("constraint", 1)):
            if other in shapes and math.prod(shapes[other]) != wanted:
                return f"{other} has shape {list(shapes[other])}, expected {wanted} values"
        return None

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """`(out, 0)` by rows, `(out, in * kh * kw)` by columns."""
        if "R" in shapes:
            return math.prod(shapes["s"]), shapes["R"][1] * shapes["R"][2]
        return shapes["blocks"][1] * shapes["blocks"][2], 0

    def apply(self, factors: Mapping[str, Tensor], scale: float, weight: Tensor, strength: float) -> Tensor:
        """The rotated weight."""
        if "R" in factors:
            raw = factors["R"].double()
            rotation, turned = cayley((raw.mT - raw) / 2), weight.T
        else:
            raw = factors["blocks"].double()
            limit = float(factors["constraint"]) if "constraint" in factors else 0.0
            rotation = cayley(constrained(raw - raw.mT, limit * raw.shape[1] * raw.shape[2]))
            turned = weight
        one = eye_like(rotation)
        rotation = (rotation * strength + (1 - strength) * one).to(weight)
        stage = _columns_stage if "R" in factors else _rows_stage
        for index in range(len(rotation)):
            turned = stage(rotation, index, turned)
        if "R" in factors:
            return turned.T * factors["s"].reshape(-1, 1)
        return turned * factors["rescale"].reshape(-1, 1) if "rescale" in factors else turned

    def rows(self, factors: Factors, start: int, stop: int) -> Factors:
        """Rows of s, by columns. By rows all belong together: NotExact."""
        if "R" not in factors:
            raise uncut(self.title)
        if factors["s"].shape[0] == 1:  # (1, out), of a convolution
            part = factors["s"].reshape((factors["s"].numel,)).rows(start, stop)
            return {**factors, "s": part.reshape((1, stop - start))}
        return cut_rows(factors, ("s",), start, stop)

    def grain(self, shapes: Shapes) -> int:
        """Any row by columns; none by rows."""
        return 1 if "R" in shapes else 0

    def stacked(self, parts: Sequence[Part]) -> Factors:
        """By columns, s below one another where all parts share their blocks."""
        first = next(part.factors for part in parts if part.factors is not None)
        if "R" not in first or first["s"].shape[0] == 1:
            raise uncut(self.title)
        return stacked_rows(parts, ("s",), self.title)


def _rows_stage(rotation: Tensor, index: int, rows: Tensor) -> Tensor:
    """One stage of LyCORIS' butterfly over the rows of a matrix."""
    _, count, size, _ = rotation.shape
    k, width = 2**index * (size // 2), rows.shape[1]
    swapped = rows.reshape(-1, 2, k, width).transpose(1, 2).reshape(count, size, width)
    made = (rotation[index] @ swapped).reshape(-1, k, 2, width)
    return made.transpose(1, 2).reshape(rows.shape)


def _columns_stage(rotation: Tensor, index: int, rows: Tensor) -> Tensor:
    """One stage P blockdiag(C) P.T of PEFT's butterfly over the rows of W.T."""
    stages, count, size, _ = rotation.shape
    order = rows.new_tensor(_butterfly(count, size, index) if stages > 1 else list(range(count * size))).long()
    there = rows.new_empty(rows.shape)
    there[order] = rows  # P.T: row i of the input is row order[i] of the blocks
    made = (rotation[index] @ there.reshape(count, size, -1)).reshape(rows.shape)
    return made[order]


def _butterfly(count: int, size: int, index: int) -> list[int]:
    """PEFT's permutation of stage `index`: in groups of size * 2^index, even pieces of size / 2 before odd ones."""
    group, piece = size * count // max(count >> index, 1), size // 2
    inside = [at for first in (0, 1) for at in range(first, group // piece, 2)]
    return [
        start + at * piece + offset
        for start in range(0, size * count, group)
        for at in inside
        for offset in range(piece)
    ]


FAMILY = Boft()
