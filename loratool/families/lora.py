"""LoRA: delta = alpha / rank * up @ down (Hu et al. 2021, arXiv:2106.09685).

Convolutions: `down` is `(rank, in, kh, kw)`, `up` `(out, rank, 1, 1)`. Tucker (LoCon, LyCORIS): `down` is
`(rank, in, 1, 1)` and `mid` `(rank, rank, kh, kw)` stands between. Embeddings (PEFT): `embedding_A` is
`(rank, vocabulary)`, `embedding_B` `(dim, rank)`; the update of the `(vocabulary, dim)` weight is their
transposed product. `bias` is the bias of `up` (PEFT's `lora_bias`), of shape `(out,)`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loratool.core.errors import NotExact
from loratool.core.family import Factors, Part, Product, Shapes
from loratool.core.ranges import check_gain, spread
from loratool.core.tensor import LazyTensor, concatenated, same_bytes, scaled
from loratool.families._base import Additive

if TYPE_CHECKING:
    from torch import Tensor


class Lora(Additive):
    """The low-rank pair, with an optional Tucker core, bias, or as an embedding's pair."""

    id = "lora"
    title = "LoRA"

    def problem(self, shapes: Shapes) -> str | None:
        """A missing half, or ranks that differ."""
        left, right = _halves(shapes)
        for role in (left, right):
            if role not in shapes:
                return f"has no {role} factor: half of the module is missing"
            if len(shapes[role]) < 2 or 0 in shapes[role]:
                return f"{role} has shape {list(shapes[role])}, expected a matrix"
        if left == "embedding_B":
            up, down = shapes[left][1], shapes[right][0]
        else:
            up, down = shapes["up"][1], shapes["down"][0]
        if any(size != 1 for size in shapes[left][2:]):
            return f"{left} has shape {list(shapes[left])}, expected a kernel of 1x1"
        mid = shapes.get("mid")
        if mid is not None:
            if len(mid) < 2 or mid[:2] != (up, down):
                return f"mid has shape {list(mid)}, expected [{up}, {down}, ...]"
        elif up != down:
            return f"ranks differ: {left} {list(shapes[left])}, {right} {list(shapes[right])}"
        bias = shapes.get("bias")
        if bias is not None and bias != (shapes[left][0],):
            return f"bias has shape {list(bias)}, expected [{shapes[left][0]}]"
        return None

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """`(out, in)` or `(out, in, kh, kw)`."""
        if "embedding_A" in shapes:
            return shapes["embedding_A"][1], shapes["embedding_B"][0]
        kernel = shapes["mid"][2:] if "mid" in shapes else shapes["down"][2:]
        return shapes["up"][0], shapes["down"][1], *kernel

    def rank(self, shapes: Shapes) -> int:
        """Rows of down."""
        return shapes["embedding_A" if "embedding_A" in shapes else "down"][0]

    def scale(self, shapes: Shapes, alpha: float | None) -> float:
        """alpha / rank."""
        return 1.0 if alpha is None else alpha / self.rank(shapes)

    def alpha(self, shapes: Shapes, scale: float) -> float:
        """scale * rank."""
        return scale * self.rank(shapes)

    def delta(self, factors: Mapping[str, Tensor], scale: float) -> Tensor:
        """scale * up @ down, over the flattened kernel for a convolution."""
        if "embedding_A" in factors:
            return (factors["embedding_B"] @ factors["embedding_A"]).T * scale
        up, down = factors["up"], factors["down"]
        out, rank = up.shape[:2]
        if "mid" in factors:
            mid = factors["mid"]
            # delta[o, i, ...] = sum_pq up[o, p] mid[p, q, ...] down[q, i]
            core = down.flatten(1).T @ mid.flatten(2).transpose(0, 1).flatten(1)  # (in, p * kernel)
            core = core.reshape(down.shape[1], rank, -1).transpose(0, 1).flatten(1)  # (p, in * kernel)
            return (up.flatten(1) @ core).reshape(out, down.shape[1], *mid.shape[2:]) * scale
        return (up.flatten(1) @ down.flatten(1)).reshape(out, *down.shape[1:]) * scale

    def rows(self, factors: Factors, start: int, stop: int) -> Factors:
        """Rows of up (and bias); down is shared by every cut."""
        if "embedding_A" in factors:
            raise NotExact("an embedding is never cut by rows")
        return {role: f.rows(start, stop) if role in ("up", "bias") else f for role, f in factors.items()}

    def grain(self, shapes: Shapes) -> int:
        """Any row; none of an embedding."""
        return 0 if "embedding_A" in shapes else 1

    def live(self, factors: Factors) -> tuple[int, ...] | None:
        """Columns of up that are not all zero; not separable behind a Tucker core."""
        if "up" not in factors or "mid" in factors:
            return None
        up = factors["up"]
        rank = up.shape[1]
        first = up.rows(0, min(up.shape[0], 4)).numbers()
        if all(any(first[i::rank]) for i in range(rank)):  # without torch, for what was trained in one piece
            return tuple(range(rank))
        reached = (up.load().flatten(1).float() != 0).any(dim=0)
        return tuple(int(i) for i in reached.nonzero().flatten())

    def keep(self, factors: Factors, components: Sequence[int]) -> Factors:
        """Columns of up and rows of down."""
        up, down, index = factors["up"], factors["down"], list(components)
        return {
            **factors,
            "up": LazyTensor.computed(
                (up.shape[0], len(index), *up.shape[2:]), up.dtype, lambda: up.load()[:, index].contiguous()
            ),
            "down": LazyTensor.computed((len(index), *down.shape[1:]), down.dtype, lambda: down.load()[index]),
        }

    def stacked(self, parts: Sequence[Part]) -> Factors:
        """Ups below one another. Equal downs are shared; different ones make up block-diagonal, ranks add up."""
        present = [part for part in parts if part.factors is not None]
        if any("mid" in (p.factors or {}) or "up" not in (p.factors or {}) for p in present):
            raise NotExact("a Tucker core or an embedding cannot be stacked by rows")
        downs: list[LazyTensor] = []
        blocks: list[int | None] = []
        for part in parts:
            if part.factors is None:
                blocks.append(None)
                continue
            down = part.factors["down"]
            known = next((i for i, other in enumerate(downs) if same_bytes(down, other)), None)
            blocks.append(len(downs) if known is None else known)
            if known is None:
                downs.append(down)
        first = present[0].factors
        assert first is not None
        up_dtype = _common([p.factors["up"] for p in present if p.factors])
        if len({down.shape[1:] for down in downs}) > 1:
            raise NotExact("parts of one fused weight differ in their input")
        _common(downs)
        rank = sum(down.shape[0] for down in downs)
        height = sum(part.height for part in parts)
        stacked: dict[str, LazyTensor] = {}
        kernel = first["up"].shape[2:]
        stacked["up"] = LazyTensor.computed(
            (height, rank, *kernel), up_dtype, lambda: _stack_up(parts, blocks, downs, (height, rank, *kernel))
        )
        stacked["down"] = downs[0] if len(downs) == 1 else concatenated(downs)
        if any("bias" in (part.factors or {}) for part in present):
            bias = next(p.factors["bias"] for p in present if p.factors and "bias" in p.factors)
            stacked["bias"] = LazyTensor.computed((height,), bias.dtype, lambda: _stack_bias(parts, height))
        return stacked

    def product(self, factors: Factors) -> Product:
        """up @ down; for an embedding embedding_B @ embedding_A, which is the transposed update."""
        if "embedding_A" in factors:
            return Product(factors["embedding_B"], factors["embedding_A"], transposed=True)
        return Product(_flat(factors["up"]), _flat(factors["down"]), factors.get("mid"))

    def with_product(self, factors: Factors, product: Product) -> Factors:
        """up and down in the shapes they had, at the product's rank; without a core, down carries the kernel."""
        left, right, core = product.left, product.right, product.core
        assert right is not None
        if "embedding_A" in factors:
            return {**factors, "embedding_B": left, "embedding_A": right}
        ones = factors["up"].shape[2:]
        made = {**factors, "up": left.reshape((*left.shape, *ones))}
        if core is not None:
            made |= {"down": right.reshape((*right.shape, *factors["down"].shape[2:])), "mid": core}
            return made
        kernel = factors["mid"].shape[2:] if "mid" in factors else factors["down"].shape[2:]
        made["down"] = right.reshape((right.shape[0], factors["down"].shape[1], *kernel))
        made.pop("mid", None)
        return made

    def gain(self, factors: Mapping[str, Any]) -> float:
        """1: the product is the update."""
        return 1.0

    def scaled(self, factors: Factors, gain: float) -> Factors:
        """up and bias times `gain`; down takes a part of it where the dtype of up cannot hold the result."""
        left, right = _halves(factors)
        gains = dict(zip((left, right), spread(gain, factors[left], factors[right]), strict=True))
        if "bias" in factors:
            check_gain(gain, factors["bias"])
            gains["bias"] = gain
        return {role: scaled(f, gains.get(role, 1.0)) for role, f in factors.items()}


