"""The process `loratool`; `python -m loratool` is the same."""

from __future__ import annotations

from loratool.cli import _process


def main() -> None:
    """Hears signals before anything large is imported, then runs the command line."""
    _process.hear()
    from loratool.cli.main import main as command_line

    command_line()


if __name__ == "__main__":
    main()
