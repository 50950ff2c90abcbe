"""`loratool unbake` as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loratool.report.inert import inert
from loratool.report.units import few, plural, short, size

if TYPE_CHECKING:
    from rich.console import Console

    from loratool.ops.unbake_file import UnbakeReport


def as_json(report: UnbakeReport) -> dict[str, Any]:
    """The documented schema of `--json` (docs/json.md)."""
    return {**asdict(report), "seconds": round(report.seconds, 3)}


def show(report: UnbakeReport, console: Console) -> None:
    """What was taken out of what, and how exact the result is."""
    from loratool.report.lines import facts

    console.print(facts(_rows(report)))


def _rows(report: UnbakeReport) -> Iterator[tuple[str, str, str]]:
    yield "baked", inert(report.baked, 200), ""
    yield "without", few((inert(name, 200) for name in report.adapters), 5), ""
    yield "wrote", inert(report.output, 200), ""
    speed = f", {size(int(report.size / report.seconds))}/s" if report.seconds else ""
    changed = plural(report.tensors, "tensor")
    yield "", f"{size(report.size)} in {report.seconds:.1f} s{speed}; {changed} changed", ""
    if report.exact:
        yield "exact", "the base again, bit for bit", "green"
        for name, digest in report.files.items():
            yield "sha256", digest + (f"  {inert(name, 100)}" if name else ""), ""
    else:
        share = f"About {report.doubtful or 0:.2%} of the changed values may be off in their last places"
        text = f"approximate: what rounding took is lost. {share}, a relative error of {short(report.error or 0)}"
        yield "result", f"{text}. Only bake --undo gives the base back bit for bit", "yellow"
    for note in report.notes:
        yield "note", inert(note), "yellow"
