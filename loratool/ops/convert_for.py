"""convert_for: which layout a file has to be converted to so that a program loads it fully, and whether it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loratool.core.adapter import Adapter
from loratool.core.errors import NotRepresentable, few
from loratool.core.program import Program
from loratool.ops import origin
from loratool.ops.check import Candidate, candidates
from loratool.ops.conformance import Conformance, conform
from loratool.ops.convert import Converted, convert
from loratool.ops.headers import with_history

_EXTRAS = "{} tensors are no modules that {} could load ({})"
_DROP = "leave them out with --drop-extras"


def way_for(adapter: Adapter, program: Program, *, approximate: bool = False, drop_extras: bool = False) -> Candidate:
    """The layout, and what to do before, in which `program` loads `adapter` fully; told without converting it.

    `approximate`: modules that the layout cannot express may be rewritten as LoRA. Raises NotRepresentable, with what
    would be lost in the layout that suits best, where there is none.
    """
    _check_extras(adapter, program, drop_extras)
    tried = [one for one in candidates(adapter, program) if approximate or not one.approximated]
    if adapter.extras and not drop_extras:  # the program uses them where they are
        tried = [one for one in tried if one.layout == adapter.layout]
    for candidate in tried:
        if candidate.fully:
            return candidate
    more = [] if approximate else [one for one in candidates(adapter, program) if one.approximated and one.fully]
    hint = "rewrite modules with --approximate lora and --rank N or --energy E" if more else None
    raise NotRepresentable(_lost(tried, program, adapter), hint=hint)


def folded(adapter: Adapter) -> Adapter:
    """The adapter with every scale multiplied into the factors, each value rounded once.

    Modules whose scale means nothing to their factors (an alpha that is ignored) stay as they are.
    """
    modules = []
    for module in adapter.modules:
        if module.scale not in (0.0, 1.0):
            factors = module.family.scaled(module.factors, module.scale)
            module = replace(module, factors=factors, alpha=None)
        modules.append(module)
    return replace(adapter, modules=tuple(modules))


def check_loads(converted: Converted, program: Program) -> None:
    """Raises NotRepresentable unless `program` loads fully what is about to be written."""
    found = _judged(converted, program)
    if converted.carried:
        raise NotRepresentable(
            _EXTRAS.format(len(converted.carried), program.title, few(converted.carried)), hint=_DROP
        )
    if not found.fully:
        raise NotRepresentable(f"{program.title} would not load the {converted.layout.id} file fully: {_told(found)}")


def converted_for(
    adapter: Adapter,
    to: str,
    program: Program,
    *,
    fold: bool = False,
    dtype: str | None = None,
    drop_extras: bool = False,
) -> Converted:
    """`convert` to what `program` loads fully; NotRepresentable where it would not.

    The original of an earlier conversion takes its place only where the program loads that fully. `fold` multiplies
    scales into the factors; no way leads back from there.
    """
    if fold:
        metadata = with_history(_without_ticket(adapter.metadata), {"op": "fold_alpha"})
        converted = convert(replace(folded(adapter), metadata=metadata), to, dtype=dtype, drop_extras=drop_extras)
        bundle = replace(converted.bundle, metadata=_without_ticket(converted.bundle.metadata))
        converted = replace(converted, bundle=bundle)
    else:
        converted = convert(adapter, to, dtype=dtype, drop_extras=drop_extras)
        if converted.returned and not _judged(converted, program).fully:
            fresh = replace(adapter, metadata=_without_ticket(adapter.metadata))
            converted = convert(fresh, to, dtype=dtype, drop_extras=drop_extras)
    check_loads(converted, program)
    return converted


def _without_ticket(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key != origin.ENTRY}


def _judged(converted: Converted, program: Program) -> Conformance:
    return conform(converted.layout.read(converted.bundle, converted.adapter.architecture), program)


def _check_extras(adapter: Adapter, program: Program, drop_extras: bool) -> None:
    """Tensors of no module may only be left out when asked for, unless the program uses them where they are."""
    if drop_extras or not adapter.extras or conform(adapter, program).fully:
        return
    names = tuple(adapter.extras)
    raise NotRepresentable(_EXTRAS.format(len(names), program.title, few(names)), hint=_DROP)


def _lost(tried: list[Candidate], program: Program, adapter: Adapter) -> str:
    """What would be lost in the candidate that loads best."""
    judged = [one for one in tried if one.conformance is not None]
    if judged:
        best = max(judged, key=lambda one: one.conformance.counts["read"] if one.conformance else 0)
        assert best.conformance is not None
        return f"{program.title} loads it fully in no layout; in {best.layout}: {_told(best.conformance)}"
    if tried:
        reasons = "; ".join(f"{one.layout}: {one.obstacle}" for one in tried)
        return f"{program.title} loads it in no layout that it can be written in ({reasons})"
    return f"no layout that {program.title} reads has names for {adapter.architecture.title}"


def _told(found: Conformance) -> str:
    told = [
        f"{reason.text} ({reason.modules or reason.tensors} {'modules' if reason.modules else 'tensors'})"
        for reason in found.reasons[:3]
    ]
    return "; ".join(told)
