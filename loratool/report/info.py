"""`loratool info` as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.ops.inspect import ComponentInfo, Info, ModuleInfo
from loratool.report.inert import inert
from loratool.report.units import count, histogram, plural, size

if TYPE_CHECKING:
    from rich.console import Console

_VALUE = 300
_UNREAD = 8


def as_json(info: Info) -> dict[str, Any]:
    """The documented schema of `--json` (docs/json.md)."""
    data: dict[str, Any] = {
        "path": info.path,
        "layout": info.layout,
        "architecture": info.architecture,
        "architecture_score": info.architecture_score,
        "runner_up": dict(info.runner_up),
        "standard_width": info.standard_width,
        "standard_modules": info.standard_modules,
        "written_by": info.written_by,
        "families": dict(info.families),
        "modules": info.modules,
        "components": {
            name: {
                "modules": c.modules,
                "parameters": c.parameters,
                "families": dict(c.families),
                "ranks": {str(rank): n for rank, n in c.ranks.items()},
                "alphas": dict(c.alphas),
                "blocks": dict(c.blocks),
            }
            for name, c in info.components.items()
        },
        "ranks": {str(rank): n for rank, n in info.ranks.items()},
        "alphas": dict(info.alphas),
        "dtypes": dict(info.dtypes),
        "dora_modules": info.dora,
        "parameters": info.parameters,
        "size_bytes": info.size_bytes,
        "training": dict(info.training),
        "tags": [{"tag": tag, "count": n} for tag, n in info.tags],
        "trigger": info.trigger,
        "webui_tag": info.webui_tag,
        "metadata": dict(info.metadata),
        "side_files": dict(info.side_files),
        "embeddings": dict(info.embeddings),
        "unread_keys": list(info.unread_keys),
        "unread_families": dict(info.unread_families),
        "notes": list(info.notes),
    }
    if info.module_list:
        data["module_list"] = [module._asdict() for module in info.module_list]
    return data


def show(info: Info, console: Console, metadata: bool = False) -> None:
    """One file on one screen; `metadata` adds all of it, and a module list what was asked for with it."""
    from rich.table import Table
    from rich.text import Text

    console.print(Text(f"{inert(Path(info.path).name, 60)}  ", style="bold") + Text(size(info.size_bytes), style="dim"))
    console.print(Text("  " + _sentence(info)))
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 2), header_style="bold")
    for title, right in (("component", False), ("modules", True), ("params", True)):
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    table.add_column("rank", overflow="fold")
    table.add_column("alpha", overflow="fold")
    for name, part in info.components.items():
        table.add_row(
            Text(inert(name)),
            f"{part.modules:,}",
            count(part.parameters),
            histogram(part.ranks),
            histogram(part.alphas),
        )
    console.print(table)
    console.print()
    _facts(info, console)
    if info.module_list:
        _keys(info.module_list, console)
    if metadata:
        _metadata(info.metadata, info.side_files, console)


def _sentence(info: Info) -> str:
    kinds = " + ".join(f"{n} {family}" for family, n in info.families.items()) if len(info.families) > 1 else ""
    family = next(iter(info.families or info.unread_families), "none") if not kinds else "mixed"
    from loratool.core.registry import families

    known = families()
    title = known[family].title if family in known else family
    if info.dora:
        title += " with DoRA" if info.dora == info.modules else f" with DoRA on {info.dora}"
    dtypes = "/".join(info.dtypes)
    text = f"{title} for {info.architecture_title}, {info.layout} layout, {plural(info.modules, 'module')}"
    return f"{text}{f' ({kinds})' if kinds else ''}, {dtypes}"


def _facts(info: Info, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def row(title: str, value: str, style: str = "") -> None:
        table.add_row(f"  {title}", Text(value, style=style))

    if info.architecture_score:
        sure = f"{info.architecture}, {info.architecture_score:.0%} of the names known"
        if info.runner_up:
            sure += "; next " + ", ".join(f"{name} {share:.0%}" for name, share in info.runner_up.items())
        row("model", sure)
    elif info.runner_up:
        row("model", "nearest: " + ", ".join(f"{name} {share:.0%}" for name, share in info.runner_up.items()))
    if not info.standard_width:
        odd = info.modules - info.standard_modules
        if info.standard_modules:
            row("width", f"{plural(odd, 'module')} of another size than the standard model's", "yellow")
        else:
            row("width", "not the standard model's: a distilled, pruned or test model", "yellow")
    for name, part in info.components.items():
        row(f"{inert(name, 20)} in", inert(_blocks(part), 300))
    row("parameters", f"{count(info.parameters)} in {plural(info.modules, 'module')}")
    if info.written_by:
        row("written by", inert(info.written_by, 100))
    for title, value in info.training.items():
        row(title, inert(value, 120))
    if info.trigger:
        row("trigger", inert(info.trigger, 200))
    if info.tags:
        row("top tags", inert(", ".join(f"{tag} ({n})" for tag, n in info.tags), 400))
    row("WebUI tag", inert(info.webui_tag, 200), "bold")
    if info.embeddings:
        names = ", ".join(f"{inert(name, 60)} ({plural(n, 'vector')})" for name, n in info.embeddings.items())
        row("embeddings", names)
    if info.unread_keys:
        shown = ", ".join(inert(key, 100) for key in info.unread_keys[:_UNREAD])
        more = len(info.unread_keys) - _UNREAD
        row(
            "no modules",
            f"{plural(len(info.unread_keys), 'key')}: {shown}{f', +{more} more' if more > 0 else ''}",
            "yellow",
        )
    for family, n in info.unread_families.items():
        row("not read yet", f"{plural(n, 'module')} of the kind {family}", "yellow")
    for note in info.notes:
        row("note", inert(note), "yellow")
    console.print(table)


def _blocks(part: ComponentInfo) -> str:
    """`down_blocks 0-2 (72), mid_block (12)`: the blocks with modules, runs of numbers joined, and how many modules."""
    numbers: dict[str, list[int]] = {}
    modules: dict[str, int] = {}
    for block, count_ in part.blocks.items():
        name, _, number = block.rpartition(".")
        name, known = (name, [int(number)]) if name and number.isdigit() else (block, [])
        numbers.setdefault(name, []).extend(known)
        modules[name] = modules.get(name, 0) + count_
    return ", ".join(
        " ".join(filter(None, (name.rpartition(".")[2], _runs(sorted(numbers[name])), f"({modules[name]})")))
        for name in numbers
    )


def _runs(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _keys(modules: Sequence[ModuleInfo], console: Console) -> None:
    from rich.text import Text

    console.print()
    for module in modules:
        alpha = "none" if module.alpha is None else f"{module.alpha:g}"
        shape = "x".join(str(size or "?") for size in module.shape)
        dora = ", DoRA" if module.dora else ""
        rank = f"rank {module.rank}, alpha {alpha}, " if module.rank else ""
        facts = f"{module.family} {rank}{shape}, {module.dtype}{dora}"
        console.print(Text(inert(f"{module.component}.{' + '.join(module.targets)}  {facts}")), soft_wrap=True)


def _metadata(metadata: Mapping[str, str], sides: Mapping[str, str], console: Console) -> None:
    from rich.text import Text

    from loratool.ops import origin

    console.print()
    for title, entries in (("metadata", metadata), ("side files", sides)):
        for key, value in entries.items():
            text = f"(the return ticket, {len(value):,} characters)" if key == origin.ENTRY else inert(value)
            console.print(Text(f"{inert(key, 200)}: ", style="bold") + Text(text), soft_wrap=True)
        if not entries and title == "metadata":
            console.print("no metadata")


def show_many(infos: Sequence[Info], failures: int, console: Console) -> None:
    """One row per file, then totals."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("file", overflow="fold", ratio=1)
    for title in ("model", "layout", "kind", "modules", "rank", "size"):
        right = title in ("modules", "size")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for info in infos:
        table.add_row(
            Text(inert(Path(info.path).name, 80)),
            info.architecture,
            info.layout,
            "+".join(info.families) + (" dora" if info.dora else ""),
            f"{info.modules:,}",
            histogram(info.ranks, 2),
            size(info.size_bytes),
        )
    console.print(table)
    models: dict[str, int] = {}
    for info in infos:
        models[info.architecture] = models.get(info.architecture, 0) + 1
    by_model = ", ".join(f"{n} {name}" for name, n in models.items())
    total = f"{plural(len(infos), 'file')} ({by_model}), {size(sum(info.size_bytes for info in infos))}"
    console.print(Text(total + (f"; {failures} could not be read" if failures else ""), style="dim"))
