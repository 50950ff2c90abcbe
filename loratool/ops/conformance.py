"""conformance: what a program makes of an adapter, module by module, as its rules say. Reads nothing, never torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from loratool.core.adapter import CONFIG, Adapter
from loratool.core.architecture import Spoken, Voice
from loratool.core.layout import Layout
from loratool.core.module import Module
from loratool.core.program import (
    CHANGES,
    COMMONEST,
    CONFIGS,
    DROPS,
    IGNORES,
    REFUSES,
    SCALES,
    Fact,
    Keys,
    Program,
    When,
)
from loratool.core.registry import layouts

FULLY, DIFFERENTLY, NOT = "loads fully", "loads but differently", "does not load"
READ, CHANGED, IGNORED, REFUSED = "read", "changed", "ignored", "refused"

_SAME = 1e-5
"""Strengths that differ by less are the same: alpha is stored in the factors' dtype."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one module, of which `key` is one key: `outcome`, and the reasons.

    `strength` is what its update is multiplied by against what the file says; `drops` are parts that are left out.
    """

    component: str
    targets: tuple[str, ...]
    key: str
    outcome: str
    strength: float
    drops: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeyFate:
    """What becomes of a tensor that belongs to no module."""

    key: str
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason, and how many modules or other tensors it is about; `examples` are a few of them.

    `strengths` are the least and the greatest strength of the modules, where the reason is about that.
    """

    text: str
    outcome: str
    modules: int
    tensors: int
    examples: tuple[str, ...]
    strengths: tuple[float, float] | None = None


@dataclass(frozen=True)
class Conformance:
    """How a program loads an adapter."""

    program: Program
    adapter: Adapter
    verdict: str
    fates: tuple[Fate, ...]
    key_fates: tuple[KeyFate, ...]
    reasons: tuple[Reason, ...]

    @property
    def fully(self) -> bool:
        """Whether every module and tensor is read and applied as the file says."""
        return self.verdict == FULLY

    @property
    def counts(self) -> Mapping[str, int]:
        """Modules by outcome, every outcome named."""
        found = Counter(fate.outcome for fate in self.fates)
        return {outcome: found[outcome] for outcome in (READ, CHANGED, IGNORED, REFUSED)}


def conform(adapter: Adapter, program: Program) -> Conformance:
    """How `program` loads `adapter`, a file as it was read."""
    view = _View(adapter)
    facts = tuple(view.facts())
    fates = tuple(_fate(program, view, module, fact) for module, fact in facts)
    key_fates = tuple(_key_fates(program, adapter, _common(facts, adapter)))
    reasons = (*_unknown_kinds(adapter), *_reasons(fates, key_fates))
    return Conformance(program, adapter, _verdict(fates, key_fates, reasons), fates, key_fates, reasons)


def _verdict(fates: Sequence[Fate], keys: Sequence[KeyFate], reasons: Sequence[Reason]) -> str:
    outcomes = [*(fate.outcome for fate in fates), *(key.outcome for key in keys)]
    if REFUSED in outcomes or not any(fate.outcome in (READ, CHANGED) for fate in fates):
        return NOT
    return DIFFERENTLY if reasons else FULLY


