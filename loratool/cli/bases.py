"""`loratool bases`: the base models that have a name, and names for more."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from loratool.cli._common import out, print_json, told_plainly
from loratool.core.errors import UsageError


def bases(
    action: Annotated[
        Optional[str],
        typer.Argument(metavar="add", help="`add` gives a checkpoint a name; without it all are listed."),
    ] = None,
    name: Annotated[
        Optional[str], typer.Argument(metavar="NAME", help="sd15, sdxl, flux, or a name of your own.")
    ] = None,
    path: Annotated[
        Optional[str], typer.Argument(metavar="PATH", help="The checkpoint: a file, or a model's folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the base models that `--base` takes by name, or add one.

    Names come from the config file, the folders of ComfyUI, WebUI and Forge, and the Hugging Face cache. Every file is
    known by its header. Exit 1 if PATH is no checkpoint, or of another model than NAME says.
    """
    from loratool.ops.bases import add_base, known_bases
    from loratool.report import bases as report

    with told_plainly():
        given = _to_add(action, name, path)
        if given is None:
            listing = known_bases()
            if as_json:
                print_json(report.as_json(listing))
            else:
                report.show(listing, out())
        else:
            added = add_base(*given)
            if as_json:
                print_json(report.added_as_json(added))
            else:
                report.show_added(added, out())


def _to_add(action: str | None, name: str | None, path: str | None) -> tuple[str, str] | None:
    """The name and the path of `add`; None where there is nothing to add."""
    if action is None:
        return None
    if action != "add":
        raise UsageError(f"bases has no action {action!r}", hint="`loratool bases`, or `loratool bases add NAME PATH`")
    if not name or not path:
        raise UsageError("add takes a name and a path", hint="`loratool bases add sd15 /path/to/file.safetensors`")
    return name, path
