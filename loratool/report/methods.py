"""`loratool merge --list-methods` as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratool.core.method import Method, Option

if TYPE_CHECKING:
    from rich.console import Console

_INDENT = 4


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
    """For each method what it is called, for whom it is, and its options with their defaults."""
    from rich.padding import Padding
    from rich.text import Text

    from loratool.report.lines import Told, glued

    width = max(len(method.id) for method in methods)
    for index, method in enumerate(methods):
        if index:
            console.print()
        console.print(Text.assemble((f"{method.id:{width}}", "bold"), f"  {method.title}"))
        console.print(Padding(Text(method.when), (0, 0, 0, _INDENT)))
        if method.options:
            options = "  ".join(glued(_option(option)) for option in method.options.values())
            console.print(Padding(Told(options, "dim"), (0, 0, 0, _INDENT)))


def _option(option: Option) -> str:
    """`--density 1.0`, `--normalize on`."""
    default = option.default
    return f"{option.flag} {('on' if default else 'off') if isinstance(default, bool) else default}"
