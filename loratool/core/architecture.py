"""Architecture: the weights of one model and which program calls them what. A table, no behaviour of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from loratool.core.blocks import Blocks
from loratool.core.naming import Naming, kind
from loratool.core.target import Target


class Voice(NamedTuple):
    """How one layout (or checkpoint) speaks of one component: `prefix` + name in `naming`."""

    prefix: str
    naming: str


class Checkpoint(NamedTuple):
    """One kind of checkpoint of this model: component -> voice. `prefix + tensor_key` is the key in the file.

    `beside` are the voices of the parts that no adapter is for.
    """

    id: str
    voices: Mapping[str, Voice]
    beside: Mapping[str, Voice] = MappingProxyType({})

    @property
    def folder(self) -> bool:
        """Whether components have the same keys, so that each needs a sub-folder of its own."""
        return len({voice.prefix for voice in self.voices.values()}) < len(self.voices)

    def voice(self, component: str) -> Voice | None:
        """The voice of any part of the model; None if this kind of checkpoint does not hold it."""
        return self.voices.get(component) or self.beside.get(component)


class Spoken(NamedTuple):
    """A resolved stem: which voice of which component it is. `targets` is None where no table says them."""

    component: str
    voice: Voice
    name: str
    targets: tuple[Target, ...] | None

    def targets_at(self, shape: tuple[int, ...]) -> tuple[Target, ...]:
        """The targets; without a table one target of the file's own `shape`."""
        return self.targets if self.targets is not None else (Target(self.component, self.name, shape),)


Namings = Mapping[str, Naming]
Resolver = Callable[[str], Sequence[Spoken]]


class OpenNaming(Naming):
    """The naming of a model without a table: every name is one target of that name."""

    def __init__(self) -> None:
        super().__init__({})

    def name_of(self, targets: tuple[Target, ...]) -> str | None:
        return targets[0].path if len(targets) == 1 else None


OPEN_NAMING = OpenNaming()


