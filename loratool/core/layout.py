"""Layout: how one program spells an adapter. The generic reader and writer, which a plug-in parametrises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import NamedTuple

from loratool.core.adapter import Adapter, Bundle
from loratool.core.architecture import Architecture, Resolver, Spoken, Voice
from loratool.core.errors import FormatError, LoratoolError, NotRepresentable, few
from loratool.core.family import ALPHA_SCALES
from loratool.core.module import Module
from loratool.core.registry import families
from loratool.core.target import Target, may_be
from loratool.core.tensor import Held, LazyTensor

ALPHA, MAGNITUDE = "alpha", "magnitude"
COMPONENT = "loratool.component"
"""Header entry that says which component a file is for, where its keys alone cannot."""

VECTOR = ".lora_magnitude_vector"
"""PEFT's suffix of a DoRA magnitude: one value per output feature, `(out,)` or, for a convolution, `(1, out, 1, 1)`."""

ANY = "*"
"""Family of the roles that every family shares."""

Voices = Mapping[str, tuple[Voice, ...]]
"""component -> the voice that is written, then more that are read."""


def _none(architecture: Architecture) -> Voices:
    return {}


class Group:
    """The keys of one stem: `by_family`, role -> key (as in the file); roles `shared` by all families apart."""

    __slots__ = ("by_family", "shared")

    def __init__(self) -> None:
        self.by_family: dict[str, dict[str, str]] = {}
        self.shared: dict[str, str] = {}

    @property
    def keys(self) -> list[str]:
        """Every key of the group, as in the file."""
        return [key for roles in (*self.by_family.values(), self.shared) for key in roles.values()]


