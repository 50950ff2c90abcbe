"""`loratool resize` as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loratool.ops.made import Held
from loratool.ops.resize import Cut
from loratool.ops.resize_file import Outcome, ResizeReport
from loratool.ops.summary import Summary, components, curve, summaries, summary
from loratool.report.inert import inert
from loratool.report.spark import can_show, spark
from loratool.report.units import histogram, plural, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WORST = 3
_NAMED = 3
_SPARK = 32


def as_json(report: ResizeReport, modules: bool = False, plot: str | None = None) -> dict[str, Any]:
    """The documented schema of `--json` (docs/json.md); with `modules` also all singular values."""
    whole = asdict(report)
    values, outcomes = whole.pop("values"), whole.pop("outcomes")
    seconds = {name: round(whole.pop(name), 3) for name in ("seconds_decompose", "seconds")}
    for data, one in zip(outcomes, report.outcomes, strict=True):
        data["ranks_after"] = _keyed(one.ranks_after)
        data["components"] = [asdict(part) for part in summaries(one.modules)]
    whole["ranks_before"] = _keyed(report.ranks_before)
    data = {**whole, "outcomes": outcomes, "plot": plot, **seconds}
    return {**data, "values": values} if modules else data


def _keyed(ranks: Any) -> dict[str, int]:
    return {str(rank): n for rank, n in ranks.items()}


def show(report: ResizeReport, console: Console, modules: bool = False, plot: str | None = None) -> None:
    """What was read, then for every rule what became of it: in total, by component, and of the worst modules (with
    `modules`: of every module)."""
    from rich.text import Text

    console.print(_facts(_source(report)))
    spectra = _spectra(report)
    for outcome in report.outcomes:
        console.print()
        console.print(Text(outcome.rule, "bold"))
        console.print(_facts(_totals(report, outcome)))
        console.print()
        console.print(_components(outcome))
        console.print()
        _curves(outcome, spectra, console)
        _modules(outcome, console, modules)
    if plot is not None:
        console.print()
        console.print(_facts([("plot", inert(plot, 200), "")]))


Facts = list[tuple[str, str, str]]
"""Title, text and style of a line."""


def _facts(rows: Facts) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=8)
    table.add_column(overflow="fold")
    for title, text, style in rows:
        table.add_row(title, Text(text, style=style))
    return table


def _source(report: ResizeReport) -> Facts:
    count = plural(sum(report.ranks_before.values()), "module")
    about = f"{report.layout_before}, {inert(report.architecture_title, 80)}, {count}"
    rows = [
        ("read", inert(report.source, 200), ""),
        ("", f"{about}, rank {_histogram(report.ranks_before)}, {size(report.size_before)}", ""),
    ]
    if report.base is not None:
        rows.append(("base", f"{inert(report.base, 200)}: ranks by importance against its weights", ""))
    if report.dora:
        rows.append(("DoRA", f"{plural(report.dora, 'module')}, magnitudes kept: each row keeps its trained norm", ""))
    for family, n in report.unread_families.items():
        rows.append(("not read", f"{plural(n, 'module')} of the kind {inert(family, 60)}", "yellow"))
    rows += [("note", inert(note), "yellow") for note in report.notes]
    return rows


def _histogram(ranks: Any) -> str:
    return histogram(ranks).replace("×", "x")  # a terminal of any encoding shows that


def _totals(report: ResizeReport, outcome: Outcome) -> Facts:
    rows = [
        ("wrote", inert(outcome.output, 200), "") if outcome.output else ("output", "not written", "yellow"),
        ("size", _smaller(report.size_before, outcome.size_after), ""),
        ("rank", _histogram(outcome.ranks_after), ""),
        ("kept", f"{outcome.energy:.2%} of the energy; relative error {_error(outcome.error)} by truncation", ""),
    ]
    if outcome.output is None:
        pass
    elif outcome.held is None:
        rows.append(("verified", "no (--no-verify)", "yellow"))
    else:
        rows += _verified(outcome.held)
    if outcome.dropped:
        text = f"{plural(len(outcome.dropped), 'tensor')} (no modules, --drop-extras): {_few(outcome.dropped)}"
        rows.append(("left out", text, "yellow"))
    return rows


def _smaller(before: int, after: int) -> str:
    share = f" ({abs(before - after) / before:.0%})" if before else ""
    return f"{size(after)}, {size(abs(before - after))}{share} {'less' if after <= before else 'more'}"


def _verified(held: Held) -> Facts:
    worst = f"; worst {_error(held.worst)} in {inert(held.worst_module, 100)}" if held.worst_module else ""
    rows = [
        (
            "verified",
            f"{plural(held.modules, 'update')} read back: relative error {_error(held.error)} with rounding{worst}",
            "green",
        )
    ]
    if held.coarse:
        text = f"{plural(len(held.coarse), 'module')} farther off than computed, too small for the dtype perhaps: "
        text += _few(held.coarse)
        rows.append(("coarse", text, "yellow"))
    return rows


def _few(names: Sequence[str]) -> str:
    more = f", +{len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(inert(name, 100) for name in names[:_NAMED]) + more


def _error(error: float) -> str:
    return f"{error:.2g}" if error else "0"


def _saved(before: int, after: int) -> str:
    return size(before - after) if after <= before else f"-{size(after - before)}"


def _grid(*titles: str) -> Table:
    """A table whose first column folds and whose others are numbers."""
    from rich.table import Table

    grid = Table(box=None, padding=(0, 0, 0, 2), header_style="dim")
    grid.add_column(titles[0], overflow="fold")
    for title in titles[1:]:
        grid.add_column(title, justify="right", no_wrap=True)
    return grid


# -- components -----------------------------------------------------------------------------------------------------


def _components(outcome: Outcome) -> Table:
    parts = summaries(outcome.modules)
    if len(parts) > 1:
        parts.append(summary(outcome.modules))
    measured = any(part.importance is not None for part in parts)
    grid = _grid("component", "modules", "rank", "energy", "error", "saved", *(["importance"] if measured else []))
    for part in parts:
        cells = [inert(part.component, 40) or "all", f"{part.modules:,}", _ranks(part), f"{part.energy:.2%}"]
        cells += [_error(part.error), _saved(part.bytes_before, part.bytes_after)]
        if measured:
            cells.append("" if part.importance is None else f"{part.importance:.2g}")
        grid.add_row(*cells, style="" if part.component else "bold")
    return grid


def _ranks(part: Summary) -> str:
    before, after = (_range(ranks) for ranks in (part.ranks_before, part.ranks_after))
    return f"{before} -> {after}"


def _range(ranks: tuple[int, int, int]) -> str:
    """`8/32/64`: the smallest, the median and the largest; one number if they are the same."""
    return "/".join(map(str, ranks)) if len(set(ranks)) > 1 else str(ranks[0])


# -- curves ---------------------------------------------------------------------------------------------------------


def _spectra(report: ResizeReport) -> dict[str, tuple[float, ...]]:
    """Component -> the mean of its modules' singular values, relative to the largest of each."""
    cuts = report.outcomes[0].modules
    own = {name: [v for v, cut in zip(report.values, cuts, strict=True) if cut.component == name]
           for name in components(cuts)}  # fmt: skip
    return {name: curve(values, relative=True).mean for name, values in own.items()}


