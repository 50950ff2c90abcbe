"""Compare: whether two sets of modules say the same update, in factored form.

This does not use `regroup`, so that it can prove what regroup did: rows are cut out of the loaded factors here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.core.module import Module
from loratool.core.tensor import same_bytes

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = {"F64": 1e-12, "F32": 1e-6, "F16": 2e-3, "BF16": 2e-2, "F8_E4M3": 0.2, "F8_E5M2": 0.4}
"""Relative error of an update that rounding its factors once to a dtype may cause (a few units in the last place)."""


EXACT = 1e-6
"""Relative error where no factor was rounded: alpha may be, as a float32."""


@dataclass(frozen=True)
class Difference:
    """How far one update is from another: ||d1 - d2|| / ||d1|| (Frobenius), computed in float64.

    `bitwise` says that factors, scale and magnitude are the same values, so that `error` is exactly 0; `tolerance` how
    large it may be: where factors were cast, or put together at one scale, as much as rounding them explains.
    """

    title: str
    error: float
    bitwise: bool = False
    tolerance: float = EXACT


@dataclass(frozen=True)
class _Stretch:
    """Rows `start:stop` of one module."""

    module: Module
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop == self.module.shape[0]


def compare(left: Sequence[Module], right: Sequence[Module]) -> Iterator[Difference]:
    """Compares the updates of `left` (the reference) and `right`, module by module, target by target where the two
    are grouped differently.

    No dense matrix is formed for LoRA pairs; other families are compared by their factors, and where these differ by
    the dense update of one module at a time. An update that only one side has is compared with zero.
    """
    whole = {(module.component, module.targets): module for module in right}
    matched = {(m.component, m.targets) for m in left} & whole.keys()
    for module in left:
        if (module.component, module.targets) in matched:
            yield difference(_all(module), _all(whole[module.component, module.targets]))
    ours = _stretches(module for module in left if (module.component, module.targets) not in matched)
    theirs = _stretches(module for module in right if (module.component, module.targets) not in matched)
    for target in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(target), theirs.get(target)
        if a is None or b is None:
            one = a or b
            assert one is not None
            if not one.module.family.additive or _norm(one) > 0:
                yield Difference(".".join(target), 1.0)
        else:
            yield difference(a, b)


def _all(module: Module) -> _Stretch:
    return _Stretch(module, 0, module.shape[0])


def _stretches(modules: Iterator[Module]) -> dict[tuple[str, str], _Stretch]:
    found = {}
    for module in modules:
        start = 0
        for target, height in zip(module.targets, module.heights(), strict=True):
            found[target.component, target.path] = _Stretch(module, start, start + height)
            start += height
    return found


def difference(a: _Stretch, b: _Stretch) -> Difference:
    """How far the rows `b` are from the rows `a`."""
    title = a.module.title if a.whole else f"{a.module.title}[{a.start}:{a.stop}]"
    if _bitwise(a, b) or _same_live(a, b):
        return Difference(title, 0.0, bitwise=True)
    error = _relative(a, b) if a.module.family.additive and b.module.family.additive else _of_factors(a, b)
    for role in ("magnitude", "bias"):
        x, y = _vector(a, role), _vector(b, role)
        if x is None and y is None:
            continue
        same_side = a.module.magnitude_per_row == b.module.magnitude_per_row
        if x is None or y is None or x.shape != y.shape or not same_side:
            return Difference(title, math.inf)
        further = _ratio(float((x - y).norm()), float(x.norm()))
        error = further if math.isnan(further) else max(error, further)
    return Difference(title, error, tolerance=_tolerance(a, b))


def _of_factors(a: _Stretch, b: _Stretch) -> float:
    """The largest relative error of a factor, of families whose update depends on the weight."""
    import torch

    if a.module.family is not b.module.family:
        return math.inf
    left, right = (dict(one.module.family.rows(one.module.factors, one.start, one.stop)) if not one.whole else
                   dict(one.module.factors) for one in (a, b))  # fmt: skip
    if left.keys() != right.keys():
        return math.inf
    worst = 0.0
    for role, tensor in left.items():
        x, y = tensor.load().double().flatten(), right[role].load().double().flatten()
        if x.shape != y.shape:
            return math.inf
        worst = max(worst, _ratio(float(torch.linalg.vector_norm(x - y)), float(torch.linalg.vector_norm(x))))
    return worst


def _tolerance(a: _Stretch, b: _Stretch) -> float:
    """EXACT for factors that were copied, else what one rounding to the coarser of the dtypes explains."""
    dtypes = {a.module.dtype, b.module.dtype}
    if len(dtypes) == 1 and a.whole and b.whole:
        return EXACT
    return max(ROUNDING.get(dtype, EXACT) for dtype in dtypes)


def _vector(stretch: _Stretch, role: str) -> Tensor | None:
    """A magnitude, or a bias times the scale it is applied with; only the stretch's rows where it is per row."""
    tensor = stretch.module.tensors.get(role)
    if tensor is None:
        return None
    values = tensor.load().double()
    if role == "magnitude":
        return values.flatten()[stretch.start : stretch.stop] if stretch.module.magnitude_per_row else values.flatten()
    return values[stretch.start : stretch.stop] * stretch.module.scale


