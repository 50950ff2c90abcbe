"""slerp: a point on the arc between two updates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import scaled
from loratool.merging._options import check_number
from loratool.merging._sphere import FLAT, blend, cosines, shares


def merge(updates: Sequence[Update], weights: Sequence[float], *, t: float = 0.5) -> Tensor:
    """The point `t` of the way from the first weighted update to the second, along the arc, `(out, in)`.

    A straight line where the two are nearly parallel or opposite (|cosine| > 0.9995). One input: itself, weighted.
    """
    check_number("t", t)
    first, *rest = [scaled(update.dense(), weight) for update, weight in zip(updates, weights, strict=True)]
    if not rest:
        return first
    cosine = cosines(first, rest[0], None)
    return blend(first, rest[0], shares(cosine, t, cosine.abs() > FLAT))


METHOD = Method(
    id="slerp",
    title="SLERP",
    formula="(sin((1 - t) a) w1 D1 + sin(t a) w2 D2) / sin(a), a the angle between w1 D1 and w2 D2",
    source="Shoemake 1985; mergekit's slerp",
    when="A mixture of two adapters that keeps their strength where a mean would weaken it.",
    merge=merge,
    symmetric=False,
    inputs=(1, 2),
)
