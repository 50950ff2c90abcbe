"""`loratool convert` as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loratool.ops.convert_file import Report
from loratool.report.inert import inert
from loratool.report.units import histogram, plural, size

if TYPE_CHECKING:
    from rich.console import Console

_NAMED = 6


def as_json(report: Report) -> dict[str, Any]:
    """The documented schema of `--json` (docs/json.md)."""
    data = asdict(report)
    for field in ("ranks_before", "ranks_after"):
        data[field] = {str(rank): n for rank, n in data[field].items()}
    data["seconds"] = round(report.seconds, 3)
    return data


def show(report: Report, console: Console) -> None:
    """A few lines: from what to what, what the proof says, what is worth knowing."""
    from loratool.report.lines import facts

    rows: list[tuple[str, str, str]] = []

    def row(title: str, value: str, style: str = "") -> None:
        rows.append((title, value, style))

    before = _modules(report.modules_before, report.ranks_before, report.size_before)
    after = _modules(report.modules_after, report.ranks_after, report.size_after)
    row("read", inert(report.source, 200))
    row("", f"{report.layout_before}, {inert(report.architecture_title, 80)}, {before}")
    row("wrote", inert(report.output, 200))
    row("", f"{report.layout_after}, {after}")
    if report.program is not None:
        row("loads", f"fully in {inert(report.program)}, by its rules", "green")
    if report.proof is None:
        row("verified", "no (--no-verify)", "yellow")
    else:
        row("verified", _proof(report), "green")
    if report.returned:
        row("", "the original's keys, header and side files are back")
    for item in report.approximated[:_NAMED]:
        row(
            "approximated",
            f"{inert(item.title, 120)}: {item.family} as LoRA of rank {item.rank}, relative error {item.error:.2g}",
            "yellow",
        )
    if len(report.approximated) > _NAMED:
        worst = max(item.error for item in report.approximated)
        row("", f"+{len(report.approximated) - _NAMED} more, largest relative error {worst:.2g}", "yellow")
    _named(row, "kept", "no modules, kept as they are", report.kept)
    _named(row, "carried", "no modules, carried in the header", report.carried)
    _named(row, "left out", "no modules, left out (--drop-extras)", report.dropped)
    _named(row, "zero", "parts of fused modules that update nothing", report.vanished)
    for family, n in report.unread_families.items():
        row("not read yet", f"{plural(n, 'module')} of the kind {family}", "yellow")
    for note in report.notes:
        row("note", inert(note), "yellow")
    console.print(facts(rows))


def _named(row: Callable[..., None], title: str, what: str, names: tuple[str, ...]) -> None:
    if names:
        shown = ", ".join(inert(name, 100) for name in names[:_NAMED])
        more = f", +{len(names) - _NAMED} more" if len(names) > _NAMED else ""
        row(title, f"{plural(len(names), 'tensor' if title != 'zero' else 'part')} ({what}): {shown}{more}", "yellow")


def _modules(count: int, ranks: Any, bytes_: int) -> str:
    return f"{plural(count, 'module')}, rank {histogram(ranks)}, {size(bytes_)}"


def _proof(report: Report) -> str:
    proof = report.proof
    assert proof is not None
    if proof.bitwise == proof.compared:
        return f"{plural(proof.compared, 'update')} read back, all the same bit for bit"
    rest = proof.compared - proof.bitwise
    return (
        f"{plural(proof.compared, 'update')} read back: {proof.bitwise:,} the same bit for bit, {rest:,} to rounding; "
        f"largest relative error {proof.worst:.1e} (limit {proof.tolerance:.0e})"
    )
