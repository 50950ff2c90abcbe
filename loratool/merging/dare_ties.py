"""dare_ties: randomly thinned updates, merged where their signs agree."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import scaled
from loratool.merging._options import check_number
from loratool.merging._signs import ties_mean
from loratool.merging._sparsify import drop


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    sign: str = "total",
    normalize: bool = False,
    lambda_: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Each update with a random `density` share of its entries, then as `ties` without its trimming, `(out, in)`."""
    check_number("lambda", lambda_)
    thinned = [drop(update, density, seed) for update in updates]
    return scaled(ties_mean(thinned, weights, sign, normalize), lambda_)


METHOD = Method(
    id="dare_ties",
    title="DARE with TIES",
    formula="lambda * sum_agreeing w_i B_i * D_i / density / number of agreeing, B_i random 0 or 1",
    source="Yu et al. 2023, arXiv:2311.03099; PEFT's dare_ties_svd",
    when="As dare_linear, for adapters that also contradict each other.",
    merge=merge,
    symmetric=False,
)
