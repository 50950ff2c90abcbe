"""Module: what one file says about one tuple of targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from loratool.core.errors import NotExact
from loratool.core.family import Factors, Family, Product, Shapes
from loratool.core.target import Target, may_be
from loratool.core.tensor import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Module:
    """One adapter module: the targets it updates, the family of its factors, alpha and the optional DoRA magnitude.

    `magnitude` has the canonical shape `(out, 1, ...)` (one norm per output row) or `(1, in, ...)` (one per
    input column). `keys` remembers under which key each role stood in the file it was read from. `weight_shape` is that
    of the weight, where a checkpoint told it and the factors do not.
    """

    targets: tuple[Target, ...]
    family: Family
    factors: Factors
    alpha: float | None = None
    magnitude: LazyTensor | None = None
    keys: Mapping[str, str] = field(default_factory=dict, compare=False)
    weight_shape: tuple[int, ...] | None = field(default=None, compare=False)

    @property
    def component(self) -> str:
        """The pipeline component whose weight this updates."""
        return self.targets[0].component

    @cached_property
    def shapes(self) -> Shapes:
        """Stored shape of every factor, by role."""
        return {role: factor.shape for role, factor in self.factors.items()}

    @cached_property
    def product(self) -> Product | None:
        """The part of the module that ranks can be cut from; None where the family has none."""
        return self.family.product(self.factors)

    @property
    def ranked(self) -> Product | None:
        """The product, if the family can hold it at a lower rank, too."""
        product = self.product
        return None if product is None or (product.whole and product.right is None) else product

    def ranks(self) -> Product:
        """The product that ranks are cut from. Raises NotExact, and says what to do, where there is none."""
        product = self.ranked
        if product is None:
            base = "" if self.family.additive else " and --base CHECKPOINT"
            raise NotExact(
                f"{self.title}: a {self.family.title} module has no ranks that can be cut",
                hint=f"convert --approximate lora with --rank N or --energy E{base} rewrites it as LoRA first",
            )
        return product

    @property
    def stored_rank(self) -> int:
        """The rank of the product as it is stored; of modules without one, the family's rank."""
        return self.rank if self.product is None else self.product.rank

    @property
    def needs_base(self) -> bool:
        """Whether what the module changes depends on the weight: DoRA, and families that are not additive."""
        return self.magnitude is not None or not self.family.additive

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the update, `(out, in)` or `(out, in, kh, kw)`.

        What the factors do not tell is taken from `weight_shape`, or from the standard model, if the rest fits it; else
        it is 0.
        """
        shape = self.family.shape(self.shapes)
        if 0 not in shape:
            return shape
        standard = self.weight_shape or (sum(target.rows for target in self.targets), *self.targets[0].shape[1:])
        return standard if may_be(shape, standard) else shape

    @property
    def delta_width(self) -> int:
        """Columns of the update with its kernel flattened: in * kh * kw."""
        return prod(self.shape[1:])

    @property
    def rank(self) -> int:
        """The rank that alpha is divided by; 0 where the family has none."""
        return self.family.rank(self.shapes)

    @property
    def scale(self) -> float:
        """alpha / rank; 1 without alpha."""
        return self.family.scale(self.shapes, self.alpha)

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """All tensors of the module by role, the magnitude included."""
        tensors = dict(self.factors)
        if self.magnitude is not None:
            tensors["magnitude"] = self.magnitude
        return tensors

    @property
    def parameters(self) -> int:
        """Number of stored values, alpha and other constants not counted."""
        beside = self.magnitude.numel if self.magnitude is not None else 0
        return beside + sum([prod(shape) for shape in self.shapes.values() if shape])

    @property
    def dtype(self) -> str:
        """dtype of the (first) factor that is no constant."""
        factors = list(self.factors.values())
        return next((factor for factor in factors if factor.shape), factors[0]).dtype

    @property
    def magnitude_per_row(self) -> bool:
        """Whether the magnitude has one value per output row (else one per input column)."""
        return self.magnitude is not None and self.magnitude.shape[0] == self.shape[0]

    @property
    def title(self) -> str:
        """A name for messages: component and paths of the targets."""
        first, *rest = (target.path for target in self.targets)
        return f"{self.component}.{first}" + (f" (+{len(rest)})" if rest else "")

    def heights(self) -> list[int]:
        """Rows of each target in this file: the standard model's proportions at this file's width.

        Raises NotExact when the module's height cannot be divided in those proportions.
        """
        total, height = sum(target.rows for target in self.targets), self.shape[0]
        if len(self.targets) == 1:
            return [height]
        if any(target.rows * height % total for target in self.targets):
            raise NotExact(f"{self.title}: {height} rows cannot be divided like the model's {total}")
        return [target.rows * height // total for target in self.targets]

    def delta(self, device: str = "cpu") -> Tensor:
        """The dense update, float32, shape `shape`, alpha / rank included. NotExact where it depends on the weight."""
        loaded = {role: factor.load(device).float() for role, factor in self.factors.items()}
        return self.family.delta(loaded, self.scale)

    def with_scale_of(self, other: Module) -> Module:
        """This module with the alpha that gives it `other`'s scale (none if `other` has none)."""
        if other.alpha is None:
            return replace(self, alpha=None)
        return replace(self, alpha=self.family.alpha(self.shapes, other.scale))

    def rows(self, start: int, stop: int, targets: tuple[Target, ...]) -> Module:
        """The module that updates rows `start:stop`, which belong to `targets`. Scale and dtype are kept.

        Raises NotExact where the family's structure, or a column-wise magnitude, cannot be cut there.
        """
        magnitude = self.magnitude
        if magnitude is not None:
            if not self.magnitude_per_row:
                raise NotExact(f"{self.title}: its DoRA magnitude is per input column and spans all rows of the weight")
            magnitude = magnitude.rows(start, stop)
        part = Module(targets, self.family, self.family.rows(self.factors, start, stop), None, magnitude)
        return part.with_scale_of(self)
