"""`loratool extract` as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loratool.ops.extract_report import ExtractReport, Others
from loratool.ops.resize import Cut
from loratool.ops.summary import Summary, summaries, summary
from loratool.report.inert import inert
from loratool.report.units import few, plural, ranks, short, size, spread
from loratool.report.verified import verified

if TYPE_CHECKING:
    from rich.console import Console

_WORST = 3
_NAMED = 3

_WORDS = {"bias": ("bias", "biases"), "other": ("other parameter", "other parameters")}
"""One and several of a kind; of other kinds an s makes several."""


def as_json(report: ExtractReport) -> dict[str, Any]:
    """The documented schema of `--json` (docs/json.md)."""
    data = asdict(report)
    held, notes, seconds = (data.pop(name) for name in ("held", "notes", "seconds"))
    data["ranks_after"] = {str(rank): n for rank, n in report.ranks_after.items()}
    data["components"] = [asdict(part) for part in summaries(report.modules)]
    return {**data, "held": held, "notes": notes, "seconds": round(seconds, 3)}


def show(report: ExtractReport, console: Console, modules: bool = False) -> None:
    """What was read and written, then the numbers by component, and of the worst modules (with `modules`: of all)."""
    from loratool.report.lines import facts

    console.print(facts([*_inputs(report), *_totals(report)]))
    if report.modules:  # else it holds full differences only
        console.print()
        _components(report, console)
        _modules(report, console, modules)


Facts = list[tuple[str, str, str]]
"""Title, text and style of a line."""


def _inputs(report: ExtractReport) -> Facts:
    rows = [
        ("base", inert(report.base, 200), ""),
        ("tuned", inert(report.tuned, 200), ""),
        ("", f"{inert(report.architecture_title, 80)}, {size(report.size_before)}", ""),
    ]
    return rows + [("note", inert(note), "yellow") for note in report.notes]


def _totals(report: ExtractReport) -> Facts:
    count = plural(len(report.modules), "module")
    made = f"{report.layout}, {count}, rank {ranks(report.ranks_after)}, {report.dtype}, {size(report.size_after)}"
    kept = f"{report.energy:.2%} of the energy; relative error {short(report.error)}, norm {report.norm:.4g}"
    rows = [
        ("rule", report.rule, ""),
        ("wrote", inert(report.output, 200), "") if report.output else ("output", "not written", "yellow"),
        ("", made, ""),
        *([("kept", kept, ""), ("SVD", _method(report), "")] if report.modules else []),
        *_skipped(report),
        *(_other(one) for one in report.others),
    ]
    return [*rows, *verified(report.held, 0.0)] if report.output is not None else rows


def _method(report: ExtractReport) -> str:
    rest = len(report.modules) - report.exact
    checked = "every error was measured on the difference itself"
    if not rest:
        return f"exact; {checked}"
    return f"randomised for {rest:,} of {plural(len(report.modules), 'module')}, exact for the others; {checked}"


def _skipped(report: ExtractReport) -> Facts:
    rows: Facts = []
    if report.unchanged:
        rows.append(("skipped", f"{plural(report.unchanged, 'weight')} without any difference", ""))
    for title, names, kind, words in (
        ("skipped", report.below, "weight", "at most --min-norm apart"),
        ("left out", report.missing, "parameter", "that only one of the two has"),
        ("left out", report.misshapen, "parameter", "of two shapes"),
    ):
        if names:
            text = f"{plural(len(names), kind)} {words}: {few((inert(name, 100) for name in names), _NAMED)}"
            rows.append((title, text, "yellow"))
    return rows


def _other(one: Others) -> tuple[str, str, str]:
    words = _WORDS.get(one.kind, (one.kind, f"{one.kind}s"))
    text = f"{one.count:,} {words[one.count != 1]} differ{'s' if one.count == 1 else ''} (norm {short(one.norm)})"
    if one.kept == one.count:
        return "in full", f"{text}, kept in full", ""
    if one.kept:
        return "in full", f"{text}, {one.kept:,} of them kept in full", ""
    return "left out", f"{text}; no pair holds {'it' if one.count == 1 else 'them'}{_way(one)}", "yellow"


def _way(one: Others) -> str:
    return "" if one.kind == "other" else ", --full does"


def _components(report: ExtractReport, console: Console) -> None:
    from rich.text import Text

    from loratool.report.lines import numbers

    parts = summaries(report.modules)
    if len(parts) > 1:
        parts.append(summary(report.modules))
    grid = numbers("component", "modules", "rank", "energy", "error", "change")
    for part in parts:
        grid.add_row(inert(part.component, 40) or "all", *_cells(part), style="" if part.component else "bold")
    console.print(grid)
    spreads = "rank: least/median/most; " if len(report.ranks_after) > 1 else ""
    console.print(Text(f"  {spreads}change: norm of the difference over that of the base weight", "dim"))


def _cells(part: Summary) -> list[str]:
    change = "" if part.importance is None else f"{part.importance:.2g}"
    return [f"{part.modules:,}", spread(part.ranks_after), f"{part.energy:.2%}", short(part.error), change]


def _modules(report: ExtractReport, console: Console, every: bool) -> None:
    from loratool.report.lines import Name, numbers

    worst = sorted((cut for cut in report.modules if cut.error), key=lambda cut: -cut.error)[:_WORST]
    cuts = report.modules if every else tuple(worst)
    if not cuts:
        return
    grid = numbers("module" if every else "worst modules", "rank", "energy", "error", "norm", "change")
    for cut in cuts:
        grid.add_row(Name(inert(cut.title, 200)), *_numbers(cut))
    console.print()
    console.print(grid)


def _numbers(cut: Cut) -> list[str]:
    change = "" if cut.importance is None else f"{cut.importance:.2g}"
    return [str(cut.rank_after), f"{cut.energy:.2%}", short(cut.error), f"{cut.norm:.3g}", change]
