"""Detection: which layout and which architecture a bundle is, as a score over all of them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from loratool.core.adapter import Bundle
from loratool.core.architecture import Architecture, Resolver, Spoken, Voice
from loratool.core.errors import FormatError
from loratool.core.layout import Layout, Parsed, fits
from loratool.core.naming import kind
from loratool.core.registry import architectures, families, layouts
from loratool.core.target import squeezed

ENOUGH = 0.5
"""More than this share of stems must resolve before a table is believed."""

CLOSE = 0.02
"""Two architectures whose scores differ by less are a tie."""

NEAR = 0.1
"""What scores less by more than this than the best is not looked at any closer: it is neither a rival nor told."""

_EXACT = 1e-9
"""Sums of the same terms in another order differ by less."""

WHOLE = 0.5
"""A model of whose blocks the file has by this much more than of another's is preferred to that one."""

FREQUENT = 8
"""A model that has none of so many of a file's most frequent kinds of names is not looked at any further."""

SAMPLE = 64
"""About so many keys, spread over the file, tell whether a spelling and a table are worth a closer look."""


class Candidate(NamedTuple):
    """One reading of a bundle. `resolved` is the share of stems with a name in the tables, `fitting` the share of
    those whose shape is the standard model's. For other widths, `consistent` is the share of dimensions that are the
    same wherever the standard model's are, `proportional` the share of those that differ from it by one factor.
    `written` is the share of resolved stems in the spelling that is written, `own` of those under the very names of the
    checkpoint that the model was published as."""

    layout: Layout
    architecture: Architecture
    parsed: Parsed
    resolved: float
    fitting: float = 0.0
    consistent: float = 0.0
    proportional: float = 0.0
    written: float = 0.0
    own: float = 0.0
    signed: bool = False
    table: bool = False

    @property
    def perfect(self) -> bool:
        """Whether every stem has a name in the tables, and every shape is the standard model's."""
        return self.resolved == self.fitting == 1

    @property
    def score(self) -> float:
        """Names first; sizes tell apart models that share names; written spellings win over aliases."""
        return self.substance + self.preference

    @property
    def substance(self) -> float:
        """What names and sizes come to, whatever the spelling: 1 if all are the standard model's."""
        width = 0.1 * self.consistent + 0.1 * self.proportional
        return self.resolved * (0.5 + 0.3 * self.fitting + width)

    @property
    def preference(self) -> float:
        """What decides between spellings that read the same: the program that the header names, the voices that are
        written, and a layout in the architecture's own table before one whose voices are derived."""
        return _preference(self.signed, self.written, self.table)


def _preference(signed: bool, written: float, table: bool) -> float:
    return 0.002 * signed + 0.001 * written + 0.0002 * table


class Detection(NamedTuple):
    """The best reading, and what came nearest. `tie` are the ids of models between which nothing decides, `others` the
    titles of models that the file may be for as well, but hardly is."""

    best: Candidate
    candidates: tuple[Candidate, ...]
    tie: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def runner_up(self) -> Candidate | None:
        """The best reading as another architecture, or None."""
        others = [c for c in self.candidates if c.architecture.id != self.best.architecture.id]
        return others[0] if others else None


