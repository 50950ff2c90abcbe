"""Decompose: the singular values of a module's update, and its best approximation of any rank, in factored form.

The SVD of `left @ right` needs no dense matrix. With `left = Q R` and `right.T = P T` (QR), it follows from the SVD of
the small `R @ T.T = X S Y.T`, and the balanced factors of rank k are

    left @ (T.T Y S^-1/2)[:, :k]    and    (S^-1/2 X.T R)[:k] @ right,

so that nothing of the size of a factor has to be kept. R comes from the Gram matrix `left.T @ left = R.T R` by Cholesky
where that is accurate enough, else from a QR. All of this is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from loratool.core.family import Product
from loratool.core.module import Module
from loratool.core.tensor import LazyTensor, torch_dtype
from loratool.ops.factored import check_finite
from loratool.ops.pool import Tick, each

EPS = torch.finfo(torch.float64).eps

TRUSTED = 3e-10
"""Squared singular values from Gram matrices carry an error of about eps times the factors' squared norms. Above this
share of these norms they are good to 1e-6 relative, which is what the tests ask for; below, QR is used."""

CANCELLING = 1e3
"""How many times the product its terms may be, taken alone, for float32 to be good enough for 16 bits."""

BATCH_BYTES = 2 << 30
"""What is decomposed at once on a GPU, as float64."""


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


def decompose(modules: Sequence[Module], device: str = "cpu", tick: Tick | None = None) -> list[Spectrum]:
    """The spectra of modules, in their order; each is read once. Computed in float64 on `device`.

    On the CPU module by module in every thread; a GPU forms the Gram matrices of equal shapes in batches. Raises
    FormatError for a module with NaN or infinite values.
    """
    if torch.device(device).type == "cpu":
        return each(spectrum, modules, tick)
    return _batched(modules, device, tick)


def spectrum(module: Module) -> Spectrum:
    """The spectrum of one module, computed in float64 on the CPU."""
    product = module.product
    scale = _outer_scale(module, product)
    if product.core is not None:
        return _tucker(module, product, scale)
    if product.right is None:
        return _whole(module, product.left, scale)
    left, right = _loaded(module, product.left), _loaded(module, product.right)
    return _from_pair(product, _pair(left, right), scale, "cpu")


def truncated(module: Module, found: Spectrum, rank: int, dtype: str | None = None) -> Module:
    """The best approximation of `module` of a rank, with its scale alpha / rank, magnitude and bias, as lazy factors.

    Factors are balanced (the square root of the singular values on either side). A rank that the module does not exceed
    leaves it as it is.
    """
    product = module.product
    if rank >= product.rank and dtype in (None, module.dtype):
        return module
    cut = found.cut(rank, dtype or module.dtype)
    made = replace(module, factors=module.family.with_product(module.factors, cut), alpha=None, keys={})
    return made.with_scale_of(module)


def _outer_scale(module: Module, product: Product) -> float:
    """Norm of the update over that of the stored product. Checks what is not of the product: bias, magnitude, alpha."""
    check_finite(module, torch.tensor(module.scale))
    if product.whole:
        for role in ("bias", "magnitude"):
            if role in module.tensors:
                _loaded(module, module.tensors[role])
        return abs(module.scale)
    loaded = {role: _loaded(module, tensor) for role, tensor in module.tensors.items()}
    return abs(module.scale) * module.family.gain(loaded)


def _loaded(module: Module, factor: LazyTensor, device: str = "cpu") -> Tensor:
    values = factor.load(device).double()
    check_finite(module, values)
    return values


# -- pairs ----------------------------------------------------------------------------------------------------------


class _Core(NamedTuple):
    """Singular values of left @ right, and the small matrices that turn left and right into the balanced factors.

    `gross` is the sum of |column of left| |row of right|: what rounding errors are relative to, where terms cancel.
    """

    values: Tensor
    to_left: Tensor
    to_right: Tensor
    gross: Tensor


def _pair(left: Tensor, right: Tensor) -> _Core:
    core, trusted = _by_grams(left.mT @ left, right @ right.mT)
    return core if bool(trusted) else _by_qr(left, right)


def _by_grams(outer: Tensor, inner: Tensor) -> tuple[_Core, Tensor]:
    """By the eigenvalues of R inner R.T, R from the Cholesky factorisation of `outer`; and whether that is good enough.

    `outer` is left.T @ left, `inner` right @ right.T; both may be batches.
    """
    lower, failed = torch.linalg.cholesky_ex(outer)
    squares, vectors = _eigh(lower.mT @ inner @ lower)
    squares, vectors = squares.flip(-1), vectors.flip(-1)
    sizes = outer.diagonal(dim1=-2, dim2=-1), inner.diagonal(dim1=-2, dim2=-1)
    # Traces bound the spectral norms from above.
    trusted = (failed == 0) & (squares[..., -1] > TRUSTED * sizes[0].sum(-1) * sizes[1].sum(-1))
    values = squares.clamp_min(0).sqrt()
    root = values.sqrt()
    onto = lower @ vectors
    gross = (sizes[0] * sizes[1]).sqrt().sum(-1)
    to_left = inner @ onto / (values * root).unsqueeze(-2)
    return _Core(values, to_left, onto.mT / root.unsqueeze(-1), gross), trusted


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors. For a batch on a GPU by the cores of the CPU: ten times faster for such small ones."""
    if matrices.device.type == "cpu":
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors
    found = each(torch.linalg.eigh, matrices.cpu().tensor_split(torch.get_num_threads()))
    values, vectors = (torch.cat(parts).to(matrices.device) for parts in zip(*found, strict=True))
    return values, vectors


