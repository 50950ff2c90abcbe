"""dare_linear: the weighted sum of randomly thinned updates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import scaled, weighted_sum
from loratool.merging._options import check_number
from loratool.merging._sparsify import drop


def merge(
    updates: Sequence[Update], weights: Sequence[float], *, density: float = 1.0, lambda_: float = 1.0, seed: int = 0
) -> Tensor:
    """The weighted sum of the updates, each with a random `density` share of its entries, made up for, `(out, in)`."""
    check_number("lambda", lambda_)
    return scaled(weighted_sum((drop(update, density, seed) for update in updates), weights), lambda_)


METHOD = Method(
    id="dare_linear",
    title="DARE",
    formula="lambda * sum_i w_i B_i * D_i / density, B_i random 0 or 1",
    source="Yu et al. 2023, arXiv:2311.03099; PEFT's dare_linear_svd",
    when="Many adapters with redundant updates: they overlap less, and the expected sum stays.",
    merge=merge,
    symmetric=False,
)