def detect(bundle: Bundle, among: Iterable[Architecture] | None = None, layout: str | None = None) -> Detection | None:
    """The best (layout, architecture) for a bundle, or None if no layout knows a single key.

    A table wins if it names more than half of the stems and no other comes as close; else the file is read
    without a table: names as they stand (`generic`), or flattened ones (`unknown`). Raises FormatError if the keys
    contradict each other in every spelling that knows them.
    """
    tables = [a for a in (among if among is not None else architectures().values()) if not a.open]
    keys = list(bundle.tensors)
    sample = keys[:: max(1, len(keys) // SAMPLE)]
    spellings = [layouts()[layout]] if layout else list(layouts().values())
    spelled: dict[object, _Keys] = {}
    for one in spellings:
        if one.grammar not in spelled:
            spelled[one.grammar] = _Keys(bundle, one, sample)
    readings = [_Reading(one, spelled[one.grammar]) for one in spellings if spelled[one.grammar].heard]
    candidates = _of_the_named(readings, tables, bundle.metadata) or _of(readings, tables)
    believed = [c for c in candidates if c.resolved > ENOUGH]
    if believed:
        rivals = [c for c in believed if c.score > believed[0].score - CLOSE]
        rivals = [c for c in rivals if c.perfect] or rivals
        rivals = _of_as_many_blocks(bundle.metadata, _named_in(bundle.metadata, rivals))
        best = _settled(rivals)
        if best is not None:
            titles = {c.architecture.id: c.architecture.title for c in reversed(rivals)}
            others = tuple(title for name, title in titles.items() if name != best.architecture.id)
            return Detection(best, tuple(candidates), others=others)
        return _open(readings, tuple(candidates), tuple(dict.fromkeys(c.architecture.id for c in rivals)))
    return _open(readings, tuple(candidates), ())


def _of_the_named(
    readings: Sequence[_Reading], tables: Sequence[Architecture], metadata: Mapping[str, str]
) -> list[Candidate]:
    """The readings as the models that the header names, if the best of them is perfect: no other could then be more
    than a rival, between which and these the header decides. Else none."""
    claims = {table: _claim(metadata, table) for table in tables} if metadata else {}
    most = max(claims.values(), default=0)
    if not most:
        return []
    candidates = _of(readings, [table for table, count in claims.items() if count == most])
    highest = 1 + max(_preference(reading.signed, 1.0, True) for reading in readings)
    if candidates and candidates[0].score > highest - _EXACT and _agrees(metadata, candidates[0].architecture) == most:
        return candidates
    return []


def _claim(metadata: Mapping[str, str], table: Architecture) -> int:
    """The most facts of one of a model's sizes that the header states."""
    sizes = ({**table.facts, **variant.facts} for variant in table.variants)
    return max(sum(metadata.get(key) == fact for key, fact in facts.items()) for facts in (table.facts, *sizes))


def _agrees(metadata: Mapping[str, str], model: Architecture) -> int:
    """How many facts of a model in one size the header states."""
    return sum(metadata.get(key) == fact for key, fact in model.facts.items())


def _of(readings: Sequence[_Reading], tables: Sequence[Architecture]) -> list[Candidate]:
    """What the readings may be among these models, the best first."""
    shares: list[tuple[float, _Reading, Architecture]] = []
    for reading in readings:
        for table in tables:
            if not reading.begins(table) or _echo(reading, table, readings):
                continue
            share = _share(reading, table)
            if share:
                shares.append((share, reading, table))
    # The standard size of the right model names more than half of what its other sizes name.
    likely = ENOUGH * max([share for share, *_ in shares], default=0.0)
    candidates = _ranked((reading, table) for share, reading, table in shares if share >= max(likely, ENOUGH / 2))
    if not any(c.resolved >= ENOUGH for c in candidates):
        candidates = _ranked((reading, table) for _, reading, table in shares)
    return candidates


def _share(reading: _Reading, table: Architecture) -> float:
    """Of a sample of stems, counted by kind, the share that is of a kind that a model has. 0 where that is less than a
    quarter, and none of the frequent kinds, of which a few are asked for: the right model knows them all."""
    kinds, resolve = reading.keys.sampled, reading.resolver(table.sketch)
    known, left = 0, kinds.total()
    least = ENOUGH / 2 * left
    for asked, (stem, count) in enumerate(kinds.most_common()):
        if not known and (left < least or asked == FREQUENT):
            return 0.0
        left -= count
        known += count * bool(resolve(stem))
    return known / kinds.total()


def _echo(reading: _Reading, table: Architecture, others: Sequence[_Reading]) -> bool:
    """Whether a layout with derived voices writes nothing for a model that another one of its own does not write
    alike, knows no key that the other does not, and is not named in the header: it would be second anyway."""
    layout = reading.layout
    if layout.id in table.writes or reading.signed:
        return False
    written = layout.written(table).items()
    return any(
        other.layout.id in table.writes
        and other.layout.separator == layout.separator
        and other.keys.heard >= reading.keys.heard
        and other.layout.written(table).items() >= written
        for other in others
    )


def _named_in(metadata: Mapping[str, str], rivals: Sequence[Candidate]) -> list[Candidate]:
    """Of equally good readings those whose model the header names; all if it names none, or all alike."""
    agreeing = [_agrees(metadata, c.architecture) for c in rivals]
    return [c for c, count in zip(rivals, agreeing, strict=True) if count == max(agreeing)]


def _settled(rivals: Sequence[Candidate]) -> Candidate | None:
    """Of equally good readings the one that is likelier by far: as the older model, where the others are its kin, or,
    of names without a prefix, as the model that was published under them. None if there are several."""
    for likely in (rivals, [c for c in rivals if c.own == 1.0]):
        models = {c.architecture.id: c.architecture for c in likely}
        older = [name for name, model in models.items() if model.kin not in models]
        if len(older) == 1:
            return next(c for c in likely if c.architecture.id == older[0])
    return None


def _of_as_many_blocks(metadata: Mapping[str, str], rivals: Sequence[Candidate]) -> list[Candidate]:
    """Of equally good readings those whose blocks end where the file's do: not 19 of 20, say, but 19 of 19."""
    if len({c.architecture.id for c in rivals}) == 1:
        return list(rivals)
    whole = [_whole(c, metadata) for c in rivals]
    return [c for c, share in zip(rivals, whole, strict=True) if share > max(whole) - WHOLE]


def _whole(candidate: Candidate, metadata: Mapping[str, str]) -> float:
    """The share of the file's kinds of names, numbers aside, of which it has every one that the table has."""
    held: Counter[tuple[str, str, str]] = Counter()
    resolve = candidate.layout.resolver(candidate.architecture, metadata)
    for stem in candidate.parsed.groups:
        for said in resolve(stem)[:1]:
            held[said.component, said.voice.naming, kind(said.name)] += 1
    known: Counter[tuple[str, str, str]] = Counter()
    for component, naming in {(component, naming) for component, naming, _ in held}:
        known.update((component, naming, kind(name)) for name in candidate.architecture.naming(component, naming))
    return sum(count == known[of_kind] for of_kind, count in held.items()) / len(held)


class _Keys:
    """A bundle's keys in one grammar, which several layouts may share; parsed when somebody asks.

    `heard` are the stems of a sample, `parsed` is None, with the reason in `error`, where two keys say the same.
    `shapes` has the shape of every group whose factors fit each other.
    """

    def __init__(self, bundle: Bundle, layout: Layout, sample: Sequence[str]) -> None:
        self.bundle, self.layout = bundle, layout
        self.error: FormatError | None = None
        self.heard = {parts[0] for key in sample if (parts := layout.split(key)) is not None}

    @cached_property
    def sampled(self) -> Counter[str]:
        """How many stems of the sample there are of each kind; see `_by_kind`."""
        return Counter(_by_kind(self.heard, self.layout.separator).values())

    @cached_property
    def begun(self) -> str:
        """What the kinds of the sample begin with is in here behind a line break; a folder's components, which have
        sub-folders, too."""
        return "\n".join(["", *self.sampled, *(stem.rpartition("/")[2] for stem in self.sampled if "/" in stem)])

    @cached_property
    def parsed(self) -> Parsed | None:
        try:
            return self.layout.parse(list(self.bundle.tensors))
        except FormatError as error:
            self.error = error
            return None

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...] | None]:
        groups = self.parsed.groups if self.parsed else {}
        known: dict[object, tuple[int, ...] | None] = {}
        return {stem: _shape(self.bundle, group.by_family, known) for stem, group in groups.items()}

    @cached_property
    def total(self) -> int:
        """Stems, and keys that are of none."""
        return len(self.parsed.groups) + len(self.parsed.unknown) if self.parsed else 0

    @cached_property
    def kinds(self) -> Mapping[tuple[str, tuple[int, ...] | None], int]:
        """How many stems there are of each kind and shape, numbers aside; see `_by_kind`."""
        kinds = _by_kind(self.shapes, self.layout.separator)
        return Counter((kinds[stem], shape) for stem, shape in self.shapes.items())


