"""What families share: those whose update is a sum, those that change the weight, and factors that are cut by rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from loratool.core.errors import NotExact
from loratool.core.family import ALPHA_SCALES, Factors, Part, Product, Shapes
from loratool.core.ranges import check_gain
from loratool.core.tensor import LazyTensor, concatenated, same_bytes, scaled

if TYPE_CHECKING:
    from torch import Tensor


class Base:
    """Answers that most families give: no separable components, and a bias that stays as it is."""

    title = ""
    alpha_role: str | None = ALPHA_SCALES

    def on_bias(self, factors: Factors) -> Factors | None:
        """None: only weights change."""
        return None

    def live(self, factors: Factors) -> tuple[int, ...] | None:
        """There are no separable rank components."""
        return None

    def keep(self, factors: Factors, components: Sequence[int]) -> Factors:
        """Never asked for: `live` is None."""
        raise NotExact(f"a {self.title} module has no separable rank components")


class Additive(Base):
    """A family whose update does not depend on the weight."""

    additive = True

    def delta(self, factors: Mapping[str, Tensor], scale: float) -> Tensor:
        """The dense update."""
        raise NotImplementedError

    def apply(self, factors: Mapping[str, Tensor], scale: float, weight: Tensor, strength: float) -> Tensor:
        """weight + strength * delta."""
        return weight + self.delta(factors, scale).reshape(weight.shape) * strength


class Rankless:
    """No rank, and so nothing that alpha could be divided by."""

    def rank(self, shapes: Shapes) -> int:
        """0: there is none."""
        return 0

    def scale(self, shapes: Shapes, alpha: float | None) -> float:
        """1."""
        return 1.0

    def alpha(self, shapes: Shapes, scale: float) -> float:
        """The scale, which is 1."""
        return scale


class Changing(Rankless, Base):
    """A family that changes the weight it finds. It has no ranks, and no update of its own."""

    additive = False
    alpha_role: str | None = None

    def delta(self, factors: Mapping[str, Tensor], scale: float) -> Tensor:
        """Raises NotExact: there is none without the weight."""
        raise self._refusal()

    def product(self, factors: Factors) -> Product | None:
        """None."""
        return None

    def with_product(self, factors: Factors, product: Product) -> Factors:
        """Never asked for: `product` is None."""
        raise self._refusal()

    def gain(self, factors: Mapping[str, object]) -> float:
        """Never asked for: `product` is None."""
        raise self._refusal()

    def scaled(self, factors: Factors, gain: float) -> Factors:
        """The factors, if `gain` is 1; else NotExact: a multiple of the change is none of this family's."""
        if gain == 1.0:
            return dict(factors)
        raise self._refusal()

    def _refusal(self) -> NotExact:
        return NotExact(
            f"what {self.title} modules change depends on the base weights",
            hint="convert --approximate lora --base CHECKPOINT with --rank N or --energy E rewrites it as LoRA",
        )


def uncut(title: str) -> NotExact:
    """The refusal to cut or stack a module by rows."""
    return NotExact(f"the rows of a {title} module belong together: they cannot be cut or put together")


def cut_rows(factors: Factors, roles: Sequence[str], start: int, stop: int) -> Factors:
    """Rows `start:stop` of the factors with these roles; the others are shared."""
    return {role: factor.rows(start, stop) if role in roles else factor for role, factor in factors.items()}


def stacked_rows(parts: Sequence[Part], roles: Sequence[str], title: str) -> Factors:
    """The factors with these roles one below the other, if the parts share all the others. Else NotExact."""
    first = next(part.factors for part in parts if part.factors is not None)
    for part in parts:
        alike = (
            part.factors is not None
            and part.gain == 1.0
            and part.factors.keys() == first.keys()
            and all(part.factors[role].dtype == factor.dtype for role, factor in first.items())
            and all(same_bytes(part.factors[role], factor) for role, factor in first.items() if role not in roles)
        )
        if not alike:
            raise NotExact(
                f"parts of one fused weight differ: {title} modules can only be put together where all agree"
            )
    return {
        role: concatenated([part.factors[role] for part in parts if part.factors]) if role in roles else factor
        for role, factor in first.items()
    }


def scaled_all(factors: Factors, gain: float) -> Factors:
    """All factors times `gain`, each value rounded once. Raises TooLarge where a dtype does not hold one."""
    for factor in factors.values():
        check_gain(gain, factor)
    return {role: scaled(factor, gain) for role, factor in factors.items()}


def turned(matrix: LazyTensor) -> LazyTensor:
    """The transpose of a matrix, lazily."""
    return LazyTensor.computed(matrix.shape[::-1], matrix.dtype, lambda: matrix.load().T.contiguous())


def made(shape: Sequence[int], dtype: str, make: Callable[[], Tensor]) -> LazyTensor:
    """A tensor computed when it is read, rounded once to `dtype`."""
    from loratool.core.tensor import torch_dtype

    return LazyTensor.computed(shape, dtype, lambda: make().to(torch_dtype(dtype)).contiguous())
