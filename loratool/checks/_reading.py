"""Reading an adapter whose modules may be broken: what is whole is read as every command reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratool.checks._subject import Reading
from loratool.core.adapter import Adapter, Bundle
from loratool.core.architecture import Architecture
from loratool.core.detect import Detection, detect
from loratool.core.errors import LoratoolError
from loratool.core.identify import what_it_is
from loratool.core.layout import ANY, Group, Layout
from loratool.core.registry import families, layouts

MOST_REFUSED = 40
"""So many modules that reading refuses are left out one by one."""


def understood(bundle: Bundle, among: Sequence[Architecture] | None = None) -> Reading:
    """How the keys of a bundle are understood. Never raises: what cannot be read is told in the reading."""
    if what_it_is(bundle) is not None:
        return Reading()
    twice = _twice(bundle)
    dropped = {key for key, _ in twice}
    once = replace(bundle, tensors={key: t for key, t in bundle.tensors.items() if key not in dropped})
    try:
        found = detect(once, among)
    except LoratoolError as raised:
        return Reading(twice=twice, error=raised)
    if found is None:
        return Reading(twice=twice)
    parsed = found.best.parsed
    problems = {stem: told for stem, group in parsed.groups.items() if (told := problem_of(group, once)) is not None}
    whole = _whole(once, found, set(problems))
    adapter, refused, error = _read(whole, found)
    return Reading(found, parsed.groups, parsed.unknown, twice, problems, refused, adapter, error)


def _read(whole: Bundle, found: Detection) -> tuple[Adapter | None, dict[str, LoratoolError], LoratoolError | None]:
    """The adapter of what can be read; what was left out, by stem; and the error that nothing could be left out for."""
    refused: dict[str, LoratoolError] = {}
    error = None
    layout = found.best.layout
    while True:
        try:
            return layout.read(whole, found.best.architecture), refused, error
        except LoratoolError as raised:
            parts = layout.split(raised.key) if raised.key else None
            stem = parts[0] if parts else raised.key or ""
            lost = set(found.best.parsed.groups[stem].keys) if stem in found.best.parsed.groups else set()
            if stem in refused or not lost or len(refused) >= MOST_REFUSED:
                if error is not None or not whole.side_files:
                    return None, refused, error or raised
                error = raised  # it may be about the config: without it, modules can still be looked at
                whole = replace(whole, side_files={})
                continue
            refused[stem] = raised
            whole = replace(whole, tensors={key: t for key, t in whole.tensors.items() if key not in lost})
        except (ArithmeticError, ValueError, TypeError, LookupError, RecursionError) as raised:
            return None, refused, LoratoolError(f"cannot be read: {raised}")


def problem_of(group: Group, bundle: Bundle) -> str | None:
    """What keeps the keys of one stem from being a module, as reading would say it; None if nothing does."""
    if not group.by_family:
        return "has no factors: only what belongs to them"
    if len(group.by_family) > 1:
        return f"one module of two families: {' and '.join(sorted(group.by_family))}"
    ((family, roles),) = group.by_family.items()
    if family not in families():
        return None
    return families()[family].problem({role: bundle.tensors[key].shape for role, key in roles.items()})


def _whole(bundle: Bundle, found: Detection, broken: set[str]) -> Bundle:
    """The bundle without the keys of broken modules, and without modules that update what another one does."""
    best = found.best
    drop = {key for stem in broken for key in best.parsed.groups[stem].keys}
    taken: dict[tuple[str, str], str] = {}
    for stem, group in best.parsed.groups.items():
        if stem in broken or not group.by_family:
            continue
        for other in same_targets(stem, best.layout, best.architecture, bundle, taken):
            if other != stem:
                drop.update(group.keys)
    return replace(bundle, tensors={key: t for key, t in bundle.tensors.items() if key not in drop})


def same_targets(
    stem: str, layout: Layout, architecture: Architecture, bundle: Bundle, taken: dict[tuple[str, str], str]
) -> list[str]:
    """Stems in `taken` (target -> stem) that update what `stem` updates, by its first meaning; notes its targets."""
    spoken = layout.resolve(stem, architecture, bundle.metadata)
    if len(spoken) != 1 or spoken[0].targets is None:
        return []
    return [taken.setdefault((target.component, target.path), stem) for target in spoken[0].targets]


def _twice(bundle: Bundle) -> tuple[tuple[str, str], ...]:
    """Pairs of keys that say the same in the layout that knows most keys: the later one, and the one before it."""
    best: tuple[int, list[tuple[str, str]]] = (0, [])
    for layout in layouts().values():
        seen: dict[tuple[str, str, str], str] = {}
        twice = []
        for key in bundle.tensors:
            parts = layout.split(key)
            if parts is None:
                continue
            stem, family, role = parts
            place = (stem, ANY if family == ANY else family, role)
            other = seen.setdefault(place, key)
            if other != key:
                twice.append((key, other))
        if len(seen) > best[0]:
            best = len(seen), twice
    return tuple(best[1])
