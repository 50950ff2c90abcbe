"""`loratool merge --list-methods` as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratool.core.method import Method, Option

if TYPE_CHECKING:
    from rich.console import Console


def as_json(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """The documented schema of `--list-methods --json` (docs/json.md)."""
    return [
        {
            "id": method.id,
            "title": method.title,
            "when": method.when,
            "formula": method.formula,
            "source": method.source,
            "options": {option.flag: option.default for option in method.options.values()},
            "inputs": list(method.inputs),
            "symmetric": method.symmetric,
            "exact": method.exact,
        }
        for method in methods
    ]


def show(methods: Sequence[Method], console: Console) -> None:
    """A row for each method: what it is called, for whom it is, its options with their defaults."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("method", no_wrap=True)
    table.add_column("title", overflow="fold", ratio=2)
    table.add_column("when", overflow="fold", ratio=4)
    table.add_column("options", overflow="fold", ratio=2)
    for method in methods:
        options = "\n".join(map(_option, method.options.values()))
        table.add_row(
            Text(method.id, "bold"), method.title, method.when, Text(options or "none", "" if options else "dim")
        )
    console.print(table)


def _option(option: Option) -> str:
    """`--density 1.0`, `--normalize on`."""
    default = option.default
    return f"{option.flag} {('on' if default else 'off') if isinstance(default, bool) else default}"
