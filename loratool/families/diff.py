"""Full differences: delta = diff, of a weight, a norm or a bias (LyCORIS `full` and `norm`, ComfyUI).

`diff` has the shape of the weight, `w_norm` that of a norm's `(size,)`. `bias` (stored as `diff_b`, beside `w_norm` as
`b_norm`) is added to the layer's bias, and may stand alone. All are added times the strength, without alpha.
A whole weight that takes the place of the base's is another family, `set`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratool.core.errors import NotExact
from loratool.core.family import Factors, Part, Product, Shapes
from loratool.families._base import Additive, Rankless, cut_rows, scaled_all, stacked_rows

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS = ("diff", "w_norm")


class Diff(Rankless, Additive):
    """The whole update, as it is."""

    id = "diff"
    title = "full difference"
    alpha_role = None

    def problem(self, shapes: Shapes) -> str | None:
        """Two weights, or a bias that does not fit."""
        found = [role for role in _WEIGHTS if role in shapes]
        if len(found) > 1:
            return "has a diff and a w_norm"
        if not found and "bias" not in shapes:
            return "has no diff: part of the module is missing"
        for role, shape in shapes.items():
            if not shape or 0 in shape:
                return f"{role} has shape {list(shape)}, expected that of a weight"
        bias = shapes.get("bias")
        if bias is not None and bias != (self.shape(shapes)[0],):
            return f"bias has shape {list(bias)}, expected [{self.shape(shapes)[0]}]"
        return None

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """That of the weight; `(out,)` of a norm, or of a bias that stands alone."""
        return shapes[next(role for role in (*_WEIGHTS, "bias") if role in shapes)]

    def delta(self, factors: Mapping[str, Tensor], scale: float) -> Tensor:
        """The difference itself; zeros where only a bias changes."""
        weight = next((factors[role] for role in _WEIGHTS if role in factors), None)
        return factors["bias"] * 0 if weight is None else weight * scale

    def rows(self, factors: Factors, start: int, stop: int) -> Factors:
        """Rows of everything."""
        return cut_rows(factors, tuple(factors), start, stop)

    def grain(self, shapes: Shapes) -> int:
        """Any row."""
        return 1

    def stacked(self, parts: Sequence[Part]) -> Factors:
        """One below the other; a part that is missing, or has another scale, has no exact place."""
        first = next(part.factors for part in parts if part.factors is not None)
        return stacked_rows(parts, tuple(first), self.title)

    def product(self, factors: Factors) -> Product | None:
        """The whole difference, which has no ranks to cut; None where only a bias changes."""
        weight = next((factors[role] for role in _WEIGHTS if role in factors), None)
        if weight is None:
            return None
        return Product(weight.reshape((weight.shape[0], weight.numel // weight.shape[0])), None)

    def with_product(self, factors: Factors, product: Product) -> Factors:
        """Another difference of the same shape. Raises NotExact for a product of ranks."""
        if product.right is not None:
            raise NotExact(f"a {self.title} has no ranks to cut")
        role = next(role for role in _WEIGHTS if role in factors)
        return {**factors, role: product.left.reshape(factors[role].shape)}

    def gain(self, factors: Mapping[str, Any]) -> float:
        """1: the product is the update."""
        return 1.0

    def scaled(self, factors: Factors, gain: float) -> Factors:
        """Everything times `gain`."""
        return scaled_all(factors, gain)


FAMILY = Diff()
