"""`loratool replay`: a merged or resized LoRA made again from its recipe."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from loratool.cli._common import err, out, print_json, told_plainly


def replay(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What loratool merged or resized: a file or folder.")],
    output: Annotated[
        Optional[str],
        typer.Option("-o", "--output", metavar="NEW", help="Keep what is made; else it is compared only."),
    ] = None,
    folders: Annotated[
        Optional[list[str]],
        typer.Option("--from", metavar="FOLDER", help="Look for the inputs here, too. May be repeated."),
    ] = None,
    device: Annotated[
        Optional[str],
        typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N; else the recipe's kind."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing NEW.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make a LoRA again from the recipe in its header, and compare it with what is there.

    Inputs are found by name or, where they were renamed, by their sha256. Exit 0 if every byte is the same, 1 if the
    result differs or an input is missing.
    """
    from loratool.ops.devices import device_named
    from loratool.ops.replay import replay_file
    from loratool.report import replay as report
    from loratool.report.progress import progress as bars

    with told_plainly():
        where = device_named(device) if device is not None else None
        with bars(err()) as progress:
            done = replay_file(
                file, output, folders=folders or [], device=where, overwrite=overwrite, progress=progress
            )
        if as_json:
            print_json(report.as_json(done))
        else:
            report.show(done, out())
        if done.comparison.result != "identical":
            raise typer.Exit(1)
