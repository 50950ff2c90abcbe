"""`loratool fix` as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loratool.report.inert import inert
from loratool.report.units import size

if TYPE_CHECKING:
    from rich.console import Console

    from loratool.ops.fix import FixReport, Mended


def as_json(report: FixReport) -> dict[str, Any]:
    """The documented schema of `--json` (docs/json.md)."""
    return asdict(report)


def show(report: FixReport, console: Console) -> None:
    """What was found, what was done, and what was written."""
    console.print(f"read   {inert(report.source)}", soft_wrap=True)
    console.print(f"       {report.layout}, {report.modules_before} modules")
    for one in report.mended:
        _show(one, "fixed", console)
    for one in report.left:
        _show(one, "left", console)
    if report.output is not None:
        console.print(f"wrote  {inert(report.output)}", soft_wrap=True)
        told = f"{report.modules_after} modules" + (f", {size(report.size)}" if report.size else "")
        console.print(f"       {told}")
    elif not report.mended:
        console.print("found nothing that can be fixed: nothing was written")


def _show(one: Mended, verb: str, console: Console) -> None:
    times = f" ({one.count} times)" if one.count > 1 else ""
    console.print(f"{verb:6} {one.code}{times}")
    console.print(f"       {inert(one.message)}")
    console.print(f"       {inert(one.fixed)}")
