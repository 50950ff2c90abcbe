"""OFT: the weight is rotated, block by block (Qiu et al. 2023, arXiv:2306.07280).

By rows, as LyCORIS (`diag-oft`) and kohya train it: `blocks` `(n, b, b)`, `Q = blocks - blocks.T`,
`R = (I + Q) (I - Q)^-1`, and rows `k * b` to `k * b + b` of the new weight are `(strength * (R_k - I) + I).T @ W_k`.
The stored alpha is a `constraint`: where it is above 0 and the norm of all of Q is above constraint * out, Q is shrunk
to that. `rescale` `(out, 1, ...)` multiplies the rows of the result. This is LyCORIS' own merge, strength included: it
weakens the rotation and not the rescale. (ComfyUI takes alpha itself as the limit and ignores rescale.) The LyCORIS of
2023 stored R itself: `diag` (read as AUTOMATIC1111 does).

By columns, as PEFT trains it (`tuners/oft/layer.py`): `R` `(n, b (b - 1) / 2)` are upper triangles of Q, and
`W @ blockdiag(R).T` is the new weight, over `in * kh * kw` columns. One row of `R` stands for all blocks (block_share).
PEFT's config says the rest: `terms`, the number of terms of the Cayley-Neumann series of R (0: the exact transform),
and, with coft, `eps`: every block of Q is shrunk to a norm of eps / sqrt(n). PEFT knows no strength; LyCORIS' is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loratool.core.family import Factors, Part, Shapes
from loratool.families._base import Changing, cut_rows, stacked_rows, uncut
from loratool.families._rotation import block_size, cayley, constrained, eye_like, series, skew_of

if TYPE_CHECKING:
    from torch import Tensor


class Oft(Changing):
    """A block-diagonal rotation of the rows, or of the input columns, of the weight."""

    id = "oft"
    title = "OFT"
    alpha_role = "constraint"

    def problem(self, shapes: Shapes) -> str | None:
        """No blocks, or factors that do not fit them."""
        found = [role for role in ("blocks", "diag", "R") if role in shapes]
        if len(found) != 1:
            return "has no blocks: part of the module is missing" if not found else "has its blocks twice"
        role, shape = found[0], shapes[found[0]]
        if role == "R":
            fits = len(shape) == 2 and 0 not in shape and block_size(shape[1]) > 1
            return None if fits else f"R has shape {list(shape)}, expected upper triangles of square blocks"
        if len(shape) != 3 or shape[1] != shape[2] or 0 in shape:
            return f"{role} has shape {list(shape)}, expected square blocks"
        for other in ("rescale", "constraint"):
            wanted = shape[0] * shape[1] if other == "rescale" else 1
            if other in shapes and math.prod(shapes[other]) != wanted:
                return f"{other} has shape {list(shapes[other])}, expected {wanted} values"
        return None

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """`(out, 0)` by rows, `(0, in * kh * kw)` by columns: nothing tells the other side."""
        if "R" in shapes:
            count, entries = shapes["R"]
            return 0, count * block_size(entries) if count > 1 else 0
        count, size, _ = shapes["blocks" if "blocks" in shapes else "diag"]
        return count * size, 0

    def apply(self, factors: Mapping[str, Tensor], scale: float, weight: Tensor, strength: float) -> Tensor:
        """The rotated weight."""
        rotation = _rotation(factors)
        one = eye_like(rotation)
        rotation = ((rotation - one) * strength + one).to(weight)
        size = rotation.shape[-1]
        if "R" in factors:
            columns = weight.reshape(len(weight), -1, size).transpose(0, 1)  # (blocks, out, b)
            return (columns @ rotation.mT).transpose(0, 1).reshape(weight.shape)
        rotated = (rotation.mT @ weight.reshape(-1, size, weight.shape[1])).reshape(weight.shape)
        return rotated * factors["rescale"].reshape(-1, 1) if "rescale" in factors else rotated

    def rows(self, factors: Factors, start: int, stop: int) -> Factors:
        """All of it, by columns. Whole blocks, by rows, where no constraint ties them together. Else NotExact."""
        if "R" in factors:
            return dict(factors)
        role = "blocks" if "blocks" in factors else "diag"
        size = factors[role].shape[1]
        if start % size or stop % size or _tied(factors):
            raise uncut(self.title)
        cut = cut_rows(factors, (role,), start // size, stop // size)
        return cut_rows(cut, ("rescale",), start, stop)

    def grain(self, shapes: Shapes) -> int:
        """The height of a block; any row by columns; 0 where a constraint may tie all blocks together."""
        if "R" in shapes:
            return 1
        return 0 if "constraint" in shapes else shapes["blocks" if "blocks" in shapes else "diag"][1]

    def stacked(self, parts: Sequence[Part]) -> Factors:
        """Blocks below one another; by columns only where all parts are the same."""
        first = next(part.factors for part in parts if part.factors is not None)
        if _tied(first):
            raise uncut(self.title)
        roles = tuple(role for role in ("blocks", "diag", "rescale") if role in first)
        return stacked_rows(parts, roles, self.title)


def _tied(factors: Factors) -> bool:
    return "constraint" in factors and factors["constraint"].item() > 0


def _rotation(factors: Mapping[str, Tensor]) -> Tensor:
    """R, float64."""
    if "diag" in factors:
        return factors["diag"].double()
    if "R" not in factors:
        blocks = factors["blocks"].double()
        limit = float(factors["constraint"]) if "constraint" in factors else 0.0
        return cayley(constrained(blocks - blocks.mT, limit * blocks.shape[0] * blocks.shape[1]))
    skew = skew_of(factors["R"].double())
    if "eps" in factors:
        limit = float(factors["eps"]) / math.sqrt(len(skew))
        norms = skew.flatten(1).norm(dim=1).reshape(-1, 1, 1)
        skew = skew * (limit / norms.clamp_min(limit))
    terms = round(float(factors["terms"])) if "terms" in factors else 0
    return series(skew, terms) if terms else cayley(-skew)


FAMILY = Oft()
