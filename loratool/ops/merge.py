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
from loratool.core.method import Method, Option
from loratool.core.module import Module
from loratool.core.ranges import TooLarge
from loratool.core.registry import layouts
from loratool.core.tensor import DTYPES, LazyTensor, code_of, torch_dtype
from loratool.ops.conflicts import sign_conflicts
from loratool.ops.convert import cast
from loratool.ops.decompose import decompose
from loratool.ops.inputs import Input, of_one_size, same_size
from loratool.ops.low_rank import low_rank
from loratool.ops.merged_module import (
    check_range,
    in_scale,
    of_balanced,
    pair_module,
    scale_of,
    shifted,
    shifts,
)
from loratool.ops.pool import Tick, each
from loratool.ops.probe import Terms
from loratool.ops.ranks import LOCAL, Limits, Rule, choose
from loratool.ops.resize import Cut, Written, candidate, resize
from loratool.ops.similar import Similar, independent, norm_of_sum
from loratool.ops.spectrum import Spectrum, spectrum, truncated
from loratool.ops.terms import REPLACED_BY, Group, Seen, common_dtype, group, is_bias, wide_dtype
from loratool.ops.weights import BaseWeights

if TYPE_CHECKING:
    from loratool.core.tensor import Array


@dataclass(frozen=True)
class MergedModule:
    """What became of one tuple of targets. `ranks` of the inputs that update it, None for those that do not.

    `norm` is nan for a module that is kept as it is and whose update depends on the weight.
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
        known = [module for module in self.modules if not math.isnan(module.norm)]
        total = math.fsum(module.norm**2 for module in known)
        lost = math.fsum((module.error * module.norm) ** 2 for module in known)
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
    options, inputs = dict(options or {}), of_one_size(inputs)
    check_inputs(inputs, method, options)
    if base is not None:
        inputs = [replace(one, adapter=base.sized_all(one.adapter)) for one in inputs]
    first = inputs[0].adapter
    layout = layouts()[to or first.layout]
    groups, silent = group(inputs, layout, approximate, voting="sign" in method.options)
    _check_kinds(groups, method, approximate, rule, base)
    job = _Job(method, options, tuple(one.weight for one in inputs), rule, limits or Limits(), dtype, base, device)
    made = each(job.run, groups, tick)
    adapter = Adapter(tuple(one.module for one in made), first.architecture, layout.id, path=first.path)
    cuts: Sequence[Cut | None] = [None] * len(made)
    if rule is not None:
        adapter, cuts = _cut(adapter, made, rule, limits, dtype, written, device)
    modules = tuple(
        module if module.dtype == one.dtype or module is one.kept else cast(module, one.dtype)
        for one, module in zip(made, adapter.modules, strict=True)
    )
    rows = tuple(one.row(len(inputs), module, cut) for one, module, cut in zip(made, modules, cuts, strict=True))
    for module, row in zip(modules, rows, strict=True):
        check_range(module, row.norm)
    return Merged(
        adapter=replace(adapter, modules=modules),
        modules=rows,
        expected=tuple(one.expected for one in made),
        images=tuple(one.image for one in made),
        planned=tuple(one.planned(row, cut) for one, row, cut in zip(made, rows, cuts, strict=True)),
        cosines={component: _cosines(made, component) for component in adapter.components},
        silent=silent,
    )


def _cut(
    adapter: Adapter,
    made: Sequence[_Made],
    rule: Rule,
    limits: Limits | None,
    dtype: str | None,
    written: Written | None,
    device: str,
) -> tuple[Adapter, Sequence[Cut | None]]:
    """The adapter cut by a rule, and how; modules without ranks, which are an input's very own, stay."""
    ranked = [index for index, module in enumerate(adapter.modules) if module.ranked is not None]
    some = replace(adapter, modules=tuple(adapter.modules[index] for index in ranked))

    def whole(modules: Sequence[Module]) -> tuple[Module, ...]:
        new = dict(zip(ranked, modules, strict=True))
        return tuple(new.get(index, module) for index, module in enumerate(adapter.modules))

    resized = resize(
        some,
        rule,
        limits=limits,
        dtype=dtype,
        spectra=_spectra([made[index] for index in ranked], device),
        written=None if written is None else lambda modules: written(whole(modules)),
    )
    cuts = dict(zip(ranked, resized.cuts, strict=True))
    return replace(adapter, modules=whole(resized.adapter.modules)), [cuts.get(i) for i in range(len(made))]


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
        if not same_size(adapter.architecture, first.architecture):
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
    terms = [term for one in groups if one.first.title in needed for term in one.terms]
    based = sorted({term.kind for term in terms if term.kind is not None and term.own.needs_base})
    if not needed:
        return
    if not approximate:
        raise NotExact(
            f"{len(needed)} modules ({', '.join(kinds)}) have no exact sum: {few(tuple(needed))}",
            hint=REPLACED_BY + (f"; {' and '.join(based)} needs --base CHECKPOINT as well" if based else ""),
        )
    if base is not None:
        for term in terms:
            if term.kind is not None and base.changed_bias(term.own) is not None:
                raise NotExact(
                    f"{term.own.title}: a {term.own.family.title} module that changes the layer's bias, too",
                    hint="rewrite it first: convert --approximate lora --base CHECKPOINT",
                )
    if based and base is None:
        title = next(title for title, found in needed.items() if set(found) & set(based))
        raise NotExact(
            f"what {based[0]} modules change depends on the base weights", key=title, hint="add --base CHECKPOINT"
        )
    if rule is None:
        raise UsageError("--approximate does not say how far", hint="add --rank N, --energy 0.999 or another rule")


