"""`loratool validate` as text, JSON and SARIF 2.1.0."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool import __version__
from loratool.core.finding import ERROR, NOTE, SEVERITIES, WARNING, Finding
from loratool.core.registry import checks
from loratool.ops.validate import Validated
from loratool.report.inert import inert
from loratool.report.units import plural, size

if TYPE_CHECKING:
    from rich.console import Console

LIMIT = 64 * 1024
"""Characters that are printed, where not all was asked for."""

WIDTH = 80

_OF_ONE = 5
_FRAME = 400
"""Characters of a result without findings."""

_MESSAGE, _KEY = 400, 120
_STYLES = {ERROR: "bold red", WARNING: "yellow", NOTE: "dim"}
_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_DOCS = "docs/findings.md"


# ---------------------------------------------------------------- text


def show(results: Sequence[Validated], console: Console, everything: bool = False) -> None:
    """The findings of each file by code, the worst first; at most 64 KiB unless `everything` is asked for."""
    from rich.text import Text

    printed, left, files = 0, 0, 0
    for result in results:
        if not everything and printed > LIMIT - 4096:
            files += 1
            continue
        printed += 120
        console.print(Text(f"{inert(Path(result.path).name or result.path, 60)}  ", style="bold") + _verdict(result))
        for lines, style in _groups(result, everything):
            length = sum(len(line) + 1 for line in lines)
            if not everything and printed + length > LIMIT - 2048:
                left += 1
                continue
            printed += length
            for number, line in enumerate(lines):
                _line(line, style if not number else "", console)
    if left:
        console.print(Text(f"{left} more kinds of findings are not shown; --all shows them", style="dim"))
    if files:
        console.print(Text(f"{files} more files are not shown; --all shows them", style="dim"))
    if len(results) > 1:
        console.print(Text(_total(results), style="dim"))


def _line(line: str, style: str, console: Console) -> None:
    """One line; what does not fit goes on further in."""
    from rich.padding import Padding
    from rich.text import Text

    text = line.lstrip(" ")
    indent = len(line) - len(text)
    width = min(console.width, WIDTH)
    first, *rest = Text(text, style=style).wrap(console, max(width - indent, 8), overflow="fold")
    console.print(Padding(first, (0, 0, 0, indent)))
    if rest:
        again = Text(" ").join(rest).wrap(console, max(width - indent - 2, 8), overflow="fold")
        for part in again:
            console.print(Padding(part, (0, 0, 0, indent + 2)))


def _verdict(result: Validated) -> Any:
    from rich.text import Text

    counts = [plural(result.count(severity), severity) for severity in SEVERITIES if result.count(severity)]
    read = "" if result.deep else ", numbers not read"
    words = ", ".join(counts) or "nothing wrong"
    style = "bold red" if result.count(ERROR) else "yellow" if result.count(WARNING) else "green"
    return Text(words, style=style) + Text(f"  {size(result.size_bytes)}{read}", style="dim")


def _groups(result: Validated, everything: bool) -> Iterator[tuple[list[str], str]]:
    """The lines of each kind of finding: its first cases, and how many more there are."""
    ordered = sorted(result.findings, key=lambda one: (SEVERITIES.index(one.severity), one.code))
    for (severity, code), group in groupby(ordered, key=lambda one: (one.severity, one.code)):
        cases = list(group)
        shown = cases if everything else cases[:_OF_ONE]
        lines = [f"  {severity}: {code}"]
        lines += [f"    {line}" for case in shown for line in _case(result, case)]
        more = len(cases) - len(shown) + result.more.get(code, 0)
        if more:
            lines.append(f"    and {more:,} more")
        hints = dict.fromkeys(inert(case.hint, 200) for case in shown if case.hint)
        lines += [f"    -> {hint}" for hint in hints]
        yield lines, _STYLES[severity]


def _case(result: Validated, case: Finding) -> Iterator[str]:
    where = []
    if case.file and case.file != result.path:
        where.append(inert(_below(case.file, result.path), _KEY))
    if case.key is not None:
        where.append(inert(case.key, _KEY))
    message = inert(case.message, _MESSAGE)
    at = f" (byte {case.byte:,})" if case.byte is not None else ""
    yield f"{': '.join([*where, message])}{at}"


def _below(file: str, folder: str) -> str:
    prefix = folder.rstrip("/") + "/"
    return file.removeprefix(prefix)


def _total(results: Sequence[Validated]) -> str:
    bad = sum(result.failed() for result in results)
    counts = [plural(sum(one.count(severity) for one in results), severity) for severity in SEVERITIES]
    return f"{plural(len(results), 'file')}, {bad} with errors; {', '.join(counts)}"


# ---------------------------------------------------------------- JSON


def as_json(results: Sequence[Validated], everything: bool = False) -> list[dict[str, Any]]:
    """The documented schema of `--json` (docs/json.md); at most 64 KiB of findings unless `everything` is asked for."""
    room = LIMIT - 1024 - sum(len(json.dumps(result.path)) + _FRAME for result in results)
    data = []
    for result in results:
        kept, more = [], dict(result.more)
        for finding in result.findings:
            entry = _entry(finding)
            room -= len(json.dumps(entry, indent=2)) + 64
            if room > 0 or everything:
                kept.append(entry)
            else:
                more[finding.code] = more.get(finding.code, 0) + 1
        data.append(
            {
                "path": result.path,
                "ok": not result.failed(),
                "errors": result.count(ERROR),
                "warnings": result.count(WARNING),
                "notes": result.count(NOTE),
                "deep": result.deep,
                "size_bytes": result.size_bytes,
                "findings": kept,
                "more": more,
            }
        )
    return data


def _entry(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "severity": finding.severity,
        "message": inert(finding.message, 2000),
        "file": finding.file,
        "key": None if finding.key is None else inert(finding.key, 1000),
        "byte": finding.byte,
        "hint": finding.hint or None,
    }


# ---------------------------------------------------------------- SARIF


def as_sarif(results: Sequence[Validated], everything: bool = False) -> dict[str, Any]:
    """A SARIF 2.1.0 log (OASIS): one run, one rule for each code that was found."""
    known = {code.id: code for check in checks().values() for code in check.codes.values()}
    used = dict.fromkeys(finding.code for result in results for finding in result.findings)
    index = {code: number for number, code in enumerate(used)}
    rules = [
        {
            "id": code,
            "shortDescription": {"text": known[code].title},
            "helpUri": f"{_DOCS}#{code}",
            "defaultConfiguration": {"level": known[code].severity},
        }
        for code in used
    ]
    room = LIMIT - 4096 - len(json.dumps(rules, indent=2))
    kept, left = [], sum(count for result in results for count in result.more.values())
    for result in results:
        for finding in result.findings:
            entry = _sarif_result(finding, index[finding.code])
            room -= len(json.dumps(entry, indent=2)) + 512
            if room > 0 or everything:
                kept.append(entry)
            else:
                left += 1
    driver = {"name": "loratool", "version": __version__, "rules": rules}
    run: dict[str, Any] = {"tool": {"driver": driver}, "results": kept, "properties": {"more": left}}
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _sarif_result(finding: Finding, rule: int) -> dict[str, Any]:
    uri = Path(finding.file or ".").as_posix()
    from urllib.parse import quote

    physical: dict[str, Any] = {"artifactLocation": {"uri": quote(uri, safe="/")}}
    if finding.byte is not None:
        physical["region"] = {"byteOffset": finding.byte}
    location: dict[str, Any] = {"physicalLocation": physical}
    if finding.key is not None:
        location["logicalLocations"] = [{"fullyQualifiedName": inert(finding.key, 1000)}]
    text = inert(finding.message, 2000) + (f"; {finding.hint}" if finding.hint else "")
    return {
        "ruleId": finding.code,
        "ruleIndex": rule,
        "level": finding.severity,
        "message": {"text": text},
        "locations": [location],
    }
