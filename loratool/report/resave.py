"""`loratool convert` of a PyTorch file to safetensors, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loratool.ops.resave import Resaved
from loratool.report.inert import inert
from loratool.report.units import plural, size

if TYPE_CHECKING:
    from rich.console import Console


def as_json(report: Resaved) -> dict[str, Any]:
    """The documented schema of `--json` (docs/json.md)."""
    return {**asdict(report), "seconds": round(report.seconds, 3)}


def show(report: Resaved, console: Console) -> None:
    """A few lines: from what to what, what was compared, what was left out."""
    from loratool.report.lines import facts

    dtypes = ", ".join(f"{count:,} of {code}" for code, count in report.dtypes.items())
    rows = [
        ("read", inert(report.source, 200), ""),
        ("", f"a PyTorch file, {plural(report.tensors, 'tensor')} ({dtypes}), {size(report.size_before)}", ""),
        ("wrote", inert(report.output, 200), ""),
        ("", f"safetensors, the same keys, {size(report.size_after)}", ""),
    ]
    if report.compared is None:
        rows.append(("verified", "no (--no-verify)", "yellow"))
    else:
        rows.append(("verified", f"{plural(report.compared, 'tensor')} read back, all the same bit for bit", "green"))
    rows += [("note", inert(note), "yellow") for note in report.notes]
    console.print(facts(rows))
