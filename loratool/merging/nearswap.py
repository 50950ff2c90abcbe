"""nearswap: the first update, pulled to the second by at most t in each entry."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import scaled
from loratool.merging._options import check_number


def merge(updates: Sequence[Update], weights: Sequence[float], *, t: float = 1e-4) -> Tensor:
    """w1 D1 + clamp(w2 D2 - w1 D1, -t, t), `(out, in)`. One input: itself, weighted.

    The same as the published interpolation by min(1, t / |difference|), which this is without its division.
    """
    check_number("t", t, 0)
    first, *rest = [scaled(update.dense(), weight) for update, weight in zip(updates, weights, strict=True)]
    return first.add_(rest[0].sub_(first).clamp_(-t, t)) if rest else first


METHOD = Method(
    id="nearswap",
    title="NearSwap",
    formula="w1 D1 + clamp(w2 D2 - w1 D1, -t, t)",
    source="alchemonaut 2024, QuartetAnemoi-70B-t0.0001; mergekit's nearswap",
    when="One adapter with a touch of a second, where the two are close.",
    merge=merge,
    symmetric=False,
    inputs=(1, 2),
)
