"""merge: one adapter from several, module by module, by a method from `merging/`. Nothing here knows which."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loratool.core.adapter import Adapter
from loratool.core.errors import FormatError, NotExact, UsageError, few
from loratool.core.family import Product
from loratool.core.method import Method, Option
from loratool.core.module import Module
from loratool.core.registry import families, layouts
from loratool.core.tensor import DTYPES, LazyTensor, code_of, torch_dtype
from loratool.ops.conflicts import sign_conflicts
from loratool.ops.convert import cast
from loratool.ops.low_rank import low_rank
from loratool.ops.pool import Tick, each
from loratool.ops.probe import Terms
from loratool.ops.ranks import Limits, Rule
from loratool.ops.resize import Cut, Written, resize
from loratool.ops.similar import Similar, independent
from loratool.ops.spectrum import spectrum, truncated
from loratool.ops.terms import Group, Input, Seen, group
from loratool.ops.weights import BaseWeights

FAR = 4096.0
"""From this ratio on, two scales alpha / rank do not fit into one."""


if TYPE_CHECKING:
    from loratool.core.tensor import Array


@dataclass(frozen=True)
class MergedModule:
    """What became of one tuple of targets. `ranks` of the inputs that update it, None for those that do not.

    `error` is the relative error (Frobenius) of the factors against what the method says, rounding not counted: 0 for
    an exact sum. `approximated` names what a low-rank form replaces. `conflicts` are the entries on which the inputs
    disagree in sign, out of `shared` that at least two of them change (None where the method does not ask).
    """

    title: str
    component: str
    ranks: tuple[int | None, ...]
    rank_after: int
    norm: float
    error: float
    approximated: tuple[str, ...] = ()
    conflicts: int | None = None
    shared: int | None = None


@dataclass(frozen=True)
class Merged:
    """A merged adapter, whose factors are made when they are written, and how it came about.

    `expected` are, module by module, the terms whose weighted sum it is, but for the relative error `planned`.
    `cosines[component]` is the matrix of cosines between the inputs' updates (block weights applied; NaN where an input
    has none). `silent` are modules that no input updates any more because a strength or block weight is 0.
    """

    adapter: Adapter
    modules: tuple[MergedModule, ...]
    expected: tuple[Terms, ...]
    images: tuple[Array | None, ...]
    planned: tuple[float, ...]
    cosines: Mapping[str, Sequence[Sequence[float]]]
    silent: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Relative error of the whole adapter against what the method says (Frobenius), rounding not counted."""
        total = math.fsum(module.norm**2 for module in self.modules)
        lost = math.fsum((module.error * module.norm) ** 2 for module in self.modules)
        return math.sqrt(lost / total) if total else 0.0


def merge(
    inputs: Sequence[Input],
    method: Method,
    options: Mapping[str, Any] | None = None,
    *,
    to: str | None = None,
    dtype: str | None = None,
    rule: Rule | None = None,
    limits: Limits | None = None,
    approximate: bool = False,
    base: BaseWeights | None = None,
    written: Written | None = None,
    device: str = "cpu",
    tick: Tick | None = None,
) -> Merged:
    """The inputs merged by `method` on the true updates alpha / rank * up @ down, grouped as the layout `to` writes it.

    Without a rule an exact sum keeps every rank that carries something (two equal adapters give the rank of one), and a
    dense result gets the largest rank among the inputs; a rule truncates optimally. Modules take the dtype that holds
    all inputs', or `dtype` (a safetensors code). What is no product of factors (LoKr, DoRA) stays as it is where it
    stands alone; else `approximate` replaces it by a low-rank form, which needs a rule and, for DoRA, the `base`
    weights. Computed in float32 or better. Raises UsageError for options that do not apply, FormatError for inputs of
    different models, NotExact for what would need `approximate`.
    """
    options = dict(options or {})
    check_inputs(inputs, method, options)
    first = inputs[0].adapter
    layout = layouts()[to or first.layout]
    groups, silent = group(inputs, layout, approximate, voting="sign" in method.options)
    _check_kinds(groups, method, approximate, rule, base)
    job = _Job(method, options, tuple(one.weight for one in inputs), rule, limits or Limits(), dtype, base, device)
    made = each(job.run, groups, tick)
    adapter = Adapter(tuple(one.module for one in made), first.architecture, layout.id, path=first.path)
    cuts: Sequence[Cut | None] = [None] * len(made)
    if rule is not None:
        resized = resize(adapter, rule, limits=limits, dtype=dtype, written=written, device=device)
        adapter, cuts = resized.adapter, resized.cuts
    modules = tuple(
        module if module.dtype == one.dtype or module is one.kept else cast(module, one.dtype)
        for one, module in zip(made, adapter.modules, strict=True)
    )
    rows = tuple(one.row(len(inputs), module, cut) for one, module, cut in zip(made, modules, cuts, strict=True))
    return Merged(
        adapter=replace(adapter, modules=modules),
        modules=rows,
        expected=tuple(one.expected for one in made),
        images=tuple(one.image for one in made),
        planned=tuple(one.planned(row, cut) for one, row, cut in zip(made, rows, cuts, strict=True)),
        cosines={component: _cosines(made, component) for component in adapter.components},
        silent=silent,
    )


