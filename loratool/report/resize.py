"""`loratool resize` as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loratool.ops.resize import Cut
from loratool.ops.resize_file import Outcome, ResizeReport
from loratool.ops.summary import Summary, components, curve, summaries, summary
from loratool.report.inert import inert
from loratool.report.spark import can_show, spark
from loratool.report.units import few, plural, ranks, short, size, spread
from loratool.report.verified import verified

if TYPE_CHECKING:
    from rich.console import Console

_WORST = 3
_NAMED = 3
_SPARK = 32
_SAME = 0.005
"""A change of size below this share is not told in percent."""


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

    from loratool.report.lines import facts

    console.print(facts(_source(report)))
    spectra = _spectra(report)
    for outcome in report.outcomes:
        console.print()
        console.print(Text(outcome.rule, "bold"))
        console.print(facts(_totals(report, outcome)))
        console.print()
        if any(cut.rank_after < cut.rank_before or cut.bytes_after != cut.bytes_before for cut in outcome.modules):
            _components(outcome, console)
            console.print()
        if spectra:
            _curves(outcome, spectra, console)
        _modules(outcome, console, modules)
    if plot is not None:
        console.print()
        console.print(facts([("plot", inert(plot, 200), "")]))


Facts = list[tuple[str, str, str]]
"""Title, text and style of a line."""


def _source(report: ResizeReport) -> Facts:
    count = plural(sum(report.ranks_before.values()), "module")
    about = f"{report.layout_before}, {inert(report.architecture_title, 80)}, {count}"
    rows = [
        ("read", inert(report.source, 200), ""),
        ("", f"{about}, rank {ranks(report.ranks_before)}, {size(report.size_before)}", ""),
    ]
    if report.base is not None:
        rows.append(("base", f"{inert(report.base, 200)}: ranks by importance against its weights", ""))
    if report.dora:
        rows.append(("DoRA", f"{plural(report.dora, 'module')}, magnitudes kept: each row keeps its trained norm", ""))
    for family, n in report.unread_families.items():
        rows.append(("not read", f"{plural(n, 'module')} of the kind {inert(family, 60)}", "yellow"))
    rows += [("note", inert(note), "yellow") for note in report.notes]
    return rows


def _totals(report: ResizeReport, outcome: Outcome) -> Facts:
    rows = [
        ("wrote", inert(outcome.output, 200), "") if outcome.output else ("output", "not written", "yellow"),
        ("size", _sizes(report.size_before, outcome.size_after), ""),
        ("rank", ranks(outcome.ranks_after), ""),
        ("kept", _kept(outcome), ""),
    ]
    if outcome.output is not None:
        rows += verified(outcome.held, outcome.error)
    if outcome.dropped:
        text = f"{plural(len(outcome.dropped), 'tensor')} (no modules, --drop-extras): "
        text += few((inert(name, 100) for name in outcome.dropped), _NAMED)
        rows.append(("left out", text, "yellow"))
    return rows


def _kept(outcome: Outcome) -> str:
    if any(cut.rank_after != cut.rank_before for cut in outcome.modules):
        return f"{outcome.energy:.2%} of the energy; relative error {short(outcome.error)} by truncation"
    if outcome.rule.startswith("rank "):
        return f"nothing was cut: every module has {outcome.rule} or less already"
    return "nothing was cut: every module keeps its rank"


def _sizes(before: int, after: int) -> str:
    share = abs(before - after) / before if before else 0.0
    change = f"{share:.0%} {'less' if after < before else 'more'}" if share >= _SAME else "about the same"
    return f"{size(before)} -> {size(after)} ({change})"


def _saved(before: int, after: int) -> str:
    return size(before - after) if after <= before else f"-{size(after - before)}"


# -- components -----------------------------------------------------------------------------------------------------


def _components(outcome: Outcome, console: Console) -> None:
    from rich.text import Text

    from loratool.report.lines import numbers

    parts = summaries(outcome.modules)
    if len(parts) > 1:
        parts.append(summary(outcome.modules))
    measured = any(part.importance is not None for part in parts)
    grid = numbers("component", "modules", "rank", "energy", "error", "saved", *(["importance"] if measured else []))
    for part in parts:
        cells = [inert(part.component, 40) or "all", f"{part.modules:,}", _ranks(part), f"{part.energy:.2%}"]
        cells += [short(part.error), _saved(part.bytes_before, part.bytes_after)]
        if measured:
            cells.append("" if part.importance is None else f"{part.importance:.2g}")
        grid.add_row(*cells, style="" if part.component else "bold")
    console.print(grid)
    spreads = "rank: least/median/most; " if "/" in _ranks(parts[-1]) else ""
    console.print(Text(f"  {spreads}saved: of the tensors alone, without the header", "dim"))


def _ranks(part: Summary) -> str:
    return f"{spread(part.ranks_before)} -> {spread(part.ranks_after)}"


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
    from loratool.report.lines import Name, numbers

    worst = sorted((cut for cut in outcome.modules if cut.error), key=lambda cut: -cut.error)[:_WORST]
    cuts = outcome.modules if every else tuple(worst)
    if not cuts:
        return
    grid = numbers("module" if every else "worst modules", "rank", "energy", "error", "saved")
    for cut in cuts:
        grid.add_row(Name(inert(cut.title, 200)), *_numbers(cut))
    console.print()
    console.print(grid)


def _numbers(cut: Cut) -> list[str]:
    return [
        f"{cut.rank_before} -> {cut.rank_after}",
        f"{cut.energy:.2%}",
        short(cut.error),
        _saved(cut.bytes_before, cut.bytes_after),
    ]
