"""`loratool merge`: one LoRA from several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from loratool.cli._common import err, out, print_json, told_plainly
from loratool.cli._inputs import asked_for, files_of
from loratool.core.errors import UsageError

if TYPE_CHECKING:
    from loratool.core.method import Method
    from loratool.ops.ranks import Rule


_METHOD = "Method"
_LIMITS = "Limits of the ranks"
_WORK = "How to work and what to tell"


def _rule(flag: str, metavar: str, text: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel="Rules for the ranks (one at most)")


def _method(flag: str, metavar: str | None, text: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel="Options of methods (see --list-methods)")


def _option(flag: str, metavar: str | None, text: str, panel: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel=panel)


def merge(
    inputs: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="IN[:WEIGHT]...", help="LoRA files or PEFT folders, each with its strength, 1 if none is given."
        ),
    ] = None,
    output: Annotated[
        Optional[str], typer.Option("-o", "--output", metavar="OUT", help="Required: the new file (peft: a folder).")
    ] = None,
    weights: Annotated[
        Optional[str], typer.Option("--weights", metavar="W,W,...", help="The strengths of all inputs: 0.7,0.3.")
    ] = None,
    blocks: Annotated[
        Optional[list[str]],
        typer.Option(
            "--blocks",
            metavar="SPEC",
            help="Weights of blocks: a preset (ALL0.5), a list (1,0,0.5,...) or a .yaml file; "
            "once for all inputs, or once for each.",
        ),
    ] = None,
    to: Annotated[
        Optional[str],
        typer.Option("--to", metavar="LAYOUT", help="kohya, diffusers, peft or comfyui; else the first input's."),
    ] = None,
    dtype: Annotated[
        Optional[str], typer.Option("--dtype", metavar="DTYPE", help="Store the factors as fp32, fp16, bf16, ...")
    ] = None,
    architecture: Annotated[
        Optional[str],
        typer.Option("--architecture", metavar="ID", help="Take the model as given (sd15, sdxl, flux, ...)."),
    ] = None,
    metadata: Annotated[
        str, typer.Option("--metadata", metavar="MODE", help="Header entries to keep: first, union or none.")
    ] = "first",
    drop_extras: Annotated[bool, typer.Option("--drop-extras", help="Leave out tensors that are no modules.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    method: Annotated[str, _option("--method", "NAME", "How to merge.", _METHOD)] = "concat",
    list_methods: Annotated[
        bool, _option("--list-methods", None, "Show the methods and their options, and do nothing else.", _METHOD)
    ] = False,
    approximate: Annotated[
        bool, _option("--approximate", None, "Replace what has no exact sum (LoKr, DoRA) by low-rank pairs.", _METHOD)
    ] = False,
    base: Annotated[
        Optional[str],
        _option("--base", "PATH", "A checkpoint of the model; --approximate needs it for DoRA.", _METHOD),
    ] = None,
    density: Annotated[Optional[float], _method("--density", "D", "Share of the entries to keep, 0 to 1.")] = None,
    epsilon: Annotated[
        Optional[float], _method("--epsilon", "E", "How far the probabilities spread around density.")
    ] = None,
    flatten: Annotated[
        Optional[bool], _method("--flatten/--no-flatten", None, "One angle for the whole matrix, or for each row.")
    ] = None,
    gamma: Annotated[Optional[float], _method("--gamma", "G", "Share of the largest entries to drop.")] = None,
    lambda_: Annotated[Optional[float], _method("--lambda", "L", "A factor for the result.")] = None,
    max_iter: Annotated[Optional[int], _method("--max-iter", "N", "Steps at most.")] = None,
    normalize: Annotated[
        Optional[bool],
        _method(
            "--normalize/--no-normalize",
            None,
            "nuslerp, karcher: strengths are shares, as they are unless this is off. Methods that elect signs: divide "
            "by the strengths that agree.",
        ),
    ] = None,
    row_wise: Annotated[
        Optional[bool], _method("--row-wise/--no-row-wise", None, "With --no-flatten: by columns instead of rows.")
    ] = None,
    seed: Annotated[Optional[int], _method("--seed", "N", "Seed of random methods; 0 if none is given.")] = None,
    select_topk: Annotated[
        Optional[float], _method("--select-topk", "K", "Share of the most varying entries to keep.")
    ] = None,
    sign: Annotated[Optional[str], _method("--sign", "HOW", "Who wins a sign: total or frequency.")] = None,
    t: Annotated[
        Optional[float],
        _method(
            "--t",
            "T",
            "slerp: how far to go from the first to the second, 0 to 1. nearswap: how much an entry may change.",
        ),
    ] = None,
    tol: Annotated[Optional[float], _method("--tol", "T", "Stop at steps smaller than this.")] = None,
    rank: Annotated[Optional[str], _rule("--rank", "N", "Rank N everywhere.")] = None,
    energy: Annotated[
        Optional[str], _rule("--energy", "E", "Share of the squared norm that each module keeps, as 0.99.")
    ] = None,
    ratio: Annotated[Optional[str], _rule("--ratio", "R", "Singular values from sigma_max / R up.")] = None,
    cumulative: Annotated[
        Optional[str], _rule("--cumulative", "C", "Share of the sum of singular values, as 0.9.")
    ] = None,
    knee: Annotated[bool, _rule("--knee", "", "Up to the bend of each module's curve.")] = False,
    error: Annotated[
        Optional[str],
        _rule("--error", "E", "Relative error of the whole adapter, as 0.01; ranks spread in the best way."),
    ] = None,
    size: Annotated[
        Optional[str], _rule("--size", "SIZE", "Size of the file, as 50MiB or 20MB; ranks spread in the best way.")
    ] = None,
    min_rank: Annotated[int, _option("--min-rank", "N", "No module gets less.", _LIMITS)] = 1,
    max_rank: Annotated[Optional[int], _option("--max-rank", "N", "No module gets more.", _LIMITS)] = None,
    conv_rank: Annotated[Optional[int], _option("--conv-rank", "N", "Rank of all k x k convolutions.", _LIMITS)] = None,
    device: Annotated[
        str, _option("--device", "DEVICE", "auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.", _WORK)
    ] = "auto",
    verify: Annotated[
        bool, _option("--verify/--no-verify", None, "Read the output back and measure it.", _WORK)
    ] = True,
    modules: Annotated[bool, _option("--modules", None, "List every module.", _WORK)] = False,
    as_json: Annotated[bool, _option("--json", None, "Print the report as JSON.", _WORK)] = False,
) -> None:
    """Write one LoRA that does what several do together, each at its strength.

    Inputs may have any layouts and ranks. The output is read back and measured before it gets its name, and its header
    holds the recipe that `loratool replay` follows. Exit 1 if a file is broken or something has no exact sum.
    """
    from loratool.report import merge as report

    options: dict[str, Any] = {
        "density": density,
        "epsilon": epsilon,
        "flatten": flatten,
        "gamma": gamma,
        "lambda": lambda_,
    }
    options |= {"max_iter": max_iter, "normalize": normalize, "row_wise": row_wise, "seed": seed}
    options |= {"select_topk": select_topk, "sign": sign, "t": t, "tol": tol}
    texts: dict[str, str | None] = {"rank": rank, "energy": energy, "ratio": ratio, "cumulative": cumulative}
    texts |= {"knee": "" if knee else None, "error": error, "size": size}
    with told_plainly():
        if list_methods:
            _list(as_json)
            return
        from loratool.files.bundle import check_apart
        from loratool.ops.convert import dtype_code
        from loratool.ops.devices import device_named
        from loratool.ops.merge_files import merge_files
        from loratool.ops.open import layout_named
        from loratool.ops.ranks import Limits
        from loratool.report.progress import progress as bars

        asked = asked_for(inputs or [], weights, blocks or [])
        if not asked:
            raise UsageError("nothing to merge", hint="name at least one LoRA file")
        if output is None:
            raise UsageError("-o is missing: where to write")
        how = _named(method)
        rule = _one_rule(texts)
        code, layout = dtype_code(dtype) if dtype else None, layout_named(to) if to else None
        where = device_named(device)
        check_apart(output, [*([base] if base else []), *files_of(blocks or [])])
        with bars(err()) as progress:
            done = merge_files(
                asked,
                output,
                how,
                {name: value for name, value in options.items() if value is not None},
                to=layout,
                dtype=code,
                rule=rule,
                limits=Limits(min_rank, max_rank, conv_rank),
                approximate=approximate,
                base=base,
                metadata=metadata,
                architecture=architecture,
                drop_extras=drop_extras,
                device=where,
                overwrite=overwrite,
                verify=verify,
                progress=progress,
            )
        if as_json:
            print_json(report.as_json(done, modules))
        else:
            report.show(done, out(), modules)


def _list(as_json: bool) -> None:
    from loratool.core.registry import methods
    from loratool.report import methods as report

    known = list(methods().values())
    if as_json:
        print_json(report.as_json(known))
    else:
        report.show(known, out())


def _named(name: str) -> Method:
    """The method of that id. Raises UsageError with the nearest and the known ones."""
    from difflib import get_close_matches

    from loratool.core.registry import methods

    known = methods()
    if name in known:
        return known[name]
    near = get_close_matches(name.lower().replace("-", "_"), known, 1, 0.5)
    nearest = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"no method is called {name!r}", hint=f"{nearest}known: {', '.join(sorted(known))}")


def _one_rule(texts: Mapping[str, str | None]) -> Rule | None:
    """The one rule that was given, if any."""
    from loratool.ops.ranks import parse_rule

    given = [(kind, text) for kind, text in texts.items() if text is not None]
    if len(given) > 1:
        raise UsageError(f"--{given[0][0]} and --{given[1][0]} both say what ranks to keep", hint="give one rule")
    return parse_rule(*given[0]) if given else None