def check_inputs(inputs: Sequence[Input], method: Method, options: Mapping[str, Any]) -> None:
    """Raises UsageError for a wrong number of inputs, a strength that is no number or options that the method does not
    have; FormatError for models that differ, and for kinds of modules that cannot be read yet."""
    fewest, most = method.inputs
    if len(inputs) < fewest or (most is not None and len(inputs) > most):
        wanted = f"{fewest} or more" if most is None else f"{fewest}" if most == fewest else f"{fewest} to {most}"
        raise UsageError(f"{method.id} takes {wanted} inputs, found {len(inputs)}")
    unknown = next((name for name in options if name not in method.options), None)
    if unknown is not None:
        has = ", ".join(option.flag for option in method.options.values()) or "none"
        raise UsageError(f"{method.id} has no option --{unknown}", hint=f"its options: {has}")
    for name, value in options.items():
        _check_value(method.options[name], value)
    first = inputs[0].adapter
    for one in inputs:
        adapter = one.adapter
        if not math.isfinite(one.weight):
            raise UsageError(f"the weight is {one.weight}, expected a finite number", file=adapter.path)
        if adapter.architecture.id != first.architecture.id:
            raise FormatError(
                f"is for {adapter.architecture.title}, {first.path} for {first.architecture.title}",
                file=adapter.path,
                hint="only adapters for one model can be merged",
            )
        if adapter.unread_families:
            kinds = ", ".join(f"{count} of {family}" for family, count in sorted(adapter.unread_families.items()))
            raise FormatError(
                f"holds modules that cannot be merged yet: {kinds}",
                file=adapter.path,
                hint="merge the others without it",
            )


def _check_value(option: Option, value: object) -> None:
    """Raises UsageError for a value of another kind than the option's default. What range it has, its method knows."""
    kind = type(option.default)
    if kind is bool or isinstance(value, bool):
        fits, wanted = type(value) is kind, "true or false" if kind is bool else "a number"
    elif kind is float:
        fits, wanted = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max, "a finite number"
    else:
        fits, wanted = isinstance(value, kind), "a whole number" if kind is int else "a word"
    if not fits:
        raise UsageError(f"{option.flag} is {value!r}, expected {wanted}")


def _check_kinds(
    groups: Sequence[Group], method: Method, approximate: bool, rule: Rule | None, base: BaseWeights | None
) -> None:
    """Raises NotExact where something has to be replaced by a low-rank form and nobody asked for that."""
    needed = {one.first.title: found for one in groups if (found := _replaced(one, method))}
    kinds = sorted({kind for found in needed.values() for kind in found})
    if not needed:
        return
    if not approximate:
        raise NotExact(
            f"{len(needed)} modules ({', '.join(kinds)}) have no exact sum: {few(tuple(needed))}",
            hint="--approximate --energy 0.999 replaces them by low-rank pairs and reports the error"
            + ("; DoRA needs --base CHECKPOINT as well" if "DoRA" in kinds else ""),
        )
    if "DoRA" in kinds and base is None:
        title = next(title for title, found in needed.items() if "DoRA" in found)
        raise NotExact("what a DoRA changes depends on the base weights", key=title, hint="add --base CHECKPOINT")
    if rule is None:
        raise UsageError("--approximate does not say how far", hint="add --rank N, --energy 0.999 or another rule")


