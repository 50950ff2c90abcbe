"""Reading an adapter whose modules may be broken: what is whole is read as every command reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from loratool.core.adapter import Adapter, Bundle
from loratool.core.architecture import Architecture
from loratool.core.detect import Detection, detect
from loratool.core.errors import LoratoolError
from loratool.core.identify import what_it_is
from loratool.core.layout import ALPHA, Group, Layout
from loratool.core.registry import families, layouts

MOST_REFUSED = 40
"""So many modules that reading refuses are left out one by one."""


@dataclass(frozen=True, eq=False)
class Reading:
    """How keys are understood, however broken the modules are.

    `groups` has every stem that the layout knows, `unknown` the keys that it does not, `twice` pairs of keys that say
    the same, `problems` what is wrong with a module, `refused` what else reading says of one. `adapter` holds the
    modules that are whole; `error` says why there is none.
    """

    detection: Detection | None = None
    groups: Mapping[str, Group] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    twice: tuple[tuple[str, str], ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, LoratoolError] = field(default_factory=dict)
    adapter: Adapter | None = None
    error: LoratoolError | None = None


def understood(bundle: Bundle, among: Sequence[Architecture] | None = None) -> Reading:
    """How the keys of a bundle are understood. Never raises: what cannot be read is told in the reading."""
    if what_it_is(bundle) is not None:
        return Reading()
    pairs = {layout.id: _twice(bundle, layout) for layout in layouts().values()}
    twice = tuple(dict.fromkeys(pair for found in pairs.values() for pair in found))
    try:
        once = _without(bundle, twice)
        found = detect(once, among)
        if found is not None and twice:
            # What is double in another layout only is put back.
            twice = pairs[found.best.layout.id]
            once = _without(bundle, twice)
            found = detect(once, among, found.best.layout.id)
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
    alpha = _alpha_problem(group, bundle)
    if alpha is not None:
        return alpha
    ((family, roles),) = group.by_family.items()
    if family not in families():
        return None
    return families()[family].problem({role: bundle.tensors[key].shape for role, key in roles.items()})


def _alpha_problem(group: Group, bundle: Bundle) -> str | None:
    key = group.shared.get(ALPHA)
    if key is None:
        return None
    tensor = bundle.tensors[key]
    if tensor.numel != 1:
        return f"alpha has shape {list(tensor.shape)}, expected one number"
    try:
        tensor.item()
    except LoratoolError as error:
        return f"alpha is no number: {error.message}"
    return None


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


def _twice(bundle: Bundle, layout: Layout) -> tuple[tuple[str, str], ...]:
    """Pairs of keys that say the same in a layout: the later one, and the one before it."""
    seen: dict[tuple[str, str, str], str] = {}
    found = []
    for key in bundle.tensors:
        parts = layout.split(key)
        other = key if parts is None else seen.setdefault(parts, key)
        if other != key:
            found.append((key, other))
    return tuple(found)


def _without(bundle: Bundle, twice: Sequence[tuple[str, str]]) -> Bundle:
    dropped = {key for key, _ in twice}
    return replace(bundle, tensors={key: t for key, t in bundle.tensors.items() if key not in dropped})
