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
        Optional[str],
        typer.Option(
            "--to",
            metavar="LAYOUT",
            help="kohya, diffusers, peft, comfyui, onetrainer, omi, musubi, lycoris, ai-toolkit, mlx or gguf. "
            "Without it a PyTorch file (.pt, .bin, .ckpt) becomes safetensors.",
        ),
    ] = None,
    program: Annotated[
        Optional[str],
        typer.Option("--for", metavar="PROGRAM", help="Choose the layout that a program loads fully (comfyui, ...)."),
    ] = None,
    dtype: Annotated[
        Optional[str], typer.Option("--dtype", metavar="DTYPE", help="Cast the factors: fp32, fp16, bf16, ...")
    ] = None,
    base: Annotated[
        Optional[str],
        typer.Option("--base", metavar="PATH", help="A checkpoint of the model, for its names and weights."),
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
            help="lora: rewrite modules of other families as LoRA (needs --rank or --energy).",
        ),
    ] = None,
    rank: Annotated[Optional[int], typer.Option("--rank", metavar="N", help="Rank of approximated modules.")] = None,
    energy: Annotated[
        Optional[float], typer.Option("--energy", metavar="E", help="Share of the squared norm that they keep, 0 to 1.")
    ] = None,
    unpack: Annotated[
        Optional[int], typer.Option("--unpack", metavar="N", help="Take the LoRA of rank N out of a DyLoRA.")
    ] = None,
    drop_extras: Annotated[bool, typer.Option("--drop-extras", help="Leave out tensors that are no modules.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    verify: Annotated[bool, typer.Option(help="Read the output back and compare every update.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a LoRA in another layout, with proof that its update is the same.

    The output is read back and every module compared before it gets its name. Converting back gives the original
    file's keys, values and metadata. Exit 1 if something cannot be expressed, is not the same, or would not be loaded
    fully by the program that --for names. Without --to and --for, any PyTorch file is written as safetensors: the same
    keys, the same bytes.
    """
    from loratool.core.registry import layouts, programs
    from loratool.files.bundle import check_apart
    from loratool.ops.approximate import check_options
    from loratool.ops.check import program_named
    from loratool.ops.convert import dtype_code
    from loratool.ops.convert_file import convert_file
    from loratool.ops.open import layout_named
    from loratool.report import convert as report
    from loratool.report.progress import progress as bars

    if to is None and program is None:
        given: dict[str, object] = {
            "--dtype": dtype,
            "--base": base,
            "--architecture": architecture,
            "--approximate": approximate,
        }
        given |= {"--rank": rank, "--energy": energy, "--unpack": unpack, "--drop-extras": drop_extras or None}
        _resave(file, output, [name for name, value in given.items() if value is not None], overwrite, verify, as_json)
        return
    with told_plainly():
        if to is not None and program is not None:
            raise UsageError("say either --to LAYOUT or --for PROGRAM")
        target = None if program is None else programs()[program_named(program)]
        layout = None if to is None else layouts()[layout_named(to)]
        code = dtype_code(dtype) if dtype else None
        wish = check_options(approximate, rank, energy)
        if base is not None:
            check_apart(output, [base])
        with bars(err()) as progress:
            done = convert_file(
                file,
                None if layout is None else layout.id,
                output,
                program=target,
                architecture=_model(base, architecture),
                dtype=code,
                approximate=wish,
                base=base,
                unpack=unpack,
                drop_extras=drop_extras,
                overwrite=overwrite,
                verify=verify,
                progress=progress,
            )
        if as_json:
            print_json(report.as_json(done))
        else:
            report.show(done, out())


def _resave(file: str, output: str, given: list[str], overwrite: bool, verify: bool, as_json: bool) -> None:
    """A PyTorch file as safetensors; `given` are options that mean nothing then."""
    from loratool.ops.resave import resave_file
    from loratool.report import resave as report
    from loratool.report.progress import progress as bars

    with told_plainly():
        if given:
            raise UsageError(f"{given[0]} needs --to", hint="name a layout with --to, or leave it out")
        with bars(err()) as progress:
            done = resave_file(file, output, overwrite=overwrite, verify=verify, progress=progress)
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
