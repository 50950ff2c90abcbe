"""Spectrum: the singular values of a module's update, and its best approximation of any rank, in factored form.

The SVD of `left @ right` needs no dense matrix. With `left = Q R` and `right.T = P T` (QR), it follows from the SVD of
the small `R @ T.T = X S Y.T`, and the balanced factors of rank k are

    left @ (T.T Y S^-1/2)[:, :k]    and    (S^-1/2 X.T R)[:k] @ right,

so that nothing of the size of a factor has to be kept. R comes from the Gram matrix `left.T @ left = R.T R` by Cholesky
where that is accurate enough, else from a QR. All of this is computed in float64, with numpy: on the CPU nothing here
needs torch, whose import alone takes longer than resizing a small file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from loratool.core.family import Product
from loratool.core.module import Module
from loratool.core.tensor import Held, LazyTensor
from loratool.ops.finite import check_finite

if TYPE_CHECKING:
    from loratool.core.tensor import Array

EPS = float(np.finfo(np.float64).eps)

TRUSTED = 3e-10
"""Squared singular values from Gram matrices carry an error of about eps times the factors' squared norms. Above this
share of these norms they are good to 1e-6 relative, which is what the tests ask for; below, QR is used."""

CANCELLING = 1e3
"""How many times the product its terms may be, taken alone, for float32 to be good enough for 16 bits."""

Multiply = Callable[[Any, Any, str, str], LazyTensor]
"""The product of two matrices, one of them stored, as a lazy tensor of a dtype, computed in float32 or float64."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of an update, and how to make its factors of any rank.

    `values` descend, in units of the update (scale included); `norm` is the update's Frobenius norm. They square to the
    same sum, but for a Tucker module, where the values after the k-th bound the error of rank k. `cut` makes the
    product of rank k in a dtype (a safetensors code).
    """

    values: tuple[float, ...]
    norm: float
    cut: Callable[[int, str], Product]

    @property
    def rank(self) -> int:
        """The numerical rank: singular values above max(m, n) * eps * the largest are counted by `values`."""
        return sum(value > 0 for value in self.values)

    def error(self, rank: int) -> float:
        """||update - rank-k update|| / ||update|| (Frobenius); an upper bound for a Tucker module."""
        lost = math.fsum(value * value for value in self.values[rank:])
        return min(math.sqrt(lost) / self.norm, 1.0) if self.norm else 0.0


def spectrum(module: Module) -> Spectrum:
    """The spectrum of one module, computed in float64 on the CPU. Raises NotExact for one that has no ranks."""
    product = module.ranks()
    scale = outer_scale(module)
    if product.core is not None:
        return _tucker(module, product, scale)
    if product.right is None:
        return _whole(module, product.left, scale)
    left, right = _loaded(module, product.left), _loaded(module, product.right)
    core = by_grams(left.T @ left, right @ right.T) or by_qr(left, right)
    return from_core(product, core, scale, _multiplied)


def truncated(module: Module, found: Spectrum, rank: int, dtype: str | None = None) -> Module:
    """The best approximation of `module` of a rank, with its scale alpha / rank, magnitude and bias, as lazy factors.

    Factors are balanced (the square root of the singular values on either side). A rank that the module does not exceed
    leaves it as it is.
    """
    product = module.ranks()
    if rank >= product.rank and dtype in (None, module.dtype):
        return module
    cut = found.cut(rank, dtype or module.dtype)
    made = replace(module, factors=module.family.with_product(module.factors, cut), alpha=None, keys={})
    return made.with_scale_of(module)


def outer_scale(module: Module) -> float:
    """Norm of the update over that of the stored product. Checks what is not of the product: bias, magnitude, alpha."""
    check_finite(module, np.float64(module.scale))
    if module.ranks().whole:
        for role in ("bias", "magnitude"):
            if role in module.tensors:
                _loaded(module, module.tensors[role])
        return abs(module.scale)
    loaded = {role: _loaded(module, tensor) for role, tensor in module.tensors.items()}
    return abs(module.scale) * module.family.gain(loaded)


def _loaded(module: Module, factor: LazyTensor) -> Array:
    values = factor.array()
    check_finite(module, values)
    return values


# -- pairs ----------------------------------------------------------------------------------------------------------


class Core(NamedTuple):
    """Singular values of left @ right, and the small matrices that turn left and right into the balanced factors.

    `gross` is the sum of |column of left| |row of right|: what rounding errors are relative to, where terms cancel.
    The matrices may be torch's, where the factors are.
    """

    values: Array
    to_left: Any
    to_right: Any
    gross: float


def by_grams(outer: Array, inner: Array) -> Core | None:
    """By the eigenvalues of R inner R.T, R from the Cholesky factorisation of `outer`; None where that is too coarse.

    `outer` is left.T @ left, `inner` right @ right.T.
    """
    try:
        lower = np.linalg.cholesky(outer)
        squares, vectors = np.linalg.eigh(lower.T @ inner @ lower)
    except np.linalg.LinAlgError:
        return None
    if not trusted(squares, outer.trace(), inner.trace()):
        return None
    gross = float(np.sqrt(outer.diagonal() * inner.diagonal()).sum())
    return Core(np.sqrt(squares[::-1]), *turned(inner, lower, squares, vectors), gross)


def trusted(squares: Any, outer: Any, inner: Any) -> Any:
    """Whether eigenvalues, ascending, are good enough, given the traces of both Gram matrices. One or many."""
    # Traces bound the spectral norms from above.
    return squares[..., 0] > TRUSTED * outer * inner


def turned(inner: Any, lower: Any, squares: Any, vectors: Any) -> tuple[Any, Any]:
    """`to_left` and `to_right` of a `Core`. For numpy's arrays and torch's tensors, one or a batch of them."""
    down = list(range(squares.shape[-1] - 1, -1, -1))
    squares = squares[..., down]
    onto = lower @ vectors[..., down]
    return inner @ onto / squares[..., None, :] ** 0.75, onto.swapaxes(-1, -2) / squares[..., :, None] ** 0.25


def by_qr(left: Array, right: Array) -> Core:
    """By QR of both factors and the SVD of the small core. Values below the numerical rank are 0."""
    outer: Array = np.asarray(np.linalg.qr(left, mode="r"))
    inner: Array = np.asarray(np.linalg.qr(right.T, mode="r"))
    x, values, y = np.linalg.svd(outer @ inner.T, full_matrices=False)
    # Householder's QR is accurate column by column, so that scaled columns do no harm.
    gross = float((np.linalg.norm(outer, axis=0) * np.linalg.norm(inner, axis=0)).sum())
    values = np.where(values > EPS * max(left.shape[0], right.shape[1]) * gross, values, 0)
    root = np.where(values > 0, np.sqrt(values), np.inf)  # components of value 0 become zeros
    return Core(values, inner.T @ y.T / root, (x / root).T @ outer, gross)


def from_core(product: Product, core: Core, scale: float, multiply: Multiply) -> Spectrum:
    """The spectrum of a module with this product, whose update has `scale` times its norm."""
    left, right = product.left, product.right
    assert right is not None

    def cut(rank: int, dtype: str) -> Product:
        # What is stored in 16 bits or less loses nothing in a float32 product, unless terms cancel.
        work = "float64" if dtype in ("F64", "F32") or cancels else "float32"
        return product._replace(
            left=multiply(left, core.to_left[:, :rank], dtype, work),
            right=multiply(core.to_right[:rank], right, dtype, work),
        )

    cancels = core.gross > CANCELLING * float(np.linalg.norm(core.values))
    return _spectrum(core.values, scale, cut)


def _multiplied(one: Any, other: Any, dtype: str, work: str) -> LazyTensor:
    def make() -> Array:
        left, right = (
            side.array(work) if isinstance(side, LazyTensor) else side.astype(work, copy=False) for side in (one, other)
        )
        made: Array = left @ right
        return made

    return LazyTensor.rounded((one.shape[0], other.shape[1]), dtype, make)


def _spectrum(values: Array, scale: float, cut: Callable[[int, str], Product]) -> Spectrum:
    spread = tuple(value * scale for value in values.tolist())
    return Spectrum(spread, math.sqrt(math.fsum(value * value for value in spread)), cut)


# -- whole matrices and Tucker ----------------------------------------------------------------------------------------


def _whole(module: Module, matrix: LazyTensor, scale: float) -> Spectrum:
    """Of a whole matrix (a LoKr's w2), by its dense SVD."""
    x, values, y = np.linalg.svd(_loaded(module, matrix), full_matrices=False)
    values = np.where(values > EPS * max(matrix.shape) * values[0], values, 0)
    root = np.sqrt(values)

    def cut(rank: int, dtype: str) -> Product:
        left, right = (x * root)[:, :rank], (root[:, None] * y)[:rank]
        return module.ranks()._replace(left=_held(left, dtype), right=_held(right, dtype))

    return _spectrum(values, scale, cut)


def _tucker(module: Module, product: Product, scale: float) -> Spectrum:
    """By the higher-order SVD (De Lathauwer et al. 2000): bases of the output and of the input side, core between.

    The error of cutting both sides to k is at most the root of the sum of both tails, so the values are the root of the
    sum of both squares.
    """
    assert product.right is not None and product.core is not None
    left, right = _loaded(module, product.left), _loaded(module, product.right)
    kernel = product.core.shape[2:]
    core = _loaded(module, product.core).reshape(*product.core.shape[:2], -1)
    (basis, outer), (base, inner) = np.linalg.qr(left), np.linalg.qr(right.T)
    whitened = np.einsum("ap,pqk,bq->abk", outer, core, inner)
    x, first, _ = np.linalg.svd(whitened.reshape(len(outer), -1), full_matrices=False)
    z, second, _ = np.linalg.svd(whitened.swapaxes(0, 1).reshape(len(inner), -1), full_matrices=False)

    def cut(rank: int, dtype: str) -> Product:
        a, b = min(rank, x.shape[1]), min(rank, z.shape[1])
        middle = np.einsum("pa,pqk,qb->abk", x[:, :a], whitened, z[:, :b])
        # The size of the update is spread evenly over the three.
        size = float(np.linalg.norm(middle)) ** (1 / 3) or 1.0
        return product._replace(
            left=_held(basis @ x[:, :a] * size, dtype),
            right=_held((base @ z[:, :b]).T * size, dtype),
            core=_held((middle / size**2).reshape(a, b, *kernel), dtype),
        )

    squares = np.zeros(max(len(first), len(second)))
    squares[: len(first)] += first**2
    squares[: len(second)] += second**2
    squares[squares <= (EPS * max(left.shape[0], right.shape[1])) ** 2 * squares[0]] = 0
    values = tuple((np.sqrt(squares) * scale).tolist())
    return Spectrum(values, scale * float(np.linalg.norm(whitened)), cut)


def _held(values: Array, dtype: str) -> LazyTensor:
    made = LazyTensor.rounded(values.shape, dtype, lambda: values)
    return LazyTensor(made.shape, dtype, Held(made.read()))