def _bitwise(a: _Stretch, b: _Stretch) -> bool:
    one, other = a.module, b.module
    left, right = one.tensors, other.tensors
    if one.family.id != other.family.id or left.keys() != right.keys() or one.scale != other.scale:
        return False
    if not (a.whole and b.whole):
        if not all(_is_plain(module) and module.magnitude is None for module in (one, other)):
            return False
        left = {role: t.rows(a.start, a.stop) if role != "down" else t for role, t in left.items()}
        right = {role: t.rows(b.start, b.stop) if role != "down" else t for role, t in right.items()}
    return all(
        tensor.numel == right[role].numel
        and same_bytes(tensor.reshape((tensor.numel,)), right[role].reshape((tensor.numel,)))
        for role, tensor in left.items()
    )


def _same_live(a: _Stretch, b: _Stretch) -> bool:
    """Whether two stretches of pairs hold the same values but for components that do not reach these rows."""
    one, other = a.module, b.module
    if not (_is_plain(one) and _is_plain(other)) or one.scale != other.scale or one.dtype != other.dtype:
        return False
    if any(vector in m.tensors for m in (one, other) for vector in ("magnitude", "bias")):
        return False
    left, right = _live_pair(a), _live_pair(b)
    return all(x.shape == y.shape and bool((x == y).all()) for x, y in zip(left, right, strict=True))


def _live_pair(stretch: _Stretch) -> tuple[Tensor, Tensor]:
    up = stretch.module.factors["up"].load()[stretch.start : stretch.stop].flatten(1).double()
    live = (up != 0).any(dim=0)
    return up[:, live], stretch.module.factors["down"].load().flatten(1).double()[live]


def _ratio(difference: float, norm: float) -> float:
    return 0.0 if difference == 0 else difference / norm if norm else math.inf


def _norm(stretch: _Stretch) -> float:
    pair = _pair(stretch)
    return float(_dense(stretch).norm()) if pair is None else _product_norm(*pair)


def _dense(stretch: _Stretch) -> Tensor:
    rows = stretch.module.delta()[stretch.start : stretch.stop].double()
    return rows.reshape(len(rows), -1)


def _relative(a: _Stretch, b: _Stretch) -> float:
    left, right = _pair(a), _pair(b)
    if left is None or right is None:
        x, y = _dense(a), _dense(b)
        return _ratio(float((x - y).norm()), float(x.norm())) if x.shape == y.shape else math.inf
    (up_a, down_a), (up_b, down_b) = left, right
    if up_a.shape[0] != up_b.shape[0] or down_a.shape[1] != down_b.shape[1]:
        return math.inf
    norm = _product_norm(up_a, down_a)
    if up_a.shape == up_b.shape:
        # up_a down_a - up_b down_b = (up_a - up_b) down_a + up_b (down_a - down_b): no cancellation of large terms.
        error = _sum_norm([(up_a - up_b, down_a), (up_b, down_a - down_b)])
        if error <= 1e-3 * norm:
            return _ratio(error, norm)
    return _ratio(_qr_difference(up_a, down_a, up_b, down_b), norm)


def _is_plain(module: Module) -> bool:
    """Whether the module is up and down, whose rows can be cut out of the factors as they are."""
    return module.factors.keys() - {"bias"} == {"up", "down"}


def _pair(stretch: _Stretch) -> tuple[Tensor, Tensor] | None:
    """The rows as two float64 matrices, the scale on the left one, if the module is stored as such a product."""
    pair = stored_pair(stretch.module)
    if pair is None:
        return None
    return pair[0][stretch.start : stretch.stop] * stretch.module.scale, pair[1]


def stored_pair(module: Module) -> tuple[Tensor, Tensor] | None:
    """`(out, rank)` and `(rank, in * kh * kw)` in float64 whose product times the scale is the update; None where it is
    no product of two stored factors."""
    product = module.product
    if product is None or not product.whole or product.core is not None or product.right is None:
        return None
    left, right = product.left.load().double(), product.right.load().double()
    return (right.T, left.T) if product.transposed else (left, right)


def _sum_norm(products: Sequence[tuple[Tensor, Tensor]]) -> float:
    """||sum of up_i @ down_i||_F from the r x r Gram matrices."""
    total = 0.0
    for up_i, down_i in products:
        for up_j, down_j in products:
            total += float(((up_i.T @ up_j) * (down_i @ down_j.T)).sum())
    return math.sqrt(max(total, 0.0))


def _product_norm(up: Tensor, down: Tensor) -> float:
    return _sum_norm([(up, down)])


def _qr_difference(up_a: Tensor, down_a: Tensor, up_b: Tensor, down_b: Tensor) -> float:
    """||up_a @ down_a - up_b @ down_b||_F from QR of the stacked factors: accurate where Gram matrices cancel."""
    import torch

    up, down = torch.cat([up_a, -up_b], dim=1), torch.cat([down_a, down_b], dim=0)
    left, right = torch.linalg.qr(up, mode="r").R, torch.linalg.qr(down.T, mode="r").R
    return float((left @ right.T).norm())
