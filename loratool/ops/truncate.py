"""Truncate: the best approximation of a dense matrix by one of low rank, and its singular values.

Exact: by the eigenvectors of the Gram matrix of its smaller side, in float64. Randomised: by block Krylov iteration
(Musco and Musco 2015, arXiv:1504.05477), which keeps every block it has seen. On the flat spectra that differences of
checkpoints have, subspace iteration does not settle; this does, in four to eight rounds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLED = 8
"""Vectors of a block beyond those wanted."""

SETTLED = 2e-4
"""Rounds end when the error shrinks by less than this share of itself: some 1e-4 of it could still be gained."""

NOISE = 3e-7
"""Share of the squared norm that rounding in float32 leaves uncertain."""

FLOOR = 1e-6
"""Singular values below this share of the largest are rounding, where what was subtracted is float32."""

_FEWEST, _ROOM, _ROUNDS = 512, 0.6, 4
"""Rows from which randomising pays; share of them that the basis may grow to; rounds there must be room for."""

_PIECE = 1 << 20
"""Values that are turned into float64 at once."""


class Pair(NamedTuple):
    """`left` `(out, k)` times `right` `(k, in)`, float32, each with the root of the singular values, which are
    `values`, float64, descending. `exact` says how they were found."""

    left: Tensor
    right: Tensor
    values: Tensor
    exact: bool


def leading(matrix: Tensor, count: int, *, exact: bool = False) -> Pair:
    """The best approximation of a float32 matrix `(out, in)` of rank `count` (Eckart-Young), on its device.

    Without `exact` randomised where `count` is small against the matrix and the error settles: then it is within some
    1e-4 of the smallest possible one. Values below FLOOR are left out.
    """
    if matrix.shape[0] > matrix.shape[1]:
        turned = leading(matrix.T, count, exact=exact)
        return Pair(turned.right.T, turned.left.T, turned.values, turned.exact)
    found = None if exact or not _worth_it(matrix, count) else _krylov(matrix, count)
    left, images, squares = found or _by_gram(matrix, count)
    values = squares.clamp_min(0).sqrt()
    kept = max(int((values > FLOOR * values[0]).sum()), 1)
    root = values[:kept].sqrt().clamp_min(torch.finfo(torch.float32).tiny).to(matrix)
    return Pair(left[:, :kept] * root, images[:kept] / root[:, None], values[:kept], found is None)


def singular_values(matrix: Tensor) -> list[float]:
    """All singular values, descending: the roots of the eigenvalues of the Gram matrix, in float64.

    They are good to about 1e-8 of the largest. Those below FLOOR are 0.
    """
    smaller = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values = torch.linalg.eigvalsh(_gram(smaller)).clamp_min(0).sqrt().flip(0)
    values[values <= FLOOR * values[0]] = 0
    return [float(value) for value in values.tolist()]


def norm_of(matrix: Tensor) -> float:
    """The Frobenius norm, summed in float64."""
    return math.sqrt(math.fsum(float(piece.double().square().sum()) for piece in _pieces(matrix)))


def take_away(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    """Subtracts `left @ right` (any float dtype) from a float32 matrix in place; the Frobenius norm of what is left."""
    matrix.addmm_(left.float(), right.float(), alpha=-1)
    return norm_of(matrix)


def _worth_it(matrix: Tensor, count: int) -> bool:
    rows = matrix.shape[0]
    return rows >= _FEWEST and _ROUNDS * (count + OVERSAMPLED) <= _ROOM * rows


Found = tuple[Tensor, Tensor, Tensor]
"""Orthonormal `(m, k)`, its transposed times the matrix, and the squared singular values in float64."""


def _krylov(matrix: Tensor, count: int) -> Found | None:
    """None if it does not settle in the room that it has."""
    rows, columns = matrix.shape
    block = count + OVERSAMPLED
    total = norm_of(matrix) ** 2
    start = torch.randn(columns, block, generator=torch.Generator().manual_seed(0))
    step = (matrix @ start.to(matrix)).double()
    # The basis is float64: where a matrix has few directions, all of a further block is rounding, and in float32 what
    # is left of it after projecting would point into the basis again.
    basis, images = step.new_empty(rows, 0), matrix.new_empty(0, columns)
    gram = torch.zeros(0, 0, dtype=torch.float64)
    before = math.inf
    while basis.shape[1] + block <= _ROOM * rows:
        for _ in range(2):
            step = torch.linalg.qr(step - basis @ (basis.T @ step)).Q
        image = step.T.to(matrix) @ matrix
        gram = _bordered(gram, images, image)
        basis, images = torch.cat([basis, step], 1), torch.cat([images, image])
        squares, vectors = torch.linalg.eigh(gram)
        left = max(total - float(squares[-count:].sum()), 0.0)
        if before - left <= max(2 * SETTLED * left, NOISE * total):
            turn = vectors[:, -count:].flip(1).to(matrix.device)
            return (basis @ turn).to(matrix), turn.T.to(matrix) @ images, squares[-count:].flip(0).to(matrix.device)
        before, step = left, (matrix @ image.T).double()
    return None


def _bordered(gram: Tensor, images: Tensor, image: Tensor) -> Tensor:
    """The Gram matrix of the rows of both, given that of `images`. Small: on the CPU."""
    new = image.double()
    cross, own = (images.double() @ new.T).cpu(), (new @ new.T).cpu()
    return torch.cat([torch.cat([gram, cross], 1), torch.cat([cross.T, own], 1)])


def _by_gram(matrix: Tensor, count: int) -> Found:
    squares, vectors = torch.linalg.eigh(_gram(matrix))
    left = vectors[:, -count:].flip(1).to(matrix)
    return left, left.T @ matrix, squares[-count:].flip(0)


def _gram(matrix: Tensor) -> Tensor:
    """matrix @ matrix.T in float64, without a float64 copy of the whole."""
    gram = matrix.new_zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64)
    for piece in _pieces(matrix, 1):
        wide = piece.double()
        gram.addmm_(wide, wide.T)
    return gram


def _pieces(matrix: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    size = max(_PIECE * matrix.shape[dim] // max(matrix.numel(), 1), 1)
    return torch.split(matrix, size, dim)
