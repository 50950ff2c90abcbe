"""What all commands share: consoles, errors, JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from loratool.core.errors import LoratoolError
from loratool.report.inert import inert

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 100
"""Columns of a table that goes into a file or a pipe, where COLUMNS does not say otherwise."""


def out() -> Console:
    """Results go here: stdout. Colours only on a terminal, and NO_COLOR is obeyed (Rich does)."""
    from rich.console import Console

    from loratool.report.lines import Trimmed

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    console.push_render_hook(Trimmed())
    return console


def err() -> Console:
    """Progress and messages go here: stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_json(data: Any) -> None:
    """One JSON document on stdout, ASCII only: nothing in it can act on a terminal."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=True))


def complain(error: LoratoolError) -> None:
    """One line on stderr."""
    typer.echo(f"error: {inert(str(error), 2000)}", err=True)


@contextmanager
def told_plainly() -> Iterator[None]:
    """Turns an error that a user can act on into one line and its exit code."""
    try:
        yield
    except LoratoolError as error:
        complain(error)
        raise typer.Exit(error.exit_code) from error
    except MemoryError as error:
        typer.echo("error: out of memory", err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        typer.echo(f"error: {inert(where)}{error.strerror or error}", err=True)
        raise typer.Exit(1) from error
