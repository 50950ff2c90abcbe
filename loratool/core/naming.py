"""Naming: a bijection between the names of one program's modules and tuples of targets."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

from loratool.core.target import Target


class Home(NamedTuple):
    """Where the rows of a target live in a checkpoint that speaks one naming.

    `tensor_key` is relative to the checkpoint's prefix. `transposed` says that the tensor is stored
    as `(in, out)`: the rows of the target are then its columns. `pointwise` says that a linear is
    stored as a 1x1 convolution, `(out, in, 1, 1)`.
    """

    name: str
    first_row: int
    tensor_key: str
    transposed: bool
    pointwise: bool = False


class Naming(Mapping[str, tuple[Target, ...]]):
    """One component's names in one program's spelling: dotted name -> the targets it holds, in row order.

    `tensor_keys` gives the checkpoint key of a name where it is not `name + ".weight"`; `transposed`
    the names whose tensor is stored as `(in, out)`, `pointwise` those of linears that are stored as
    1x1 convolutions. It is checked to be
    a bijection when it is first asked in the other direction: `ValueError` when a target has two names.
    """

    def __init__(
        self,
        table: Mapping[str, tuple[Target, ...]],
        tensor_keys: Mapping[str, str] | None = None,
        transposed: frozenset[str] = frozenset(),
        pointwise: frozenset[str] = frozenset(),
    ) -> None:
        self._table = dict(table)
        self._tensor_keys = dict(tensor_keys or {})
        self._transposed = transposed
        self._pointwise = pointwise
        self._spellings: dict[str, dict[str, tuple[str, ...]]] = {}
        self._kinds: dict[str, dict[str, list[str]]] = {}

    def __getitem__(self, name: str) -> tuple[Target, ...]:
        return self._table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def name_of(self, targets: tuple[Target, ...]) -> str | None:
        """The name of exactly these targets in this order, or None."""
        return self._names.get(targets)

    def spelled(self, text: str, separator: str) -> Sequence[str]:
        """The names that read `text` when their dots are written as `separator`."""
        if separator == ".":
            return (text,) if text in self._table else ()
        index = self._spellings.get(separator)
        if index is None:
            spelled = _changed(self._table, lambda text: text.replace(".", separator))
            index = dict(zip(spelled, zip(self._table, strict=False), strict=True))
            if len(index) < len(self._table):  # names that read alike
                found: dict[str, list[str]] = {}
                for name, alike in zip(self._table, spelled, strict=True):
                    found.setdefault(alike, []).append(name)
                index = {alike: tuple(names) for alike, names in found.items()}
            self._spellings[separator] = index
        return index.get(text, ())

    def alike(self, of_kind: str, separator: str) -> Sequence[str]:
        """The names of one `kind`, when their dots are written as `separator`: one of each shape."""
        index = self._kinds.get(separator)
        if index is None:
            index = self._kinds[separator] = {}
            kinds = _changed(self._table, lambda text: _NUMBER.sub("#", text).replace(".", separator))
            for name, spelled in zip(self._table, kinds, strict=True):
                names = index.get(spelled)
                if names is None:
                    index[spelled] = [name]
                else:
                    names.append(name)
        found = index.get(of_kind, ())
        if len(found) < 2:
            return found
        shapes: dict[tuple[int, ...], str] = {}
        for name in found:
            shapes.setdefault(self._shape(name), name)
        return tuple(shapes.values())

    def _shape(self, name: str) -> tuple[int, ...]:
        first, *rest = self._table[name]
        return (first.rows + sum([target.rows for target in rest]), *first.shape[1:])

    @cached_property
    def _names(self) -> dict[tuple[Target, ...], str]:
        names = {targets: name for name, targets in self._table.items()}
        if len(names) != len(self._table):
            raise ValueError("a tuple of targets has two names")
        return names

    @cached_property
    def _homes(self) -> dict[Target, Home]:
        homes: dict[Target, Home] = {}
        for name, targets in self._table.items():
            row = 0
            for target in targets:
                if target in homes:
                    raise ValueError(f"{target.path} is named by {homes[target].name} and by {name}")
                key = self._tensor_keys.get(name, f"{name}.weight")
                homes[target] = Home(name, row, key, name in self._transposed, name in self._pointwise)
                row += target.rows
        return homes

    @property
    def targets(self) -> frozenset[Target]:
        """Every target this naming has a name for."""
        return frozenset(self._homes)

    def home(self, target: Target) -> Home:
        """The name and the first row (of the standard model) at which `target` lives; KeyError if it has none."""
        return self._homes[target]


_NUMBER = re.compile(r"\d+")


@lru_cache(maxsize=1 << 15)
def kind(name: str) -> str:
    """A name with `#` for every number in it: what the names of alike blocks have in common."""
    return _NUMBER.sub("#", name)


def _changed(names: Collection[str], change: Callable[[str], str]) -> list[str]:
    """`change` of each name: of all in one text, a line each, which is faster by far; else of one after another."""
    found = change("\n".join(names)).split("\n")
    return found if len(found) == len(names) else [change(name) for name in names]
