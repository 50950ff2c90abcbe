"""The command line: one file per command, collected here."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import typer
import typer.core
import typer.main

from loratool.cli._process import run

COMMANDS = (
    "info",
    "validate",
    "check",
    "fix",
    "convert",
    "blocks",
    "resize",
    "merge",
    "bake",
    "unbake",
    "extract",
    "replay",
    "bases",
)
"""Each is a function of that name in a module of that name, in the order of the help."""


class _Command(typer.core.TyperCommand):
    """A command whose usage line names arguments as its help does, without braces."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


@cache
def command(name: str) -> Any:
    """The command of that name, made when it is asked for: dozens of options take as long as reading a file does."""
    alone = typer.Typer(rich_markup_mode="markdown", add_completion=False, context_settings=CONTEXT)
    alone.command(name, cls=_Command)(getattr(import_module(f"loratool.cli.{name}"), name))
    return typer.main.get_command(alone)


class _Group(typer.core.TyperGroup):
    """All commands, in the order of COMMANDS."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = dict.fromkeys(COMMANDS)  # what a misspelt one is compared with

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return command(cmd_name) if cmd_name in COMMANDS else None


CONTEXT = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="loratool",
    cls=_Group,
    help="Inspect, convert, merge, resize, bake and extract LoRA files.",
    rich_markup_mode="markdown",  # else Rich keeps the line breaks of docstrings
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
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
    """Inspect, convert, merge, resize, bake and extract LoRA files."""


def main() -> None:
    """The process `loratool`."""
    run(app)
