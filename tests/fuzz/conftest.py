"""Fuzzing: how many cases, and what came of them at the end of the run."""

from __future__ import annotations

import pytest

from tests.fuzz import targets


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Cases, accepted ones and seconds of each target."""
    for name, tally in targets.TALLIES.items():
        terminalreporter.write_line(
            f"fuzz: {name:8} {tally.cases:>9,} cases, {tally.accepted:>8,} accepted, {tally.seconds:8.1f} s"
        )
