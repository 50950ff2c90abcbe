"""(IA)^3: every row, or every column, of the weight times a trained number (Liu et al. 2022, arXiv:2205.05638).

LyCORIS stores the difference from 1 (`weight`, `(size,)` or `(1, size, 1, 1)`) and a flag `on_input`: the new weight is
`W * (1 + strength * w)`, per row, or per input column where the flag is set (`modules/ia3.py`). PEFT stores the factor
itself (`ia3_l`: `(out, 1)`; `(1, in)` of a feed-forward layer): `W * l` (`tuners/ia3/layer.py`), and by rows the bias
of the layer times `l`, too. It knows no strength; LyCORIS' is taken: `l` becomes `1 + strength * (l - 1)`.

Roles: `output`, `input` (differences from 1), `output_l`, `input_l` (factors), `on_input` (the stored flag).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loratool.core.family import Factors, Part, Shapes
from loratool.families._base import Changing, cut_rows, stacked_rows, uncut

if TYPE_CHECKING:
    from torch import Tensor

_VECTORS = ("output", "input", "output_l", "input_l")


class Ia3(Changing):
    """One factor for each row or each input column of the weight."""

    id = "ia3"
    title = "(IA)^3"

    def problem(self, shapes: Shapes) -> str | None:
        """No vector, more than one, or one that is none."""
        found = [role for role in _VECTORS if role in shapes]
        if len(found) != 1:
            return "has no vector: part of the module is missing" if not found else "has two vectors"
        shape = shapes[found[0]]
        if not shape or math.prod(shape) != max(shape) or 0 in shape:
            return f"{found[0]} has shape {list(shape)}, expected a vector"
        return None

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """`(out, 0)` or `(0, in)`: the vector tells one side only."""
        role = _role(shapes)
        size = math.prod(shapes[role])
        return (size, 0) if role.startswith("output") else (0, size)

    def apply(self, factors: Mapping[str, Tensor], scale: float, weight: Tensor, strength: float) -> Tensor:
        """weight * (1 + strength * w), by rows or by input columns."""
        role = _role(factors)
        vector = factors[role].flatten()
        by = 1 + strength * (vector - 1 if role.endswith("_l") else vector)
        if role.startswith("output"):
            return weight * by.reshape(-1, 1)
        return (weight.reshape(len(weight), len(by), -1) * by.reshape(1, -1, 1)).reshape(weight.shape)

    def on_bias(self, factors: Factors) -> Factors | None:
        """PEFT multiplies what the layer gives, its bias included; LyCORIS the weight only."""
        return dict(factors) if "output_l" in factors else None

    def rows(self, factors: Factors, start: int, stop: int) -> Factors:
        """Rows of a vector by rows; one by columns is shared."""
        role = _role(factors)
        if role.startswith("input"):
            return dict(factors)
        vector = factors[role]
        if vector.shape[0] == 1 and len(vector.shape) > 1:  # (1, out, 1, 1)
            part = vector.reshape((vector.numel,)).rows(start, stop)
            return {**factors, role: part.reshape((1, stop - start, *vector.shape[2:]))}
        return cut_rows(factors, (role,), start, stop)

    def grain(self, shapes: Shapes) -> int:
        """Any row."""
        return 1

    def stacked(self, parts: Sequence[Part]) -> Factors:
        """Vectors by rows below one another; by columns only where all are the same. Not with a hole."""
        present = [part.factors for part in parts if part.factors is not None]
        role = _role(present[0])
        if any(role in one and one[role].shape[0] == 1 and len(one[role].shape) > 1 for one in present):
            raise uncut(self.title)
        return stacked_rows(parts, (role,) if role.startswith("output") else (), self.title)


def _role(roles: Mapping[str, object]) -> str:
    return next(role for role in _VECTORS if role in roles)


FAMILY = Ia3()
