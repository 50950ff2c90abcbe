"""`loratool convert`: a LoRA in another program's spelling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from loratool.cli._common import err, out, print_json, told_plainly
from loratool.core.errors import UsageError

if TYPE_CHECKING:
    from loratool.core.architecture import Architecture


def convert(
    file: Annotated[str, typer.Argument(metavar="IN", help="A LoRA file or a PEFT folder.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="The new file (peft: a folder).")],
    to: Annotated[
        Optional[str], typer.Option("--to", metavar="LAYOUT", help="kohya, diffusers, peft or comfyui.")
    ] = None,
    program: Annotated[
        Optional[str],
        typer.Option("--for", metavar="PROGRAM", help="Choose the layout that a program loads fully (comfyui, ...)."),
    ] = None,
    dtype: Annotated[
        Optional[str], typer.Option("--dtype", metavar="DTYPE", help="Cast the factors: fp32, fp16, bf16, ...")
    ] = None,
    base: Annotated[
        Optional[str], typer.Option("--base", metavar="PATH", help="A checkpoint of the model, to take its names from.")
    ] = None,
    architecture: Annotated[
        Optional[str],
        typer.Option("--architecture", metavar="ID", help="Take the model as given (sd15, sdxl, flux, ...)."),
    ] = None,
    approximate: Annotated[
        Optional[str],
        typer.Option(
            "--approximate",
            metavar="FAMILY",
            help="lora: rewrite modules that LAYOUT cannot express as LoRA (needs --rank or --energy).",
        ),
    ] = None,
    rank: Annotated[Optional[int], typer.Option("--rank", metavar="N", help="Rank of approximated modules.")] = None,
    energy: Annotated[
        Optional[float], typer.Option("--energy", metavar="E", help="Share of the squared norm that they keep, 0 to 1.")
    ] = None,
    drop_extras: Annotated[bool, typer.Option("--drop-extras", help="Leave out tensors that are no modules.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    verify: Annotated[bool, typer.Option(help="Read the output back and compare every update.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a LoRA in another layout, with proof that its update is the same.

    The output is read back and every module compared before it gets its name. Converting back gives the original
    file's keys, values and metadata. Exit 1 if something cannot be expressed, is not the same, or would not be loaded
    fully by the program that --for names.
    """
    from loratool.core.registry import layouts, programs
    from loratool.files.bundle import check_output
    from loratool.ops.approximate import check_options
    from loratool.ops.check import program_named
    from loratool.ops.convert import dtype_code
    from loratool.ops.convert_file import convert_file
    from loratool.ops.open import layout_named
    from loratool.report import convert as report
    from loratool.report.progress import progress as bars

    with told_plainly():
        if (to is None) == (program is None):
            raise UsageError("say either --to LAYOUT or --for PROGRAM")
        target = None if program is None else programs()[program_named(program)]
        layout = None if to is None else layouts()[layout_named(to)]
        code = dtype_code(dtype) if dtype else None
        wish = check_options(approximate, rank, energy)
        if base is not None:
            check_output(output, [base], layout is not None and layout.folder, overwrite)
        with bars(err()) as progress:
            done = convert_file(
                file,
                None if layout is None else layout.id,
                output,
                program=target,
                architecture=_model(base, architecture),
                dtype=code,
                approximate=wish,
                drop_extras=drop_extras,
                overwrite=overwrite,
                verify=verify,
                progress=progress,
            )
        if as_json:
            print_json(report.as_json(done))
        else:
            report.show(done, out())


def _model(base: str | None, architecture: str | None) -> Architecture | str | None:
    """What the options say the model is; None leaves it to be detected."""
    if base is None:
        return architecture
    if architecture is not None:
        raise UsageError("--base and --architecture both say what the model is", hint="name one of them")
    from loratool.ops.base import architecture_of

    return architecture_of(base)
