"""Program: what one program makes of an adapter's file, as rules that are data. What plug-ins in `programs/` offer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache

REFUSES, IGNORES, DROPS, CHANGES, SCALES = "refuses", "ignores", "drops", "changes", "scales"
EFFECTS = (REFUSES, IGNORES, DROPS, CHANGES, SCALES)
"""What a rule says: the program loads nothing of the file; it passes the module over; it applies the module without
one of its parts; by another formula; at another scale."""

FACTS = (
    "magnitude",
    "magnitude per output",
    "magnitude per input",
    "alpha stored",
    "alpha elsewhere",
    "no alpha",
    "kernel",
)
"""What `When.has` may ask for: a DoRA magnitude; one value per row of the weight, or per column; an alpha tensor beside
the factors; an alpha that is kept in the header or a side file; none at all; a kernel larger than 1x1."""

ONE, COMMONEST, CONFIGS = "1", "the commonest alpha", "the config's"
SCALINGS = (ONE, COMMONEST, CONFIGS)
"""What a SCALES rule may name: no alpha is applied; the alpha that most modules of the component have (the first of
several), over the module's own rank; lora_alpha / r of `adapter_config.json`, whatever its patterns say."""


class Keys:
    """All keys of a file. What is looked for once need not be looked for again."""

    def __init__(self, keys: Collection[str]) -> None:
        self._keys = keys
        self._found: dict[str, bool] = {}

    def any(self, expression: str) -> bool:
        """Whether an expression is found in one of them."""
        if expression not in self._found:
            self._found[expression] = any(_compiled(expression).search(key) for key in self._keys)
        return self._found[expression]


@dataclass(frozen=True, slots=True)
class Fact:
    """One module as rules see it: `keys` in the file, `paths` of its targets, shapes of its factors by `roles`.

    `layout` is what the file is taken for. Several spell alike, and a program looks at keys only: `layouts` are all
    that read the module's keys as the same module, `written` those of them that would write them so, `namings` those
    that its name is of. `others` are the paths of all modules of the component, `first` the first key of the
    component, `file` all keys of the file.
    """

    layout: str
    layouts: Collection[str]
    architecture: str
    component: str
    namings: Collection[str]
    written: Collection[str]
    family: str
    roles: Mapping[str, tuple[int, ...]]
    has: Collection[str]
    keys: Collection[str]
    paths: Collection[str]
    others: Collection[str]
    first: str
    file: Keys


_BLOCK = re.compile(r"(.*?\.)(\d+)(?=\.|$)")


@dataclass(frozen=True, slots=True)
class When:
    """Which modules are meant: all that is given must hold, and a list names alternatives. Nothing given: every module.

    `layouts` are spellings that the module's keys must be in, whatever the file is taken for, `written` whether one of
    them would write it so. `without` are roles of which the module has none. `keys`, `paths`, `first` and `beside` are
    expressions, found anywhere in one of the module's keys, in the path of one of its targets, in the component's first
    key, in any key of the file. `lacking` is one that no path of the component may match; `{parent}` in it is the
    module's path without its last part, `{block}` the path up to its first number, `{before}` the same with a number
    that is one less (0 stays). `taller` are two roles: the first factor has more rows than the second.
    """

    layouts: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    namings: tuple[str, ...] = ()
    written: bool = False
    families: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    taller: tuple[str, str] | None = None
    has: tuple[str, ...] = ()
    keys: str = ""
    paths: str = ""
    first: str = ""
    beside: str = ""
    lacking: str = ""

    def holds(self, fact: Fact) -> bool:
        """Whether the module is one of those that are meant."""
        return (
            (not self.layouts or any(one in fact.layouts for one in self.layouts))
            and (not self.architectures or fact.architecture in self.architectures)
            and (not self.components or fact.component in self.components)
            and (not self.namings or any(one in fact.namings for one in self.namings))
            and (not self.written or any(one in fact.written for one in self.layouts or (fact.layout,)))
            and (not self.families or fact.family in self.families)
            and (not self.roles or any(role in fact.roles for role in self.roles))
            and not any(role in fact.roles for role in self.without)
            and (self.taller is None or _taller(fact.roles, *self.taller))
            and (not self.has or any(what in fact.has for what in self.has))
            and (not self.keys or any(_compiled(self.keys).search(key) for key in fact.keys))
            and (not self.paths or any(_compiled(self.paths).search(path) for path in fact.paths))
            and (not self.first or _compiled(self.first).search(fact.first) is not None)
            and (not self.beside or fact.file.any(self.beside))
            and (not self.lacking or self._lacks(fact))
        )

    def _lacks(self, fact: Fact) -> bool:
        path = next(iter(fact.paths))
        block = _BLOCK.match(path)
        stem, number = (block[1], int(block[2])) if block else (path, 0)
        places = {
            "{parent}": path.rpartition(".")[0],
            "{block}": f"{stem}{number}",
            "{before}": f"{stem}{max(number - 1, 0)}",
        }
        expression = self.lacking
        for name, place in places.items():
            expression = expression.replace(name, re.escape(place))
        wanted = _compiled(expression)
        return not any(wanted.search(path) for path in fact.others)


