"""Detection: which layout and which architecture a bundle is, as a score over all of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from loratool.core.adapter import Bundle
from loratool.core.architecture import Architecture, Spoken
from loratool.core.errors import FormatError
from loratool.core.layout import Layout, Parsed, fits
from loratool.core.registry import architectures, families, layouts
from loratool.core.target import squeezed

ENOUGH = 0.5
"""More than this share of stems must resolve before a table is believed."""

CLOSE = 0.02
"""Two architectures whose scores differ by less are a tie."""

SAMPLE = 64
"""About so many keys, spread over the file, tell whether a spelling and a table are worth a closer look."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One reading of a bundle. `resolved` is the share of stems with a name in the tables, `fitting` the share of
    those whose shape is the standard model's, `consistent` the share of dimensions that one other width explains."""

    layout: Layout
    architecture: Architecture
    parsed: Parsed
    resolved: float
    fitting: float = 0.0
    consistent: float = 0.0
    written: float = 0.0
    signed: bool = False
    table: bool = False

    @property
    def perfect(self) -> bool:
        """Whether every stem has a name in the tables, and every shape is the standard model's."""
        return self.resolved == self.fitting == 1

    @property
    def score(self) -> float:
        """Names first; sizes tell apart models that share names; written spellings win over aliases."""
        return self.resolved * (0.5 + 0.3 * self.fitting + 0.2 * self.consistent) + self.preference

    @property
    def preference(self) -> float:
        """What decides between spellings that read the same: the program that the header names, the voices that are
        written, and a layout in the architecture's own table before one whose voices are derived."""
        return 0.002 * self.signed + 0.001 * self.written + 0.0002 * self.table


@dataclass(frozen=True, eq=False)
class Detection:
    """The best reading, and what came nearest. `tie` are the ids of models between which nothing decides, `kin` the
    titles of models made from the best one, which the file may be for as well."""

    best: Candidate
    candidates: tuple[Candidate, ...]
    tie: tuple[str, ...] = ()
    kin: tuple[str, ...] = ()

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
    readings: list[_Reading] = []
    likely: list[tuple[_Reading, Architecture]] = []
    unlikely: list[tuple[_Reading, Architecture]] = []
    spellings = [layouts()[layout]] if layout else list(layouts().values())
    heard = {one: {parts[0] for key in sample if (parts := one.split(key)) is not None} for one in spellings}
    for spelling, stems in heard.items():
        if not stems:
            continue
        reading = _Reading(bundle, spelling)
        readings.append(reading)
        begun = stems | {stem.rpartition("/")[2] for stem in stems}  # a folder's components have sub-folders
        for table in tables:
            prefixes = spelling.prefixes(table)
            if not prefixes or not any(stem.startswith(prefixes) for stem in begun):
                continue  # most are not: nothing of their tables is built
            if _echo(spelling, table, heard, bundle.metadata):
                continue
            known = sum(bool(spelling.resolve(stem, table, bundle.metadata)) for stem in stems)
            if known:
                (likely if known >= ENOUGH / 2 * len(stems) else unlikely).append((reading, table))
    candidates = _ranked(likely)
    if not any(c.resolved >= ENOUGH for c in candidates):
        candidates = _ranked(likely + unlikely)
    believed = [c for c in candidates if c.resolved > ENOUGH]
    if believed:
        rivals = [c for c in believed if c.score > believed[0].score - CLOSE]
        rivals = _named_in(bundle.metadata, rivals)
        models = {c.architecture.id: c.architecture for c in reversed(rivals)}
        origin = _origin(models)
        if origin is not None:
            best = next(c for c in rivals if c.architecture.id == origin)
            kin = tuple(one.title for name, one in models.items() if name != origin)
            return Detection(best, tuple(candidates), kin=kin)
        return _open(readings, tuple(candidates), tuple(dict.fromkeys(c.architecture.id for c in rivals)))
    return _open(readings, tuple(candidates), ())


def _echo(layout: Layout, table: Architecture, heard: Mapping[Layout, set[str]], metadata: Mapping[str, str]) -> bool:
    """Whether a layout with derived voices writes nothing for a model that another one of its own does not write
    alike, knows no key that the other does not, and is not named in the header: it would be second anyway."""
    if layout.id in table.writes or layout.signed(metadata):
        return False
    written = layout.written(table).items()
    return any(
        other.id in table.writes
        and other.separator == layout.separator
        and stems >= heard[layout]
        and other.written(table).items() >= written
        for other, stems in heard.items()
    )


