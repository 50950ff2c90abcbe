"""Terms: the modules of several adapters on the same targets, and what a merge method sees of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from loratool.core.adapter import Adapter
from loratool.core.errors import FormatError, NotExact, UsageError
from loratool.core.layout import Layout
from loratool.core.module import Module
from loratool.core.naming import Naming
from loratool.core.registry import families
from loratool.core.tensor import DTYPES, LazyTensor, code_of
from loratool.ops.convert import cast
from loratool.ops.factored import dense_update, pair_update
from loratool.ops.inputs import Input
from loratool.ops.low_rank import low_rank
from loratool.ops.spell import check_writable, namings_for, regrouped
from loratool.ops.weights import BaseWeights


@dataclass(frozen=True, eq=False)
class Term:
    """One input's module; `gains` are the block weights of its targets, in row order.

    `stands_for` is the input's own module, where that cannot be cut as the output needs it: `module` is then a pair of
    whatever rank it takes.
    """

    index: int
    module: Module
    weight: float
    gains: tuple[float, ...]
    stands_for: Module | None = None

    @property
    def own(self) -> Module:
        """The module as the input has it, up to exact regrouping."""
        return self.stands_for or self.module

    @property
    def gain(self) -> float | None:
        """The one block weight, if all targets share it."""
        return self.gains[0] if len(set(self.gains)) == 1 else None

    @property
    def kind(self) -> str | None:
        """What keeps the module from being a sum's term as it is: DoRA, or a family that is no product of factors."""
        if self.own.magnitude is not None:
            return "DoRA"
        product = self.own.ranked
        return None if product is not None and product.whole else self.own.family.title

    @property
    def full(self) -> bool:
        """Whether the module is its whole update as one matrix, or of a bias alone: these add up exactly."""
        product = self.own.product
        whole = product is not None and product.whole and product.right is None
        return (whole or is_bias(self.own)) and not self.own.needs_base

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
        if self.gain == 1:
            return module
        if self.gain is not None:
            # In the dtype of the file, the result might be rounded, or too large.
            wide = cast(module, "F64" if wide_dtype(module.dtype) else "F32")
            return replace(wide, factors=module.family.scaled(wide.factors, self.gain))
        product = module.product
        assert product is not None
        left = LazyTensor.computed(product.left.shape, "F32", lambda: self.gained(product.left.load().float()))
        return replace(module, factors=module.family.with_product(module.factors, product._replace(left=left)))


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
        """`(out, in * kh * kw)`; 0 for a side that no term tells."""
        heights, widths = zip(*(_flat(term.module) for term in self.terms), strict=True)
        return max(heights), max(widths) or 1

    @property
    def full(self) -> bool:
        """Whether all modules are whole updates: so is their sum."""
        return all(term.full for term in self.terms)


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
        """Whether the update can be told: that of a DoRA, for instance, takes the base weights."""
        return self.term is None or not self.term.module.needs_base or self.base is not None

    def pair(self) -> tuple[Tensor, Tensor]:
        """The update as left and right, its scale in both."""
        return self._pair

    def dense(self) -> Tensor:
        """The update as one matrix, a new one each time."""
        if self.term is None or is_bias(self.term.module):
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
    """`(out, in * kh * kw)`; of a bias alone `(out, 0)`."""
    return module.shape[0], 0 if is_bias(module) else module.delta_width


def is_bias(module: Module) -> bool:
    """Whether a module changes a bias and no weight."""
    return module.factors.keys() == {"bias"}


def group(
    inputs: Sequence[Input], layout: Layout, approximate: bool, voting: bool = False
) -> tuple[list[Group], tuple[str, ...]]:
    """The inputs' modules by their targets as `layout` groups them, in the order of the inputs, and the titles of those
    that have no weight left. Where there is `voting`, an input of strength 0 takes part.

    Raises FormatError where two inputs' weights differ in size, NotExact for what cannot be regrouped (unless
    `approximate` lets it be rewritten as a pair first), UsageError if nothing is left.
    """
    found: dict[_Key, list[Term]] = {}
    firsts: dict[_Key, tuple[str, Module]] = {}
    for index, one in enumerate(inputs):
        for module, stands_for in _as_grouped(one.adapter, layout, approximate):
            key = (module.component, tuple(target.path for target in module.targets))
            path, first = firsts.setdefault(key, (one.adapter.path, module))
            if not all(a == b or 0 in (a, b) for a, b in zip(_flat(module), _flat(first), strict=True)):
                raise FormatError(
                    f"updates a weight of {list(module.shape)}, {path} one of {list(first.shape)}",
                    file=one.adapter.path,
                    key=module.title,
                    hint="the two are for models of different size",
                )
            gains = one.blocks.of_module(module) if one.blocks is not None else (1.0,) * len(module.targets)
            terms = found.setdefault(key, [])
            if any(gains) and (one.weight or voting):
                terms.append(Term(index, module, one.weight, gains, stands_for))
    live = {
        key: Group(tuple(terms), all(layout.obstacle(term.module) is None for term in terms))
        for key, terms in found.items()
        if any(term.weight for term in terms)
    }
    if not live:
        raise UsageError("nothing is left to merge: every strength or block weight is 0")
    return list(live.values()), tuple(firsts[key][1].title for key in found if key not in live)


