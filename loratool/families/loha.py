"""LoHa: delta = scale * (w1_a @ w1_b) * (w2_a @ w2_b), element by element (LyCORIS, Yeh et al. 2023, arXiv:2309.14859).

The product is FedPara's (Hyeon-Woo et al. 2022, arXiv:2108.06098). A convolution's kernel is flattened into `w1_b` and
`w2_b`, `(rank, in * kh * kw)`; or each side is Tucker: `t1` `(rank, rank, kh, kw)` between `w1_a` `(rank, out)` and
`w1_b` `(rank, in)`, and the same with 2. scale = alpha / rank. LyCORIS 4.1.3's own `get_diff_weight` multiplies by the
scale twice; its forward pass, PEFT and ComfyUI do it once, and so does this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratool.core.errors import NotExact
from loratool.core.family import Factors, Part, Product, Shapes
from loratool.core.ranges import spread
from loratool.core.tensor import LazyTensor, concatenated, same_bytes, scaled
from loratool.families._base import Additive, made

if TYPE_CHECKING:
    from torch import Tensor

_SIDES = ("1", "2")


class Loha(Additive):
    """The Hadamard product of two low-rank matrices."""

    id = "loha"
    title = "LoHa"

    def problem(self, shapes: Shapes) -> str | None:
        """A missing factor, or sizes that differ."""
        for role in ("w1_a", "w1_b", "w2_a", "w2_b"):
            if role not in shapes:
                return f"has no {role}: part of the module is missing"
        for role, shape in shapes.items():
            if (len(shape) != 2 and not role.startswith("t")) or len(shape) < 2 or 0 in shape:
                return f"{role} has shape {list(shape)}, expected a matrix"
        if len({"t1", "t2"} & shapes.keys()) == 1:
            return "has one of t1 and t2: part of the module is missing"
        for side in _SIDES:
            a, b, core = shapes[f"w{side}_a"], shapes[f"w{side}_b"], shapes.get(f"t{side}")
            if core is not None and core[:2] != (a[0], b[0]):
                return f"t{side} has shape {list(core)}, expected the ranks of w{side}_a and w{side}_b"
            if core is None and a[1] != b[0]:
                return f"ranks differ: w{side}_a {list(a)}, w{side}_b {list(b)}"
        one, other = (_side_shape(shapes, side) for side in _SIDES)
        return None if one == other else f"its two sides have shapes {list(one)} and {list(other)}"

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """`(out, in)`, `(out, in, kh, kw)`, or `(out, in * kh * kw)` where the kernel is flattened."""
        return _side_shape(shapes, "1")

    def rank(self, shapes: Shapes) -> int:
        """Rows of w1_b. The rank of the update is up to the product of both sides' ranks."""
        return shapes["w1_b"][0]

    def scale(self, shapes: Shapes, alpha: float | None) -> float:
        """alpha / rank."""
        return 1.0 if alpha is None else alpha / self.rank(shapes)

    def alpha(self, shapes: Shapes, scale: float) -> float:
        """scale * rank."""
        return scale * self.rank(shapes)

    def delta(self, factors: Mapping[str, Tensor], scale: float) -> Tensor:
        """scale * side 1 * side 2."""
        return _side(factors, "1") * _side(factors, "2") * scale

    def rows(self, factors: Factors, start: int, stop: int) -> Factors:
        """Rows of w1_a and w2_a (columns, where it is Tucker); the others are shared."""
        if "t1" in factors:
            cut = {f"w{side}_a": _columns(factors[f"w{side}_a"], start, stop) for side in _SIDES}
        else:
            cut = {f"w{side}_a": factors[f"w{side}_a"].rows(start, stop) for side in _SIDES}
        return {**factors, **cut}

    def grain(self, shapes: Shapes) -> int:
        """Any row."""
        return 1

    def live(self, factors: Factors) -> tuple[int, ...] | None:
        """Components whose column of w1_a or of w2_a is not all zero; not separable behind a Tucker core."""
        ranks = {factors[f"w{side}_b"].shape[0] for side in _SIDES}
        if "t1" in factors or len(ranks) > 1:
            return None
        reached = (factors["w1_a"].load().double() != 0).any(0) | (factors["w2_a"].load().double() != 0).any(0)
        return tuple(int(i) for i in reached.nonzero().flatten())

    def keep(self, factors: Factors, components: Sequence[int]) -> Factors:
        """Columns of the a, rows of the b."""
        index = list(components)
        kept: dict[str, LazyTensor] = {}
        for role, factor in factors.items():
            columns = role.endswith("_a")
            shape = (factor.shape[0], len(index)) if columns else (len(index), factor.shape[1])
            kept[role] = made(shape, factor.dtype, _picked(factor, index, columns))
        return kept

    def stacked(self, parts: Sequence[Part]) -> Factors:
        """w1_a and w2_a below one another where all parts share w1_b and w2_b; else both block-diagonal, and ranks add
        up: `(A1 B1) * (A2 B2)` of each part touches its own components only."""
        present = [part for part in parts if part.factors is not None]
        factors = [part.factors for part in present if part.factors is not None]
        if any("t1" in one for one in factors):
            raise NotExact("a Tucker core cannot be stacked by rows")
        if len({one[role].dtype for one in factors for role in one}) > 1:
            raise NotExact("parts of one fused weight have different dtypes")
        if len({one["w1_b"].shape[1] for one in factors}) > 1:
            raise NotExact("parts of one fused weight differ in their input")
        shared = all(same_bytes(one[b], factors[0][b]) for one in factors for b in ("w1_b", "w2_b"))
        dtype, height = factors[0]["w1_a"].dtype, sum(part.height for part in parts)
        made_of: dict[str, LazyTensor] = {}
        for side in _SIDES:
            a, b = f"w{side}_a", f"w{side}_b"
            rights = [factors[0][b]] if shared else [one[b] for one in factors]
            rank = sum(right.shape[0] for right in rights)
            made_of[a] = made((height, rank), dtype, _blocks(parts, a, rank, shared, gains=side == "1"))
            made_of[b] = concatenated(rights)
        return made_of

    def product(self, factors: Factors) -> Product | None:
        """None: cutting the ranks of either side is no best approximation of the update."""
        return None

    def with_product(self, factors: Factors, product: Product) -> Factors:
        """Never asked for: `product` is None."""
        raise NotExact("a LoHa module has no ranks to cut")

    def gain(self, factors: Mapping[str, Any]) -> float:
        """Never asked for: `product` is None."""
        raise NotExact("a LoHa module has no ranks to cut")

    def scaled(self, factors: Factors, gain: float) -> Factors:
        """w1_a times `gain`; w1_b takes a part of it where the dtype of w1_a cannot hold the result."""
        outer, inner = spread(gain, factors["w1_a"], factors["w1_b"])
        return {**factors, "w1_a": scaled(factors["w1_a"], outer), "w1_b": scaled(factors["w1_b"], inner)}


