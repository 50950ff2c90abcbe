"""`loratool unbake`: a checkpoint without what was baked into it."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from loratool.cli._common import err, out, print_json, told_plainly
from loratool.cli._inputs import asked_for
from loratool.core.errors import UsageError


def _option(flag: str, metavar: str | None, text: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel="How to work and what to tell")


def unbake(
    baked: Annotated[str, typer.Argument(metavar="BAKED", help="What `loratool bake` wrote: a file or a folder.")],
    inputs: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="LORA[:STRENGTH]...", help="Without --undo: what to subtract, as it was baked."),
    ] = None,
    output: Annotated[
        Optional[str], typer.Option("-o", "--output", metavar="BASE", help="Required: the base, written anew.")
    ] = None,
    undo: Annotated[
        Optional[str],
        typer.Option("--undo", metavar="FILE", help="What `bake --undo` wrote: gives the base back bit for bit."),
    ] = None,
    weights: Annotated[
        Optional[str], typer.Option("--weights", metavar="W,W,...", help="The strengths of all LoRAs: 0.7,0.3.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    device: Annotated[
        str, _option("--device", "DEVICE", "auto, cpu, cuda, cuda:N, or several; auto takes a GPU if there is one.")
    ] = "auto",
    verify: Annotated[
        bool, _option("--verify/--no-verify", None, "Check what is subtracted; with --undo, sha256 is always checked.")
    ] = True,
    as_json: Annotated[bool, _option("--json", None, "Print the report as JSON.")] = False,
) -> None:
    """Take LoRAs out of a checkpoint again.

    With the undo file the result is the base, bit for bit, whichever device baked it; its sha256 proves it. Without one
    the updates are subtracted, which is nearly the base: the report says how nearly. Exit 1 if it is not the base.
    """
    from loratool.ops.bake_task import Options
    from loratool.ops.devices import devices_named
    from loratool.ops.unbake_file import subtract_file, unbake_file
    from loratool.report import unbake as report
    from loratool.report.progress import progress as bars

    with told_plainly():
        if output is None:
            raise UsageError("-o is missing: where to write the base")
        if undo is not None and inputs:
            raise UsageError("--undo knows what was baked", hint="name the undo file, or the LoRA files, not both")
        if undo is not None and weights is not None:
            raise UsageError("--weights are for LoRA files; --undo knows the strengths")
        devices = tuple(devices_named(device))
        with bars(err()) as progress:
            if undo is not None:
                done = unbake_file(baked, undo, output, devices=devices, overwrite=overwrite, progress=progress)
            else:
                asked = asked_for(inputs or [], weights, [])
                options = Options(devices=devices, overwrite=overwrite, verify=verify)
                done = subtract_file(baked, asked, output, options, progress=progress)
        if as_json:
            print_json(report.as_json(done))
        else:
            report.show(done, out())
