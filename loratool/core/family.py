"""Family: the mathematics of one kind of adapter. What a plug-in in `families/` must offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from loratool.core.tensor import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor

Factors = Mapping[str, LazyTensor]
Shapes = Mapping[str, tuple[int, ...]]


ALPHA_SCALES = "scale"
"""`alpha_role` of families whose update is multiplied by alpha / rank."""


class Part(NamedTuple):
    """One stretch of rows in a stacked module: `height` rows, and what updates them (None: nothing does).

    `gain` is the part's scale over the stack's scale: what its update has to be multiplied by.
    """

    height: int
    factors: Factors | None
    gain: float = 1.0


class Product(NamedTuple):
    """The part of a module that ranks can be cut from: `left @ right`, `(m, rank)` and `(rank, n)`, kernels flattened.

    `right` is None where `left` is a whole matrix; if that is `whole`, it is the update itself, and has no ranks that
    the family could cut. Of a Tucker module `core` `(p, q, *kernel)` stands between `left`
    `(m, p)` and `right` `(q, n)`. `whole`: the product times the scale is the update (`transposed`: its transpose);
    else the update's norm is that of the product times scale and `gain`.
    """

    left: LazyTensor
    right: LazyTensor | None
    core: LazyTensor | None = None
    whole: bool = True
    transposed: bool = False

    @property
    def rank(self) -> int:
        """The rank as it is stored: that of a whole matrix is its smaller side."""
        if self.core is not None:
            return max(self.core.shape[:2])
        return min(self.left.shape) if self.right is None else self.right.shape[0]


class Family(Protocol):
    """One kind of adapter. Shapes are those of the stored factors, by role; nothing is read for them.

    The update of an `additive` family is a matrix of its own, which `delta` makes. That of any other depends on the
    weight: `apply` makes the new weight, and `delta` and `scaled` raise NotExact.
    """

    @property
    def id(self) -> str:
        """The family's name in files, messages and JSON."""

    @property
    def title(self) -> str:
        """The family's name for people."""

    @property
    def additive(self) -> bool:
        """Whether the update is a sum of its own, whatever weight it is added to."""

    @property
    def alpha_role(self) -> str | None:
        """What a stored alpha is: ALPHA_SCALES, the role of the factor that it is (OFT's constraint), None: nothing."""

    def problem(self, shapes: Shapes) -> str | None:
        """What keeps these factors from being a module (a missing half, ranks that differ), or None."""

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Shape of the update, `(out, in)` or `(out, in, kh, kw)`; `(out, in * kh * kw)` if the kernel is flattened.

        0 for a side that the factors do not tell: the weight has it.
        """

    def rank(self, shapes: Shapes) -> int:
        """The rank that alpha is divided by; 0 where there is none."""

    def scale(self, shapes: Shapes, alpha: float | None) -> float:
        """The factor of the update: alpha / rank, or 1 without alpha."""

    def alpha(self, shapes: Shapes, scale: float) -> float:
        """The alpha that gives this scale: the inverse of `scale`."""

    def delta(self, factors: Mapping[str, Tensor], scale: float) -> Tensor:
        """The dense update of shape `shape`, in the factors' dtype (float32 or float64), scale included."""

    def apply(self, factors: Mapping[str, Tensor], scale: float, weight: Tensor, strength: float) -> Tensor:
        """The new weight, `(out, in * kh * kw)` like `weight`, in its dtype (float32 or float64)."""

    def on_bias(self, factors: Factors) -> Factors | None:
        """Factors that are applied to the layer's bias as to a weight `(out, 1)`; None: it stays as it is."""

    def rows(self, factors: Factors, start: int, stop: int) -> Factors:
        """Factors of the update's rows `start:stop`. Raises NotExact where the structure cannot be cut there."""

    def grain(self, shapes: Shapes) -> int:
        """`rows` can cut the update at multiples of so many rows; 0 where it cannot cut at all."""

    def live(self, factors: Factors) -> tuple[int, ...] | None:
        """Rank components that reach any row; None where the family has no separable components."""

    def keep(self, factors: Factors, components: Sequence[int]) -> Factors:
        """Factors with only these rank components, in this order."""

    def stacked(self, parts: Sequence[Part]) -> Factors:
        """Factors whose update has the rows of `parts` one below the other. Raises NotExact if there are none."""

    def product(self, factors: Factors) -> Product | None:
        """The part of the module that ranks can be cut from; None where there are none. Nothing is read."""

    def with_product(self, factors: Factors, product: Product) -> Factors:
        """Factors with another product (of the same `whole`, `transposed`) in its place; alpha / rank is not kept."""

    def gain(self, factors: Mapping[str, Any]) -> float:
        """Norm of the update over that of its product (Frobenius), without the scale. Of arrays or tensors."""

    def scaled(self, factors: Factors, gain: float) -> Factors:
        """Factors of the update times `gain`, each rounded once to its dtype.

        One factor takes the gain, unless its dtype cannot hold the result: then two share it. Raises TooLarge where
        that is not enough.
        """
