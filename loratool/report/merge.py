"""`loratool merge` as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loratool.core.registry import methods
from loratool.ops.merge import MergedModule
from loratool.ops.merge_files import MergeReport, Source
from loratool.report.inert import inert
from loratool.report.units import few, plural, ranks, short, size, spread
from loratool.report.verified import verified

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ALIGNED = 0.1
"""From this cosine on two updates are said to pull together, from its negative down to fight; independent between."""

_NAMED = 3
_TITLES = 12
_FEW_INPUTS = 3
"""Of more inputs only the smallest and the largest cosine are shown."""
_IN_A_ROW = 6
"""The ranks of more inputs may take several lines."""


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
    from loratool.report.lines import facts

    console.print(facts([*_inputs(report), *_output(report)], _TITLES))
    console.print()
    _components(report, console)
    pairs = [fact for component in report.cosines for fact in _pairs(report, component)]
    conflicts = _conflicts(report)
    if pairs or conflicts:
        console.print()
        console.print(facts([*pairs, *conflicts], _TITLES))
    remarks = _remarks(report)
    if remarks:
        console.print()
        console.print(facts(remarks, _TITLES))
    if modules:
        console.print()
        console.print(_modules(report))


Facts = list[tuple[str, str, str]]
"""Title, text and style of a line."""


def _few(names: Sequence[str]) -> str:
    return few((inert(name, 100) for name in names), _NAMED)


# -- in and out -------------------------------------------------------------------------------------------------------


def _inputs(report: MergeReport) -> Iterator[tuple[str, str, str]]:
    several = len(report.inputs) > 1
    for letter, one in zip(letters(len(report.inputs)), report.inputs, strict=True):
        strength = f"strength {one.weight:g}, " if one.weight != 1 else ""
        blocks = f"blocks {inert(one.blocks, 60)}, " if one.blocks and one.blocks.upper() != "ALL" else ""
        yield f"read {letter}" if several else "read", inert(one.path, 200), ""
        yield "", f"{strength}{blocks}{_about(one)}", ""
        if several and one.alone:
            yield "", f"{plural(one.alone, 'module')} that no other input updates", ""


def _about(one: Source) -> str:
    return f"{one.layout}, {plural(one.modules, 'module')}, rank {ranks(one.ranks)}, {size(one.size)}"


def letters(count: int) -> list[str]:
    """A, B, C for the inputs; numbers if there are more than letters."""
    return [chr(65 + index) if count <= 26 else str(index + 1) for index in range(count)]


def _output(report: MergeReport) -> Iterator[tuple[str, str, str]]:
    count = plural(len(report.modules), "module")
    yield "wrote", inert(report.output, 200), ""
    about = f"{report.layout}, {inert(report.architecture_title, 80)}, {count}"
    yield "", f"{about}, rank {ranks(report.ranks_after)}, {size(report.size_after)}", ""
    options = "".join(f", {name} {value}" for name, value in report.options.items())
    rule = f", {report.rule}" if report.rule else ""
    yield "method", inert(f"{report.method}{options}{rule}", 300), ""
    if len(report.inputs) > 1:
        yield "merged", f"{report.merged:,} of {count} are updated by more than one input", ""
    yield "error", _against(report), ""
    yield from verified(report.held, report.error)


def _against(report: MergeReport) -> str:
    method = methods().get(report.method)
    if method is not None and method.stands_for_sum:
        return f"{short(report.error)} off the sum that it stands for, before rounding"
    what = "the exact sum" if method is not None and method.exact else "the method's result"
    if not report.error:
        return f"0: {what}, before rounding"
    return f"{short(report.error)} off {what}, by the ranks kept, before rounding"


# -- components -------------------------------------------------------------------------------------------------------


def _components(report: MergeReport, console: Console) -> None:
    from rich.text import Text

    from loratool.report.lines import numbers

    table = numbers("component", "modules", "merged", "rank before", "after", "error")
    components = list(report.cosines)
    cells: list[str] = []
    for component in [*components, *([""] if len(components) > 1 else [])]:
        own = [row for row in report.modules if component in ("", row.component)]
        merged = sum(_count(row) > 1 for row in own)
        before = spread([max(rank for rank in row.ranks if rank is not None) for row in own])
        cells = [f"{len(own):,}", f"{merged:,}", before, spread([row.rank_after for row in own]), short(_total(own))]
        table.add_row(Text(inert(component, 40) or "all"), *cells, style="" if component else "bold")
    console.print(table)
    if "/" in "".join(cells):  # the last row has the ranks of all
        console.print(Text("  rank: least/median/most", "dim"))


def _count(row: MergedModule) -> int:
    """How many inputs update it."""
    return sum(rank is not None for rank in row.ranks)


def _total(rows: Sequence[MergedModule]) -> float:
    known = [row for row in rows if not math.isnan(row.norm)]  # what is kept, and depends on the base, has none
    total = math.fsum(row.norm**2 for row in known)
    return math.sqrt(math.fsum((row.error * row.norm) ** 2 for row in known) / total) if total else 0.0


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
    common = [(cosine, i, j) for cosine, i, j in found if _in_common(report, component, i, j)]
    title, name = ("cosine" if component == next(iter(report.cosines)) else ""), inert(component, 40)
    if len(matrix) > _FEW_INPUTS and len(found) > 1:
        if not common:
            return [(title, f"{name}: no two inputs update a weight in common", "")]
        found = [min(common), max(common)] if len(common) > 1 else common
    names = letters(len(matrix))
    rows = []
    for cosine, i, j in found:
        pair = f"{name}: {names[i]} and {names[j]}"
        if (cosine, i, j) not in common:
            rows.append(("", f"{pair} update no weight in common", ""))
            continue
        turned = report.inputs[i].weight * report.inputs[j].weight < 0
        word = relation(-cosine if turned else cosine) + (" (one strength is negative)" if turned else "")
        shown = f"{cosine:.2f}".replace("-0.00", "0.00")
        rows.append(("", f"{pair} {shown}, {word}", ""))
    return [(title, *rows[0][1:]), *rows[1:]] if rows else []


def _in_common(report: MergeReport, component: str, i: int, j: int) -> bool:
    """Whether both inputs update one weight of the component."""
    return any(
        row.ranks[i] is not None and row.ranks[j] is not None for row in report.modules if row.component == component
    )


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
        text = f"{inert(row.title, 120)}: {kinds} as LoRA of rank {row.rank_after}, relative error {short(row.error)}"
        rows.append(("approximated", text, "yellow"))
    if len(changed) > _NAMED:
        worst = max(changed, key=lambda row: row.error)
        text = f"+{len(changed) - _NAMED} more; the worst is {inert(worst.title, 120)}: {short(worst.error)}"
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
    from loratool.report.lines import Name, numbers

    table = numbers("module", "ranks", "after", "error")
    table.columns[1].no_wrap, table.columns[1].overflow = len(report.inputs) <= _IN_A_ROW, "fold"
    for row in report.modules:
        before = " ".join("-" if rank is None else str(rank) for rank in row.ranks)
        table.add_row(Name(inert(row.title, 200)), before, str(row.rank_after), short(row.error))
    return table
