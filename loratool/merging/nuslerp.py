"""nuslerp: a point on the arc between two updates, where the weights say which."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import scaled
from loratool.merging._sphere import FLAT, blend, cosines, shares


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    flatten: bool = True,
    row_wise: bool = False,
    normalize: bool = True,
) -> Tensor:
    """The point w2 / (w1 + w2) of the way from the first update to the second, along the arc, `(out, in)`.

    `flatten` False: an arc for each row (fixed output), or with `row_wise` for each column (fixed input), which is
    what mergekit calls so. `normalize` False: times w1 + w2. Straight lines where two vectors are parallel or nearly
    opposite (cosine < -0.9995). Weights that cancel count as equal.
    """
    total = sum(weights)
    strength = 1.0 if normalize else total
    first, *rest = [update.dense() for update in updates]
    if not rest:
        return scaled(first, strength)
    t = weights[1] / total if abs(total) >= 1e-6 else 0.5
    cosine = cosines(first, rest[0], None if flatten else 0 if row_wise else 1)
    straight = (1 - cosine.abs() < 1e-12) | (cosine < -FLAT)
    return scaled(blend(first, rest[0], shares(cosine, t, straight)), strength)


METHOD = Method(
    id="nuslerp",
    title="NuSLERP",
    formula="(sin((1 - t) a) D1 + sin(t a) D2) / sin(a), t = w2 / (w1 + w2), a the angle between D1 and D2",
    source="mergekit's nuslerp",
    when="As slerp, with weights as shares, and row by row if wanted.",
    merge=merge,
    inputs=(1, 2),
)
