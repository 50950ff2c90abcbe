"""The command line: one file per command, collected here."""

from __future__ import annotations

import typer

from loratool.cli.blocks import blocks
from loratool.cli.convert import convert
from loratool.cli.info import info
from loratool.cli.merge import merge
from loratool.cli.replay import replay
from loratool.cli.resize import resize

app = typer.Typer(
    name="loratool",
    help="Inspect, convert, merge and resize LoRA files.",
    rich_markup_mode="markdown",  # else Rich keeps the line breaks of docstrings
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from loratool import __version__

        typer.echo(f"loratool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_version, is_eager=True),
) -> None:
    """Inspect, convert, merge and resize LoRA files."""


app.command()(info)
app.command()(convert)
app.command()(blocks)
app.command()(resize)
app.command()(merge)
app.command()(replay)