class _Reading:
    """A bundle's keys as one layout. `signed`: the header says that this is it."""

    def __init__(self, layout: Layout, keys: _Keys) -> None:
        self.layout, self.keys = layout, keys
        self.signed = layout.signed(keys.bundle.metadata)

    def resolver(self, architecture: Architecture) -> Resolver:
        """What the layout's stems are in a model."""
        return self.layout.resolver(architecture, self.keys.bundle.metadata)

    def begins(self, table: Architecture) -> bool:
        """Whether a stem of the sample begins as one for this model may."""
        return any(f"\n{prefix}" in self.keys.begun for prefix in self.layout.prefixes(table))


def _open(readings: list[_Reading], candidates: tuple[Candidate, ...], tie: tuple[str, ...]) -> Detection | None:
    """The best reading without a table. Raises FormatError where every spelling finds a contradiction."""
    without = [architecture for architecture in architectures().values() if architecture.open]
    offers = [
        (_preference(reading.signed, 1.0, reading.layout.id in architecture.writes), reading, architecture)
        for reading in readings
        for architecture in without
        if reading.layout.voices(architecture)
    ]
    offers.sort(key=lambda offer: (not offer[1].begins(offer[2]), -offer[0]))  # the likely ones first
    best: Candidate | None = None
    for most, reading, architecture in offers:
        if best is None or 1 + most > best.resolved + best.preference:
            for found in _candidates(reading, architecture):
                if found.resolved and (
                    best is None or found.resolved + found.preference > best.resolved + best.preference
                ):
                    best = found
    if best is not None:
        return Detection(best, candidates, tie)
    for reading in readings:
        if reading.keys.error is not None:
            raise reading.keys.error
    return None


