"""Flatten: nested dicts and lists of a pickle as one name per tensor, with what else they hold told apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratool.core.errors import FormatError, few
from loratool.files.torch_names import Rebuilt
from loratool.files.unpickle import MAX_STEPS, Global, Table

MAX_DEPTH = 64
MAX_LETTERS = 32 << 20
"""Letters of all names and values: 18,000 tensors take a tenth of it."""

WRAPPER = "state_dict"
"""The entry in which Lightning keeps the weights: left out of their names."""

_SHOWN = 80
_DAMAGED = "the file is damaged or was made to do harm"


@dataclass
class Flat:
    """Tensors by name, in the order of the file, simple values as text, and where there was something else."""

    tensors: dict[str, Rebuilt] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def flatten(root: Any) -> Flat:
    """The tensors and values of a pickle's object. Names are the keys of nested dicts and positions in lists, joined
    by dots.

    Raises FormatError for objects that hold themselves, are nested too deep, or repeat parts until they are too
    many, and for two tensors of one name.
    """
    walk = _Walk(Flat(), set())
    if type(root) is Table:
        for key, value in root.pairs:
            wrapped = key == WRAPPER and type(key) is str and _holds_tensors(value)
            walk.visit(value, "" if wrapped else name_of(key), 1)
        walk.state(root, "")
    else:
        walk.visit(root, "", 0)
    return walk.found


def left_out(names: Sequence[str]) -> tuple[str, ...]:
    """The note about values that safetensors has no place for; none where there are none."""
    names = [name if len(name) <= _SHOWN else name[:_SHOWN] + "..." for name in dict.fromkeys(names)]
    if not names:
        return ()
    what = "1 value" if len(names) == 1 else f"{len(names)} values"
    return (f"a PyTorch file: {what} beside the tensors left out, safetensors has no place for it ({few(names)})",)


def name_of(key: Any) -> str:
    """A key of a dict as a part of a name. What is no text, number or class has none of its own."""
    if type(key) in (str, int, float, bool):
        return str(key)
    return key.name if type(key) is Global else f"<{type(key).__name__}>"


def _holds_tensors(value: Any) -> bool:
    return type(value) is Table and any(type(one) is Rebuilt for _, one in value.pairs)


@dataclass
class _Walk:
    """One walk through an object: `above` are the containers around the one that is visited, by identity."""

    found: Flat
    above: set[int]
    visited: int = 0
    letters: int = 0

    def visit(self, value: Any, name: str, depth: int, in_list: bool = False) -> None:
        self.visited += 1
        self.letters += len(name) + (len(value) if type(value) is str else 0)
        if self.visited > MAX_STEPS or self.letters > MAX_LETTERS:
            raise FormatError(f"unfolds into more than {MAX_STEPS} values", hint=_DAMAGED)
        if type(value) is Rebuilt:
            self.put(self.found.tensors, name, value)
        elif type(value) in (Table, list, tuple):
            self.inside(value, name, depth)
        elif type(value) in (str, int, float, bool) and name and not in_list:
            self.put(self.found.metadata, name, str(value))
        else:
            self.found.dropped.append(name.rpartition(".")[0] if in_list else name)

    def inside(self, value: Any, name: str, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise FormatError(f"is nested more than {MAX_DEPTH} deep", hint=_DAMAGED)
        if id(value) in self.above:
            raise FormatError("holds itself", key=name or None, hint=_DAMAGED)
        self.above.add(id(value))
        for part, one in _parts(value):
            self.visit(one, f"{name}.{part}" if name else part, depth + 1, type(value) is not Table)
        self.above.remove(id(value))
        if type(value) is Table:
            self.state(value, name)

    def state(self, table: Table, name: str) -> None:
        """What was set on a dict beside its entries, such as the versions of a model's modules."""
        if table.state is None:
            return
        parts = list(_parts(table.state)) or [("state", None)]
        for part, value in parts:
            full = f"{name}.{part}" if name else part
            if type(value) is Rebuilt:
                self.put(self.found.tensors, full, value)
            else:
                self.found.dropped.append(full)

    def put(self, where: dict[str, Any], name: str, value: Any) -> None:
        if name in where:
            raise FormatError("stands twice in the file", key=name, hint="two entries have one name: rename one")
        where[name] = value


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    pairs: Iterable[tuple[Any, Any]] = ()
    if type(value) is Table:
        pairs = value.pairs
    elif type(value) in (list, tuple):
        pairs = enumerate(value)
    return ((name_of(key), one) for key, one in pairs)
