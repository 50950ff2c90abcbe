"""`loratool blocks`: which blocks of a model a LoRA changes, and how much."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from loratool.cli._common import out, print_json, told_plainly


def blocks(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A LoRA file or a PEFT folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    architecture: Annotated[
        Optional[str],
        typer.Option("--architecture", metavar="ID", help="Take the model as given (sd15, sdxl, flux, ...)."),
    ] = None,
) -> None:
    """Show the blocks of a LoRA with their names and norms, and the lists of block weights that fit it.

    Reads every factor. Exit 1 if the file is no LoRA or is broken.
    """
    from loratool.ops.blocks import blocks_of
    from loratool.ops.open import open_adapter
    from loratool.report import blocks as report

    with told_plainly():
        table = blocks_of(open_adapter(file, architecture=architecture))
        if as_json:
            print_json(report.as_json(table))
        else:
            report.show(table, out())
