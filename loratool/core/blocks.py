"""Blocks: which part of a model a name belongs to, under the labels that block weights are given by. Plain tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple


class Span(NamedTuple):
    """Names of one component, in one naming, that begin with `prefix`: they are in the block `label`.

    `{}` in `label` stands for the number that follows the prefix, in two digits.
    """

    component: str
    naming: str
    prefix: str
    label: str

    def label_of(self, name: str) -> str | None:
        """The label of `name`, or None if it is not in this span."""
        if not name.startswith(self.prefix):
            return None
        if "{}" not in self.label:
            return self.label
        number = name[len(self.prefix) :].partition(".")[0]
        return self.label.format(number.zfill(2)) if number.isdigit() else None


class Blocks(NamedTuple):
    """The blocks of one model. `labels` are in model order; the first span that knows a name decides.

    `lists` are the accepted lists of values, each as the labels its values are for; a list may name labels that only
    other models have. `presets` are the labels that a preset keeps; all other blocks it turns off.
    """

    labels: tuple[str, ...]
    spans: tuple[Span, ...]
    lists: tuple[tuple[str, ...], ...]
    presets: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def naming(self, component: str) -> str:
        """The naming that the blocks of a component are told by; KeyError if it has none."""
        for span in self.spans:
            if span.component == component:
                return span.naming
        raise KeyError(component)

    def label_of(self, component: str, name: str) -> str:
        """The label of a name in `naming(component)`; KeyError if no span knows it."""
        for span in self.spans:
            if span.component == component and (label := span.label_of(name)) is not None:
                return label
        raise KeyError(f"{component}.{name}")


def numbered(letters: str, first: int, last: int) -> tuple[str, ...]:
    """`IN00` to `IN11`, say: both ends included."""
    return tuple(f"{letters}{number:02d}" for number in range(first, last + 1))


def runs(labels: Sequence[str]) -> str:
    """Labels in their order, three or more neighbours as `IN00-IN11`."""
    found: list[list[str]] = []
    for label in labels:
        if found and _follows(found[-1][-1], label):
            found[-1].append(label)
        else:
            found.append([label])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(run) for run in found)


def _follows(label: str, other: str) -> bool:
    one, two = (re.fullmatch(r"(\D+)(\d+)", text) for text in (label, other))
    return bool(one and two and one[1] == two[1] and int(two[2]) == int(one[2]) + 1)
