"""Fuzzing: how many cases, and what came of them at the end of the run."""

from __future__ import annotations

import sys

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Cases, accepted ones and seconds of each target."""
    targets = sys.modules.get("tests.fuzz.targets")  # absent where other processes run the tests
    for name, tally in targets.TALLIES.items() if targets else ():
        terminalreporter.write_line(
            f"fuzz: {name:8} {tally.cases:>9,} cases, {tally.accepted:>8,} accepted, {tally.seconds:8.1f} s"
        )