class _View:
    """An adapter as rules see it; what several modules share is found once."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.paths = {c: tuple(t.path for m in adapter.of(c) for t in m.targets) for c in adapter.components}
        self.alphas = {c: _commonest_alpha(adapter.of(c)) for c in adapter.components}
        self.spellings = _Spellings(adapter)
        self.file = Keys(tuple(adapter.stored))
        order = {key: at for at, key in enumerate(adapter.stored)}
        firsts = {c: [key for m in adapter.of(c) for key in m.keys.values()] for c in adapter.components}
        self.first = {c: min(keys, key=lambda k: order.get(k, 0), default="") for c, keys in firsts.items()}

    def facts(self) -> Iterable[tuple[Module, Fact]]:
        """Every module with what rules may ask of it."""
        adapter = self.adapter
        for module in adapter.modules:
            component = module.component
            voices = self.spellings.of(module)
            yield (
                module,
                Fact(
                    layout=adapter.layout,
                    layouts=voices.keys(),
                    architecture=adapter.architecture.id,
                    component=component,
                    namings={voice.naming for voice in voices.values()},
                    written=self.spellings.written(voices, component),
                    family=module.family.id,
                    roles=module.shapes,
                    has=frozenset(_has(module)),
                    keys=tuple(module.keys.values()),
                    paths=tuple(target.path for target in module.targets),
                    others=self.paths[component],
                    first=self.first[component],
                    file=self.file,
                ),
            )

    def scale(self, module: Module, scaling: str) -> float:
        """The scale that a program gives a module by one of SCALINGS."""
        if scaling == COMMONEST:
            alpha = self.alphas[module.component]
            return module.scale if alpha is None else alpha / module.rank
        if scaling == CONFIGS:
            return _config_scale(self.adapter, module)
        return 1.0


class _Spellings:
    """In which layouts an adapter's modules are spelled as they are in the file."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.others = () if adapter.architecture.open else tuple(one for one in layouts().values())

    def of(self, module: Module) -> Mapping[str, Voice]:
        """layout -> the voice in which it reads the module's keys as this module; the file's own layout first."""
        adapter = self.adapter
        own = adapter.voices.get(module.component)
        found = {adapter.layout: own or Voice("", "")}
        for layout in self.others:
            said = self._said(layout, module)
            if said is not None:
                found[layout.id] = said.voice
        return found

    def _said(self, layout: Layout, module: Module) -> Spoken | None:
        """What a layout takes the module's keys for, if for this module."""
        parts = [layout.split(key) for key in module.keys.values()]
        stem = parts[0][0] if parts and parts[0] is not None else ""
        if not stem or any(part is None or part[0] != stem for part in parts):
            return None
        paths = [(target.component, target.path) for target in module.targets]
        for said in layout.resolve(stem, self.adapter.architecture, self.adapter.metadata):
            if said.targets and [(target.component, target.path) for target in said.targets] == paths:
                return said
        return None

    def written(self, voices: Mapping[str, Voice], component: str) -> frozenset[str]:
        """Which of these layouts write a component in the voice that it is read in."""
        architecture = self.adapter.architecture
        return frozenset(
            name
            for name, voice in voices.items()
            if name in layouts() and layouts()[name].written(architecture).get(component) == _in_folder(voice)
        )


def _in_folder(voice: Voice | None) -> Voice | None:
    """A voice as it is within a component's sub-folder."""
    return None if voice is None else voice._replace(prefix=voice.prefix.rpartition("/")[2])


def _has(module: Module) -> Iterable[str]:
    if module.magnitude is not None:
        yield "magnitude"
        yield "magnitude per output" if module.magnitude_per_row else "magnitude per input"
    if "alpha" in module.keys:
        yield "alpha stored"
    else:
        yield "no alpha" if module.alpha is None else "alpha elsewhere"
    if any(size != 1 for size in (*module.shape[2:], *module.targets[0].shape[2:])):
        yield "kernel"


def _commonest_alpha(modules: Sequence[Module]) -> float | None:
    counted = Counter(module.alpha for module in modules if module.alpha is not None and "alpha" in module.keys)
    return counted.most_common(1)[0][0] if counted else None


def _config_scale(adapter: Adapter, module: Module) -> float:
    key = next(iter(module.keys.values()), "")
    folder = key.rpartition("/")[0]
    try:
        config = json.loads(adapter.side_files[f"{folder}/{CONFIG}" if folder else CONFIG])
        rank, alpha = float(config["r"]), float(config["lora_alpha"])
        return alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return module.scale


def _fate(program: Program, view: _View, module: Module, fact: Fact) -> Fate:
    read = any(when.holds(fact) for when in program.reads)
    outcome, strength = READ if read else IGNORED, 1.0
    reasons = [] if read else [_why_unread(program, fact, module)]
    drops = []
    for rule in program.rules:
        if (rule.unread and read) or (not read and rule.does != REFUSES) or not rule.when.holds(fact):
            continue
        if rule.does == SCALES:
            applied = view.scale(module, rule.what)
            if module.scale == 0 or math.isclose(applied, module.scale, rel_tol=_SAME):
                continue
            strength = applied / module.scale
        elif rule.does == DROPS:
            drops.append(rule.what)
        outcome = max(outcome, _OUTCOMES[rule.does], key=_ORDER.index)
        reasons.append(f"{program.title} {rule.why}")
    limit = program.rank
    if limit is not None and read and module.rank > limit.default:
        outcome = REFUSED
        reasons.append(_too_high(program, module.rank))
    strength = strength if outcome in (READ, CHANGED) else 0.0
    key = next(iter(fact.keys), "")
    told = tuple(dict.fromkeys(reasons))
    return Fate(fact.component, tuple(fact.paths), key, outcome, strength, tuple(dict.fromkeys(drops)), told)


