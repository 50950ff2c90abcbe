"""Blocks: weights for the parts of a model, as lists, presets and patterns, and how much of a file is in which part."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from loratool.core.adapter import Adapter
from loratool.core.architecture import Architecture
from loratool.core.blocks import runs
from loratool.core.errors import FormatError, UsageError
from loratool.core.module import Module
from loratool.core.target import Target
from loratool.ops.compare import stored_pair

if TYPE_CHECKING:
    import yaml

EVERYWHERE = {"NONE": 0.0, "ALL": 1.0, "ALL0.5": 0.5}
"""The presets that any model has: one weight for all blocks."""

PATTERN_FILES = (".yaml", ".yml")


Value = TypeVar("Value")

Plain = str | Mapping[str, str] | None
"""What stands behind a pattern in YAML: a text, texts by name, or None for any other collection."""


@dataclass(frozen=True)
class Entry(Generic[Value]):
    """`value` for what `pattern` names: a label, a `component.path`, all below one, or these with wildcards.

    `line` is its line in a file, 0 where it comes from none.
    """

    pattern: str
    value: Value
    line: int = 0


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """A weight for every target of a model: that of the last entry that names it, else `rest`.

    `left_out` are the blocks of the model that a list of values has no place for: they get 0.
    """

    spec: str
    architecture: Architecture
    entries: tuple[Entry[float], ...]
    rest: float
    left_out: tuple[str, ...] = ()

    def of(self, target: Target) -> float:
        """The weight of one target."""
        found = last_naming(self.entries, target, self.architecture)
        return self.rest if found is None else found.value

    def of_module(self, module: Module) -> tuple[float, ...]:
        """The weight of each of the module's targets, in row order."""
        return tuple(self.of(target) for target in module.targets)

    def to_data(self) -> dict[str, Any]:
        """The weights as plain data, for a recipe: `entries` as [pattern, weight] pairs, and `rest`."""
        return {"entries": [[entry.pattern, entry.value] for entry in self.entries], "rest": self.rest}

    @classmethod
    def from_data(cls, data: Any, architecture: Architecture) -> BlockWeights:
        """The weights that `to_data` gave, with no `spec` and nothing `left_out`. Raises FormatError for other data."""
        entries = data.get("entries") if isinstance(data, dict) else None
        sound = isinstance(entries, list) and all(
            isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and _finite(pair[1])
            for pair in entries
        )
        if not sound or not _finite(data.get("rest")):
            raise FormatError("its block weights are no [pattern, weight] pairs and the weight of the rest")
        made = tuple(Entry(pattern, float(weight)) for pattern, weight in entries or ())
        return cls("", architecture, made, float(data["rest"]))


def _finite(value: object) -> bool:
    # Not isfinite: a whole number that no float can hold has no float to ask.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class Block:
    """One block of a file. `names` are the `component.path` prefixes that make up the block, `present` those with
    modules; each of them is a pattern. `norm` is the Frobenius norm of the update of all its modules together, `share`
    its part of the file's squared norm, 0 to 1 (nan where that cannot be told)."""

    label: str
    names: tuple[str, ...]
    present: tuple[str, ...]
    modules: int
    norm: float
    share: float


@dataclass(frozen=True, eq=False)
class BlockTable:
    """The blocks of a file in model order, and the lists of values that its model takes.

    `fitting` is the shortest of these lists that has a place for every block of the file; None without lists.
    """

    adapter: Adapter
    blocks: tuple[Block, ...]
    lists: tuple[tuple[str, ...], ...]
    presets: tuple[str, ...]
    fitting: tuple[str, ...] | None


# -- labels ---------------------------------------------------------------------------------------------------------


def block_label(target: Target, architecture: Architecture) -> str:
    """The label of the block that a target belongs to.

    Where no blocks are known, `component.path` up to the first number of the path, which is a pattern, too.
    """
    if architecture.blocks is None:
        return f"{target.component}.{_path_block(target.module_path)}"
    return _labels(architecture, target.component)[target]