def _replaced(one: Group, method: Method) -> tuple[str, ...]:
    """The kinds of modules in a group that a low-rank form has to replace."""
    if _alone(one, method) is not None:
        return ()
    return tuple(dict.fromkeys(term.kind for term in one.terms if term.kind is not None))


def _alone(one: Group, method: Method) -> Module | None:
    """The one module of a group times its strength, where the sum is just that."""
    term = one.terms[0]
    if not method.exact or len(one.terms) > 1 or term.gain is None or not one.writable:
        return None
    gain = term.weight * term.gain
    if gain == 1:
        return term.module
    if term.module.magnitude is not None:
        return None
    return replace(term.module, factors=term.module.family.scaled(term.module.factors, gain))


# -- one module -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Made:
    """One merged module before a rule; `norm` is that of what the method says, `error` how far the module is from it.

    `kept` is the module if it is an input's very own, whose dtype stays.
    """

    module: Module
    group: Group
    dtype: str
    inner: Tensor
    norm: float
    error: float
    expected: Terms
    image: Array | None = None
    exact: bool = True
    kept: Module | None = None
    replaced: tuple[str, ...] = ()
    conflicts: tuple[int, int] | None = None

    def row(self, inputs: int, module: Module, cut: Cut | None) -> MergedModule:
        """What is reported of it, after a rule that made `module` of it."""
        ranks = {term.index: term.module.product.rank for term in self.group.terms}
        # What the rule lost is a share of what the first truncation had left.
        further = cut.error**2 * (1 - self.error**2) if cut is not None else 0.0
        return MergedModule(
            title=module.title,
            component=module.component,
            ranks=tuple(ranks.get(index) for index in range(inputs)),
            rank_after=module.product.rank,
            norm=cut.norm if cut is not None and self.exact else self.norm,
            error=math.sqrt(self.error**2 + further),
            approximated=self.replaced,
            conflicts=self.conflicts[0] if self.conflicts else None,
            shared=self.conflicts[1] if self.conflicts else None,
        )

    def planned(self, row: MergedModule, cut: Cut | None) -> float:
        """How far the final module is from `expected`."""
        if self.exact:
            return row.error
        return cut.error if cut is not None else 0.0


