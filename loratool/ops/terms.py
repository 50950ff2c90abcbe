"""Terms: the modules of several adapters on the same targets, and what a merge method sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from loratool.core.adapter import Adapter
from loratool.core.errors import FormatError, NotExact, UsageError
from loratool.core.layout import Layout
from loratool.core.module import Module
from loratool.core.target import same_shape
from loratool.core.tensor import LazyTensor
from loratool.ops.approximate import Wish, as_lora
from loratool.ops.blocks import BlockWeights
from loratool.ops.factored import dense_update, pair_update
from loratool.ops.low_rank import low_rank
from loratool.ops.spell import check_writable, regrouped
from loratool.ops.weights import BaseWeights


@dataclass(frozen=True, eq=False)
class Input:
    """One adapter in a merge, its strength, and weights for its blocks."""

    adapter: Adapter
    weight: float = 1.0
    blocks: BlockWeights | None = None


@dataclass(frozen=True, eq=False)
class Term:
    """One input's module; `gains` are the block weights of its targets, in row order."""

    index: int
    module: Module
    weight: float
    gains: tuple[float, ...]

    @property
    def gain(self) -> float | None:
        """The one block weight, if all targets share it."""
        return self.gains[0] if len(set(self.gains)) == 1 else None

    @property
    def kind(self) -> str | None:
        """What keeps the module from being a sum's term as it is: DoRA, or a family that is no product of factors."""
        if self.module.magnitude is not None:
            return "DoRA"
        return None if self.module.product.whole else self.module.family.title

    def gained(self, rows: Tensor) -> Tensor:
        """Rows of the module's update times the block weights of their targets."""
        if self.gain is not None:
            return rows if self.gain == 1 else rows * self.gain
        heights = torch.tensor(self.module.heights(), device=rows.device)
        gains = torch.tensor(self.gains, dtype=rows.dtype, device=rows.device)
        return rows * gains.repeat_interleave(heights).reshape(-1, *[1] * (rows.dim() - 1))

    def weighed(self) -> Module:
        """The module with its block weights on it, lazily."""
        module = self.module
        if self.gain is not None:
            return (
                module if self.gain == 1 else replace(module, factors=module.family.scaled(module.factors, self.gain))
            )
        product = module.product
        left = LazyTensor.computed(product.left.shape, "F32", lambda: self.gained(product.left.load().float()))
        return replace(module, factors=module.family.with_product(module.factors, replace(product, left=left)))


@dataclass(frozen=True, eq=False)
class Group:
    """The terms on one tuple of targets: one at least, in the order of the inputs.

    `writable`: the output's layout has a spelling for their modules as they are.
    """

    terms: tuple[Term, ...]
    writable: bool = True

    @property
    def first(self) -> Module:
        """The module of the first input that has one."""
        return self.terms[0].module

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in * kh * kw)`."""
        return _flat(self.first)


@dataclass(eq=False)
class Seen:
    """A term as a method sees it (`core.method.Update`); without a term it is zero. Loads once, in `work`.

    The update is given in units of `unit`: for a sum that of the result, so that factors keep their values.
    """

    index: int
    name: str
    shape: tuple[int, int]
    term: Term | None
    work: torch.dtype
    device: str = "cpu"
    base: BaseWeights | None = None
    unit: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether the update is stored as a product of factors."""
        return self.term is not None and self.term.kind is None

    @property
    def known(self) -> bool:
        """Whether the update can be told: that of a DoRA takes the base weights."""
        return self.term is None or self.term.module.magnitude is None or self.base is not None

    def pair(self) -> tuple[Tensor, Tensor]:
        """The update as left and right, its scale in both."""
        return self._pair

    def dense(self) -> Tensor:
        """The update as one matrix, a new one each time."""
        if self.term is None:
            return torch.zeros(self.shape, dtype=self.work, device=self.device)
        if self.plain:
            left, right = self._pair
            return left @ right
        whole = self.term.gained(dense_update(self.term.module, self.work, self.device, self.base))
        return whole if self.unit == 1 else whole / self.unit

    @cached_property
    def _pair(self) -> tuple[Tensor, Tensor]:
        if self.term is None:
            empty = torch.zeros(0, dtype=self.work, device=self.device)
            return empty.reshape(self.shape[0], 0), empty.reshape(0, self.shape[1])
        found = pair_update(self.term.module, self.work, self.device, self.unit)
        if found is not None:
            left, right = found
            return self.term.gained(left), right
        x, values, y = low_rank(self.dense().double(), min(self.shape))
        root = values.sqrt()
        return (x * root).to(self.work), (root[:, None] * y).to(self.work)


def _flat(module: Module) -> tuple[int, int]:
    return module.shape[0], module.delta_width


def group(
    inputs: Sequence[Input], layout: Layout, approximate: bool, voting: bool = False
) -> tuple[list[Group], tuple[str, ...]]:
    """The inputs' modules by their targets as `layout` groups them, in the order of the inputs, and the titles of those
    that have no weight left. Where there is `voting`, an input of strength 0 takes part.

    Raises FormatError where two inputs' weights differ in size, NotExact for what cannot be regrouped (unless
    `approximate` lets it be rewritten as a pair first), UsageError if nothing is left.
    """
    found: dict[tuple[str, tuple[str, ...]], list[Term]] = {}
    titles: dict[tuple[str, tuple[str, ...]], str] = {}
    shapes: dict[tuple[str, tuple[str, ...]], tuple[str, tuple[int, ...]]] = {}
    for index, one in enumerate(inputs):
        for module in _as_grouped(one.adapter, layout, approximate):
            key = (module.component, tuple(target.path for target in module.targets))
            titles.setdefault(key, module.title)
            path, shape = shapes.setdefault(key, (one.adapter.path, module.shape))
            if not same_shape(_flat(module), (shape[0], _width(shape))):
                raise FormatError(
                    f"updates a weight of {list(module.shape)}, {path} one of {list(shape)}",
                    file=one.adapter.path,
                    key=module.title,
                    hint="the two are for models of different size",
                )
            gains = one.blocks.of_module(module) if one.blocks is not None else (1.0,) * len(module.targets)
            terms = found.setdefault(key, [])
            if any(gains) and (one.weight or voting):
                terms.append(Term(index, module, one.weight, gains))
    live = {
        key: Group(tuple(terms), all(layout.obstacle(term.module) is None for term in terms))
        for key, terms in found.items()
        if any(term.weight for term in terms)
    }
    groups = list(live.values())
    if not groups:
        raise UsageError("nothing is left to merge: every strength or block weight is 0")
    return groups, tuple(titles[key] for key in found if key not in live)


def _width(shape: tuple[int, ...]) -> int:
    width = 1
    for size in shape[1:]:
        width *= size
    return width


def _as_grouped(adapter: Adapter, layout: Layout, approximate: bool) -> Sequence[Module]:
    """The modules of one input as the output groups them; what cannot be cut so is rewritten only when asked to."""
    if not approximate:
        check_writable(adapter, layout.id)
    try:
        return regrouped(adapter, layout).modules
    except NotExact as error:
        if not approximate:
            error.hint = error.hint or "--approximate rewrites it as a low-rank pair and reports the error"
            raise
    # All the rank there is: nothing is lost but rounding.
    pairs, _ = as_lora(adapter.modules, Wish(energy=1.0), lambda module: None if module.magnitude else "cannot be cut")
    return regrouped(replace(adapter, modules=pairs), layout).modules
