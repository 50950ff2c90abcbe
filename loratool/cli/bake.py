"""`loratool bake`: LoRAs added to a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from loratool.cli._common import err, out, print_json, told_plainly
from loratool.cli._inputs import asked_for, asked_in, files_of
from loratool.core.errors import UsageError

if TYPE_CHECKING:
    from loratool.ops.inputs import Asked


_HOW = "How to compute and store"
_WORK = "How to work and what to tell"


def _option(flag: str, metavar: str | None, text: str, panel: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel=panel)


def bake(
    inputs: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="LORA[:STRENGTH]...", help="LoRA files or PEFT folders, each with its strength, 1 if none is given."
        ),
    ] = None,
    base: Annotated[
        Optional[str],
        typer.Option(
            "--base",
            metavar="BASE",
            help="Required: the checkpoint, a file or a model's folder; or a name, as sd15 (see `loratool bases`).",
        ),
    ] = None,
    output: Annotated[
        Optional[str],
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Required, except with --dry-run: the new file (or folder).",
        ),
    ] = None,
    weights: Annotated[
        Optional[str], typer.Option("--weights", metavar="W,W,...", help="The strengths of all LoRAs: 0.7,0.3.")
    ] = None,
    blocks: Annotated[
        Optional[list[str]],
        typer.Option(
            "--blocks",
            metavar="SPEC",
            help="Weights of blocks: a preset (ALL0.5), a list (1,0,0.5,...) or a .yaml file; "
            "once for all LoRAs, or once for each.",
        ),
    ] = None,
    prompt: Annotated[
        Optional[str],
        typer.Option("--prompt", metavar="TEXT", help="LoRAs and strengths as in a WebUI prompt: `<lora:name:0.8>`."),
    ] = None,
    architecture: Annotated[
        Optional[str],
        typer.Option("--architecture", metavar="ID", help="Take the LoRAs' model as given (sd15, sdxl, flux, ...)."),
    ] = None,
    allow_unmatched: Annotated[
        bool, typer.Option("--allow-unmatched", help="Go on where a module has no place in the checkpoint.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch a base with a known name that is not on this machine.")
    ] = False,
    undo: Annotated[
        Optional[str],
        typer.Option("--undo", metavar="FILE", help="Also write what gives the base back bit for bit (unbake)."),
    ] = None,
    dtype: Annotated[
        Optional[str], _option("--dtype", "DTYPE", "Cast all weights to fp32, fp16, bf16, fp8_e4m3, ...", _HOW)
    ] = None,
    spelling: Annotated[
        Optional[str],
        _option("--format", "NAME", "Write one file with the names of another program: ldm, sgm, bfl, comfyui.", _HOW),
    ] = None,
    rounding: Annotated[
        str, _option("--rounding", "HOW", "nearest, or stochastic: keeps updates that are too small for a dtype.", _HOW)
    ] = "nearest",
    seed: Annotated[int, _option("--seed", "N", "Seed of stochastic rounding.", _HOW)] = 0,
    dora_norm: Annotated[
        str,
        _option("--dora-norm", "NORM", "What DoRA divides by: paper (norm of W + delta) or comfyui (norm of W).", _HOW),
    ] = "paper",
    device: Annotated[
        str,
        _option(
            "--device",
            "DEVICE",
            "auto, cpu, cuda, cuda:N, or several (cuda:0,cuda:1); auto takes a GPU if there is one.",
            _WORK,
        ),
    ] = "auto",
    dry_run: Annotated[bool, _option("--dry-run", None, "Report what would be changed; write nothing.", _WORK)] = False,
    verify: Annotated[
        bool, _option("--verify/--no-verify", None, "Compare untouched bytes, compute random rows anew.", _WORK)
    ] = True,
    tensors: Annotated[bool, _option("--tensors", None, "List every tensor that is changed.", _WORK)] = False,
    as_json: Annotated[bool, _option("--json", None, "Print the report as JSON.", _WORK)] = False,
) -> None:
    """Add LoRAs to a checkpoint of any size.

    Every weight becomes W + the sum of strength * delta, computed in float32 and rounded once; everything else keeps
    its bytes. Exit 1, with nothing written, if a LoRA is for another model or a module has no place.
    """
    from loratool.cli._torch import spare
    from loratool.files.bundle import check_apart
    from loratool.ops.bake_file import bake_file
    from loratool.ops.bake_task import Options
    from loratool.ops.convert import dtype_code
    from loratool.ops.devices import devices_asked
    from loratool.report import bake as report
    from loratool.report.progress import progress as bars

    spare()
    with told_plainly():
        if base is None:
            raise UsageError("--base is missing: the checkpoint to bake into", hint="a path, or a name as sd15")
        if output is None and not dry_run:
            raise UsageError("-o is missing: where to write", hint="--dry-run shows what would be done")
        options = Options(
            dtype=dtype_code(dtype) if dtype else None,
            rounding=_one_of("--rounding", rounding, ("nearest", "stochastic")),
            seed=seed,
            dora_norm=_one_of("--dora-norm", dora_norm, ("paper", "comfyui")),
            devices=tuple(devices_asked(device)),
            verify=verify,
            allow_unmatched=allow_unmatched,
            overwrite=overwrite,
            format=spelling,
        )
        asked = _asked(inputs or [], weights, blocks or [], prompt)
        where = _base(base, download)
        for written in (output, undo):
            if written is not None:
                check_apart(written, files_of(blocks or []))
        with bars(err()) as progress:
            done = bake_file(
                where,
                asked,
                None if dry_run else output,
                options,
                undo=undo,
                architecture=architecture,
                progress=progress,
            )
        if as_json:
            print_json(report.as_json(done, tensors))
        else:
            report.show(done, out(), tensors)


def _asked(inputs: list[str], weights: str | None, blocks: list[str], prompt: str | None) -> list[Asked]:
    named = asked_in(prompt) if prompt is not None else []
    if named and blocks and not inputs:
        raise UsageError("--blocks are for LoRAs named as files", hint="name the LoRA, instead of in --prompt")
    return [*asked_for(inputs, weights, blocks), *named]


def _base(text: str, download: bool) -> str:
    """The path of the base."""
    from loratool.ops.bases import NoneFound, download_base, resolve_base

    try:
        return resolve_base(text).path
    except NoneFound:
        if not download:
            raise
        return download_base(text).path


def _one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise UsageError(f"{option} is {value!r}", hint=f"known: {', '.join(known)}")
    return value