def _named_in(metadata: Mapping[str, str], rivals: Sequence[Candidate]) -> list[Candidate]:
    """Of equally good readings those whose model the header names; all if it names none, or all alike."""
    agreeing = [sum(metadata.get(key) == fact for key, fact in c.architecture.facts.items()) for c in rivals]
    return [c for c, count in zip(rivals, agreeing, strict=True) if count == max(agreeing)]


def _origin(models: Mapping[str, Architecture]) -> str | None:
    """The one model that all others were made from; None if there are several."""
    own = [name for name, model in models.items() if model.kin not in models]
    return own[0] if len(own) == 1 else None


class _Reading:
    """A bundle's keys in one spelling; parsed when somebody asks. `parsed` is None, with the reason in `error`, where
    two keys say the same; `shapes` has the shape of every group whose factors fit each other."""

    def __init__(self, bundle: Bundle, layout: Layout) -> None:
        self.bundle, self.layout = bundle, layout
        self.error: FormatError | None = None

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
        return {stem: _shape(self.bundle, group.by_family) for stem, group in groups.items()}


def _open(readings: list[_Reading], candidates: tuple[Candidate, ...], tie: tuple[str, ...]) -> Detection | None:
    found: list[Candidate] = []
    for reading in readings:
        for architecture in architectures().values():
            if architecture.open and reading.layout.voices(architecture):
                found += _candidates(reading, architecture)
    found = sorted((c for c in found if c.resolved > 0), key=lambda c: -(c.resolved + c.preference))
    if found:
        return Detection(found[0], candidates, tie)
    for reading in readings:
        if reading.error is not None:
            raise reading.error
    return None


def _ranked(pairs: Iterable[tuple[_Reading, Architecture]]) -> list[Candidate]:
    """What the readings are as these architectures, the best score first."""
    found = [candidate for reading, table in pairs for candidate in _best_size(reading, table)]
    return sorted((c for c in found if c.resolved > 0), key=lambda c: -c.score)


def _best_size(reading: _Reading, architecture: Architecture) -> list[Candidate]:
    """The reading as the size of a model that it fits best: the standard one, unless another fits better."""
    found: list[Candidate] = []
    for size in architecture.sizes:
        found += _candidates(reading, size)
        if found and found[-1].perfect:
            break
    return [max(found, key=lambda c: c.score)] if found else []


def _candidates(reading: _Reading, architecture: Architecture) -> list[Candidate]:
    """The reading as one architecture; none where its keys contradict each other."""
    layout, parsed, metadata = reading.layout, reading.parsed, reading.bundle.metadata
    if parsed is None:
        return []
    written = layout.written(architecture)
    total = len(parsed.groups) + len(parsed.unknown)
    resolved = plain = sized = fitting = 0
    widths: dict[int, Counter[int]] = defaultdict(Counter)
    for stem in parsed.groups:
        spoken = layout.resolve(stem, architecture, metadata)
        if not spoken:
            continue
        resolved += 1
        plain += any(written.get(said.component) == said.voice for said in spoken)
        shape = None if architecture.open else reading.shapes[stem]
        if shape is None:
            continue
        sized += 1
        best = next((said for said in spoken if said.targets and fits(said.targets, shape)), None)
        fitting += best is not None
        _note_widths(best or spoken[0], shape, widths)
    agreeing = sum(counter.most_common(1)[0][1] for counter in widths.values())
    noted = sum(sum(counter.values()) for counter in widths.values())
    found = Candidate(
        layout,
        architecture,
        parsed,
        resolved / total if total else 0.0,
        fitting / sized if sized else 0.0,
        agreeing / noted if noted else 0.0,
        plain / resolved if resolved else 0.0,
        layout.signed(metadata),
        layout.id in architecture.writes,
    )
    return [found]


def _shape(bundle: Bundle, by_family: Mapping[str, Mapping[str, str]]) -> tuple[int, ...] | None:
    """Shape of a group's update if its family is known and its factors fit each other."""
    for family_id, roles in by_family.items():
        family = families().get(family_id)
        shapes = {role: bundle.tensors[key].shape for role, key in roles.items()}
        if family is not None and family.problem(shapes) is None:
            return family.shape(shapes)
    return None


def _note_widths(said: Spoken, shape: tuple[int, ...], widths: dict[int, Counter[int]]) -> None:
    """Notes which size of the file stands for which size of the standard model (another width: one for one)."""
    assert said.targets is not None
    if shape[0]:
        widths[sum(target.rows for target in said.targets)][shape[0]] += 1
    standard = squeezed(said.targets[0].shape)
    if len(shape) > 1 and len(standard) > 1 and shape[1]:
        widths[standard[1]][shape[1]] += 1