class _Offer(NamedTuple):
    """A reading as one size of a model, the `rank`th of table `place`, and the most that it can come to."""

    place: int
    rank: int
    reading: _Reading
    size: Architecture
    substance: float
    preference: float
    own: bool

    @property
    def score(self) -> float:
        return self.substance + self.preference

    def hopeless(self, best: Candidate | None, rank: int) -> bool:
        """Whether `best`, of the same table in its size `rank`, is at least as good; the spelling is the same."""
        if best is None:
            return False
        gain = self.substance - best.substance
        return gain < -_EXACT or (self.rank > rank and gain <= _EXACT)

    def echoed(self, found: Candidate) -> bool:
        """Whether the same model in another spelling is at least as good, so that this one would be second anyway."""
        return found.architecture.id == self.size.id and found.score >= self.score - _EXACT and found.own >= self.own


def _offers(reading: _Reading, table: Architecture, place: int) -> list[_Offer]:
    """Every size of a model, measured by the kinds and shapes of its outlines alone."""
    layout = reading.layout
    written = layout.written(table)
    published = table.checkpoints[0].voices if table.checkpoints else {}
    offers: list[_Offer] = []
    standard: list[object] = []
    for rank, size in enumerate(table.sizes):
        if rank and offers[0].substance >= 1:
            offers.append(offers[0]._replace(rank=rank, size=size))  # no size can have more: nothing is built
            continue
        named = right = 0
        plain = own = False
        told: list[object] = []
        resolve = reading.resolver(size.sketch)
        for (stem, shape), count in reading.keys.kinds.items():
            spoken = resolve(stem)
            if spoken:
                named += count
                right += count * (shape is None or any(said.targets and fits(said.targets, shape) for said in spoken))
                plain = plain or _is_said(spoken, written)
                own = own or _is_said(spoken, published)
            told.append([(one.component, one.voice.naming, *[t.shape for t in one.targets or ()]) for one in spoken])
        if not rank:
            standard = told
        elif told == standard and size.blocks is not None and size.blocks is table.blocks:
            continue  # as many blocks, and the same in them: what the file holds is in both
        substance = (0.7 * named + 0.3 * right) / reading.keys.total if named else 0.0
        preference = _preference(reading.signed, float(plain), layout.id in table.writes)
        offers.append(_Offer(place, rank, reading, size, substance, preference, own))
    return offers


def _ranked(pairs: Iterable[tuple[_Reading, Architecture]]) -> list[Candidate]:
    """What the readings are as these architectures, each in the size that fits best (the standard one, unless another
    fits better), the best score first; without those that cannot come near it."""
    pairs = list(pairs)
    if len(pairs) == 1 and len(pairs[0][1].sizes) == 1:
        return [c for c in _candidates(*pairs[0]) if c.resolved > 0]  # there is nothing to choose from
    offers = [one for place, pair in enumerate(pairs) for one in _offers(*pair, place)]
    floor = 0.0
    best: dict[int, tuple[Candidate, int]] = {}
    for offer in sorted(offers, key=lambda one: -one.score):
        own, rank = best.get(offer.place, (None, 0))
        if not offer.substance or offer.score <= floor or offer.hopeless(own, rank):
            continue
        if any(offer.echoed(found) for found, _ in best.values()):
            continue
        for found in _candidates(offer.reading, offer.size, floor):
            if own is None or (found.score, -offer.rank) > (own.score, -rank):
                best[offer.place] = found, offer.rank
            if found.resolved > ENOUGH:
                floor = max(floor, found.score - NEAR)
    ranked = [best[place][0] for place in sorted(best)]
    return sorted((c for c in ranked if c.resolved > 0), key=lambda c: -c.score)