def _by_qr(left: Tensor, right: Tensor) -> _Core:
    """By QR of both factors and the SVD of the small core. Values below the numerical rank are 0."""
    outer = torch.linalg.qr(left, mode="r").R
    inner = torch.linalg.qr(right.mT, mode="r").R
    x, values, y = torch.linalg.svd(outer @ inner.mT, full_matrices=False)
    # Householder's QR is accurate column by column, so that scaled columns do no harm.
    gross = (outer.norm(dim=0) * inner.norm(dim=0)).sum()
    values = torch.where(values > EPS * max(left.shape[0], right.shape[1]) * gross, values, 0)
    root = torch.where(values > 0, values.sqrt(), math.inf)  # components of value 0 become zeros
    return _Core(values, inner.mT @ y.mT / root, (x / root).mT @ outer, gross)


def _from_pair(product: Product, core: _Core, scale: float, device: str) -> Spectrum:
    left, right = product.left, product.right
    assert right is not None

    def cut(rank: int, dtype: str) -> Product:
        # What is stored in 16 bits or less loses nothing in a float32 product, unless terms cancel.
        work = torch.float64 if dtype in ("F64", "F32") or cancels else torch.float32
        rank = min(rank, len(spread))
        onto, into = core.to_left[:, :rank].to(work), core.to_right[:rank].to(work)

        def make_left() -> Tensor:
            return (left.load(device).to(work) @ onto.to(device)).to(torch_dtype(dtype)).cpu()

        def make_right() -> Tensor:
            return (into.to(device) @ right.load(device).to(work)).to(torch_dtype(dtype)).cpu()

        return replace(
            product,
            left=LazyTensor.computed((left.shape[0], rank), dtype, make_left),
            right=LazyTensor.computed((rank, right.shape[1]), dtype, make_right),
        )

    cancels = float(core.gross) > CANCELLING * float(core.values.norm())
    spread = [value * scale for value in core.values.tolist()]
    return Spectrum(tuple(spread), math.sqrt(math.fsum(value * value for value in spread)), cut)


# -- whole matrices and Tucker ----------------------------------------------------------------------------------------


def _whole(module: Module, matrix: LazyTensor, scale: float) -> Spectrum:
    """Of a whole matrix (a LoKr's w2), by its dense SVD."""
    x, values, y = torch.linalg.svd(_loaded(module, matrix), full_matrices=False)
    floor = EPS * max(matrix.shape) * float(values[0])
    values = torch.where(values > floor, values, 0)
    root = values.sqrt()

    def cut(rank: int, dtype: str) -> Product:
        left, right = (x * root)[:, :rank], (root[:, None] * y)[:rank]
        return replace(module.product, left=_held(left, dtype), right=_held(right, dtype))

    spread = [value * scale for value in values.tolist()]
    return Spectrum(tuple(spread), math.sqrt(math.fsum(value * value for value in spread)), cut)


def _tucker(module: Module, product: Product, scale: float) -> Spectrum:
    """By the higher-order SVD (De Lathauwer et al. 2000): bases of the output and of the input side, core between.

    The error of cutting both sides to k is at most the root of the sum of both tails, so the values are the root of the
    sum of both squares.
    """
    assert product.right is not None and product.core is not None
    left, right = _loaded(module, product.left), _loaded(module, product.right)
    core = _loaded(module, product.core).flatten(2)
    (basis, outer), (base, inner) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    whitened = torch.einsum("ap,pqk,bq->abk", outer, core, inner)
    x, first, _ = torch.linalg.svd(whitened.flatten(1), full_matrices=False)
    z, second, _ = torch.linalg.svd(whitened.transpose(0, 1).flatten(1), full_matrices=False)
    kernel = product.core.shape[2:]

    def cut(rank: int, dtype: str) -> Product:
        a, b = min(rank, x.shape[1]), min(rank, z.shape[1])
        middle = torch.einsum("ap,pqk,qb->abk", x[:, :a].mT, whitened, z[:, :b])
        # The size of the update is spread evenly over the three.
        size = float(middle.norm()) ** (1 / 3) or 1.0
        return replace(
            product,
            left=_held(basis @ x[:, :a] * size, dtype),
            right=_held((base @ z[:, :b]).mT * size, dtype),
            core=_held((middle / size**2).reshape(a, b, *kernel), dtype),
        )

    length = max(len(first), len(second))
    squares = [scale * scale * (_at(first, i) ** 2 + _at(second, i) ** 2) for i in range(length)]
    floor = (EPS * max(left.shape[0], right.shape[1])) ** 2 * max(squares)
    values = tuple(math.sqrt(square) if square > floor else 0.0 for square in squares)
    return Spectrum(values, scale * float(whitened.norm()), cut)


