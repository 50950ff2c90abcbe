"""`loratool bases` as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loratool.ops.bases import NONE_FOUND, Added, Listed, Listing, Looked, Skipped
from loratool.ops.known_models import models
from loratool.report.inert import inert
from loratool.report.units import plural, size

if TYPE_CHECKING:
    from rich.console import Console

_LONGEST_NAME = 30
_LONGEST_PATH = 300
_MOST_SKIPPED = 10


def as_json(listing: Listing) -> dict[str, Any]:
    """The documented schema of `--json` (docs/json.md)."""
    data = asdict(listing)
    return {**data, "files": [_without(one, "problem") for one in data["files"]]}


def added_as_json(added: Added) -> dict[str, Any]:
    """The documented schema of `add --json` (docs/json.md)."""
    return asdict(added)


def _without(data: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != key}


def show_added(added: Added, console: Console) -> None:
    """What the name means now."""
    from loratool.report.lines import facts

    rows = [
        (inert(added.name, _LONGEST_NAME), inert(added.path, _LONGEST_PATH), ""),
        ("", f"{_model(added.architecture)}, {size(added.size)}", ""),
    ]
    if added.replaced is not None:
        rows.append(("before", inert(added.replaced, _LONGEST_PATH), ""))
    rows.append(("config", inert(added.config, _LONGEST_PATH), ""))
    console.print(facts(rows))


def show(listing: Listing, console: Console) -> None:
    """The names and what they lead to, the other files, and where all this was looked for."""
    from rich.text import Text

    from loratool.report.lines import facts

    console.print(facts(_names(listing.names)))
    others = _others(listing)
    if others:
        console.print()
        console.print(Text("other files, by their own names", "dim"))
        console.print(_files(others))
    console.print()
    console.print(Text("looked in, with the number of checkpoints of known models", "dim"))
    console.print(_places(listing))
    if listing.skipped:
        console.print()
        console.print(Text(f"{plural(len(listing.skipped), 'file')} of no known model", "dim"))
        console.print(_skipped(listing.skipped))
    for note in listing.notes:
        console.print()
        console.print(Text(f"note: {inert(note, _LONGEST_PATH)}", "yellow"))
    if any(one.problem for one in listing.names):
        console.print()
        console.print(Text("to name one:", "dim"))
        console.print(Text("loratool bases add NAME PATH", "bold"), soft_wrap=True)


Facts = Iterator[tuple[str, str, str]]
"""Title, text and style of a line."""


def _names(names: Iterable[Listed]) -> Facts:
    """Every name that leads somewhere, or should; those of models of which there is nothing in one line."""
    names = list(names)
    nothing = [one for one in names if one.problem == NONE_FOUND and one.source is None and one.path is None]
    for one in names:
        if one in nothing:
            continue
        title = inert(one.name, _LONGEST_NAME)
        if one.problem is not None:
            problem = one.problem if one.source is None else f"{one.problem} ({one.source})"
            yield title, inert(problem, _LONGEST_PATH), "yellow" if one.source or "pick" in problem else "dim"
        else:
            yield title, f"{_model(one.architecture)}, {size(one.size or 0)} ({one.source})", ""
        if one.path is not None:
            yield "", inert(one.path, _LONGEST_PATH), ""
    if nothing:
        yield NONE_FOUND, ", ".join(inert(one.name, _LONGEST_NAME) for one in nothing), "dim"


def _model(architecture: str | None) -> str:
    return "a model without a table" if architecture is None else models()[architecture].title


def _others(listing: Listing) -> list[Listed]:
    """The files that no name leads to."""
    named = {one.path for one in listing.names}
    return [one for one in listing.files if one.path not in named]


def _files(files: Sequence[Listed]) -> Any:
    from rich.text import Text

    from loratool.report.lines import Name, numbers

    table = numbers("name", "model", "size", "in")
    for one in files:
        cells = (one.architecture or "-", size(one.size or 0), one.source or "-")
        table.add_row(Name(inert(one.name, _LONGEST_PATH)), *map(Text, cells))
    return table


def _places(listing: Listing) -> Any:
    """Places that are there first, then in one line those that are not."""
    from loratool.report.lines import facts

    rows = [("config", _place(listing.config, listing.config_exists), "" if listing.config_exists else "dim")]
    rows += [(f"{one.checkpoints:,}", _there(one), "") for one in listing.places if one.exists]
    missing = [inert(one.path, _LONGEST_PATH) for one in listing.places if not one.exists]
    if missing:
        rows.append(("missing", ", ".join(missing), "dim"))
    return facts(rows)


def _place(path: str, exists: bool) -> str:
    return f"{inert(path, _LONGEST_PATH)}{'' if exists else ' (does not exist)'}"


def _there(one: Looked) -> str:
    return f"{inert(one.path, _LONGEST_PATH)} ({one.source})"


def _skipped(skipped: Sequence[Skipped]) -> Any:
    from loratool.report.lines import facts

    rows = []
    for one in skipped[:_MOST_SKIPPED]:
        rows += [("", f"{inert(one.path, _LONGEST_PATH)}: {inert(one.reason, _LONGEST_PATH)}", "dim")]
    if len(skipped) > _MOST_SKIPPED:
        rows.append(("", f"and {len(skipped) - _MOST_SKIPPED} more: see --json", "dim"))
    return facts(rows, width=0)
