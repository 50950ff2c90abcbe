"""A whole weight in the place of the base's: ComfyUI's `.set_weight`.

The new weight is `W + strength * (weight - W)`. ComfyUI ignores the strength: the two agree at 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loratool.core.family import Factors, Part, Shapes
from loratool.families._base import Changing, cut_rows, stacked_rows

if TYPE_CHECKING:
    from torch import Tensor


class Set(Changing):
    """Another weight."""

    id = "set"
    title = "replaced weight"

    def problem(self, shapes: Shapes) -> str | None:
        """No weight."""
        shape = shapes.get("weight")
        if shape is None:
            return "has no weight: part of the module is missing"
        return None if shape and 0 not in shape else f"weight has shape {list(shape)}, expected that of a weight"

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """That of the weight."""
        return shapes["weight"]

    def apply(self, factors: Mapping[str, Tensor], scale: float, weight: Tensor, strength: float) -> Tensor:
        """weight + strength * (other - weight); the very values at strength 1."""
        other = factors["weight"].reshape(weight.shape)
        return other.clone() if strength == 1 else weight + strength * (other - weight)

    def rows(self, factors: Factors, start: int, stop: int) -> Factors:
        """Rows of the weight."""
        return cut_rows(factors, ("weight",), start, stop)

    def grain(self, shapes: Shapes) -> int:
        """Any row."""
        return 1

    def stacked(self, parts: Sequence[Part]) -> Factors:
        """One below the other."""
        return stacked_rows(parts, ("weight",), self.title)


FAMILY = Set()
