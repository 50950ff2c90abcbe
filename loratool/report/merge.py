"""`loratool merge` as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import median_low
from typing import TYPE_CHECKING, Any

from loratool.ops.made import Held
from loratool.ops.merge import MergedModule
from loratool.ops.merge_files import MergeReport, Source
from loratool.report.inert import inert
from loratool.report.units import histogram, plural, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ALIGNED = 0.1
"""From this cosine on two updates are said to pull together, from its negative down to fight; independent between."""

_NAMED = 3
_FEW_INPUTS = 3
"""Of more inputs only the smallest and the largest cosine are shown."""


def as_json(report: MergeReport, modules: bool = False) -> dict[str, Any]:
    """The documented schema of `--json` (docs/json.md); with `modules` also every module."""
    data = asdict(report)
    rows = data["modules"]
    if data["held"] is not None:
        data["held"]["worst"] = _finite(data["held"]["worst"])
    data |= {
        "inputs": [
            {**one, "ranks": _keyed(source.ranks)} for one, source in zip(data["inputs"], report.inputs, strict=True)
        ],
        "modules": len(rows),
        "ranks_after": _keyed(report.ranks_after),
        "cosines": {
            component: [[_finite(value) for value in row] for row in matrix]
            for component, matrix in report.cosines.items()
        },
        "approximated": [approximated(row) for row in report.modules if row.approximated],
        "seconds": round(report.seconds, 3),
    }
    return {**data, "module_list": rows} if modules else data


def _keyed(ranks: Any) -> dict[str, int]:
    return {str(rank): n for rank, n in ranks.items()}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON has no NaN


def approximated(row: MergedModule) -> dict[str, Any]:
    """A module that a low-rank pair replaces, as data."""
    return {"title": row.title, "families": list(row.approximated), "rank": row.rank_after, "error": row.error}


def show(report: MergeReport, console: Console, modules: bool = False) -> None:
    """What was read, what was written, what the inputs have to do with each other, and what is worth knowing."""
    console.print(_facts([*_inputs(report), *_output(report)]))
    console.print()
    console.print(_components(report))
    pairs = [fact for component in report.cosines for fact in _pairs(report, component)]
    conflicts = _conflicts(report)
    if pairs or conflicts:
        console.print()
        console.print(_facts([*pairs, *conflicts]))
    remarks = _remarks(report)
    if remarks:
        console.print()
        console.print(_facts(remarks))
    if modules:
        console.print()
        console.print(_modules(report))


Facts = list[tuple[str, str, str]]
"""Title, text and style of a line."""


def _facts(rows: Facts) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=12)
    table.add_column(overflow="fold")
    for title, text, style in rows:
        table.add_row(title, Text(text, style=style))
    return table


def _histogram(ranks: Any) -> str:
    return histogram(ranks).replace("×", "x")  # a terminal of any encoding shows that


def _few(names: Sequence[str]) -> str:
    more = f", +{len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(inert(name, 100) for name in names[:_NAMED]) + more


def _error(error: float) -> str:
    return f"{error:.2g}" if error else "0"


# -- in and out -------------------------------------------------------------------------------------------------------


def _inputs(report: MergeReport) -> Iterator[tuple[str, str, str]]:
    several = len(report.inputs) > 1
    for letter, one in zip(letters(len(report.inputs)), report.inputs, strict=True):
        blocks = f", blocks {inert(one.blocks, 60)}" if one.blocks else ""
        yield f"read {letter}" if several else "read", inert(one.path, 200), ""
        yield "", f"strength {one.weight:g}{blocks}, {_about(one)}", ""
        if several and one.alone:
            yield "", f"{plural(one.alone, 'module')} that no other input updates", ""


def _about(one: Source) -> str:
    return f"{one.layout}, {plural(one.modules, 'module')}, rank {_histogram(one.ranks)}, {size(one.size)}"


def letters(count: int) -> list[str]:
    """A, B, C for the inputs; numbers if there are more than letters."""
    return [chr(65 + index) if count <= 26 else str(index + 1) for index in range(count)]


def _output(report: MergeReport) -> Iterator[tuple[str, str, str]]:
    count = plural(len(report.modules), "module")
    yield "wrote", inert(report.output, 200), ""
    about = f"{report.layout}, {inert(report.architecture_title, 80)}, {count}"
    yield "", f"{about}, rank {_histogram(report.ranks_after)}, {size(report.size_after)}", ""
    options = "".join(f", {name} {value}" for name, value in report.options.items())
    rule = f", {report.rule}" if report.rule else ""
    yield "method", inert(f"{report.method}{options}{rule}", 300), ""
    if len(report.inputs) > 1:
        yield "merged", f"{report.merged:,} of {count} are updated by more than one input", ""
    yield "error", f"{_error(report.error)} against the method's definition, by the ranks that were kept", ""
    if report.held is None:
        yield "verified", "no (--no-verify)", "yellow"
    else:
        yield from _verified(report.held, report.error)


def _verified(held: Held, error: float) -> Iterator[tuple[str, str, str]]:
    # A dense result is measured against its low-rank form: what that form lost is not in it.
    rounding = ", rounding included" if held.error >= error else " by rounding"
    text = f"{plural(held.modules, 'update')} read back and measured: relative error {_error(held.error)}{rounding}"
    yield "verified", text, "green"
    if held.coarse:
        text = f"{plural(len(held.coarse), 'module')} farther off than computed, too small for the dtype perhaps: "
        yield "coarse", text + _few(held.coarse), "yellow"


# -- components -------------------------------------------------------------------------------------------------------


def _components(report: MergeReport) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 0, 0, 2), header_style="dim")
    table.add_column("component", overflow="fold")
    for title in ("modules", "merged", "rank before", "after", "error"):
        table.add_column(title, justify="right", no_wrap=True)
    components = list(report.cosines)
    for component in [*components, *([""] if len(components) > 1 else [])]:
        own = [row for row in report.modules if component in ("", row.component)]
        merged = sum(_count(row) > 1 for row in own)
        before = _range([max(rank for rank in row.ranks if rank is not None) for row in own])
        cells = [f"{len(own):,}", f"{merged:,}", before, _range([row.rank_after for row in own]), _error(_total(own))]
        table.add_row(Text(inert(component, 40) or "all"), *cells, style="" if component else "bold")
    return table


def _count(row: MergedModule) -> int:
    """How many inputs update it."""
    return sum(rank is not None for rank in row.ranks)


def _range(ranks: Sequence[int]) -> str:
    """`8/32/64`: the smallest, the median and the largest; one number if they are the same."""
    found = (min(ranks), median_low(ranks), max(ranks))
    return "/".join(map(str, found)) if len(set(found)) > 1 else str(found[0])


def _total(rows: Sequence[MergedModule]) -> float:
    total = math.fsum(row.norm**2 for row in rows)
    return math.sqrt(math.fsum((row.error * row.norm) ** 2 for row in rows) / total) if total else 0.0


# -- how the inputs get on --------------------------------------------------------------------------------------------


def _pairs(report: MergeReport, component: str) -> Facts:
    """The cosines of one component: of every pair, or of many the smallest and the largest."""
    matrix = report.cosines[component]
    found = [
        (matrix[i][j], i, j)
        for i in range(len(matrix))
        for j in range(i + 1, len(matrix))
        if not math.isnan(matrix[i][j])
    ]
    if len(matrix) > _FEW_INPUTS and len(found) > 1:
        found = [min(found), max(found)]
    names = letters(len(matrix))
    rows = []
    for cosine, i, j in found:
        turned = report.inputs[i].weight * report.inputs[j].weight < 0
        word = relation(-cosine if turned else cosine) + (" (one strength is negative)" if turned else "")
        shown = f"{cosine:.2f}".replace("-0.00", "0.00")
        rows.append(("", f"{inert(component, 40)}: {names[i]} and {names[j]} {shown}, {word}", ""))
    return [("cosine" if component == next(iter(report.cosines)) else "", *rows[0][1:]), *rows[1:]] if rows else []


def relation(cosine: float) -> str:
    """What a cosine between two updates means for their sum."""
    if cosine >= ALIGNED:
        return "they pull together"
    return "they fight" if cosine <= -ALIGNED else "they are independent"


def _conflicts(report: MergeReport) -> Facts:
    if report.conflicts is None or report.shared is None:
        return []
    if not report.shared:
        return [("signs", "no entry is changed by two inputs", "")]
    share = report.conflicts / report.shared
    return [
        ("signs", f"the inputs disagree on {share:.1%} of the {report.shared:,} entries that two or more change", "")
    ]


# -- what is worth knowing --------------------------------------------------------------------------------------------


def _remarks(report: MergeReport) -> Facts:
    rows: Facts = []
    changed = [row for row in report.modules if row.approximated]
    for row in changed[:_NAMED]:
        kinds = ", ".join(row.approximated)
        text = f"{inert(row.title, 120)}: {kinds} as LoRA of rank {row.rank_after}, relative error {_error(row.error)}"
        rows.append(("approximated", text, "yellow"))
    if len(changed) > _NAMED:
        worst = max(changed, key=lambda row: row.error)
        text = f"+{len(changed) - _NAMED} more; the worst is {inert(worst.title, 120)}: {_error(worst.error)}"
        rows.append(("", text, "yellow"))
    if report.silent:
        text = f"{plural(len(report.silent), 'module')} with no weight left, not in the output: {_few(report.silent)}"
        rows.append(("silent", text, "yellow"))
    for title, what, names in (
        ("kept", "kept as they are", report.kept),
        ("left out", "--drop-extras", report.dropped),
    ):
        if names:
            rows.append((title, f"{plural(len(names), 'tensor')} (no modules, {what}): {_few(names)}", "yellow"))
    return [*rows, *(("note", inert(note), "yellow") for note in report.notes)]


# -- modules ----------------------------------------------------------------------------------------------------------


def _modules(report: MergeReport) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 0, 0, 2), header_style="dim")
    table.add_column("module", overflow="fold")
    for title in ("ranks", "after", "error"):
        table.add_column(title, justify="right", overflow="fold")
    for row in report.modules:
        ranks = " ".join("-" if rank is None else str(rank) for rank in row.ranks)
        table.add_row(Text(inert(row.title, 200)), ranks, str(row.rank_after), _error(row.error))
    return table