def _flat(factor: LazyTensor) -> LazyTensor:
    """A factor as a matrix, the kernel flattened into its columns."""
    return factor.reshape((factor.shape[0], factor.numel // factor.shape[0]))


def _halves(roles: Collection[str]) -> tuple[str, str]:
    embedding = "embedding_A" in roles or "embedding_B" in roles
    return ("embedding_B", "embedding_A") if embedding else ("up", "down")


def _common(tensors: Sequence[LazyTensor]) -> str:
    """The one dtype of all tensors. Raises NotExact if they differ: casting one would round it."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise NotExact(f"parts of one fused weight have different dtypes: {', '.join(sorted(dtypes))}")
    return dtypes.pop()


def _stack_up(
    parts: Sequence[Part], blocks: Sequence[int | None], downs: Sequence[LazyTensor], shape: tuple[int, ...]
) -> Tensor:
    starts = [sum(down.shape[0] for down in downs[:i]) for i in range(len(downs))]
    loaded = [None if part.factors is None else part.factors["up"].load() for part in parts]
    whole = next(up for up in loaded if up is not None).new_zeros(shape)
    row = 0
    for part, block, up in zip(parts, blocks, loaded, strict=True):
        if up is not None and block is not None:
            gained = up if part.gain == 1.0 else (up.double() * part.gain).to(up.dtype)
            whole[row : row + part.height, starts[block] : starts[block] + up.shape[1]] = gained
        row += part.height
    return whole


def _stack_bias(parts: Sequence[Part], height: int) -> Tensor:
    loaded = [p.factors["bias"].load() if p.factors and "bias" in p.factors else None for p in parts]
    whole = next(bias for bias in loaded if bias is not None).new_zeros((height,))
    row = 0
    for part, bias in zip(parts, loaded, strict=True):
        if bias is not None:
            gained = bias if part.gain == 1.0 else (bias.double() * part.gain).to(bias.dtype)
            whole[row : row + part.height] = gained
        row += part.height
    return whole


FAMILY = Lora()
