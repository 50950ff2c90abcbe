"""GLoRA: delta = scale * (W @ a1 @ a2 + b1 @ b2), which depends on the weight (Chavan et al. 2023, arXiv:2306.07967).

As LyCORIS trains it (`modules/glora.py`): `a1` `(in, rank)`, `a2` `(rank, in)`, over the input channels of a
convolution; `b1` `(out, rank)`, `b2` `(rank, in)` or `(rank, in, kh, kw)`; `bm` `(rank, rank, kh, kw)` between them
where it is Tucker. scale = alpha / rank. Files of 2023 have all four the other way round: `b2` `(out, rank)` and `b1`
`(rank, in)`, and `W @ a2 @ a1` (ComfyUI's reading); shapes tell. Linear in strength.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loratool.core.family import ALPHA_SCALES, Factors, Part, Shapes
from loratool.families._base import Changing, cut_rows, stacked_rows

if TYPE_CHECKING:
    from torch import Tensor

_ROLES = ("a1", "a2", "b1", "b2")


class Glora(Changing):
    """A low-rank update that multiplies the weight, and one that is added to it."""

    id = "glora"
    title = "GLoRA"
    alpha_role: str | None = ALPHA_SCALES

    def problem(self, shapes: Shapes) -> str | None:
        """A missing factor, or ranks and sizes that differ."""
        for role in _ROLES:
            if role not in shapes:
                return f"has no {role}: part of the module is missing"
            if len(shapes[role]) < 2 or 0 in shapes[role]:
                return f"{role} has shape {list(shapes[role])}, expected a matrix"
        first, second, left, right = (shapes[role] for role in _order(shapes))
        ranks = {first[1], second[0], *((left[1], right[0]) if "bm" not in shapes else ())}
        if "bm" in shapes and (len(shapes["bm"]) < 2 or shapes["bm"][:2] != (left[1], right[0])):
            return f"bm has shape {list(shapes['bm'])}, expected the ranks of b1 and b2"
        if len(ranks) > 1 or first[0] != second[1] or first[0] != right[1]:
            return "its factors do not fit: " + ", ".join(f"{role} {list(shapes[role])}" for role in _ROLES)
        return None

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """`(out, in)` or `(out, in, kh, kw)`."""
        _, _, left, right = (shapes[role] for role in _order(shapes))
        return left[0], right[1], *(shapes["bm"][2:] if "bm" in shapes else right[2:])

    def rank(self, shapes: Shapes) -> int:
        """Rows of a2."""
        return shapes[_order(shapes)[1]][0]

    def scale(self, shapes: Shapes, alpha: float | None) -> float:
        """alpha / rank."""
        return 1.0 if alpha is None else alpha / self.rank(shapes)

    def alpha(self, shapes: Shapes, scale: float) -> float:
        """scale * rank."""
        return scale * self.rank(shapes)

    def apply(self, factors: Mapping[str, Tensor], scale: float, weight: Tensor, strength: float) -> Tensor:
        """weight + strength * scale * (weight @ a1 @ a2 + b1 @ b2)."""
        shapes = {role: tuple(factor.shape) for role, factor in factors.items()}
        first, second, left, right = (factors[role].flatten(1) for role in _order(shapes))
        channels = weight.reshape(len(weight), len(first), -1)
        turned = (second.T @ (first.T @ channels)).reshape(weight.shape)
        if "bm" in factors:
            half = (left @ factors["bm"].flatten(1)).reshape(len(left), len(right), -1)  # (out, q, kernel)
            added = (right.T @ half).reshape(weight.shape)
        else:
            added = (left @ right).reshape(weight.shape)
        return weight + (turned + added) * (scale * strength)

    def rows(self, factors: Factors, start: int, stop: int) -> Factors:
        """Rows of b1; everything else is shared."""
        return cut_rows(factors, (self._left(factors),), start, stop)

    def grain(self, shapes: Shapes) -> int:
        """Any row."""
        return 1

    def stacked(self, parts: Sequence[Part]) -> Factors:
        """b1 below one another where all parts share the others."""
        first = next(part.factors for part in parts if part.factors is not None)
        return stacked_rows(parts, (self._left(first),), self.title)

    def _left(self, factors: Factors) -> str:
        return _order({role: factor.shape for role, factor in factors.items()})[2]


def _order(shapes: Shapes) -> tuple[str, str, str, str]:
    """The roles of `(in, rank)`, `(rank, in)`, `(out, rank)`, `(rank, in)`."""
    a1, a2, b1, b2 = (shapes[role] for role in _ROLES)
    new = a1[1] == a2[0] and b1[1] == b2[0] == a1[1] and a1[0] == a2[1] == b2[1]
    old = a1[0] == a2[1] and b1[0] == b2[1] == a1[0] and a1[1] == a2[0] == b1[1]
    # Of a square weight both may fit: the rank is the smaller side.
    turned = old and "bm" not in shapes and (not new or a1[0] < a1[1])
    return ("a2", "a1", "b2", "b1") if turned else _ROLES


FAMILY = Glora()