def _replaced(one: Group, method: Method) -> tuple[str, ...]:
    """The kinds of modules in a group that a low-rank form has to replace."""
    if _is_alone(one, method) or one.full:
        return ()
    return tuple(dict.fromkeys(term.kind for term in one.terms if term.kind is not None))


def _is_alone(one: Group, method: Method) -> bool:
    """Whether the sum is just one module of an input, times a number."""
    term = one.terms[0]
    if not method.exact or len(one.terms) > 1 or term.gain is None or not one.writable or term.stands_for is not None:
        return False
    return not term.module.needs_base or term.weight * term.gain == 1


# -- one module -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Result:
    """A module of what a method made: the norm of what the method says, and how far the module is from that.

    `spectrum` is the module's, where it is known already.
    """

    module: Module
    norm: float
    error: float = 0.0
    spectrum: Spectrum | None = None


@dataclass(frozen=True, eq=False)
class _Made:
    """One merged module before a rule; `exact` says whether it is the weighted sum.

    `kept` is the module if it is an input's very own, whose dtype stays.
    """

    result: _Result
    group: Group
    dtype: str
    inner: Tensor
    expected: Terms
    image: Array | None = None
    exact: bool = True
    kept: Module | None = None
    replaced: tuple[str, ...] = ()
    conflicts: tuple[int, int] | None = None

    @property
    def module(self) -> Module:
        """The module itself."""
        return self.result.module

    def row(self, inputs: int, module: Module, cut: Cut | None) -> MergedModule:
        """What is reported of it, after a rule that made `module` of it."""
        ranks = {term.index: term.own.stored_rank for term in self.group.terms}
        error = self.result.error
        # What the rule lost is a share of what the first truncation had left.
        further = cut.error**2 * (1 - error**2) if cut is not None else 0.0
        # The norm of a sum of large ranks was estimated only.
        measured = cut is not None and self.exact and self.result.spectrum is None
        return MergedModule(
            title=module.title,
            component=module.component,
            ranks=tuple(ranks.get(index) for index in range(inputs)),
            rank_after=module.stored_rank,
            norm=cut.norm if cut is not None and measured else self.result.norm,
            error=math.sqrt(error**2 + further),
            approximated=self.replaced,
            conflicts=self.conflicts[0] if self.conflicts else None,
            shared=self.conflicts[1] if self.conflicts else None,
        )

    def planned(self, row: MergedModule, cut: Cut | None) -> float:
        """How far the final module is from `expected`."""
        if self.exact:
            return row.error
        return cut.error if cut is not None and row.rank_after < self.module.stored_rank else 0.0


