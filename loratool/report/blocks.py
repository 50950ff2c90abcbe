"""`loratool blocks` as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.core.blocks import runs
from loratool.ops.blocks import Block, BlockTable
from loratool.report.inert import inert
from loratool.report.units import plural, size

if TYPE_CHECKING:
    from rich.console import Console


def as_json(table: BlockTable) -> dict[str, Any]:
    """The documented schema of `--json` (docs/json.md)."""
    adapter = table.adapter
    return {
        "path": adapter.path,
        "layout": adapter.layout,
        "architecture": adapter.architecture.id,
        "modules": len(adapter.modules),
        "dora_modules": _dora(table),
        "norm": _finite(_norm(table)),
        "blocks": [_block(block) for block in table.blocks],
        "presets": list(table.presets),
        "lists": [list(labels) for labels in table.lists],
        "fitting": None if table.fitting is None else list(table.fitting),
        "unread_families": dict(adapter.unread_families),
        "notes": list(adapter.notes),
    }


def _block(block: Block) -> dict[str, Any]:
    return {
        "label": block.label,
        "names": list(block.names),
        "present": list(block.present),
        "modules": block.modules,
        "norm": _finite(block.norm),
        "share": _finite(block.share),
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON has no NaN


def _dora(table: BlockTable) -> int:
    return sum(module.magnitude is not None for module in table.adapter.modules)


def _norm(table: BlockTable) -> float:
    return math.sqrt(sum(block.norm**2 for block in table.blocks))


def show(table: BlockTable, console: Console) -> None:
    """The blocks in model order, then what `--blocks` takes for this model."""
    from rich.table import Table
    from rich.text import Text

    adapter = table.adapter
    console.print(Text(f"{inert(Path(adapter.path).name, 60)}  ", "bold") + Text(size(adapter.size_bytes), "dim"))
    about = f"{adapter.architecture.title}, {adapter.layout} layout, {plural(len(adapter.modules), 'module')}"
    console.print(Text(f"  {inert(about)}"))
    console.print()
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 2), header_style="bold")
    labelled = bool(table.lists)  # else a label is the name itself
    if labelled:
        grid.add_column("block", no_wrap=True)
    grid.add_column("names", overflow="fold")
    for title in ("modules", "norm", "share"):
        grid.add_column(title, justify="right", no_wrap=True)
    for block in table.blocks:
        cells = [Text(inert(block.label))] if labelled else []
        names = Text(inert(_short(block.present or block.names), 300))
        numbers = ["-", "-", "-"]
        if block.modules:
            numbers = [f"{block.modules:,}", f"{block.norm:#.3g}".rstrip("."), f"{block.share:.1%}"]
        grid.add_row(*cells, names, *numbers, style="" if block.modules else "dim")
    console.print(grid)
    console.print()
    _remarks(table, console)
    _choices(table, console)


def _short(names: Sequence[str]) -> str:
    """Names behind one another, each without the parts that all of them share with the first."""
    split = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    return ", ".join(".".join(parts[shared if index else 0 :]) for index, parts in enumerate(split))


def _remarks(table: BlockTable, console: Console) -> None:
    from rich.text import Text

    adapter = table.adapter
    lines = [
        f"{plural(n, 'module')} of the kind {family} cannot be read yet and count nowhere"
        for family, n in adapter.unread_families.items()
    ]
    if dora := _dora(table):
        lines.append(f"{plural(dora, 'module')} with DoRA: the norm is that of the low-rank part alone")
    based = sum(not module.family.additive for module in adapter.modules)
    if based:
        lines.append(f"{plural(based, 'module')} whose update depends on the weight: no norm is known without it")
    for line in (*lines, *adapter.notes):
        console.print(Text(f"  note: {inert(line)}", "yellow"))
    if lines or adapter.notes:
        console.print()


def _choices(table: BlockTable, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("  presets", " ".join(table.presets))
    for labels in table.lists:
        grid.add_row(f"  {len(labels)} values", runs(labels))
    some = next((block for block in table.blocks if block.modules), None)
    if some is not None:
        grid.add_row("  patterns", Text(inert(f'in a YAML file: "{some.present[0]}": 0.5', 300)))
    console.print(grid)
    if table.fitting is not None:
        console.print()
        console.print(Text("to weigh them, copy and change:", "dim"))
        # One line whatever the width: it is there to be copied.
        console.print(Text(f"--blocks {','.join('1' * len(table.fitting))}", "bold"), soft_wrap=True)
