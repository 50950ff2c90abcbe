"""LoKr: delta = scale * kron(w1, w2) (LyCORIS, Yeh et al. 2023, arXiv:2309.14859).

Each side is stored whole (`w1`, `w2`) or as a product (`w1_a @ w1_b`, `w2_a @ w2_b`). Of a convolution, w2
carries the kernel: whole `(c, d, kh, kw)`, as a product with `w2_b` `(rank, d * kh * kw)`, or Tucker with
`t2` `(rank, rank, kh, kw)`, `w2_a` `(rank, c)` and `w2_b` `(rank, d)`. scale = alpha / rank, where rank is
that of a product; with both sides whole there is no rank and alpha is ignored. PEFT multiplies by the alpha / r of
its config then, too: that is the constant `scale`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratool.core.errors import NotExact
from loratool.core.family import Factors, Part, Product, Shapes
from loratool.core.ranges import spread
from loratool.core.tensor import concatenated, same_bytes, scaled
from loratool.families._base import Additive, turned

if TYPE_CHECKING:
    from torch import Tensor


class Lokr(Additive):
    """The Kronecker product of two small matrices, each whole or factored."""

    id = "lokr"
    title = "LoKr"

    def problem(self, shapes: Shapes) -> str | None:
        """A missing side or half, or ranks that differ."""
        for side in ("w1", "w2"):
            whole, halves = side in shapes, {f"{side}_a", f"{side}_b"} & set(shapes)
            if whole and halves:
                return f"{side} is stored whole and as a product"
            if not whole and len(halves) < 2:
                return f"has no {side}: part of the module is missing"
        if any(len(shape) < 2 or 0 in shape for role, shape in shapes.items() if role != "scale"):
            return "a factor is no matrix"
        if "t2" in shapes:
            if "w2_a" not in shapes:
                return "t2 stands beside a whole w2"
            if shapes["t2"][:2] != (shapes["w2_a"][0], shapes["w2_b"][0]):
                return f"t2 has shape {list(shapes['t2'])}, expected the ranks of w2_a and w2_b"
        pairs = ["w1"] if "t2" in shapes else ["w1", "w2"]
        for side in pairs:
            if f"{side}_a" in shapes and shapes[f"{side}_a"][1] != shapes[f"{side}_b"][0]:
                a, b = shapes[f"{side}_a"], shapes[f"{side}_b"]
                return f"ranks differ: {side}_a {list(a)}, {side}_b {list(b)}"
        return None

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """`(out, in)`, `(out, in, kh, kw)`, or `(out, in * kh * kw)` where w2_b hides the kernel."""
        (a, b), (c, d, *kernel) = _left(shapes), _right(shapes)
        return a * c, b * d, *kernel

    def rank(self, shapes: Shapes) -> int:
        """Rank of a product; with both sides whole, the smaller side of w2."""
        for role in ("w2_b", "w1_b"):
            if role in shapes:
                return shapes[role][0]
        return min(shapes["w2"][:2])

    def scale(self, shapes: Shapes, alpha: float | None) -> float:
        """alpha / rank; 1 where both sides are whole."""
        if alpha is None or ("w1" in shapes and "w2" in shapes):
            return 1.0
        return alpha / self.rank(shapes)

    def alpha(self, shapes: Shapes, scale: float) -> float:
        """scale * rank."""
        return scale * self.rank(shapes)

    def delta(self, factors: Mapping[str, Tensor], scale: float) -> Tensor:
        """scale * kron(w1, w2): `delta[i * c + k, j * d + l] = w1[i, j] * w2[k, l]`."""
        w1 = factors["w1"] if "w1" in factors else factors["w1_a"] @ factors["w1_b"]
        if "w2" in factors:
            w2 = factors["w2"]
        elif "t2" in factors:
            core, left, right = factors["t2"], factors["w2_a"], factors["w2_b"]
            # w2[c, d, ...] = sum_ij core[i, j, ...] left[i, c] right[j, d]
            inner, kernel = core.shape[1], list(core.shape[2:])
            w2 = (left.T @ core.flatten(1)).reshape(left.shape[1], inner, -1)  # (c, j, kernel)
            w2 = (right.T @ w2).reshape(left.shape[1], right.shape[1], *kernel)  # (c, d, kernel)
        else:
            w2 = (factors["w2_a"] @ factors["w2_b"].flatten(1)).reshape(-1, *factors["w2_b"].shape[1:])
        (a, b), (c, d, *kernel) = w1.shape, w2.shape
        scale = scale * float(factors["scale"]) if "scale" in factors else scale
        product = w1.reshape(a, 1, b, 1, 1) * w2.reshape(1, c, 1, d, -1)
        return product.reshape(a * c, b * d, *kernel) * scale

    def rows(self, factors: Factors, start: int, stop: int) -> Factors:
        """Rows of w1, where the cut falls between the blocks of w2's height. Else NotExact."""
        block = self.grain({role: factor.shape for role, factor in factors.items()})
        if start % block or stop % block:
            raise NotExact(f"rows {start}:{stop} cut a Kronecker block of {block} rows")
        left = "w1" if "w1" in factors else "w1_a"
        return {**factors, left: factors[left].rows(start // block, stop // block)}

    def grain(self, shapes: Shapes) -> int:
        """The height of w2, which is that of a Kronecker block."""
        return _right(shapes)[0]

    def stacked(self, parts: Sequence[Part]) -> Factors:
        """Left sides below one another, if all parts share every other factor and the scale. Else NotExact."""
        present = [part.factors for part in parts if part.factors is not None]
        left = "w1" if "w1" in present[0] else "w1_a"
        shared = {role: factor for role, factor in present[0].items() if role != left}
        for part in parts:
            alike = (
                part.factors is not None
                and part.gain == 1.0
                and part.factors.keys() == present[0].keys()
                and part.factors[left].dtype == present[0][left].dtype
                and all(same_bytes(part.factors[role], factor) for role, factor in shared.items())
            )
            if not alike:
                raise NotExact("parts of one fused weight differ in w2: their Kronecker products cannot be stacked")
        sides = [factors[left] for factors in present]
        return {**shared, left: concatenated(sides)}

    def product(self, factors: Factors) -> Product:
        """w2: ||kron(w1, w2)|| = ||w1|| ||w2||, so that cutting w2 optimally does so for the update, w1 being fixed."""
        if "w2" in factors:
            w2 = factors["w2"]
            return Product(w2.reshape((w2.shape[0], w2.numel // w2.shape[0])), None, whole=False)
        left, right = factors["w2_a"], factors["w2_b"]
        if "t2" in factors:
            return Product(turned(left), right, factors["t2"], whole=False)
        return Product(left, right.reshape((right.shape[0], right.numel // right.shape[0])), whole=False)

    def with_product(self, factors: Factors, product: Product) -> Factors:
        """w2 as w2_a @ w2_b (with t2 where it had one)."""
        right = product.right
        assert right is not None
        made = {role: factor for role, factor in factors.items() if role not in ("w2", "w2_a", "w2_b", "t2")}
        if product.core is not None:
            return {**made, "w2_a": turned(product.left), "w2_b": right, "t2": product.core}
        if "w2_b" in factors:
            right = right.reshape((right.shape[0], *factors["w2_b"].shape[1:]))
        return {**made, "w2_a": product.left, "w2_b": right}

    def gain(self, factors: Mapping[str, Any]) -> float:
        """||w1||, times a stored scale."""
        w1 = factors["w1"] if "w1" in factors else factors["w1_a"] @ factors["w1_b"]
        own = abs(float(factors["scale"])) if "scale" in factors else 1.0
        return own * math.sqrt(float((w1 * w1).sum()))

    def scaled(self, factors: Factors, gain: float) -> Factors:
        """w1 (or its left half) times `gain`; w2 takes a part of it where the dtype of w1 cannot hold the result."""
        left, right = ("w1" if "w1" in factors else "w1_a"), ("w2" if "w2" in factors else "w2_a")
        outer, inner = spread(gain, factors[left], factors[right])
        return {**factors, left: scaled(factors[left], outer), right: scaled(factors[right], inner)}


def _left(shapes: Shapes) -> tuple[int, int]:
    if "w1" in shapes:
        return shapes["w1"][0], shapes["w1"][1]
    return shapes["w1_a"][0], shapes["w1_b"][1]


def _right(shapes: Shapes) -> tuple[int, ...]:
    if "w2" in shapes:
        return shapes["w2"]
    if "t2" in shapes:
        return shapes["w2_a"][1], shapes["w2_b"][1], *shapes["t2"][2:]
    return shapes["w2_a"][0], *shapes["w2_b"][1:]


FAMILY = Lokr()
