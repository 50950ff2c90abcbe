"""Lines and tables for people: what stays together on a line, names that fit a column, no blanks at line ends."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.containers import Lines
from rich.measure import Measurement
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

_GLUE = "\ue000"
"""A blank that no line ends at, until the lines are made. `inert` escapes it in what comes from a file."""

_UNIT = re.compile(r"(?<=\d) (?=[A-Za-z])|(?<=\brank) (?=\d)|(?<=\berror) (?=\d)")
"""The blanks between a number and its unit, and between a word and its number."""

_LEAST = 12
"""Columns that a shortened name keeps at least."""


class Told(Text):
    """Text whose lines never end between a number and its unit, or where `glued` left a mark.

    It belongs into a table or a `Padding`: a console makes plain text of what it prints itself.
    """

    def wrap(self, console: Console, width: int, **options: Any) -> Lines:
        """The lines of that width."""
        whole = self.copy()
        whole.plain = _UNIT.sub(_GLUE, self.plain)
        lines = whole.wrap(console, width, **options)
        for line in lines:
            line.plain = line.plain.replace(_GLUE, " ")
        return lines


def glued(text: str) -> str:
    """Text for `Told` that stays on one line."""
    return text.replace(" ", _GLUE)


class Name:
    """A module's name in a table: shortened to what the column has room for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(shortened(self.name, options.max_width), no_wrap=True, overflow="crop")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = cell_len(self.name)
        return Measurement(min(width, _LEAST), width)


def shortened(name: str, width: int) -> str:
    """`name` in at most `width` cells, with `...` inside its longest words.

    Its first and last part and its numbers, which tell modules apart, stay as long as that is possible.
    """
    if cell_len(name) <= width:
        return name
    runs = [list(parts) for _, parts in groupby(name.split("."), str.isdigit)]
    texts = [".".join(run) for run in runs]
    if len(runs) == 1:
        return _cut(name, width)
    heads, tails = texts[0].partition("."), texts[-1].rpartition(".")
    first, last = heads[0] + heads[1], tails[1] + tails[2]
    texts[0], texts[-1] = heads[2], tails[0]
    over = cell_len(name) - width
    for index in sorted(range(len(texts)), key=lambda index: -len(texts[index])):
        if over > 0 and len(texts[index]) > len("x...x"):
            short = _cut(texts[index], max(len("x...x"), len(texts[index]) - over))
            over -= cell_len(texts[index]) - cell_len(short)
            texts[index] = short
    return _cut(f"{first}{'.'.join(texts)}{last}", width)


def _cut(text: str, width: int) -> str:
    """The two ends of a text, where it is wider than that."""
    if cell_len(text) <= width:
        return text
    for room in range(width - 3, 0, -1):  # the first one fits, unless characters are wide
        short = f"{text[: room // 2]}...{text[len(text) - (room - room // 2) :]}"
        if cell_len(short) <= width:
            return short
    return "..."[:width]


def facts(rows: Iterable[tuple[str, str, str]], width: int = 8) -> Table:
    """Lines of a title, a text and the text's style; titles take `width` columns at least."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=width)
    table.add_column(overflow="fold")
    for title, text, style in rows:
        table.add_row(title, Told(text, style=style))
    return table


def numbers(first: str, *titles: str) -> Table:
    """A table whose first column has names and whose others are numbers."""
    table = Table(box=None, padding=(0, 0, 0, 2), header_style="dim")
    table.add_column(first, overflow="fold")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


class Trimmed(RenderHook):
    """Takes the blanks off the ends of all lines that a console prints."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Each of them, trimmed."""
        return [_Trimmed(one) for one in renderables]


class _Trimmed:
    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments: list[Segment] = []
        for line in Segment.split_lines(console.render(self._inner, options)):
            segments += [*_trimmed(line), Segment.line()]
        yield Segments(segments)


def _trimmed(line: list[Segment]) -> list[Segment]:
    while line and not line[-1].control:
        text, style, _ = line[-1]
        if text.rstrip():
            return [*line[:-1], Segment(text.rstrip(), style)]
        line = line[:-1]
    return line