_OUTCOMES = {REFUSES: REFUSED, IGNORES: IGNORED, DROPS: CHANGED, CHANGES: CHANGED, SCALES: CHANGED}
_ORDER = (READ, CHANGED, IGNORED, REFUSED)


def _too_high(program: Program, rank: int) -> str:
    limit = program.rank
    assert limit is not None
    room = next((choice for choice in limit.choices if choice >= rank), None)
    if room is None:
        return f"a rank of {rank} is more than {limit.choices[-1]}, the highest that {program.title} can be set to"
    return (
        f"a rank of {rank} is more than {limit.default}, unless {program.title} is started with {limit.setting} {room}"
    )


_RELAXED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("families",), "reads no modules of the kind {family} here"),
    (("roles", "has", "keys", "paths", "namings", "written"), "does not know these names in the {layout} layout"),
    (("components",), "loads nothing into the {component} from the {layout} layout"),
    (
        ("layouts", "keys", "paths", "namings", "written", "components"),
        "does not read the {layout} layout for {architecture}",
    ),
    (("architectures",), "does not know the model {architecture}"),
)


def _why_unread(program: Program, fact: Fact, module: Module) -> str:
    """Which single condition, left out, would let the module be read."""
    names = {
        "family": module.family.title,
        "layout": fact.layout,
        "component": fact.component,
        "architecture": fact.architecture,
    }
    for fields, text in _RELAXED:
        empty = {name: getattr(When(), name) for name in fields}
        if any(replace(when, **empty).holds(fact) for when in program.reads):
            return f"{program.title} {text.format(**names)}"
    return f"{program.title} reads no {fact.layout} files for {fact.architecture}"


def _common(facts: Iterable[tuple[Module, Fact]], adapter: Adapter) -> frozenset[str]:
    """The layouts that every module is spelled in."""
    return frozenset({adapter.layout}).union(
        frozenset.intersection(*(frozenset(fact.layouts) for _, fact in facts)) if adapter.modules else ()
    )


def _key_fates(program: Program, adapter: Adapter, layouts: Collection[str]) -> Iterable[KeyFate]:
    for key in adapter.extras:
        rule = program.key_rule(key, layouts, adapter.architecture.id)
        outcome = {REFUSES: REFUSED, IGNORES: IGNORED}.get(rule.does, READ)
        yield KeyFate(key, outcome, f"{program.title} {rule.why}" if rule.why else "")


def _unknown_kinds(adapter: Adapter) -> Iterable[Reason]:
    """Modules of families without a plug-in: nothing is known of them."""
    for family, count in adapter.unread_families.items():
        yield Reason(f"loratool cannot judge modules of the kind {family}", IGNORED, count, 0, ())


_EXAMPLES = 3


def _reasons(fates: Sequence[Fate], keys: Sequence[KeyFate]) -> Iterable[Reason]:
    """The reasons of all modules and tensors, each once, the gravest first."""
    modules: dict[tuple[str, str], list[Fate]] = {}
    for fate in fates:
        for text in fate.reasons:
            modules.setdefault((text, fate.outcome), []).append(fate)
    tensors: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        if key.outcome != READ:
            tensors.setdefault((key.reason, key.outcome), []).append(key.key)
    found = [
        Reason(
            text,
            outcome,
            len(some),
            0,
            tuple(f"{one.component}.{one.targets[0]}" for one in some[:_EXAMPLES]),
            _range([one.strength for one in some]) if outcome == CHANGED else None,
        )
        for (text, outcome), some in modules.items()
    ]
    found += [Reason(text, outcome, 0, len(some), tuple(some[:_EXAMPLES])) for (text, outcome), some in tensors.items()]
    return sorted(found, key=lambda reason: -_ORDER.index(reason.outcome))


def _range(strengths: Sequence[float]) -> tuple[float, float] | None:
    least, greatest = min(strengths), max(strengths)
    return None if least == greatest == 1.0 else (least, greatest)
