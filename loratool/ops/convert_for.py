"""convert_for: which layout a file has to be converted to so that a program loads it fully, and whether it did."""

from __future__ import annotations

from dataclasses import replace

from loratool.core.adapter import Adapter
from loratool.core.errors import NotRepresentable, few
from loratool.core.layout import Layout
from loratool.core.program import Program
from loratool.core.registry import layouts
from loratool.ops import origin
from loratool.ops.check import Candidate, candidates
from loratool.ops.conformance import Conformance, conform
from loratool.ops.convert import Converted, convert


def layout_for(adapter: Adapter, program: Program, *, approximate: bool = False, drop_extras: bool = False) -> Layout:
    """The layout in which `program` loads `adapter` fully, told without converting it.

    `approximate`: modules that the layout cannot express may be rewritten as LoRA. Raises NotRepresentable, with what
    would be lost in the layout that suits best, where there is none.
    """
    _check_extras(adapter, program, drop_extras)
    tried = [one for one in candidates(adapter, program) if approximate or not one.approximated]
    for candidate in tried:
        if candidate.fully:
            return layouts()[candidate.layout]
    more = [] if approximate else [one for one in candidates(adapter, program) if one.approximated and one.fully]
    hint = "rewrite modules with --approximate lora and --rank N or --energy E" if more else None
    raise NotRepresentable(_lost(tried, program, adapter), hint=hint)


def check_loads(converted: Converted, program: Program) -> None:
    """Raises NotRepresentable unless `program` loads what is about to be written fully."""
    found = _judged(converted, program)
    if not found.fully:
        raise NotRepresentable(f"{program.title} would not load the {converted.layout.id} file fully: {_told(found)}")


def converted_for(adapter: Adapter, to: str, program: Program, **options: object) -> Converted:
    """`convert`, with the original of an earlier conversion in its place only where `program` loads that fully."""
    converted = convert(adapter, to, **options)  # type: ignore[arg-type]
    if converted.returned and not _judged(converted, program).fully:
        metadata = {key: value for key, value in adapter.metadata.items() if key != origin.ENTRY}
        converted = convert(replace(adapter, metadata=metadata), to, **options)  # type: ignore[arg-type]
    check_loads(converted, program)
    return converted


def _judged(converted: Converted, program: Program) -> Conformance:
    return conform(converted.layout.read(converted.bundle, converted.adapter.architecture), program)


def _check_extras(adapter: Adapter, program: Program, drop_extras: bool) -> None:
    """Tensors of no module may only be left out when asked for, unless the program uses them where they are."""
    if drop_extras or not adapter.extras or conform(adapter, program).fully:
        return
    raise NotRepresentable(
        f"{len(adapter.extras)} tensors are no modules that {program.title} could load ({few(tuple(adapter.extras))})",
        hint="leave them out with --drop-extras",
    )


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
