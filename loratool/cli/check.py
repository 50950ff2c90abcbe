"""`loratool check`: will a program load this file, module by module?"""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from loratool.cli._common import out, print_json, told_plainly


def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A LoRA file or a PEFT folder.")],
    programs: Annotated[
        list[str],
        typer.Option(
            "--for",
            metavar="PROGRAM",
            help="diffusers, comfyui, kohya, a1111, peft, lycoris, invokeai, onetrainer or vllm; may be repeated.",
        ),
    ],
    keys: Annotated[bool, typer.Option("--keys", help="List what becomes of every module.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    architecture: Annotated[
        Optional[str],
        typer.Option("--architecture", metavar="ID", help="Take the model as given (sd15, sdxl, flux, ...)."),
    ] = None,
) -> None:
    """Say whether a program loads a LoRA fully, differently or not at all, why, and what helps.

    Reads the header only; the program need not be installed. Exit 0 if every program loads it fully, else 1.
    """
    from loratool.core.registry import programs as known
    from loratool.ops.check import check as judge
    from loratool.ops.check import program_named
    from loratool.ops.open import open_adapter
    from loratool.report import check as report

    with told_plainly():
        names = [program_named(name) for name in dict.fromkeys(programs)]
        adapter = open_adapter(file, architecture=architecture)
        found = [judge(adapter, known()[name], named=architecture is not None) for name in names]
        if as_json:
            told = [report.as_json(one, keys) for one in found]
            print_json(told[0] if len(told) == 1 else told)
        else:
            report.show(found, out(), keys)
    if not all(one.conformance.fully for one in found):
        raise typer.Exit(1)
