"""`loratool info`: what a LoRA file is."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from loratool.cli._common import complain, out, print_json, told_plainly
from loratool.core.errors import LoratoolError, UsageError


def info(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="LoRA files, PEFT folders, or folders of them.")
    ],
    keys: Annotated[bool, typer.Option("--keys", help="List every module: names, rank, alpha, shape, dtype.")] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="Show all metadata.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    architecture: Annotated[
        Optional[str],
        typer.Option("--architecture", metavar="ID", help="Take the model as given (sd15, sdxl, flux, ...)."),
    ] = None,
) -> None:
    """Show what a LoRA file is: layout, model, modules, ranks, training facts.

    Reads the header only. Exit 1 if a file is no LoRA or is broken.
    """
    from loratool.files.bundle import adapters_in
    from loratool.ops.inspect import inspect
    from loratool.report import info as report

    infos, failures, found = [], 0, []
    with told_plainly():
        files = [adapter for place in files for adapter in adapters_in(place)]
        for file in files:
            try:
                infos.append(inspect(file, architecture, keys))
                found.append(report.as_json(infos[-1]))
            except UsageError:
                raise
            except LoratoolError as error:
                failures += 1
                complain(error)
                found.append({"path": file, "error": str(error)})
        if as_json:
            print_json(found[0] if len(files) == 1 else found)
        elif len(files) == 1 and infos:
            report.show(infos[0], out(), metadata)
        elif infos:
            console = out()
            report.show_many(infos, failures, console)
            if keys or metadata:
                for one in infos:
                    console.print()
                    report.show(one, console, metadata)
    if failures:
        raise typer.Exit(1)