class Parsed(NamedTuple):
    """Keys of a bundle by stem, and those whose suffix this layout does not know."""

    groups: Mapping[str, Group]
    unknown: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """A spelling: separator, factor suffixes, where alpha and magnitude live. Subclasses say what differs.

    `spelling[(family, role)]` is the suffix that is written; `aliases[suffix]` more suffixes that occur.
    `header_entries` are the header entries that describe this spelling and mean nothing in another one; `elsewhere`
    are the roles that it keeps there or in a side file, and not as a tensor.
    `derive` makes its voices out of those that an architecture has for other layouts, where the architecture's own
    table has none for this one: a new layout then speaks of every model. It builds no naming. `names` are other names
    of the same spelling. A layout that is not `writable` is only written on the way back to a file that was so spelled.
    """

    id: str
    title: str
    separator: str
    spelling: Mapping[tuple[str, str], str]
    aliases: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    header_entries: tuple[str, ...] = ()
    elsewhere: frozenset[tuple[str, str]] = frozenset()
    writable: bool = True
    folder: bool = False
    derive: Callable[[Architecture], Voices] = _none
    names: tuple[str, ...] = ()

    # -- voices ----------------------------------------------------------------------------------------------

    def written(self, architecture: Architecture) -> Mapping[str, Voice]:
        """The voice in which each component of a model is written."""
        return _written(self, architecture.whole)

    def voices(self, architecture: Architecture) -> Sequence[tuple[str, Voice]]:
        """Every (component, voice) that may occur for a model, the written ones first."""
        return _voices(self, architecture.whole)

    def prefixes(self, architecture: Architecture) -> tuple[str, ...]:
        """What a stem may begin with for a model."""
        return _prefixes(self, architecture.whole)

    def signed(self, metadata: Mapping[str, str]) -> bool:
        """Whether the header says that this layout's program wrote the file: it decides between equal spellings."""
        return False

    # -- reading ---------------------------------------------------------------------------------------------

    @cached_property
    def grammar(self) -> object:
        """What `parse` makes of keys follows from this: equal for layouts that differ in names only."""
        kind = type(self)
        return kind.parse, kind.split, kind.rewrite, self.separator, frozenset(self.suffixes.items())

    @cached_property
    def suffixes(self) -> Mapping[str, tuple[str, str]]:
        """suffix -> (family, role), written ones and aliases."""
        return {**self.aliases, **{suffix: meaning for meaning, suffix in self.spelling.items()}}

    def rewrite(self, key: str) -> str:
        """A key in the spelling of today; old spellings that are no mere suffix are turned into it here."""
        return key

    def split(self, key: str) -> tuple[str, str, str] | None:
        """(stem, family, role) of a key, by its longest known suffix; None if there is none."""
        key = self.rewrite(key)
        found = None
        cut, suffixes = len(key), self.suffixes
        for _ in range(4):
            cut = key.rfind(".", 0, cut)
            if cut <= 0:
                break
            meaning = suffixes.get(key[cut:])
            if meaning is not None:
                found = (key[:cut], *meaning)
        return found

    def parse(self, keys: Sequence[str]) -> Parsed:
        """Groups keys by stem. Two keys with one meaning are an error."""
        groups: dict[str, Group] = {}
        unknown = []
        for key in keys:
            parts = self.split(key)
            if parts is None:
                unknown.append(key)
                continue
            stem, family, role = parts
            group = groups.get(stem)
            if group is None:
                group = groups[stem] = Group()
            roles = group.shared if family == ANY else group.by_family.setdefault(family, {})
            if role in roles:
                raise FormatError(f"says the same as {roles[role]!r}: one module is spelled twice", key=key)
            roles[role] = key
        return Parsed(groups, tuple(unknown))

    def resolver(self, architecture: Architecture, metadata: Mapping[str, str]) -> Resolver:
        """The function from a stem to everything that it may name in an architecture, best first.

        `metadata` is the file's header's.
        """
        return _resolver(self, architecture)

    def resolve(self, stem: str, architecture: Architecture, metadata: Mapping[str, str]) -> Sequence[Spoken]:
        """Everything that one stem may name."""
        return self.resolver(architecture, metadata)(stem)

    def read(self, bundle: Bundle, architecture: Architecture, parsed: Parsed | None = None) -> Adapter:
        """The adapter in a bundle, for one architecture. Nothing but alpha scalars is read.

        `parsed` are the bundle's keys, where they have been parsed before.
        Keys that name no module travel as extras. Raises FormatError for a module with a missing half, with
        factors that do not fit each other, or for two modules on one target.
        """
        parsed = parsed or self.parse(list(bundle.tensors))
        modules: list[Module] = []
        extras = dict.fromkeys(parsed.unknown)
        unread: dict[str, int] = {}
        voices: dict[str, Voice] = {}
        taken: dict[tuple[str, str], str] = {}
        resolve = self.resolver(architecture, bundle.metadata)
        known: dict[object, tuple[int, ...]] = {}
        for stem, group in parsed.groups.items():
            spoken = resolve(stem)
            for family in [family for family in group.by_family if family not in families()]:
                unread[family] = unread.get(family, 0) + 1
                extras.update(dict.fromkeys(group.by_family.pop(family).values()))
            if len(group.by_family) > 1 and group.by_family.get("diff", {}).keys() == {"bias"}:
                extras.update(dict.fromkeys(group.by_family.pop("diff").values()))  # the bias has no other home
            if not spoken or not group.by_family:
                extras.update(dict.fromkeys(group.keys))
                continue
            if ALPHA in group.shared and families()[next(iter(group.by_family))].alpha_role is None:
                extras[group.shared.pop(ALPHA)] = None
            said, module = self._module(stem, group, spoken, bundle, known)
            for target in module.targets:
                other = taken.setdefault((target.component, target.path), stem)
                if other != stem:
                    raise FormatError(
                        f"updates {target.path}, and so does {other!r}: one module is spelled twice", key=stem
                    )
            modules.append(module)
            voices.setdefault(said.component, said.voice)
        return self.with_alphas(
            Adapter(
                modules=tuple(modules),
                architecture=architecture,
                layout=self.id,
                metadata=bundle.metadata,
                extras={key: bundle.tensors[key] for key in bundle.tensors if key in extras},
                voices=voices,
                side_files=bundle.side_files,
                notes=bundle.notes,
                unread_families=unread,
                path=bundle.path,
                size_bytes=bundle.size_bytes,
                stored=bundle.tensors,
            )
        )

    def _module(
        self,
        stem: str,
        group: Group,
        spoken: Sequence[Spoken],
        bundle: Bundle,
        known: dict[object, tuple[int, ...]],
    ) -> tuple[Spoken, Module]:
        """What a stem names, and its module. `known` are the shapes of updates whose factors have been looked at."""
        if len(group.by_family) > 1:
            names = " and ".join(sorted(group.by_family))
            raise FormatError(f"one module of two families: {names}", key=stem)
        (family_id, roles), *_ = group.by_family.items()
        factors = {role: bundle.tensors[key] for role, key in roles.items()}
        family_id, renamed = self.meant(family_id, factors)
        if renamed:
            roles = {renamed.get(role, role): key for role, key in roles.items()}
            factors = {renamed.get(role, role): factor for role, factor in factors.items()}
        family = families()[family_id]
        factors = self.read_factors(family_id, factors)
        constant = family.alpha_role if family.alpha_role != ALPHA_SCALES else None
        if constant is not None and ALPHA in group.shared:
            factors[constant] = bundle.tensors[group.shared[ALPHA]]
        shapes = {role: factor.shape for role, factor in factors.items()}
        alike = family_id, *shapes.items()
        shape = known.get(alike)
        if shape is None:
            problem = family.problem(shapes)
            if problem is not None:
                raise FormatError(problem, key=stem, hint="the file is damaged or was written by a broken tool")
            shape = known[alike] = family.shape(shapes)
        said = _best(spoken, shape, bundle.metadata.get(COMPONENT))
        alpha = None
        if ALPHA in group.shared and constant is None:
            tensor = bundle.tensors[group.shared[ALPHA]]
            if tensor.numel != 1:
                raise FormatError(f"alpha has shape {list(tensor.shape)}, expected one number", key=group.shared[ALPHA])
            alpha = tensor.item()
        magnitude = None
        if MAGNITUDE in group.shared:
            key = group.shared[MAGNITUDE]
            if not family.additive:
                raise FormatError(
                    f"a DoRA magnitude beside a {family.title} module, whose meaning is not known", key=key
                )
            columns = "embedding_A" in factors and VECTOR in key  # an embedding's outputs are its weight's columns
            magnitude = self.canonical_magnitude(bundle.tensors[key], shape, key, columns)
        keys = {**roles, **group.shared}
        return said, Module(said.targets_at(shape), family, factors, alpha, magnitude, keys)

    def read_factors(self, family: str, factors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Factors by the family's roles and in its shapes, where a spelling has others."""
        return factors

    def meant(self, family: str, factors: Mapping[str, LazyTensor]) -> tuple[str, Mapping[str, str]]:
        """The family that is meant, and roles that are other ones there, where a suffix alone does not tell.

        OFT and BOFT share LyCORIS' suffixes: the number of dimensions tells. A flag says what an IA3 vector is of.
        """
        if family == "oft" and "blocks" in factors and len(factors["blocks"].shape) == 4:
            return "boft", {}
        if family == "ia3" and "on_input" in factors and factors["on_input"].item():
            return "ia3", {"output": "input"}
        return family, {}

    def canonical_magnitude(
        self, stored: LazyTensor, shape: tuple[int, ...], key: str, per_column: bool = False
    ) -> LazyTensor:
        """A DoRA magnitude as `(out, 1, ...)` or `(1, in, ...)`; FormatError if it fits neither side of `shape`.

        Without `per_column` its shape tells which it is, except for PEFT's, which has one value per output whatever
        its shape. Where `shape` hides a kernel (LoKr's `in * kh * kw`) the magnitude has all dimensions of the weight.
        """
        out, columns = shape[0], shape[1]
        vector = VECTOR in key
        hidden = not vector and len(stored.shape) > len(shape)
        ones = (1,) * ((len(stored.shape) if hidden else len(shape)) - 1)
        if hidden and columns % stored.shape[1] == 0 and stored.shape[0] == 1:
            columns = stored.shape[1]
        if stored.numel == columns and (per_column or (not vector and stored.shape[:2] == (1, columns))):
            return stored.reshape((1, columns, *ones[1:]))
        if stored.numel == out and not per_column and (vector or stored.shape[0] == out):
            return stored.reshape((out, *ones))
        raise FormatError(
            f"DoRA magnitude has shape {list(stored.shape)}, expected one value per row ({out}) or column ({columns})",
            key=key,
        )

    def with_alphas(self, adapter: Adapter) -> Adapter:
        """The adapter with alphas that this layout keeps elsewhere than beside the factors."""
        return adapter

    # -- writing ---------------------------------------------------------------------------------------------

    def obstacle(self, module: Module) -> str | None:
        """Why this layout cannot express a module, or None."""
        for role in module.factors:
            if not {(module.family.id, role)} & (self.spelling.keys() | self.elsewhere):
                return f"{self.id} has no spelling for the {role} of a {module.family.title} module"
        if module.magnitude is not None and (ANY, MAGNITUDE) not in self.spelling:
            return f"{self.id} has no spelling for a DoRA magnitude"
        return None

    def ready(self, modules: Sequence[Module]) -> tuple[Module, ...]:
        """Modules without an obstacle as this layout can hold them, each the same update: a scale that it has no place
        for is put into the factors."""
        return tuple(modules)

    def suffix(self, module: Module, role: str) -> str:
        """The suffix of one of a module's factors."""
        return self.spelling[module.family.id, role]

    def write(self, adapter: Adapter, voices: Mapping[str, Voice] | None = None) -> Bundle:
        """The bundle that spells an adapter, whose modules must already be those of the voices' namings.

        Extras are not written. Raises NotRepresentable with every module that this layout cannot express.
        """
        voices = dict(voices or {})
        if any(component not in voices for component in adapter.components):
            voices = {**self.voices_for(adapter), **voices}
        self.refuse(adapter.modules)
        adapter = replace(adapter, modules=self.ready(adapter.modules))
        tensors: dict[str, LazyTensor] = {}
        for module in adapter.modules:
            tensors.update(self.spell(module, adapter.architecture, voices).values())
        metadata = {key: value for key, value in adapter.metadata.items() if key != COMPONENT}
        if len(adapter.components) == 1 and self.ambiguous(adapter, voices):
            metadata[COMPONENT] = adapter.components[0]
        return self.finish(adapter, Bundle(tensors, metadata), voices)

    def refuse(self, modules: Sequence[Module]) -> None:
        """Raises NotRepresentable with every module that this layout cannot express, and the way out, if any."""
        blocked = {m.title: reason for m in modules if (reason := self.obstacle(m)) is not None}
        if blocked:
            raise NotRepresentable(
                f"{len(blocked)} of {len(modules)} modules cannot be written ({few(tuple(blocked))}): "
                f"{'; '.join(sorted(set(blocked.values())))}",
                modules=tuple(blocked),
                hint=self.way_out([m for m in modules if m.title in blocked]),
            )

    def way_out(self, blocked: Sequence[Module]) -> str | None:
        """What a user can do about modules with an obstacle: their approximation as LoRA, if that has none."""
        pair = families()["lora"]
        for module in blocked:
            if module.family is pair and "mid" not in module.factors:
                return None  # it is a LoRA already
            if len(module.shape) < 2:
                return None  # a vector is no pair
            out, columns, *kernel = (size or 1 for size in module.shape)
            ones = [1] * len(kernel)
            factors = {"up": _empty((out, 1, *ones), module.dtype), "down": _empty((1, columns, *kernel), module.dtype)}
            magnitude = module.magnitude if module.family.additive else None
            if self.obstacle(replace(module, family=pair, factors=factors, magnitude=magnitude)) is not None:
                return None
        base = ", and --base CHECKPOINT" if any(module.needs_base for module in blocked) else ""
        return f"rewrite them with --approximate lora and --rank N or --energy E{base}"

    def ambiguous(self, adapter: Adapter, voices: Mapping[str, Voice]) -> bool:
        """Whether the keys of an adapter's one component might be read as another component's."""
        resolve = self.resolver(adapter.architecture, {})
        for module in adapter.modules:
            spoken = resolve(self.stem(module, adapter.architecture, voices))
            if adapter.architecture.open:
                spoken = spoken[:1]  # without a table nothing but the order decides
            if any(said.component != module.component for said in spoken):
                return True
        return False

    def spell(
        self, module: Module, architecture: Architecture, voices: Mapping[str, Voice]
    ) -> dict[str, tuple[str, LazyTensor]]:
        """role -> (key, tensor) of everything that is stored for one module."""
        stem = self.stem(module, architecture, voices)
        spelled = {
            role: (stem + self.suffix(module, role), self.stored_factor(module, role, factor))
            for role, factor in module.factors.items()
            if (module.family.id, role) not in self.elsewhere
        }
        if module.magnitude is not None:
            spelled[MAGNITUDE] = stem + self.spelling[ANY, MAGNITUDE], self.stored_magnitude(module)
        alpha = self.alpha_tensor(module)
        if alpha is not None:
            spelled[ALPHA] = stem + self.spelling[ANY, ALPHA], alpha
        return spelled

    def voices_for(self, adapter: Adapter) -> Mapping[str, Voice]:
        """The voice in which each component is written. Raises NotRepresentable for a component without one."""
        written = self.written(adapter.architecture)
        missing = [component for component in adapter.components if component not in written]
        if missing:
            hint = "; ".join(adapter.notes) or "name a checkpoint of the model with --base"
            raise NotRepresentable(
                f"{self.id} has no spelling for {', '.join(missing)} of {adapter.architecture.title}",
                hint=hint if adapter.architecture.open else None,
            )
        return {component: written[component] for component in adapter.components}

    def stem(self, module: Module, architecture: Architecture, voices: Mapping[str, Voice]) -> str:
        """What stands before the suffix in the keys of a module."""
        voice = voices[module.component]
        name = architecture.naming(module.component, voice.naming).name_of(module.targets)
        if name is None:
            raise NotRepresentable(f"{voice.naming} has no name for {module.title}", modules=(module.title,))
        return voice.prefix + (name if self.separator == "." else name.replace(".", self.separator))

    def alpha_tensor(self, module: Module) -> LazyTensor | None:
        """The alpha scalar stored beside the factors (the rank, where the module has no alpha); None for no tensor."""
        if (ANY, ALPHA) not in self.spelling or module.family.alpha_role != ALPHA_SCALES:
            return None
        alpha = module.alpha if module.alpha is not None else float(module.rank)
        return alpha_scalar(alpha, module.dtype)

    def stored_factor(self, module: Module, role: str, factor: LazyTensor) -> LazyTensor:
        """A factor in the shape that this layout stores: the inverse of `read_factors`."""
        return factor

    def stored_magnitude(self, module: Module) -> LazyTensor:
        """The magnitude in the shape that this layout stores."""
        assert module.magnitude is not None
        return module.magnitude

    def finish(self, adapter: Adapter, bundle: Bundle, voices: Mapping[str, Voice]) -> Bundle:
        """The bundle with what is not a tensor: header entries, side files."""
        return bundle


@cache
def _derived(layout: Layout, architecture: Architecture) -> Voices:
    return {} if layout.id in architecture.writes else layout.derive(architecture)


@cache
def _written(layout: Layout, architecture: Architecture) -> Mapping[str, Voice]:
    own = architecture.writes.get(layout.id)
    if own is not None:
        return own
    return {component: voices[0] for component, voices in _derived(layout, architecture).items()}


@cache
def _voices(layout: Layout, architecture: Architecture) -> Sequence[tuple[str, Voice]]:
    voices = dict.fromkeys(_written(layout, architecture).items())
    voices |= dict.fromkeys(architecture.voices(layout.id))
    for component, more in _derived(layout, architecture).items():
        voices |= dict.fromkeys((component, voice) for voice in more)
    return tuple(voices)


@cache
def _prefixes(layout: Layout, architecture: Architecture) -> tuple[str, ...]:
    spoken = [voice for _, voice in architecture.voices(layout.id)]
    for voices in _derived(layout, architecture).values():
        spoken += voices
    return tuple(dict.fromkeys(voice.prefix for voice in spoken))


@cache
def _resolver(layout: Layout, architecture: Architecture) -> Resolver:
    return architecture.resolver(layout.voices(architecture), layout.separator)


def _best(spoken: Sequence[Spoken], shape: tuple[int, ...], component: str | None) -> Spoken:
    """Of several meanings of a stem the one of `component`, else the one whose standard shape fits, else the first."""
    if len(spoken) > 1:
        spoken = [said for said in spoken if said.component == component] or spoken
        for said in spoken:
            if said.targets is not None and fits(said.targets, shape):
                return said
    return spoken[0]


def _empty(shape: tuple[int, ...], dtype: str) -> LazyTensor:
    """A tensor to ask for its shape, never for its values."""
    return LazyTensor(shape, dtype, Held(b""))


def fits(targets: Sequence[Target], shape: tuple[int, ...]) -> bool:
    """Whether an update of `shape` has exactly the standard model's size (a flattened kernel counts as equal)."""
    rows = 0
    for target in targets:
        rows += target.shape[0]
    return may_be(shape, (rows, *targets[0].shape[1:]))


def alpha_scalar(alpha: float, dtype: str) -> LazyTensor:
    """alpha as a 0-d tensor: in the factors' dtype, as trainers write it, where that holds the value, else wider."""
    for code in (dtype, "F32"):
        try:
            scalar = LazyTensor.scalar(alpha, code)
        except LoratoolError:
            continue  # an integer dtype, say
        if abs(scalar.item() - alpha) <= 1e-12 * abs(alpha):
            return scalar
    return LazyTensor.scalar(alpha, "F64")