@cache
def _labels(architecture: Architecture, component: str) -> Mapping[Target, str]:
    """The label of every target of one component."""
    blocks = architecture.blocks
    assert blocks is not None
    naming = architecture.naming(component, blocks.naming(component))
    return {target: blocks.label_of(component, name) for name, targets in naming.items() for target in targets}


def _path_block(path: str) -> str:
    """`layers.0` of `layers.0.mlp.up`, `blocks_0` of `blocks_0_attn`, `lm_head` of `lm_head.proj`."""
    numbered = re.match(r".*?(?<![^._])\d+(?=[._])", path)
    return numbered[0] if numbered else path.partition(".")[0]


def _full(target: Target) -> str:
    return f"{target.component}.{target.module_path}"


def _known_targets(architecture: Architecture) -> Iterator[Target]:
    for component in architecture.components:
        for targets in next(iter(architecture.namings(component).values())).values():
            yield from targets


# -- weights --------------------------------------------------------------------------------------------------------


def block_weights(spec: str, architecture: Architecture, modules: Sequence[Module] = ()) -> BlockWeights:
    """The weights that `spec` says: the name of a preset, a list of values, or a YAML file of patterns.

    A pattern must name something: a target of the architecture or, where it has no table, one of `modules` (not checked
    if there are none). Raises UsageError with what is known and what comes nearest.
    """
    spec = spec.strip()
    if spec.lower().endswith(PATTERN_FILES):
        entries = read_patterns(spec, "--blocks", _weight, 'write lines like "unet.*.attn2.*": 0.5')
        check_patterns(entries, architecture, modules, spec)
        return BlockWeights(spec, architecture, entries, rest=1.0)
    if "," in spec or _number(spec) is not None:
        return _from_list(spec, architecture)
    return _from_preset(spec, architecture)


def presets_of(architecture: Architecture) -> tuple[str, ...]:
    """The names of the presets that a model takes."""
    return (*EVERYWHERE, *(architecture.blocks.presets if architecture.blocks else ()))


def _from_preset(spec: str, architecture: Architecture) -> BlockWeights:
    name, known = spec.upper(), presets_of(architecture)
    if name in EVERYWHERE:
        return BlockWeights(spec, architecture, (), rest=EVERYWHERE[name])
    if architecture.blocks is not None and name in architecture.blocks.presets:
        entries = tuple(Entry(label, 1.0) for label in architecture.blocks.presets[name])
        return BlockWeights(spec, architecture, entries, rest=0.0)
    near = get_close_matches(name, known, 1, 0.5)
    nearest = f"did you mean {near[0]}? " if near else ""
    raise UsageError(
        f"--blocks: no preset for {architecture.title} is called {spec!r}",
        hint=f"{nearest}known: {', '.join(known)}; else give a list of values or a .yaml file of patterns",
    )


def _from_list(spec: str, architecture: Architecture) -> BlockWeights:
    texts = [text.strip() for text in spec.split(",")]
    blocks = architecture.blocks
    if blocks is None:
        raise UsageError(
            f"--blocks: {architecture.title} has no list of blocks", hint="give patterns in a .yaml file instead"
        )
    labels = next((labels for labels in blocks.lists if len(labels) == len(texts)), None)
    if labels is None:
        orders = "; ".join(f"{len(labels)}: {runs(labels)}" for labels in blocks.lists)
        count = f"{len(texts)} value{'s' if len(texts) > 1 else ''}"
        raise UsageError(f"--blocks: {count} for {architecture.title}, which takes {orders}")
    entries: list[Entry[float]] = []
    for label, text in zip(labels, texts, strict=True):
        value = _number(text)
        if value is None:
            raise UsageError(f"--blocks: the value for {label} is no finite number: {text!r}")
        entries.append(Entry(label, value))
    left_out = tuple(label for label in blocks.labels if label not in labels)
    return BlockWeights(spec, architecture, tuple(entries), rest=0.0, left_out=left_out)


