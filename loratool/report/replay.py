"""`loratool replay` as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loratool import __version__
from loratool.core.registry import methods
from loratool.ops.recipe import file_name
from loratool.ops.replay import Needed, ReplayReport
from loratool.report.inert import inert
from loratool.report.units import few, plural

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
    from loratool.report.lines import facts

    console.print(facts([*_made(report), *_result(report)]))


Facts = Iterator[tuple[str, str, str]]
"""Title, text and style of a line."""


def _made(report: ReplayReport) -> Facts:
    yield "recipe", inert(report.source, 200), ""
    yield "", inert(", ".join([report.command, *_settings(report.settings)]), 300), ""
    for title, one in [*(("input", one) for one in report.inputs), ("base", report.base)]:
        if one is not None:
            yield title, _found(one), ""
    if report.version != __version__:
        text = f"written by loratool {inert(report.version, 40)}, this is {__version__}: results may differ"
        yield "version", text, "yellow"
    for note in report.notes:
        yield "note", inert(note), "yellow"


def _settings(settings: Mapping[str, Any]) -> Iterator[str]:
    """What was asked for, without what is so anyway."""
    for key, value in settings.items():
        name = key.replace("_", " ")
        if key in ("base", "title") or (key, value) == ("metadata", "first"):
            continue  # a base has a line of its own, a title is the name of the file
        if key == "rule":
            yield str(value)
        elif key == "options":
            yield from _options(str(settings.get("method")), value)
        else:
            yield name if value is True else f"{name} {_plain(value)}"


def _options(method: str, options: Mapping[str, Any]) -> Iterator[str]:
    known = methods().get(method)
    for name, value in options.items():
        option = known.options.get(name) if known is not None else None
        if option is None or option.default != value:
            yield f"{name} {_plain(value)}"


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
        yield "differ", few((inert(name, 120) for name in found.entries), _NAMED), "yellow"


def _difference(error: float | None) -> str:
    if error is None or math.isnan(error):
        return "which cannot be compared as updates"
    return f"largest relative difference of an update {error:.2g}" if error else "no update differs"
