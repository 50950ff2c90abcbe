"""`loratool validate`: what is wrong with a file or folder."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from loratool.cli._common import out, print_json, told_plainly
from loratool.core.errors import UsageError


def validate(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE_OR_FOLDER...", help="LoRA files, PEFT folders, checkpoints, or folders of them."),
    ],
    base: Annotated[
        Optional[str],
        typer.Option("--base", metavar="CHECKPOINT", help="Compare names and shapes with this model."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    as_sarif: Annotated[bool, typer.Option("--sarif", help="Print them as SARIF 2.1.0.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 for warnings, too.")] = False,
    deep: Annotated[
        Optional[bool],
        typer.Option("--deep/--no-deep", help="Read the numbers (by default, up to 1 GiB).", show_default=False),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Print every finding: more than 64 KB, maybe.")] = False,
) -> None:
    """Find what is wrong with LoRA files: damage, tricks, broken modules, NaN.

    Nothing in a file is run, imported or believed. Exit 0 if there are no errors, 1 if there are.
    """
    from loratool.ops.validate import validate as run
    from loratool.report import validate as report

    with told_plainly():
        if as_json and as_sarif:
            raise UsageError("--json and --sarif are two forms of one thing", hint="name one of them")
        place = None
        if base is not None:
            from loratool.ops.bases import resolve_base

            place = resolve_base(base).path
        results = [result for file in files for result in run(file, base=place, deep=deep)]
        if as_json:
            print_json(report.as_json(results, everything))
        elif as_sarif:
            print_json(report.as_sarif(results, everything))
        else:
            report.show(results, out(), everything)
    if any(result.failed(strict) for result in results):
        raise typer.Exit(1)