def _weight(value: Plain) -> float:
    number = _number(value) if isinstance(value, str) else None
    if number is None:
        shown = repr(value) if isinstance(value, str) else "a collection"
        raise UsageError(f"the weight is no finite number: {shown}")
    return number


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# -- patterns -------------------------------------------------------------------------------------------------------


def last_naming(entries: Sequence[Entry[Value]], target: Target, architecture: Architecture) -> Entry[Value] | None:
    """The last entry that names a target: the one that counts. None if none does."""
    label = block_label(target, architecture)
    return next((one for one in reversed(entries) if _names(one.pattern, target, label, architecture)), None)


def read_patterns(path: str, option: str, parse: Callable[[Plain], Value], hint: str) -> tuple[Entry[Value], ...]:
    """The entries of a YAML file in the order of its lines, which decides where two of them name one target.

    `parse` turns what stands behind a pattern into its value, or raises a UsageError, which gets file, line and pattern
    here. `hint` is what a file that holds no mapping should be.
    """
    import yaml

    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"{option}: cannot be read: {error.strerror}", file=path) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or "it is no text of that kind"
        raise UsageError(f"{line}is no YAML: {problem}", file=path) from error
    if not isinstance(root, yaml.MappingNode):
        raise UsageError("holds no mapping from patterns to values", file=path, hint=hint)
    # The nodes, not the dictionary: it would forget the lines, and the place of a pattern that is there twice.
    return tuple(_entry(path, key, value, parse) for key, value in root.value)


def _entry(path: str, key: yaml.Node, value: yaml.Node, parse: Callable[[Plain], Value]) -> Entry[Value]:
    line = key.start_mark.line + 1
    if not isinstance(key.value, str):
        raise UsageError(f"line {line}: a pattern is one text", file=path)
    try:
        return Entry(key.value, parse(_plain(value)), line)
    except UsageError as error:
        raise UsageError(f"line {line}: {error.message}", file=path, key=key.value, hint=error.hint) from None


def _plain(node: yaml.Node) -> Plain:
    """Texts only, one level deep: an alias that holds itself, or a thousandfold, goes no further."""
    import yaml

    if isinstance(node.value, str):
        return node.value
    if isinstance(node, yaml.MappingNode):
        pairs = {key.value: value.value for key, value in node.value if isinstance(key.value, str)}
        if len(pairs) == len(node.value) and all(isinstance(value, str) for value in pairs.values()):
            return pairs
    return None


def check_patterns(
    entries: Sequence[Entry[Any]], architecture: Architecture, modules: Sequence[Module], file: str | None
) -> None:
    """Raises UsageError for an entry that names no target of the architecture or, where it has no table, of `modules`
    (nothing is checked if there are none); with what comes nearest."""
    targets = [target for module in modules for target in module.targets]
    if not architecture.open:
        targets = list(_known_targets(architecture))
    if not targets:
        return
    labelled = [(target, block_label(target, architecture)) for target in targets]
    for entry in entries:
        if not any(_names(entry.pattern, target, label, architecture) for target, label in labelled):
            candidates = dict.fromkeys(label for _, label in labelled)
            candidates |= dict.fromkeys(prefix for target in targets for prefix in _prefixes(_full(target)))
            near = get_close_matches(entry.pattern, candidates, 1, 0.5)
            nearest = f"did you mean {near[0]!r}? " if near else ""
            whose = architecture.title if not architecture.open else "the file"
            line = f"line {entry.line}: " if entry.line else ""
            raise UsageError(
                f"{line}names no block and no module of {whose}",
                file=file,
                key=entry.pattern,
                hint=f"{nearest}a pattern is a block's label, or a component and a path: see `loratool blocks FILE`",
            )


def _prefixes(name: str) -> Iterator[str]:
    for dot in re.finditer(r"\.", name):
        yield name[: dot.start()]
    yield name


def _names(pattern: str, target: Target, label: str, architecture: Architecture) -> bool:
    """Whether a pattern is the block's label, the target's path, or a part of the model that the target is below."""
    if fnmatchcase(label, pattern):
        return True
    name = _full(target)
    if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*"):
        return True
    # A flattened name, whose dots nobody knows: its parts end at underscores, but the component's name does not.
    return architecture.open and "." not in target.path and "." in pattern and fnmatchcase(name, f"{pattern}_*")