def _side_shape(shapes: Shapes, side: str) -> tuple[int, ...]:
    a, b = shapes[f"w{side}_a"], shapes[f"w{side}_b"]
    core = shapes.get(f"t{side}")
    return (a[0], b[1]) if core is None else (a[1], b[1], *core[2:])


def _side(factors: Mapping[str, Tensor], side: str) -> Tensor:
    a, b, core = factors[f"w{side}_a"], factors[f"w{side}_b"], factors.get(f"t{side}")
    if core is None:
        return a @ b
    # side[o, i, ...] = sum_pq core[p, q, ...] a[p, o] b[q, i]
    out, inner, kernel = a.shape[1], core.shape[1], list(core.shape[2:])
    half = (a.T @ core.flatten(1)).reshape(out, inner, -1)  # (out, q, kernel)
    return (b.T @ half).reshape(out, b.shape[1], *kernel)


def _columns(factor: LazyTensor, start: int, stop: int) -> LazyTensor:
    return made((factor.shape[0], stop - start), factor.dtype, lambda: factor.load()[:, start:stop])


def _picked(factor: LazyTensor, index: list[int], columns: bool):  # type: ignore[no-untyped-def]
    return lambda: factor.load()[:, index] if columns else factor.load()[index]


def _blocks(parts: Sequence[Part], role: str, rank: int, shared: bool, gains: bool):  # type: ignore[no-untyped-def]
    def make() -> Tensor:
        loaded = [None if part.factors is None else part.factors[role].load().double() for part in parts]
        whole = next(one for one in loaded if one is not None).new_zeros((sum(p.height for p in parts), rank))
        row = column = 0
        for part, one in zip(parts, loaded, strict=True):
            if one is not None:
                whole[row : row + part.height, column : column + one.shape[1]] = one * (part.gain if gains else 1.0)
                column += 0 if shared else one.shape[1]
            row += part.height
        return whole

    return make


FAMILY = Loha()
