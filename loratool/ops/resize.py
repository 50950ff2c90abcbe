"""resize: the best approximation of an adapter at smaller ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from loratool.core.adapter import Adapter
from loratool.core.module import Module
from loratool.core.target import Target
from loratool.core.tensor import DTYPES
from loratool.ops.convert import cast
from loratool.ops.decompose import decompose
from loratool.ops.pool import Tick
from loratool.ops.ranks import Candidate, Limits, Rule, choose
from loratool.ops.spectrum import Spectrum, truncated

Norms = Mapping[tuple[Target, ...], tuple[float, float]]
"""Frobenius and spectral norm of the base weight that a module updates, by its targets."""

OwnRule = Callable[[Module], "Rule | None"]
"""The rule for one module alone, where there is one."""

Written = Callable[[Sequence[Module]], int]
"""Bytes of the file with these modules."""


@dataclass(frozen=True)
class Cut:
    """What became of one module. `energy` is the share of its squared norm that was kept, `error` the relative error
    (Frobenius), both of the truncation alone; `importance` the norm of its update over that of the base weight."""

    title: str
    component: str
    rank_before: int
    rank_after: int
    norm: float
    energy: float
    error: float
    bytes_before: int
    bytes_after: int
    importance: float | None = None


@dataclass(frozen=True)
class Resized:
    """An adapter with other ranks, and how it came about. Its factors are lazy: made when they are written."""

    adapter: Adapter
    rule: Rule
    cuts: tuple[Cut, ...]

    @property
    def error(self) -> float:
        """Relative error of the whole adapter: truncation alone, Frobenius over all modules."""
        return total_error(self.cuts)


def total_error(cuts: Sequence[Cut]) -> float:
    """Relative error over several modules together."""
    total = math.fsum(cut.norm**2 for cut in cuts)
    lost = math.fsum((cut.error * cut.norm) ** 2 for cut in cuts)
    return math.sqrt(lost / total) if total else 0.0


def resize(
    adapter: Adapter,
    rule: Rule,
    *,
    limits: Limits | None = None,
    dtype: str | None = None,
    spectra: Sequence[Spectrum] | None = None,
    norms: Norms | None = None,
    own: OwnRule | None = None,
    written: Written | None = None,
    device: str = "cpu",
    tick: Tick | None = None,
) -> Resized:
    """The adapter with every module at the rank that `rule` gives it, truncated optimally (Eckart-Young).

    Each module keeps its targets, its scale alpha / rank and its dtype (or takes `dtype`, a safetensors code). A DoRA
    magnitude stays as it is: it is the norm that the rows (or columns) of W + delta are given, whatever delta is.
    `spectra` of an earlier `decompose` are used instead of a new one; `norms` of the base weights make `error`, `size`
    and `ratio` relative to these; `written` is needed for a size.
    """
    if spectra is None:
        spectra = decompose(adapter.modules, device, tick)
    pairs = list(zip(adapter.modules, spectra, strict=True))
    candidates = [candidate(module, found, dtype, norms, own) for module, found in pairs]

    def at(ranks: Sequence[int]) -> tuple[Module, ...]:
        return tuple(_at(module, found, rank, dtype) for (module, found), rank in zip(pairs, ranks, strict=True))

    ranks = choose(rule, candidates, limits, None if written is None else lambda ranks: written(at(ranks)))
    modules = at(ranks)
    cuts = tuple(_cut(*pair, made, norms) for pair, made in zip(pairs, modules, strict=True))
    return Resized(replace(adapter, modules=modules), rule, cuts)


def _at(module: Module, found: Spectrum, rank: int, dtype: str | None) -> Module:
    product = module.ranks()
    # A whole matrix that would only grow as a product stays whole.
    uncut = product.right is None and rank * sum(product.left.shape) >= product.left.numel
    made = module if uncut else truncated(module, found, rank, dtype)
    return made if dtype is None or all(t.dtype == dtype for t in made.tensors.values()) else cast(made, dtype)


def candidate(
    module: Module, found: Spectrum, dtype: str | None, norms: Norms | None = None, own: OwnRule | None = None
) -> Candidate:
    """What a rule sees of a module that becomes one of `dtype`."""
    product = module.ranks()
    sizes = [product.left.shape[0], product.right.shape[1] if product.right is not None else product.left.shape[1]]
    core = product.core.numel // product.rank if product.core is not None else 0
    whole, peak = (norms or {}).get(module.targets, (1.0, None))
    return Candidate(
        values=found.values,
        norm=found.norm,
        full=product.rank,
        unit=(sum(sizes) + core) * DTYPES[dtype or module.dtype] // 8,
        kernel=any(size > 1 for size in module.shape[2:]),
        base_norm=whole or 1.0,
        base_peak=peak,
        own=own(module) if own is not None else None,
    )


def _cut(module: Module, found: Spectrum, made: Module, norms: Norms | None) -> Cut:
    rank = made.stored_rank
    error = found.error(rank)
    whole = (norms or {}).get(module.targets, (0.0, 0.0))[0]
    return Cut(
        title=module.title,
        component=module.component,
        rank_before=module.stored_rank,
        rank_after=rank,
        norm=found.norm,
        energy=1 - error * error,
        error=error,
        bytes_before=sum(tensor.nbytes for tensor in module.tensors.values()),
        bytes_after=sum(tensor.nbytes for tensor in made.tensors.values()),
        importance=found.norm / whole if whole else None,
    )
