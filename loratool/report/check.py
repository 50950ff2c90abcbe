"""`loratool check` as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.ops.check import Check, Remedy
from loratool.ops.conformance import CHANGED, FULLY, NOT, Conformance, Fate, Reason
from loratool.report.inert import inert
from loratool.report.units import few, plural

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {FULLY: "bold green", NOT: "bold red"}


def as_json(check: Check, keys: bool = False) -> dict[str, Any]:
    """The documented schema of `--json` (docs/json.md)."""
    found = check.conformance
    adapter, program = found.adapter, found.program
    data = {
        "path": adapter.path,
        "layout": adapter.layout,
        "architecture": adapter.architecture.id,
        "program": program.id,
        "program_version": program.version,
        "verdict": found.verdict,
        "fully": found.fully,
        "modules": dict(found.counts),
        "reasons": [_reason(reason) for reason in found.reasons],
        "ignored_keys": [fate.key for fate in found.key_fates if fate.outcome == "ignored"],
        "refused_keys": [fate.key for fate in found.key_fates if fate.outcome == "refused"],
        "unread_families": dict(adapter.unread_families),
        "remedy": None if check.remedy is None else _remedy(check.remedy),
        "notes": [*adapter.notes, *program.notes],
    }
    if keys:
        data["module_list"] = [_fate(fate) for fate in found.fates]
    return data


def _reason(reason: Reason) -> dict[str, Any]:
    return {
        "text": reason.text,
        "outcome": reason.outcome,
        "modules": reason.modules,
        "tensors": reason.tensors,
        "examples": list(reason.examples),
        "strengths": None if reason.strengths is None else list(reason.strengths),
    }


def _remedy(remedy: Remedy) -> dict[str, Any]:
    return {
        "command": remedy.command or None,
        "advice": remedy.advice or None,
        "exact": remedy.exact,
        "leaves_out": list(remedy.leaves_out),
    }


def _fate(fate: Fate) -> dict[str, Any]:
    return {
        "component": fate.component,
        "targets": list(fate.targets),
        "key": fate.key,
        "outcome": fate.outcome,
        "strength": fate.strength,
        "drops": list(fate.drops),
        "reasons": list(fate.reasons),
    }


def show(checks: Sequence[Check], console: Console, keys: bool = False) -> None:
    """What each program makes of the file, why, and what helps."""
    from rich.text import Text

    adapter = checks[0].conformance.adapter
    console.print(Text(inert(Path(adapter.path).name, 60), "bold"))
    about = f"{adapter.architecture.title}, {adapter.layout} layout, {plural(len(adapter.modules), 'module')}"
    console.print(Text(f"  {inert(about)}"))
    for note in adapter.notes:
        console.print(Text(f"  note: {inert(note)}", "yellow"))
    for check in checks:
        console.print()
        _show_one(check, console, keys)


def _show_one(check: Check, console: Console, keys: bool) -> None:
    from rich.text import Text

    from loratool.report.lines import facts

    found = check.conformance
    title = Text(f"{found.program.title}  ", "bold") + Text(found.verdict, _STYLES.get(found.verdict, "bold yellow"))
    console.print(title)
    rows = [("rules", f"of {found.program.title} {found.program.version}", "")]
    rows += [(outcome, plural(n, "module"), "") for outcome, n in found.counts.items() if n]
    for reason in found.reasons:
        rows.append(("because", _why(reason), "yellow"))
    rows += _help(check.remedy, found)
    rows += [("note", note, "dim") for note in found.program.notes]
    console.print(facts(rows))
    if keys:
        _list(found, console)


def _why(reason: Reason) -> str:
    counted = [
        plural(number, word) for number, word in ((reason.modules, "module"), (reason.tensors, "tensor")) if number
    ]
    strength = ""
    if reason.strengths is not None:
        least, greatest = (f"{value:.3g}" for value in reason.strengths)
        strength = f", strength x{least}" + ("" if least == greatest else f" to x{greatest}")
    examples = few((inert(name, 80) for name in reason.examples), 2)
    where = f" ({examples})" if examples else ""
    return f"{inert(reason.text)}: {' and '.join(counted)} {reason.outcome}{strength}{where}"


def _help(remedy: Remedy | None, found: Conformance) -> list[tuple[str, str, str]]:
    if found.fully:
        return []
    if remedy is None:
        return [("help", "there is no command that makes it load fully", "")]
    rows = [("help", inert(text), "bold") for text in (remedy.advice, remedy.command) if text]
    if not remedy.exact:
        rows.append(("", "not exact: modules are rewritten as LoRA, with the error told", ""))
    if remedy.leaves_out:
        rows.append(("", f"leaves out {plural(len(remedy.leaves_out), 'tensor')} of no module", ""))
    return rows


def _list(found: Conformance, console: Console) -> None:
    from loratool.report.lines import Name, numbers

    table = numbers("module", "outcome", "strength")
    for fate in found.fates:
        more = f" (+{len(fate.targets) - 1})" if len(fate.targets) > 1 else ""
        name = inert(f"{fate.component}.{fate.targets[0]}{more}", 200)
        table.add_row(Name(name), fate.outcome, f"{fate.strength:.3g}" if fate.outcome == CHANGED else "")
    console.print(table)