def _spectra(made: Sequence[_Made], device: str) -> list[Spectrum]:
    """The spectra of all modules: those that are known, and the others decomposed."""
    unknown = [one.module for one in made if one.result.spectrum is None]
    found = iter(decompose(unknown, device))
    return [one.result.spectrum or next(found) for one in made]


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
        dtype = self.dtype or common_dtype(f.dtype for term in one.terms for f in term.own.factors.values() if f.shape)
        try:
            return self._alone(one, dtype) if _is_alone(one, self.method) else self._merged(one, dtype)
        except TooLarge as error:
            error.key = error.key or one.first.title
            raise

    def _alone(self, one: Group, dtype: str) -> _Made:
        (term,) = one.terms
        seen = self._seen(one)
        similar = Similar(seen)
        module, gain = term.module, term.weight * term.gains[0]
        # Without the base, the norm that a DoRA's factors have.
        known = seen[term.index].known
        norm = similar.norm(self.weights) if known else spectrum(module).norm if module.ranked else math.nan
        if gain == 1:
            expected = [(module, 1.0)] if module.needs_base else _weighed(one)
            kept = module if self.dtype is None or module.dtype == dtype else None
            return _Made(_Result(module, norm), one, dtype, similar.inner, expected, kept=kept)
        # First in the new dtype: it is this one's range that counts.
        module = cast(module, dtype)
        module = replace(module, factors=module.family.scaled(module.factors, gain))
        return _Made(_Result(module, norm), one, dtype, similar.inner, _weighed(one))

    def _merged(self, one: Group, dtype: str) -> _Made:
        seen = self._seen(one)
        similar = Similar(seen)
        if similar.cancels(self.weights):
            seen = self._seen(one, torch.float64)
        conflicts = None
        if "sign" in self.method.options:
            dense = [each_seen.dense() for each_seen in seen if each_seen.term is not None]
            conflicts = sign_conflicts(dense, [term.weight for term in one.terms])
            del dense
        result = self._result(one, seen, similar, dtype)
        # DoRA is no sum; what is no product of factors cannot be scaled row by row.
        exact = self.method.exact and all(
            term.kind is None or (not term.own.needs_base and term.gain is not None) for term in one.terms
        )
        expected = _weighed(one) if exact else [(result.module, 1.0)]
        image = similar.image(self.weights) if exact else None
        replaced = _replaced(one, self.method)
        return _Made(result, one, dtype, similar.inner, expected, image, exact, None, replaced, conflicts)

    def _result(self, one: Group, seen: Sequence[Seen], similar: Similar, dtype: str) -> _Result:
        if self.method.exact and all(term.kind is None for term in one.terms):
            return self._sum(one, seen, similar, dtype)
        if one.full:
            made = self.method.apply(seen, self.weights, self.options)
            return self._full(one, made[0] @ made[1] if isinstance(made, tuple) else made)
        if self.method.exact:  # of dense updates: their factors would have every rank there is
            terms = [(each_seen.dense(), self.weights[each_seen.index]) for each_seen in seen if each_seen.term]
            return self._dense(one, sum((values * weight for values, weight in terms), torch.zeros(())), dtype)
        made = self.method.apply(seen, self.weights, self.options)
        if not isinstance(made, tuple):
            return self._dense(one, made, dtype)
        left, right = in_scale(one, *made)
        left, right = shifted(left, right, shifts(left, right, dtype))
        module = pair_module(one, _held(left), _held(right), dtype)
        if not self.method.stands_for_sum:
            found = spectrum(module)
            return _Result(module, found.norm, 0.0, found)
        norm = similar.norm(self.weights)
        return _Result(module, norm, norm_of_sum(seen, self.weights, made) / norm if norm else 0.0)

    def _seen(self, one: Group, work: torch.dtype | None = None) -> list[Seen]:
        """The terms as the method sees them, in `work`: float64 for a sum of what is stored in more than 16 bits.

        A sum of factors is seen in the scale of the result: most factors are then taken as they are.
        """
        wide = any(wide_dtype(term.own.dtype) for term in one.terms)
        work = work or (torch.float64 if wide and (self.method.exact or self.method.stands_for_sum) else torch.float32)
        by_index = {term.index: term for term in one.terms}
        unit = scale_of(one) if self.method.exact and all(term.kind is None for term in one.terms) else 1.0
        return [
            Seen(index, one.first.title, one.shape, by_index.get(index), work, self.device, self.base, unit)
            for index in range(len(self.weights))
        ]

    def _sum(self, one: Group, seen: Sequence[Seen], similar: Similar, dtype: str) -> _Result:
        """A weighted sum, computed again when it is written, with fewer ranks where some carry nothing."""
        left, right = self.method.apply(seen, self.weights, self.options)
        powers = shifts(left, right, dtype)
        norm = similar.norm(self.weights)
        # What cancels is cut to its own size: else its factors would be rounded as the terms are.
        apart = not similar.cancels(self.weights) and left.shape[1] <= min(one.shape)
        if apart and independent(left, right):
            work = torch_dtype(dtype) if powers is None and self._copies(one, dtype) else left.dtype
            sides = self._again(one, left.shape[1], work, powers)
            return _Result(pair_module(one, *sides, dtype), norm)
        sides = self._again(one, left.shape[1], left.dtype, powers, shifted(left, right, powers))
        whole = pair_module(one, *sides, dtype)
        found = spectrum(whole)
        rank = max(found.rank, 1)
        return _Result(truncated(whole, found, rank, code_of(left.dtype)), norm and found.norm, 0.0, found)

    def _again(
        self,
        one: Group,
        rank: int,
        work: torch.dtype,
        powers: Tensor | None,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[LazyTensor, LazyTensor]:
        """The factors of a sum, made in `work` whenever they are read; the first time they are the `known` ones."""

        def make() -> tuple[Tensor, Tensor]:
            left, right = self.method.apply(self._seen(one, work), self.weights, self.options)
            return shifted(left, right, powers)

        both = _Twice(make, known)
        code = code_of(work)
        return (
            LazyTensor.computed((one.shape[0], rank), code, partial(both.take, 0)),
            LazyTensor.computed((rank, one.shape[1]), code, partial(both.take, 1)),
        )

    def _copies(self, one: Group, dtype: str) -> bool:
        """Whether a sum in the output's own dtype rounds no value twice: only strengths scale anything."""
        return (
            self.rule is None
            and DTYPES[dtype] > 8
            and all(
                term.kind is None
                and term.gain == 1
                and all(factor.dtype == dtype for factor in term.module.factors.values())
                and term.module.scale == scale_of(one)
                and "mid" not in term.module.factors
                for term in one.terms
            )
        )

    def _dense(self, one: Group, matrix: Tensor, dtype: str) -> _Result:
        """The largest singular values of a matrix, as many as a rule for one module leaves of them."""
        norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
        if not math.isfinite(norm):
            raise TooLarge(code_of(matrix.dtype))
        x, values, y = low_rank(matrix, self._limit(one))
        root = values.sqrt()
        left, right = x * root, root[:, None] * y
        error = float((matrix - left @ right).double().norm()) / norm if norm else 0.0
        left, right = in_scale(one, left, right)
        module = pair_module(one, _held(left), _held(right), dtype)
        if self.rule is None:
            return _Result(module, norm, error)
        spread = values.tolist()
        found = of_balanced(module, spread)
        if self.rule.kind in LOCAL:
            # The singular vectors that are not wanted go now: those of all modules would not fit into memory.
            (rank,) = choose(self.rule, [candidate(module, found, self.dtype)], self.limits)
            module = pair_module(one, _held(left[:, :rank].clone()), _held(right[:rank].clone()), dtype)
            found = replace(found, cut=of_balanced(module, spread).cut)
        return _Result(module, norm, error, found)

    def _full(self, one: Group, matrix: Tensor) -> _Result:
        """A matrix in the form of the first module with one, and the sum of the biases."""
        module = next((term.module for term in one.terms if term.module.product is not None), one.first)
        product, factors = module.product, dict(module.factors)
        if product is not None:
            factors = dict(module.family.with_product(factors, product._replace(left=_held(matrix))))
        if any("bias" in term.module.factors for term in one.terms):
            biases = [(t.module.factors["bias"].load().double(), t) for t in one.terms if "bias" in t.module.factors]
            bias = sum((term.gained(values) * term.weight for values, term in biases), torch.zeros(()))
            factors["bias"] = LazyTensor.from_torch(bias)
        return _Result(replace(module, factors=factors, keys={}), float(matrix.double().norm()))

    def _limit(self, one: Group) -> int:
        """The rank that a dense result is brought to first: at least what the rule and the limits give it then."""
        if self.rule is None:
            return max(term.own.stored_rank for term in one.terms)
        if self.rule.kind != "rank":
            return min(one.shape)
        return max(int(self.rule.value), self.limits.min_rank, self.limits.conv_rank or 1)


class _Twice:
    """Two matrices that are made together, given out one by one, and kept no longer than that."""

    def __init__(self, make: Callable[[], tuple[Tensor, Tensor]], known: tuple[Tensor, Tensor] | None) -> None:
        self._make = make
        self._kept = dict(enumerate(known or ()))

    def take(self, side: int) -> Tensor:
        """The left (0) or the right (1) matrix, on the CPU."""
        if side not in self._kept:
            self._kept = dict(enumerate(self._make()))
        return self._kept.pop(side).cpu()


def _cosines(made: Sequence[_Made], component: str) -> list[list[float]]:
    inner = sum((one.inner for one in made if one.module.component == component), torch.zeros(()))
    norms = inner.diagonal().sqrt()
    # 0 / 0 is NaN: an input without this component has no angle.
    cosines: list[list[float]] = (inner / (norms * norms.unsqueeze(1))).clamp(-1, 1).tolist()
    return cosines


def _held(matrix: Tensor) -> LazyTensor:
    return LazyTensor.from_torch(matrix.cpu().contiguous())


def _weighed(one: Group) -> Terms:
    terms = [term for term in one.terms if not is_bias(term.module)] or one.terms
    return [(term.weighed(), term.weight) for term in terms]
