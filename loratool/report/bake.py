"""`loratool bake` as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from math import prod
from typing import TYPE_CHECKING, Any

from loratool.core.tensor import DTYPES
from loratool.ops.bake_report import LOW, Baked, BakeReport
from loratool.ops.sites import Unmatched
from loratool.report.inert import inert
from loratool.report.units import few, plural, size

if TYPE_CHECKING:
    from rich.console import Console

Facts = Iterator[tuple[str, str, str]]
"""Title, text and style of a line."""

_TITLES = 9
_NAMED = 3


def as_json(report: BakeReport, tensors: bool = False) -> dict[str, Any]:
    """The documented schema of `--json` (docs/json.md); with `tensors` also every tensor that was changed."""
    data = asdict(report)
    changed = data.pop("tensors")
    data["seconds"] = round(report.seconds, 3)
    return {**data, "tensors": len(changed), **({"tensor_list": changed} if tensors else {})}


def show(report: BakeReport, console: Console, tensors: bool = False) -> None:
    """What was read and written, what became of each component, and what is worth knowing."""
    from loratool.report.lines import facts

    console.print(facts([*_inputs(report), *_output(report)], _TITLES))
    if report.components:  # else all was only cast
        console.print()
        _components(report, console)
    remarks = list(_remarks(report))
    if remarks:
        console.print()
        console.print(facts(remarks, _TITLES))
    if tensors:
        console.print()
        _tensors(report, console)


def _inputs(report: BakeReport) -> Facts:
    yield "base", inert(report.base, 200), ""
    yield "", inert(report.architecture_title, 80), ""
    for one in report.adapters:
        yield "adds", inert(one.path, 200), ""
        yield "", _about(one), ""


def _about(one: Baked) -> str:
    blocks = f", blocks {inert(one.blocks, 60)}" if one.blocks else ""
    modules = plural(one.modules, "module")
    if one.matched != one.modules:
        modules = f"{one.matched:,} of {modules}"
    dora = f", {one.dora:,} with DoRA" if one.dora else ""
    return f"strength {one.strength:g}{blocks}, {one.layout}, {modules}{dora}"


def _output(report: BakeReport) -> Facts:
    if report.output is None:
        yield "output", "not written (--dry-run)", "yellow"
        host, gpu = report.memory["host"], report.memory["device"]
        yield "memory", f"about {size(host)}" + (f", and {size(gpu)} on each GPU" if gpu else ""), ""
    else:
        yield "wrote", inert(report.output, 200), ""
        speed = f", {size(int(report.size / report.seconds))}/s" if report.seconds else ""
        yield "", f"{size(report.size)} in {report.seconds:.1f} s{speed}", ""
    changed = sum(prod(one.shape) * DTYPES[one.dtype] // 8 for one in report.tensors)
    count = plural(len(report.tensors), "tensor")
    yield "changed", f"{count}, {size(changed)}; {size(report.untouched)} keep their bytes", ""
    if report.linked or report.copied:
        yield "", f"other files: {report.linked:,} linked, {report.copied:,} copied", ""
    if report.dtype is not None:
        but = " but vectors and scales" if report.dtype.startswith("F8") else ""
        yield "dtype", f"all weights{but} are {report.dtype} now", ""
    if report.format is not None:
        yield "format", f"spelled as {report.format}", ""
    if report.rounding != "nearest":
        yield "rounding", f"{report.rounding}, seed {report.seed}", ""
    if report.undo is not None:
        yield "undo", f"{inert(report.undo, 200)}, {size(report.undo_size or 0)}", ""
    if report.output is not None:
        yield from _checked(report)


def _checked(report: BakeReport) -> Facts:
    found = report.checked
    if found is None:
        yield "verified", "no (--no-verify)", "yellow"
        return
    rows = f"{plural(found.rows, 'random row')} of {plural(found.tensors, 'tensor')} as computed in float64"
    same = f"{size(found.bytes)} compared, all the same; " if found.bytes else ""  # none: everything was cast
    yield "verified", f"{same}{rows}, off by {found.worst:.2f} ulp at most", "green"


def _components(report: BakeReport, console: Console) -> None:
    from rich.text import Text

    from loratool.report.lines import numbers

    done = any(one.survived is not None for one in report.components)
    table = numbers("component", "tensors", "size", *(["update that survived rounding"] if done else []))
    for one in report.components:
        share = "" if one.survived is None else f"{one.survived:.2%}"
        style = "yellow" if one.survived is not None and one.survived < LOW else ""
        cells = [f"{one.tensors:,}", size(one.bytes), *([share] if done else [])]
        table.add_row(Text(inert(one.component, 40) or "model"), *cells, style=style)
    console.print(table)


def _remarks(report: BakeReport) -> Facts:
    low = [one.component or "model" for one in report.components if one.survived is not None and one.survived < LOW]
    if low:
        text = f"{few(map(inert, low))}: less than {LOW:.0%} of the update survived rounding to this dtype"
        more = (
            "--dtype with more bits"
            if report.rounding == "stochastic"
            else "--rounding stochastic, or more bits by --dtype"
        )
        yield "warning", f"{text}; use {more}", "yellow"
    if report.unmatched:
        names = few(map(_unmatched, report.unmatched), _NAMED)
        yield "left out", f"{plural(len(report.unmatched), 'part')} without a place: {names}", "yellow"
    for note in report.notes:
        yield "note", inert(note), "yellow"


def _unmatched(one: Unmatched) -> str:
    nearest = f"; nearest: {inert(one.nearest, 100)}" if one.nearest else ""
    return f"{inert(one.title, 100)} ({inert(one.reason, 100)}{nearest})"


def _tensors(report: BakeReport, console: Console) -> None:
    from loratool.report.lines import Name, numbers

    table = numbers("tensor", "dtype", "shape", "survived")
    for one in report.tensors:
        shape = "x".join(map(str, one.shape))
        share = "" if one.survived is None else f"{one.survived:.2%}"
        table.add_row(Name(inert(one.key, 200)), one.dtype, shape, share)
    console.print(table)