class Variant(NamedTuple):
    """Another size of a model whose programs and spellings are the same: other shapes, other counts of blocks.

    What is empty here is the standard size's. `components` may replace tables or add some, and `outlines` are theirs.
    """

    title: str
    components: Mapping[str, Callable[[], Namings]] = MappingProxyType({})
    facts: Mapping[str, str] = MappingProxyType({})
    blocks: Blocks | None = None
    outlines: Mapping[str, Callable[[], Namings]] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Architecture:
    """The targets of one model, their namings, and which layout speaks which naming with which prefix.

    `components` maps a component to the function that builds its namings (id -> Naming); the first one is
    the canonical (diffusers / transformers) naming. Nothing is built before it is asked for. `beside` are the parts
    that no adapter is for, as the VAE: only what spells a whole checkpoint anew needs them.
    `writes[layout][component]` is the voice a layout is written in; `reads[layout][component]` more
    voices that occur in files. `facts` are `ss_*` / `modelspec.*` metadata that are true of every
    adapter for this model. `blocks` are the parts that block weights may be given for, None where no list of them is
    known. An `open` architecture has no tables: any name is a target. `variants` are its other sizes. `kin` is the id
    of the older model whose names this one kept: a file that may be for either is taken for the older, with a note.
    `outlines` are the tables of `components` with one block of each kind and shape, where the whole ones are large:
    what a file may at most be is told by them, without building the whole ones. In the sketch of another
    one (`sketch_of`) a stem names all that has its kind, whatever its numbers.
    `config` is the model's own `config.json`, where a checkpoint's folder has one.
    """

    id: str
    title: str
    components: Mapping[str, Callable[[], Namings]]
    writes: Mapping[str, Mapping[str, Voice]]
    reads: Mapping[str, Mapping[str, tuple[Voice, ...]]] = field(default_factory=dict)
    checkpoints: tuple[Checkpoint, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Callable[[], Namings]] = field(default_factory=dict)
    blocks: Blocks | None = None
    open: bool = False
    variants: tuple[Variant, ...] = ()
    kin: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    outlines: Mapping[str, Callable[[], Namings]] = field(default_factory=dict)
    sketch_of: Architecture | None = None

    @cached_property
    def sketch(self) -> Architecture:
        """This model as far as its outlines go: a stem of a kind that is in there resolves, to one of each shape."""
        if self.sketch_of is not None:
            return self
        return replace(self, components={**self.components, **self.outlines}, outlines={}, variants=(), sketch_of=self)

    @property
    def whole(self) -> Architecture:
        """This model; the one that this is the sketch of."""
        return self.sketch_of or self

    @cached_property
    def sizes(self) -> tuple[Architecture, ...]:
        """This model in each of its sizes, the standard one first. All have one id; the title tells which."""
        return (self, *(self._sized(variant) for variant in self.variants))

    def _sized(self, variant: Variant) -> Architecture:
        return replace(
            self,
            title=variant.title,
            components={**self.components, **variant.components},
            facts={**self.facts, **variant.facts},
            blocks=variant.blocks or self.blocks,
            variants=(),
            outlines={**{c: o for c, o in self.outlines.items() if c not in variant.components}, **variant.outlines},
        )

    def namings(self, component: str) -> Namings:
        """The namings of one component, built once."""
        return _built(self.components.get(component) or self.beside[component])

    @cached_property
    def targets(self) -> frozenset[Target]:
        """Every target of every component; builds all tables."""
        return frozenset().union(*(next(iter(self.namings(name).values())).targets for name in self.components))

    def naming(self, component: str, naming: str) -> Naming:
        """One naming of one component; KeyError if there is none."""
        return OPEN_NAMING if self.open else self.namings(component)[naming]

    def voices(self, layout: str) -> list[tuple[str, Voice]]:
        """Every (component, voice) that `layout` may use for this model, the written ones first."""
        spoken = list(self.writes.get(layout, {}).items())
        for component, voices in self.reads.get(layout, {}).items():
            spoken += [(component, voice) for voice in voices]
        return spoken

    def resolver(self, voices: Sequence[tuple[str, Voice]], separator: str) -> Resolver:
        """The function from a key's stem, spelled with `separator`, to everything it may name in `voices`, best first.

        It remembers what it has resolved: make it once.
        """
        return _resolver(self, voices, separator)


@cache
def _built(build: Callable[[], Namings]) -> Namings:
    return build()


def _resolver(architecture: Architecture, voices: Sequence[tuple[str, Voice]], separator: str) -> Resolver:
    if architecture.open:

        def resolve(stem: str) -> Sequence[Spoken]:
            fitting = [(c, v) for c, v in voices if stem.startswith(v.prefix) and len(stem) > len(v.prefix)]
            fitting.sort(key=lambda item: -len(item[1].prefix))  # stable: the first of the longest prefixes wins
            return [Spoken(component, voice, stem[len(voice.prefix) :], None) for component, voice in fitting]

        return resolve

    asked = [(voice.prefix, component, voice, (component, voice.naming)) for component, voice in voices]
    whole: dict[tuple[str, str], Naming] = {}
    sketched = architecture.sketch_of is not None

    @lru_cache(maxsize=1 << 15)
    def look_up(stem: str) -> Sequence[Spoken]:
        found: list[Spoken] = []
        for prefix, component, voice, which in asked:
            if not stem.startswith(prefix):  # most do not: their tables are never built
                continue
            text = stem[len(prefix) :]
            naming = whole.get(which)
            if naming is None:
                if component in architecture.outlines:
                    outline = architecture.sketch.naming(*which)
                    if not outline.alike(kind(text), separator):  # no name of the model
                        continue
                naming = whole[which] = architecture.naming(*which)
            for name in naming.alike(kind(text), separator) if sketched else naming.spelled(text, separator):
                found.append(Spoken(component, voice, name, naming[name]))
        return found

    return look_up