@dataclass(frozen=True, eq=False)
class _Job:
    """How every group is merged."""

    method: Method
    options: Mapping[str, Any]
    weights: tuple[float, ...]
    rule: Rule | None
    limits: Limits
    dtype: str | None
    base: BaseWeights | None
    device: str

    def run(self, one: Group) -> _Made:
        """The merged module of one group."""
        seen = self.seen(one)
        similar = Similar(seen)
        dtype = self.dtype or common_dtype([f.dtype for term in one.terms for f in term.module.factors.values()])
        alone = _alone(one, self.method)
        if alone is not None:
            # Without the base, the norm that a DoRA's factors have.
            norm = similar.norm(self.weights) if seen[one.terms[0].index].known else spectrum(alone).norm
            expected = _weighed(one) if alone.magnitude is None else [(alone, 1.0)]
            kept = alone if self.dtype is None or alone.dtype == dtype else None
            return _Made(alone, one, dtype, similar.inner, norm, 0.0, expected, None, True, kept)
        conflicts = None
        if "sign" in self.method.options:
            dense = [each_seen.dense() for each_seen in seen if each_seen.term is not None]
            conflicts = sign_conflicts(dense, [term.weight for term in one.terms])
            del dense
        result = self.method.apply(seen, self.weights, self.options)
        if isinstance(result, tuple):
            made, norm, error = self._of_pair(one, seen, result, similar, dtype)
        else:
            made, norm, error = self._of_dense(one, result)
        # DoRA is no sum; what is no product of factors cannot be scaled row by row.
        exact = self.method.exact and all(
            term.kind is None or (term.kind != "DoRA" and term.gain is not None) for term in one.terms
        )
        replaced = _replaced(one, self.method)
        expected = _weighed(one) if exact else [(made, 1.0)]
        image = similar.image(self.weights) if exact else None
        return _Made(made, one, dtype, similar.inner, norm, error, expected, image, exact, None, replaced, conflicts)

    def seen(self, one: Group, work: torch.dtype | None = None) -> list[Seen]:
        """The terms as the method sees them, in `work`: float64 for a sum of what is stored in more than 16 bits.

        A sum is seen in the scale of the result: most factors are then taken as they are.
        """
        wide = any(DTYPES[term.module.dtype] > 16 for term in one.terms)
        work = work or (torch.float64 if wide and self.method.exact else torch.float32)
        by_index = {term.index: term for term in one.terms}
        unit = self._unit(one)
        return [
            Seen(index, one.first.title, one.shape, by_index.get(index), work, self.device, self.base, unit)
            for index in range(len(self.weights))
        ]

    def _unit(self, one: Group) -> float:
        return _scale(one) if self.method.exact else 1.0

    def _of_pair(
        self, one: Group, seen: Sequence[Seen], result: tuple[Tensor, Tensor], similar: Similar, dtype: str
    ) -> tuple[Module, float, float]:
        """A module of these factors, its norm, and its relative error where it stands for the weighted sum.

        An exact sum is computed again when it is written, with fewer ranks where some carry nothing.
        """
        left, right = result
        if not self.method.exact:
            module = _pair_module(one, _held(left), _held(right))
            error = _distance(result, seen, self.weights, similar) if self.method.stands_for_sum else 0.0
            return module, spectrum(module).norm, error
        norm = similar.norm(self.weights)
        if left.shape[1] <= min(one.shape) and independent(left, right):
            work = torch_dtype(dtype) if self._copies(one, dtype) else left.dtype
            again = _Twice(lambda: self.method.apply(self.seen(one, work), self.weights, self.options))
            first = LazyTensor.computed(left.shape, code_of(work), partial(again.take, 0))
            second = LazyTensor.computed(right.shape, code_of(work), partial(again.take, 1))
            return _pair_module(one, first, second, self._unit(one)), norm, 0.0
        whole = _pair_module(one, _held(left), _held(right), self._unit(one))
        found = spectrum(whole)
        return truncated(whole, found, max(found.rank, 1), code_of(left.dtype)), norm, 0.0

    def _copies(self, one: Group, dtype: str) -> bool:
        """Whether a sum in the output's own dtype rounds no value twice: only strengths scale anything."""
        return (
            self.rule is None
            and DTYPES[dtype] > 8
            and all(
                term.kind is None
                and term.gain == 1
                and all(factor.dtype == dtype for factor in term.module.factors.values())
                and term.module.scale == self._unit(one)
                and "mid" not in term.module.factors
                for term in one.terms
            )
        )

    def _of_dense(self, one: Group, matrix: Tensor) -> tuple[Module, float, float]:
        """A module of the matrix' largest singular values, its norm, and the relative error of leaving the rest out."""
        norm = float(matrix.double().norm())
        x, values, y = low_rank(matrix, self._limit(one))
        root = values.sqrt()
        left, right = x * root, root[:, None] * y
        error = float((matrix - left @ right).double().norm()) / norm if norm else 0.0
        return _pair_module(one, _held(left), _held(right)), norm, error

    def _limit(self, one: Group) -> int:
        """The rank that a dense result is brought to first: at least what the rule and the limits give it then."""
        if self.rule is None:
            return max(term.module.product.rank for term in one.terms)
        if self.rule.kind != "rank":
            return min(one.shape)
        return max(int(self.rule.value), self.limits.min_rank, self.limits.conv_rank or 1)