def _candidates(reading: _Reading, architecture: Architecture, floor: float = 0.0) -> list[Candidate]:
    """The reading as one architecture; none where its keys contradict each other, or its score is below `floor`."""
    layout, parsed = reading.layout, reading.keys.parsed
    if parsed is None:
        return []
    written = layout.written(architecture)
    published = architecture.checkpoints[0].voices if architecture.checkpoints else {}
    total, shapes, resolve = reading.keys.total, reading.keys.shapes, reading.resolver(architecture)
    missing = len(parsed.unknown)
    needed = (floor - _preference(True, 1.0, True)) * total
    alike: dict[object, tuple[Sequence[Spoken], tuple[int, ...] | None]] = {}
    counts: dict[object, int] = {}
    for stem in parsed.groups:
        spoken = resolve(stem)
        if not spoken:
            missing += 1
            if total - missing < needed:
                return []
            continue
        shape = None if architecture.open else shapes[stem]
        # What follows is the same for all that are alike in this: it is looked at once.
        key = shape, *[(said.component, said.voice, *[t.shape for t in said.targets or ()]) for said in spoken]
        if key in counts:
            counts[key] += 1
        else:
            counts[key], alike[key] = 1, (spoken, shape)
    resolved = plain = own = fitting = sized = 0
    widths: dict[int, Counter[int]] = defaultdict(Counter)
    for one, (spoken, shape) in alike.items():
        count = counts[one]
        resolved += count
        plain += count * _is_said(spoken, written)
        own += count * _is_said(spoken, published)
        if shape is not None:
            best = next((said for said in spoken if said.targets and fits(said.targets, shape)), None)
            sized += count
            fitting += count * (best is not None)
            _note_widths(best or spoken[0], shape, widths, count)
    agreeing = sum(counter.most_common(1)[0][1] for counter in widths.values())
    noted = sum(sum(counter.values()) for counter in widths.values())
    factors: Counter[float] = Counter()
    for standard, counter in widths.items():
        for size, count in counter.items():
            factors[size / standard] += count
    found = Candidate(
        layout,
        architecture,
        parsed,
        resolved / total if total else 0.0,
        fitting / sized if sized else 0.0,
        agreeing / noted if noted else 0.0,
        max(factors.values()) / noted if noted else 0.0,
        plain / resolved if resolved else 0.0,
        own / resolved if resolved else 0.0,
        reading.signed,
        layout.id in architecture.writes,
    )
    return [found]


def _is_said(spoken: Sequence[Spoken], voices: Mapping[str, Voice]) -> bool:
    """Whether a stem can be of one of these voices."""
    for said in spoken:
        voice = voices.get(said.component)
        if voice is said.voice or voice == said.voice:  # the first is faster, and most often true
            return True
    return False


def _by_kind(stems: Collection[str], separator: str) -> dict[str, str]:
    """Each stem with 0 for every number in it: one for all that differ in numbers alone."""
    dot = re.escape(separator)
    number = re.compile(rf"(?<=[{dot}\n])\d+(?=[{dot}\n])")  # the whole of a part: `te1` is no `te2`
    # All at once, which is faster by far; a line break in a name, which nobody writes, makes it a kind of its own.
    kinds = number.sub("0", "\n".join(["", *stems, ""])).split("\n")[1:-1]
    return dict(zip(stems, kinds if len(kinds) == len(stems) else stems, strict=True))


def _shape(
    bundle: Bundle, by_family: Mapping[str, Mapping[str, str]], known: dict[object, tuple[int, ...] | None]
) -> tuple[int, ...] | None:
    """Shape of a group's update if its family is known and its factors fit each other; `known` are those so far."""
    for family_id, roles in by_family.items():
        shapes = {role: bundle.tensors[key].shape for role, key in roles.items()}
        factors = family_id, *shapes.items()
        if factors not in known:
            family = families().get(family_id)
            fit = family is not None and family.problem(shapes) is None
            known[factors] = family.shape(shapes) if family is not None and fit else None
        if known[factors] is not None:
            return known[factors]
    return None


def _note_widths(said: Spoken, shape: tuple[int, ...], widths: dict[int, Counter[int]], count: int) -> None:
    """Notes which size of the file stands for which size of the standard model (another width: one for one)."""
    assert said.targets is not None
    widths[sum(target.rows for target in said.targets)][shape[0]] += count
    standard = squeezed(said.targets[0].shape)
    if len(shape) > 1 and len(standard) > 1:
        widths[standard[1]][shape[1]] += count
