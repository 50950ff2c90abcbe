"""`loratool resize`: a LoRA at smaller ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from loratool.cli._common import err, out, print_json, told_plainly
from loratool.core.errors import UsageError

if TYPE_CHECKING:
    from loratool.ops.ranks import Rule


_LIMITS = "Limits and exceptions"
_WORK = "How to work and what to tell"


def _rule(flag: str, metavar: str, text: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel="Rules (one or more, each makes a file)")


def _option(flag: str, metavar: str | None, text: str, panel: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel=panel)


def resize(
    file: Annotated[str, typer.Argument(metavar="IN", help="A LoRA file or a PEFT folder.")],
    output: Annotated[
        Optional[str],
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Required, except with --dry-run or --plot: the new file (peft: a folder); "
            "of several rules with {rule} in its name.",
        ),
    ] = None,
    to: Annotated[
        Optional[str], typer.Option("--to", metavar="LAYOUT", help="Another layout: kohya, diffusers, peft or comfyui.")
    ] = None,
    dtype: Annotated[
        Optional[str], typer.Option("--dtype", metavar="DTYPE", help="Store the factors as fp32, fp16, bf16, ...")
    ] = None,
    architecture: Annotated[
        Optional[str],
        typer.Option("--architecture", metavar="ID", help="Take the model as given (sd15, sdxl, flux, ...)."),
    ] = None,
    drop_extras: Annotated[bool, typer.Option("--drop-extras", help="Leave out tensors that are no modules.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
    rank: Annotated[Optional[list[str]], _rule("--rank", "N", "Rank N everywhere.")] = None,
    energy: Annotated[
        Optional[list[str]], _rule("--energy", "E", "Share of the squared norm that each module keeps, as 0.99.")
    ] = None,
    ratio: Annotated[
        Optional[list[str]], _rule("--ratio", "R", "Singular values from sigma_max / R up (with --base: the base's).")
    ] = None,
    cumulative: Annotated[
        Optional[list[str]], _rule("--cumulative", "C", "Share of the sum of singular values, as 0.9.")
    ] = None,
    knee: Annotated[bool, _rule("--knee", "", "Up to the bend of each module's curve.")] = False,
    error: Annotated[
        Optional[list[str]],
        _rule("--error", "E", "Relative error of the whole adapter, as 0.01; ranks spread in the best way."),
    ] = None,
    size: Annotated[
        Optional[list[str]],
        _rule("--size", "SIZE", "Size of the file, as 50MiB or 20MB; ranks spread in the best way."),
    ] = None,
    min_rank: Annotated[int, _option("--min-rank", "N", "No module gets less.", _LIMITS)] = 1,
    max_rank: Annotated[Optional[int], _option("--max-rank", "N", "No module gets more.", _LIMITS)] = None,
    conv_rank: Annotated[Optional[int], _option("--conv-rank", "N", "Rank of all k x k convolutions.", _LIMITS)] = None,
    per_block: Annotated[
        Optional[str],
        _option("--per-block", "FILE", "A .yaml file: patterns and the rules of what they name.", _LIMITS),
    ] = None,
    base: Annotated[
        Optional[str],
        _option("--base", "PATH", "A checkpoint of the model: measure importance against its norms.", _LIMITS),
    ] = None,
    dry_run: Annotated[bool, _option("--dry-run", None, "Report what would be done; write no LoRA.", _WORK)] = False,
    device: Annotated[
        str, _option("--device", "DEVICE", "auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.", _WORK)
    ] = "auto",
    verify: Annotated[
        bool, _option("--verify/--no-verify", None, "Read the output back and measure it.", _WORK)
    ] = True,
    modules: Annotated[bool, _option("--modules", None, "List every module.", _WORK)] = False,
    plot: Annotated[
        Optional[str],
        _option("--plot", "FILE", "Draw the singular values and the cuts: .png, .svg or .html.", _WORK),
    ] = None,
    as_json: Annotated[bool, _option("--json", None, "Print the report as JSON.", _WORK)] = False,
) -> None:
    """Write a LoRA at smaller ranks: the best approximation there is, and how good it is.

    Several rules share one decomposition. The output is read back and measured before it gets its name. Exit 1 if a
    file is broken or a size cannot be reached.
    """
    from loratool.ops.convert import dtype_code
    from loratool.ops.devices import device_named
    from loratool.ops.open import layout_named, open_adapter
    from loratool.ops.per_block import read_per_block
    from loratool.ops.ranks import Limits, check_limits
    from loratool.ops.resize_file import resize_file
    from loratool.report import plot as drawing
    from loratool.report import resize as report
    from loratool.report.progress import progress as bars

    with told_plainly():
        rules = _rules(
            {"rank": rank, "energy": energy, "ratio": ratio, "cumulative": cumulative, "knee": [""] if knee else None}
            | {"error": error, "size": size}
        )
        if output is None and not dry_run and plot is None:
            raise UsageError("-o is missing: where to write", hint="--dry-run shows what would be done")
        written = None if dry_run else output
        limits = Limits(min_rank, max_rank, conv_rank)
        check_limits(limits)
        code, layout, where = (
            dtype_code(dtype) if dtype else None,
            layout_named(to) if to else None,
            device_named(device),
        )
        inputs = [file, *(path for path in (base, per_block) if path is not None)]
        if plot is not None:
            drawing.check(plot, inputs, overwrite)
        _check_outputs(rules, written, plot, inputs)
        own = None
        if per_block is not None:
            source = open_adapter(file, architecture=architecture)
            own = read_per_block(per_block, source.architecture, source.modules)
        with bars(err()) as progress:
            done = resize_file(
                file,
                rules,
                written,
                to=layout,
                dtype=code,
                limits=limits,
                own=own,
                per_block=own.to_data() if own is not None else None,
                base=base,
                architecture=architecture,
                drop_extras=drop_extras,
                device=where,
                overwrite=overwrite,
                verify=verify,
                progress=progress,
            )
        if plot is not None:
            drawing.plot(done, plot, overwrite)
        if as_json:
            print_json(report.as_json(done, modules, plot))
        else:
            report.show(done, out(), modules, plot)


def _rules(given: dict[str, list[str] | None]) -> list[Rule]:
    """The rules, kind by kind, each kind's in the order of the command line."""
    from loratool.ops.ranks import parse_rule

    return [parse_rule(kind, text) for kind, texts in given.items() for text in texts or ()]


def _check_outputs(rules: Sequence[Rule], output: str | None, plot: str | None, inputs: Sequence[str]) -> None:
    """Raises LoratoolError for an output that is an input, UsageError for one that is the plot."""
    from loratool.files.bundle import check_apart

    for name in (output.replace("{rule}", rule.label) for rule in rules if output is not None):
        check_apart(name, inputs)
        if plot is not None and os.path.realpath(name) == os.path.realpath(plot):
            raise UsageError("-o and --plot name the same file", file=name)
