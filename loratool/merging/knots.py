"""knots: TIES in a basis that all updates share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratool.core.method import Method, Update
from loratool.merging._dense import scaled
from loratool.merging._options import check_number
from loratool.merging._signs import ties_mean
from loratool.merging._sparsify import prune_small


def merge(
    updates: Sequence[Update],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    sign: str = "total",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`left` `(out, k)` and `right` `(k, in)`, k at most the sum of the ranks.

    [D1 ... Dn] = U S [V1 ... Vn]^T; `ties` merges the S V_i^T, and U is `left`. No matrix of out x (n in) is formed.
    """
    check_number("lambda", lambda_)
    pairs = [update.pair() for update in updates]
    basis = _shared_basis(pairs)
    aligned = [prune_small((basis.T @ left) @ right, density) for left, right in pairs]
    merged = scaled(ties_mean(aligned, weights, sign, normalize), lambda_)
    # The basis is orthonormal: half of the size goes over to it, so that neither factor leaves the range of float16.
    size = float(merged.norm()) ** 0.5 or 1.0
    return basis * size, merged / size


def _shared_basis(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """U `(out, k)` of the SVD of the updates side by side: orthonormal columns, singular values above rounding.

    With L = [L1 ... Ln] = Q T and R_i^T = P_i C_i, it is Q times the left singular vectors of T blockdiag(C_i^T),
    because the P_i are orthonormal.
    """
    lefts = torch.cat([left for left, _ in pairs], dim=1)
    if not lefts.shape[1]:
        return lefts
    orthonormal, triangle = torch.linalg.qr(lefts)
    ends = triangle.split([left.shape[1] for left, _ in pairs], dim=1)
    core = [end @ torch.linalg.qr(right.T).R.T for end, (_, right) in zip(ends, pairs) if right.shape[0]]
    vectors, values, _ = torch.linalg.svd(torch.cat(core, dim=1), full_matrices=False)
    rounding = torch.finfo(values.dtype).eps * max(lefts.shape)
    basis: Tensor = orthonormal @ vectors[:, values > rounding * values[0]]
    # An SVD leaves signs open, and a drawn election is positive: the largest entry of each column decides.
    peaks = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return basis * peaks.sign()


METHOD = Method(
    id="knots",
    title="KnOTS with TIES",
    formula="U @ ties(S V_1^T, ..., S V_n^T), U S [V_1 ... V_n]^T = [D_1 ... D_n]",
    source="Stoica et al. 2024, arXiv:2410.19735; github.com/gstoica27/KnOTS",
    when="LoRAs whose updates live in different subspaces, for which ties compares entries that mean different things.",
    merge=merge,
)