class _Twice:
    """Two matrices that are made together, given out one by one, and kept no longer than that."""

    def __init__(self, make: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._make = make
        self._kept: dict[int, Tensor] = {}

    def take(self, side: int) -> Tensor:
        """The left (0) or the right (1) matrix, on the CPU."""
        if side not in self._kept:
            self._kept = dict(enumerate(part.cpu() for part in self._make()))
        return self._kept.pop(side)


def _distance(result: tuple[Tensor, Tensor], seen: Sequence[Seen], weights: Sequence[float], similar: Similar) -> float:
    """||left @ right - weighted sum|| / ||weighted sum||, in float64 from QRs of all factors side by side."""
    pairs = [(-weight, *one.pair()) for one, weight in zip(seen, weights, strict=True)]
    left = torch.cat([result[0].double(), *(part.double() * weight for weight, part, _ in pairs)], dim=1)
    right = torch.cat([result[1].double(), *(part.double() for _, _, part in pairs)])
    off = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
    norm = similar.norm(weights)
    return float(off.norm()) / norm if norm else 0.0


def _cosines(made: Sequence[_Made], component: str) -> list[list[float]]:
    inner = sum((one.inner for one in made if one.module.component == component), torch.zeros(()))
    norms = inner.diagonal().sqrt()
    # 0 / 0 is NaN: an input without this component has no angle.
    cosines: list[list[float]] = (inner / (norms * norms.unsqueeze(1))).clamp(-1, 1).tolist()
    return cosines


def common_dtype(dtypes: Sequence[str]) -> str:
    """The one dtype, or the smallest that holds all: F32 for F16 with BF16, F16 for different 8-bit floats."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    wide = {dtype for dtype in found if DTYPES[dtype] > 8} or {"F16"}
    if len(wide) == 1:
        return wide.pop()
    return "F64" if "F64" in wide else "F32"


def _held(matrix: Tensor) -> LazyTensor:
    return LazyTensor.from_torch(matrix.cpu().contiguous())


# -- a module of given factors ----------------------------------------------------------------------------------------


def _template(one: Group) -> Module | None:
    """The first module of the group whose form a plain pair can take."""
    pairs = (term.module for term in one.terms if term.module.product.whole)
    return next(pairs, None)


def _scale(one: Group) -> float:
    """alpha / rank of the merged module: the first input's, so that its factors keep their values.

    The largest where that is far larger: beside it, the factors of others would leave the range of float16.
    """
    template = _template(one)
    first = template.scale if template is not None else 1.0
    largest = max((term.module.scale if term.kind is None else 1.0 for term in one.terms), key=abs)
    return first if abs(largest) <= FAR * abs(first) and first else largest or 1.0


def _weighed(one: Group) -> Terms:
    return [(term.weighed(), term.weight) for term in one.terms]


def _pair_module(one: Group, left: LazyTensor, right: LazyTensor, unit: float = 1.0) -> Module:
    """A LoRA module whose update is unit * left @ right, in the form and with the scale of the first that is one."""
    scale, template = _scale(one), _template(one)
    if scale != unit:
        root = math.sqrt(abs(unit / scale))
        left, right = _times(left, math.copysign(root, unit / scale)), _times(right, root)
    if template is None:
        first = one.first
        kernel = first.shape[2:]
        if not kernel and len(first.targets[0].shape) > 2:
            kernel = first.targets[0].shape[2:]  # a LoKr whose w2_b hides the kernel
        ones = (1,) * len(kernel)
        width = right.shape[1] // math.prod(kernel)
        factors = {
            "up": left.reshape((*left.shape, *ones)),
            "down": right.reshape((right.shape[0], width, *kernel)),
        }
        return Module(first.targets, families()["lora"], factors, float(left.shape[1]))
    old = template.product
    product = Product(left, right)
    if old.transposed:
        product = Product(_transposed(right), _transposed(left), transposed=True)
    factors = dict(template.family.with_product(template.factors, product))
    if "bias" in {role for term in one.terms for role in term.module.factors}:
        factors["bias"] = _bias(one, scale, left.dtype)
    module = replace(template, factors=factors, alpha=None, magnitude=None, keys={})
    if template.alpha is None:
        return module
    return replace(module, alpha=template.family.alpha(module.shapes, scale))


def _times(matrix: LazyTensor, gain: float) -> LazyTensor:
    return LazyTensor.computed(matrix.shape, matrix.dtype, lambda: matrix.load() * gain)


def _transposed(matrix: LazyTensor) -> LazyTensor:
    return LazyTensor.computed(matrix.shape[::-1], matrix.dtype, lambda: matrix.load().T.contiguous())


def _bias(one: Group, scale: float, dtype: str) -> LazyTensor:
    """The weighted sum of the biases, each with the scale that its module gives it."""
    height = one.shape[0]

    def make() -> Tensor:
        total = torch.zeros(height, dtype=torch.float64)
        for term in one.terms:
            if "bias" in term.module.factors:
                bias = term.module.factors["bias"].load().double()
                total += term.weight * term.module.scale / scale * term.gained(bias)
        return total.to(torch_dtype(dtype))

    return LazyTensor.computed((height,), dtype, make)