# -- what a file holds ----------------------------------------------------------------------------------------------


def blocks_of(adapter: Adapter) -> BlockTable:
    """The blocks of a file with their norms, in float64. Reads every factor, one module at a time.

    A module over several blocks counts for the first one. Of a DoRA module the norm is that of its low-rank part; that
    of a family whose update depends on the weight is nan.
    """
    architecture = adapter.architecture
    blocks = architecture.blocks
    squares: dict[str, list[float]] = {label: [] for label in (blocks.labels if blocks else ())}
    names = _block_names(architecture) if blocks else {}
    present: dict[str, dict[str, None]] = {}
    for module in _in_model_order(adapter):
        label = block_label(module.targets[0], architecture)
        squares.setdefault(label, []).append(_squared_norm(module))
        for target in module.targets:
            name = next((name for name in names.get(label, ()) if _below(name, _full(target))), label)
            present.setdefault(label, {})[name] = None
    total = sum(square for part in squares.values() for square in part)
    found = []
    for label, part in squares.items():
        square = sum(part)
        share = square / total if total else 0.0
        here = tuple(present.get(label, ()))
        found.append(Block(label, names.get(label, here), here, len(part), math.sqrt(square), share))
    lists = blocks.lists if blocks else ()
    fitting = _fitting(lists, [block.label for block in found if block.modules])
    return BlockTable(adapter, tuple(found), lists, presets_of(architecture), fitting)


def places(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Label of every block that has modules -> their places in `adapter.modules`; the labels in model order.

    A module over several blocks counts for the first one. Reads nothing.
    """
    blocks = adapter.architecture.blocks
    at = {module: index for index, module in enumerate(map(id, adapter.modules))}
    found: dict[str, list[int]] = {label: [] for label in (blocks.labels if blocks else ())}
    for module in _in_model_order(adapter):
        found.setdefault(block_label(module.targets[0], adapter.architecture), []).append(at[id(module)])
    return {label: tuple(sorted(indices)) for label, indices in found.items() if indices}


def _fitting(lists: Sequence[tuple[str, ...]], needed: Sequence[str]) -> tuple[str, ...] | None:
    return min((labels for labels in lists if set(needed) <= set(labels)), key=len, default=None)


def _in_model_order(adapter: Adapter) -> Iterator[Module]:
    """By component and then by path, numbers in the order of numbers; only where no table says the order."""
    for component in adapter.components:
        yield from sorted(adapter.of(component), key=lambda module: _natural(module.targets[0].path))


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path) if part]


def _below(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


@cache
def _block_names(architecture: Architecture) -> Mapping[str, tuple[str, ...]]:
    """Label -> the shortest `component.path` prefixes below which all targets, and only those, are in that block."""
    labels: dict[str, set[str]] = {}
    of: list[tuple[str, str]] = []
    for target in _known_targets(architecture):
        label, name = block_label(target, architecture), _full(target)
        of.append((label, name))
        for prefix in _prefixes(name):
            labels.setdefault(prefix, set()).add(label)
    found: dict[str, dict[str, None]] = {}
    for label, name in of:
        shortest = next((prefix for prefix in _prefixes(name) if len(labels[prefix]) == 1), name)
        found.setdefault(label, {})[shortest] = None
    return {label: tuple(prefixes) for label, prefixes in found.items()}


def _squared_norm(module: Module) -> float:
    """||delta||_F^2. Of a pair from its r x r Gram matrices, so that no dense matrix is formed."""
    if not module.family.additive:
        return math.nan  # it depends on the weight
    pair = stored_pair(module)
    if pair is None:
        return float(module.delta().double().square().sum())
    left, right = pair
    gram = float(((left.T @ left) * (right @ right.T)).sum())
    # Rounding can make the trace of a vanishing update a tiny negative number; a NaN must stay one.
    return 0.0 if gram < 0 else gram * module.scale**2
