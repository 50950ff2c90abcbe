"""`loratool extract`: the difference of two checkpoints as a LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from loratool.cli._common import err, out, print_json, told_plainly
from loratool.core.errors import UsageError

if TYPE_CHECKING:
    from loratool.ops.ranks import Rule

_RULES = "Rules (exactly one)"
_LIMITS = "Limits and exceptions"
_WORK = "How to work and what to tell"


def _option(flag: str, metavar: str | None, text: str, panel: str = "Options") -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel=panel)


def extract(
    base: Annotated[
        str, _option("--base", "BASE", "The checkpoint before training: a file, a folder, or a name, as sd15.")
    ],
    tuned: Annotated[str, _option("--tuned", "TUNED", "The checkpoint after training, in any spelling.")],
    output: Annotated[
        Optional[str],
        typer.Option("-o", "--output", metavar="OUT", help="The new file (peft: a folder); not with --dry-run."),
    ] = None,
    to: Annotated[
        Optional[str],
        _option("--to", "LAYOUT", "kohya (the default), diffusers, comfyui or peft (for language models the default)."),
    ] = None,
    dtype: Annotated[str, _option("--dtype", "DTYPE", "Store the factors as fp16, bf16 or fp32.")] = "fp16",
    full: Annotated[
        bool, _option("--full", None, "Add norms, biases and embeddings that differ, in full (kohya, comfyui).")
    ] = False,
    architecture: Annotated[
        Optional[str], _option("--architecture", "ID", "Take the model as given (sd15, sdxl, flux).")
    ] = None,
    overwrite: Annotated[bool, _option("--overwrite", None, "Replace an existing output.")] = False,
    rank: Annotated[Optional[str], _option("--rank", "N", "Rank N everywhere: the fastest.", _RULES)] = None,
    energy: Annotated[
        Optional[str], _option("--energy", "E", "Share of the squared norm that each module keeps, as 0.9.", _RULES)
    ] = None,
    ratio: Annotated[Optional[str], _option("--ratio", "R", "Singular values from sigma_max / R up.", _RULES)] = None,
    cumulative: Annotated[
        Optional[str], _option("--cumulative", "C", "Share of the sum of singular values, as 0.8.", _RULES)
    ] = None,
    knee: Annotated[bool, _option("--knee", None, "Up to the bend of each module's curve.", _RULES)] = False,
    error: Annotated[
        Optional[str],
        _option("--error", "E", "Relative error of the whole, as 0.3; ranks spread in the best way.", _RULES),
    ] = None,
    size: Annotated[
        Optional[str],
        _option("--size", "SIZE", "Size of the file, as 150MiB; ranks spread in the best way.", _RULES),
    ] = None,
    min_rank: Annotated[int, _option("--min-rank", "N", "No module gets less.", _LIMITS)] = 1,
    max_rank: Annotated[Optional[int], _option("--max-rank", "N", "No module gets more.", _LIMITS)] = None,
    conv_rank: Annotated[Optional[int], _option("--conv-rank", "N", "Rank of all k x k convolutions.", _LIMITS)] = None,
    min_norm: Annotated[
        float,
        _option("--min-norm", "N", "Skip weights that changed by at most this share of their norm, as 0.001.", _LIMITS),
    ] = 0.0,
    clamp: Annotated[
        Optional[float],
        _option("--clamp", "Q", "Cut entries beyond this quantile off, as popular scripts do with 0.99.", _LIMITS),
    ] = None,
    exact: Annotated[bool, _option("--exact", None, "No randomised SVD.", _WORK)] = False,
    dry_run: Annotated[bool, _option("--dry-run", None, "Report what would be done; write nothing.", _WORK)] = False,
    device: Annotated[
        str, _option("--device", "DEVICE", "auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.", _WORK)
    ] = "auto",
    verify: Annotated[
        bool, _option("--verify/--no-verify", None, "Read the output back and measure it.", _WORK)
    ] = True,
    modules: Annotated[bool, _option("--modules", None, "List every module.", _WORK)] = False,
    as_json: Annotated[bool, _option("--json", None, "Print the report as JSON.", _WORK)] = False,
) -> None:
    """Write what training changed, TUNED - BASE, as a LoRA: the best one of its ranks, and how good it is.

    The two may be spelled differently. Memory never holds a whole file. Exit 1 if a file is broken, the two
    are of different models, or nothing differs.
    """
    from loratool.ops.bases import resolve_base
    from loratool.ops.convert import dtype_code
    from loratool.ops.devices import device_named
    from loratool.ops.open import layout_named
    from loratool.ops.ranks import Limits
    from loratool.report import extract as report
    from loratool.report.progress import progress as bars

    with told_plainly():
        rule = _rule(
            {"rank": rank, "energy": energy, "ratio": ratio, "cumulative": cumulative, "knee": "" if knee else None}
            | {"error": error, "size": size}
        )
        if output is None and not dry_run:
            raise UsageError("-o is missing: where to write", hint="--dry-run shows what would be done")
        code, layout = dtype_code(dtype), layout_named(to) if to else None
        where = device_named(device)
        from loratool.ops.extract import Wish  # torch, which a wrong word does not wait for
        from loratool.ops.extract_file import extract_file

        wish = Wish(rule, Limits(min_rank, max_rank, conv_rank), code, min_norm, exact, clamp, where)
        with bars(err()) as progress:
            done = extract_file(
                resolve_base(base).path,
                resolve_base(tuned).path,
                None if dry_run else output,
                wish,
                to=layout,
                full=full,
                architecture=architecture,
                overwrite=overwrite,
                verify=verify,
                progress=progress,
            )
        if as_json:
            print_json(report.as_json(done))
        else:
            report.show(done, out(), modules)


def _rule(given: dict[str, str | None]) -> Rule:
    """The one rule. Raises UsageError for none, and for several."""
    from loratool.ops.ranks import parse_rule

    rules = [parse_rule(kind, text) for kind, text in given.items() if text is not None]
    if not rules:
        raise UsageError("no rule says what ranks to keep", hint="for instance --rank 32 or --energy 0.9")
    if len(rules) > 1:
        raise UsageError(f"{' and '.join(rule.title for rule in rules)} are {len(rules)} rules", hint="name one")
    return rules[0]
