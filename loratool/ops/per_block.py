"""Per block: rules for some modules alone, by the patterns that block weights have, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.core.architecture import Architecture
from loratool.core.errors import FormatError, UsageError
from loratool.core.module import Module
from loratool.core.target import Target
from loratool.ops.blocks import Entry, Plain, check_patterns, last_naming, read_patterns
from loratool.ops.ranks import LOCAL, Rule, parse_rule

_BARE = ("keep", "knee")
_KNOWN = ", ".join(kind for kind in LOCAL if kind not in _BARE)
_EXPECTED = f"expected a rank, keep, knee, or one of {_KNOWN} with its value, such as energy 0.95"


@dataclass(frozen=True, eq=False)
class PerBlock:
    """The rule of every module that a pattern names, that of the last one; called with a module. None for the others.

    A module that spans several targets has one rank, so that all of its targets must have the same rule: it raises
    UsageError where they do not.
    """

    architecture: Architecture
    entries: tuple[Entry[Rule], ...]

    def __call__(self, module: Module) -> Rule | None:
        found = {target: last_naming(self.entries, target, self.architecture) for target in module.targets}
        rules = {entry.value if entry else None for entry in found.values()}
        if len(rules) > 1:
            raise UsageError(
                f"one rank is for all of its parts, and their rules differ: {_differing(found)}",
                key=module.title,
                hint="name all of them by one pattern, or split them first: loratool convert --to diffusers",
            )
        return rules.pop()

    def to_data(self) -> dict[str, str]:
        """The rules as plain data, for a recipe: pattern -> rule, in an order in which the last one decides."""
        data: dict[str, str] = {}
        for entry in self.entries:
            data.pop(entry.pattern, None)  # the later one decides, and where it stands is what counts
            data[entry.pattern] = entry.value.title
        return data


def read_per_block(path: str, architecture: Architecture, modules: Sequence[Module]) -> PerBlock:
    """The rules in a YAML file of patterns. A value is a rank, `keep`, `knee`, `energy 0.95` or `{energy: 0.95}`.

    Raises UsageError for what names nothing, is no rule, or differs between the parts of one of `modules`.
    """
    entries = read_patterns(path, "--per-block", rule_of, 'write lines like "IN*": 16 or "unet.*.attn2.*": energy 0.95')
    check_patterns(entries, architecture, modules, path)
    return _checked(PerBlock(architecture, entries), modules, path)


def from_mapping(data: Any, architecture: Architecture, modules: Sequence[Module] = ()) -> PerBlock:
    """The rules from plain data, as `to_data` gives them; numbers and mappings as in YAML will do.

    Raises FormatError for data that are no mapping, else what `read_per_block` does.
    """
    if not isinstance(data, Mapping) or not all(isinstance(pattern, str) for pattern in data):
        raise FormatError("its rules per block are no mapping from patterns")
    entries = []
    for pattern, value in data.items():
        try:
            entries.append(Entry(pattern, rule_of(_plain(value))))
        except UsageError as error:
            raise UsageError(error.message, key=pattern, hint=error.hint) from None
    check_patterns(entries, architecture, modules, None)
    return _checked(PerBlock(architecture, tuple(entries)), modules, None)


def rule_of(value: Plain) -> Rule:
    """The rule that stands behind a pattern. Raises UsageError."""
    words = list(value.items()) if isinstance(value, Mapping) else [tuple((value or "").split())]
    if len(words) != 1 or len(words[0]) not in (1, 2):
        raise UsageError(f"is no rule: {value!r}" if isinstance(value, str) else "is no rule", hint=_EXPECTED)
    kind, text = words[0] if len(words[0]) == 2 else ("", words[0][0])
    if text in _BARE and not kind:
        return parse_rule(text, "")
    kind = kind or "rank"
    if kind not in LOCAL or kind in _BARE:
        raise UsageError(f"is no rule for a module alone: {kind!r}", hint=_EXPECTED)
    try:
        return parse_rule(kind, text)
    except UsageError as error:
        raise UsageError(error.message.removeprefix("--"), hint=_EXPECTED) from None


def _plain(value: object) -> Plain:
    if isinstance(value, Mapping):
        return {str(kind): str(number) for kind, number in value.items()}
    return str(value) if isinstance(value, (str, int, float)) else None


def _checked(rules: PerBlock, modules: Sequence[Module], file: str | None) -> PerBlock:
    for module in modules:
        try:
            rules(module)
        except UsageError as error:
            raise (error.with_file(file) if file else error) from None
    return rules


def _differing(found: Mapping[Target, Entry[Rule] | None]) -> str:
    """`rank 8 for attn.to_q, the general one for attn.to_k`: the first target of every rule."""
    firsts: dict[Rule | None, str] = {}
    for target, entry in found.items():
        firsts.setdefault(entry.value if entry else None, target.path)
    return ", ".join(f"{rule.title if rule else 'the general one'} for {path}" for rule, path in firsts.items())