def _curves(outcome: Outcome, spectra: dict[str, tuple[float, ...]], console: Console) -> None:
    """A line per component: mean singular values on a log scale, the median cut marked."""
    from rich.text import Text

    blocks = can_show(console.encoding)
    width = max(len(inert(name, 40)) for name in spectra)
    console.print(Text("  mean singular values relative to the largest, log scale; | is the median cut", "dim"))
    for part in summaries(outcome.modules):
        values = spectra[part.component]
        if not values:
            continue
        cut = min(part.ranks_after[1], len(values))
        name = inert(part.component, 40)
        where = f"cut at {cut} of {len(values)}" if cut < len(values) else f"all {len(values)}"
        line = spark(values, cut, _SPARK, blocks)
        console.print(Text(f"  {name:{width}}  {line}  1 to {min(values):.1g}, {where}"))


# -- modules --------------------------------------------------------------------------------------------------------


def _modules(outcome: Outcome, console: Console, every: bool) -> None:
    from rich.text import Text

    worst = sorted((cut for cut in outcome.modules if cut.error), key=lambda cut: -cut.error)[:_WORST]
    cuts = outcome.modules if every else tuple(worst)
    if not cuts:
        return
    grid = _grid("module" if every else "worst modules", "rank", "energy", "error", "saved")
    for cut in cuts:
        grid.add_row(Text(inert(cut.title, 200)), *_numbers(cut))
    console.print()
    console.print(grid)


def _numbers(cut: Cut) -> list[str]:
    return [
        f"{cut.rank_before} -> {cut.rank_after}",
        f"{cut.energy:.2%}",
        _error(cut.error),
        _saved(cut.bytes_before, cut.bytes_after),
    ]
