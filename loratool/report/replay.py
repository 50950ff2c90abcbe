"""`loratool replay` as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loratool import __version__
from loratool.ops.recipe import file_name
from loratool.ops.replay import Needed, ReplayReport
from loratool.report.inert import inert
from loratool.report.units import plural

if TYPE_CHECKING:
    from rich.console import Console

_NAMED = 6


def as_json(report: ReplayReport) -> dict[str, Any]:
    """The documented schema of `--json` (docs/json.md)."""
    data = asdict(report)
    comparison = data.pop("comparison")
    if comparison["error"] is not None and not math.isfinite(comparison["error"]):
        comparison["error"] = None  # JSON has no NaN
    return {**data, **comparison, "seconds": round(report.seconds, 3)}


def show(report: ReplayReport, console: Console) -> None:
    """What was made again, from what, and whether it is the same."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=8)
    table.add_column(overflow="fold")
    for title, text, style in (*_made(report), *_result(report)):
        table.add_row(title, Text(text, style=style))
    console.print(table)


Facts = Iterator[tuple[str, str, str]]
"""Title, text and style of a line."""


def _made(report: ReplayReport) -> Facts:
    yield "recipe", inert(report.source, 200), ""
    what = [f"{key} {_plain(value)}" for key, value in report.settings.items() if key not in ("base", "title")]
    yield "", inert(", ".join([report.command, *what]), 300), ""
    for title, one in [*(("input", one) for one in report.inputs), ("base", report.base)]:
        if one is not None:
            yield title, _found(one), ""
    if report.version != __version__:
        text = f"written by loratool {inert(report.version, 40)}, this is {__version__}: results may differ"
        yield "version", text, "yellow"
    for note in report.notes:
        yield "note", inert(note), "yellow"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_plain(inner)}" for key, inner in value.items()) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _found(one: Needed) -> str:
    path = one.path or ""
    renamed = "" if file_name(path) == one.name else f" (then {inert(one.name, 100)}; the same sha256)"
    return f"{inert(path, 200)}{renamed}"


def _result(report: ReplayReport) -> Facts:
    found = report.comparison
    if report.output is not None:
        yield "wrote", inert(report.output, 200), ""
    if found.result == "identical":
        yield "result", "identical, bit for bit", "green"
        return
    if found.result == "header":
        yield "result", "the same tensors, but another header or form", "yellow"
    else:
        yield "result", f"different: {plural(found.tensors, 'tensor')}, {_difference(found.error)}", "red"
        if found.worst_module is not None:
            yield "", f"in {inert(found.worst_module, 200)}", "red"
    if found.entries:
        more = f", +{len(found.entries) - _NAMED} more" if len(found.entries) > _NAMED else ""
        names = ", ".join(inert(name, 120) for name in found.entries[:_NAMED])
        yield "differ", f"{names}{more}", "yellow"


def _difference(error: float | None) -> str:
    if error is None or math.isnan(error):
        return "which cannot be compared as updates"
    return f"largest relative difference of an update {error:.2g}" if error else "no update differs"
