"""Naming: a bijection between the names of one program's modules and tuples of targets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        self._spellings: dict[str, dict[str, list[str]]] = {}
        self._kinds: dict[str, Mapping[str, Sequence[str]]] = {}

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
        if separator not in self._spellings:
            index: dict[str, list[str]] = {}
            for name in self._table:
                index.setdefault(name.replace(".", separator), []).append(name)
            self._spellings[separator] = index
        return self._spellings[separator].get(text, ())

    def kinds(self, separator: str) -> Mapping[str, Sequence[str]]:
        """Kind of name, dots written as `separator` -> names of that kind, one of each shape."""
        found = self._kinds.get(separator)
        if found is None:
            index: dict[str, dict[tuple[int, ...], str]] = {}
            for of_kind, names in self._by_kind.items():
                spelled = of_kind.replace(".", separator)
                index[spelled] = {**names, **index[spelled]} if spelled in index else names
            found = self._kinds[separator] = {of_kind: tuple(names.values()) for of_kind, names in index.items()}
        return found

    @cached_property
    def _by_kind(self) -> Mapping[str, dict[tuple[int, ...], str]]:
        """Kind of name -> shape -> a name."""
        index: dict[str, dict[tuple[int, ...], str]] = {}
        for (name, targets), of_kind in zip(self._table.items(), kinds_of(self._table), strict=True):
            shape = targets[0].shape
            if len(targets) > 1:
                shape = (sum([target.shape[0] for target in targets]), *shape[1:])
            names = index.get(of_kind)
            if names is None:
                index[of_kind] = {shape: name}
            else:
                names.setdefault(shape, name)
        return index

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


def kinds_of(names: Iterable[str]) -> list[str]:
    """The kind of each of a table's names, which hold no line breaks: in one step for all of them."""
    return _NUMBER.sub("#", "\n".join(names)).split("\n")