_Key = tuple[str, tuple[str, ...]]
"""Component and paths of the targets."""


def common_dtype(dtypes: Iterable[str]) -> str:
    """The one dtype, or the smallest that holds all: F32 for F16 with BF16, F16 for different 8-bit floats."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    wide = {dtype for dtype in found if DTYPES[dtype] > 8} or {"F16"}
    if len(wide) == 1:
        return wide.pop()
    return "F64" if "F64" in wide else "F32"


def wide_dtype(dtype: str) -> bool:
    """Whether values of this dtype deserve float64."""
    return DTYPES[dtype] > 16


# -- regrouping -----------------------------------------------------------------------------------------------------


def _as_grouped(adapter: Adapter, layout: Layout, approximate: bool) -> list[tuple[Module, Module | None]]:
    """The modules of one input as the output groups them, each with the one that it stands for, if any.

    What cannot be cut or stacked so is a pair instead, if that was asked for.
    """
    if not approximate:
        check_writable(adapter, layout.id)
    adapter = _of_one_dtype(adapter, layout)
    try:
        return [(module, None) for module in regrouped(adapter, layout).modules]
    except NotExact as error:
        stuck = [one for one in adapter.modules if _is_stuck(one, adapter, layout)]
        if not (approximate and stuck):
            error.hint = error.hint or (REPLACED_BY if stuck else None)
            raise
    owners = {target: one for one in stuck for target in one.targets}
    replaced = {id(one) for one in stuck}
    pairs = tuple(_stand_in(one) if id(one) in replaced else one for one in adapter.modules)
    groups = regrouped(_of_one_dtype(replace(adapter, modules=pairs), layout), layout)
    return [(one, next((owners[t] for t in one.targets if t in owners), None)) for one in groups.modules]


REPLACED_BY = "--approximate --energy 0.999 replaces them by low-rank pairs and reports the error"
"""What to do about modules that have no exact sum, or cannot be cut."""


def _of_one_dtype(adapter: Adapter, layout: Layout) -> Adapter:
    """The adapter with those modules that `layout` fuses in one dtype that holds them: nothing is rounded."""
    namings = namings_for(adapter, layout)
    names = [
        {namings[one.component].home(target).name for target in one.targets} if _moves(one, namings) else set()
        for one in adapter.modules
    ]
    parts: dict[tuple[str, str], list[Module]] = {}
    for one, own in zip(adapter.modules, names, strict=True):
        for name in own:
            parts.setdefault((one.component, name), []).append(one)
    modules = []
    for one, own in zip(adapter.modules, names, strict=True):
        fused = [other for name in own for other in parts[one.component, name]]
        dtype = common_dtype(t.dtype for other in (one, *fused) for t in other.tensors.values() if t.shape)
        modules.append(cast(one, dtype) if len(fused) > len(own) else one)
    return replace(adapter, modules=tuple(modules))


def _moves(module: Module, namings: Mapping[str, Naming]) -> bool:
    return namings[module.component].name_of(module.targets) is None


def _is_stuck(module: Module, adapter: Adapter, layout: Layout) -> bool:
    """Whether a module, taken alone, cannot be regrouped, but the pair that is its update could be."""
    product = module.ranked
    if module.needs_base or (product is not None and product.whole and product.core is None):
        return False
    try:
        regrouped(replace(adapter, modules=(module,)), layout)
    except NotExact:
        return True
    return False


def _stand_in(module: Module) -> Module:
    """A pair whose product is the module's update, computed whenever it is read.

    That of a Tucker module has its rank; what is no product of factors becomes the dense update times the identity.
    """
    work = torch.float64 if wide_dtype(module.dtype) else torch.float32
    height, width = _flat(module)

    def left() -> Tensor:
        pair = pair_update(module, work)
        return dense_update(module, work) if pair is None else pair[0]

    def right() -> Tensor:
        pair = pair_update(module, work)
        return torch.eye(width, dtype=work) if pair is None else pair[1]

    product = module.ranked
    rank = product.left.shape[1] if product is not None and product.whole else width
    code = code_of(work)
    return plain_pair(
        module,
        LazyTensor.computed((height, rank), code, left),
        LazyTensor.computed((rank, width), code, right),
    )


def plain_pair(module: Module, left: LazyTensor, right: LazyTensor) -> Module:
    """A LoRA module on the targets of `module`, in the shape of its update, whose update is left @ right."""
    kernel = module.shape[2:]
    if not kernel and len(module.targets[0].shape) > 2:
        kernel = module.targets[0].shape[2:]  # a LoKr whose w2_b hides the kernel
    ones = (1,) * len(kernel)
    rank, width = right.shape
    factors = {
        "up": left.reshape((*left.shape, *ones)),
        "down": right.reshape((rank, width // math.prod(kernel), *kernel)),
    }
    return Module(module.targets, families()["lora"], factors, float(rank))