def _taller(shapes: Mapping[str, tuple[int, ...]], first: str, second: str) -> bool:
    return first in shapes and second in shapes and shapes[first][0] > shapes[second][0]


@cache
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


@dataclass(frozen=True, slots=True)
class Rule:
    """What the program does with the modules that are meant, and why: the rest of a sentence that begins with the
    program's name. `what` is the part that is dropped, or one of SCALINGS. `unread`: only modules that it does not read
    are meant; else a rule that does not refuse is about those that it reads."""

    when: When
    does: str
    why: str
    what: str = ""
    unread: bool = False


@dataclass(frozen=True, slots=True)
class KeyRule:
    """What the program does with a tensor that belongs to no module: the first rule whose expression is found in its
    key decides. `does` is REFUSES or IGNORES; empty: the program uses it. `why` as in a Rule."""

    keys: str
    does: str
    why: str = ""
    layouts: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RankLimit:
    """Ranks above `default` need `setting` with one of `choices`; above the last of these they are refused."""

    default: int
    choices: tuple[int, ...]
    setting: str


@dataclass(frozen=True)
class Program:
    """A program, and its rules, taken from `version` of it as told by `sources` (addresses, files of its source).

    A module is read if one of `reads` holds; else the program passes it over, unless a rule refuses it. All `rules`
    that hold apply; of several scalings the last. `keys` are about tensors of no module, `rank` about high ranks.
    `writes` names the layouts that `convert --for` may choose, the best first: by architecture, `*` for all others.
    `notes` are sentences that are true of every file.
    """

    id: str
    title: str
    version: str
    sources: tuple[str, ...]
    reads: tuple[When, ...]
    writes: Mapping[str, tuple[str, ...]]
    rules: tuple[Rule, ...] = ()
    keys: tuple[KeyRule, ...] = ()
    rank: RankLimit | None = None
    notes: tuple[str, ...] = ()
    other_keys: KeyRule = field(default=KeyRule("", IGNORES, "does not know this key"))

    def layouts_for(self, architecture: str) -> tuple[str, ...]:
        """The layouts that suit the program for a model, the best first."""
        return self.writes.get(architecture, self.writes["*"])

    def key_rule(self, key: str, layouts: Collection[str], architecture: str) -> KeyRule:
        """The rule about a tensor of no module in a file that is in any of `layouts`."""
        for rule in self.keys:
            here = (not rule.layouts or any(one in layouts for one in rule.layouts)) and (
                not rule.architectures or architecture in rule.architectures
            )
            if here and _compiled(rule.keys).search(key):
                return rule
        return self.other_keys
