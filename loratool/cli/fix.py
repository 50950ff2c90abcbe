"""`loratool fix`: a LoRA without the faults that its producer is known for."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from loratool.cli._common import out, print_json, told_plainly
from loratool.core.errors import UsageError


def fix(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A LoRA file or a PEFT folder.")],
    output: Annotated[Optional[str], typer.Option("-o", "--output", metavar="OUT", help="The new file.")] = None,
    only: Annotated[
        Optional[list[str]],
        typer.Option("--only", metavar="CODE", help="Fix this only (scale-twice, wrong-dim, ...); may be repeated."),
    ] = None,
    program: Annotated[
        Optional[str],
        typer.Option("--for", metavar="PROGRAM", help="Leave out text encoder modules that it does not load."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be fixed; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Mend known faults of trainers, converters and mergers, and leave the rest as it is.

    What is found is told by code, as `validate` does. Exit 0 if all of it was fixed or nothing had to be, else 1.
    """
    from loratool.core.registry import programs
    from loratool.ops.check import program_named
    from loratool.ops.fix import fix_file
    from loratool.report import fix as report

    with told_plainly():
        if (output is None) != dry_run:
            raise UsageError("say either -o OUT or --dry-run")
        target = None if program is None else programs()[program_named(program)]
        done = fix_file(file, output, only=only or (), program=target, overwrite=overwrite)
        if as_json:
            print_json(report.as_json(done))
        else:
            report.show(done, out())
    if done.left:
        raise typer.Exit(1)