def _at(values: Tensor, index: int) -> float:
    return float(values[index]) if index < len(values) else 0.0


def _held(values: Tensor, dtype: str) -> LazyTensor:
    return LazyTensor.from_torch(values.to(torch_dtype(dtype)).contiguous())


# -- dense matrices --------------------------------------------------------------------------------------------------


def low_rank(matrix: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `limit` largest singular values of a dense matrix and their vectors: x `(m, k)`, values, y `(k, n)`.

    By a dense SVD, or, where few of many are wanted, by randomised subspace iteration (Halko et al. 2011,
    arXiv:0909.4061), which goes on until the error of the approximation is settled to 1e-6 of itself. Values that are
    zero to rounding are left out. In the dtype of `matrix`.
    """
    found = _randomised(matrix, limit) if RANDOMISED * (limit + OVERSAMPLED) <= min(matrix.shape) else None
    x, values, y = found or torch.linalg.svd(matrix, full_matrices=False)
    floor = torch.finfo(matrix.dtype).eps * max(matrix.shape) * values[0]
    kept = min(limit, max(int((values > floor).sum()), 1))
    return x[:, :kept], values[:kept], y[:kept]


OVERSAMPLED, ROUNDS, RANDOMISED = 16, 24, 6
"""Vectors beyond those wanted, iterations at most, and how much smaller than the matrix the subspace has to be."""


def _randomised(matrix: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """None if it does not settle."""
    total = float(matrix.double().square().sum())
    start = torch.randn(matrix.shape[1], limit + OVERSAMPLED, generator=torch.Generator().manual_seed(0))
    basis = matrix @ start.to(matrix)
    left = math.inf
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(basis).Q
        projected = basis.mT @ matrix
        inner, values, y = torch.linalg.svd(projected, full_matrices=False)
        before, left = left, max(total - float(values[:limit].double().square().sum()), 0.0)
        # What remains can only shrink from round to round: a step that changes nothing has found the optimum.
        if before - left <= 2e-6 * left or left <= 1e-12 * total:
            return basis @ inner, values, y
        basis = matrix @ projected.mT
    return None


# -- GPU ------------------------------------------------------------------------------------------------------------


def _batched(modules: Sequence[Module], device: str, tick: Tick | None) -> list[Spectrum]:
    found: dict[int, Spectrum] = {}
    groups: dict[object, list[int]] = {}
    for index, module in enumerate(modules):
        product = module.product
        pair = (product.left, product.right) if product.core is None and product.right is not None else ()
        groups.setdefault(tuple((side.shape, side.dtype) for side in pair) or index, []).append(index)
    for indices in groups.values():
        for batch in _batches(modules, indices):
            found |= _decompose_batch({index: modules[index] for index in batch}, device)
            if tick is not None:
                tick(len(found), len(modules))
    return [found[index] for index in range(len(modules))]


def _batches(modules: Sequence[Module], indices: Sequence[int]) -> Iterator[Sequence[int]]:
    size = max(1, BATCH_BYTES // (8 * max(modules[indices[0]].parameters, 1)))
    return (indices[start : start + size] for start in range(0, len(indices), size))


def _decompose_batch(batch: Mapping[int, Module], device: str) -> dict[int, Spectrum]:
    products = {index: module.product for index, module in batch.items()}
    lefts = [product.left for product in products.values()]
    rights = [product.right for product in products.values() if product.right is not None and product.core is None]
    if len(rights) < len(batch):
        return {index: spectrum(module) for index, module in batch.items()}
    left = torch.stack(each(lambda factor: factor.load(device), lefts)).double()
    right = torch.stack(each(lambda factor: factor.load(device), rights)).double()
    sums = (left.sum((1, 2)) + right.sum((1, 2))).tolist()
    for at, (module, total) in enumerate(zip(batch.values(), sums, strict=True)):
        if not math.isfinite(total):
            check_finite(module, left[at])
            check_finite(module, right[at])
    cores, trusted = _by_grams(left.mT @ left, right @ right.mT)
    # What is small comes to the CPU at once; the matrices are where the factors will be made.
    cores, good = cores._replace(values=cores.values.cpu(), gross=cores.gross.cpu()), trusted.tolist()
    found = {}
    for at, (index, module) in enumerate(batch.items()):
        core = _Core(*(part[at] for part in cores)) if good[at] else _by_qr(left[at].cpu(), right[at].cpu())
        found[index] = _from_pair(products[index], core, _outer_scale(module, products[index]), device)
    return found
