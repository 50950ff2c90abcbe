"""Progress of long work on a terminal's stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loratool.report.units import size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, Task

Tell = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

IN_BYTES = frozenset({"writing", "respelling", "comparing"})
"""Stages whose work is counted in bytes; that of all others is counted in modules."""


@contextmanager
def progress(console: Console) -> Iterator[Tell | None]:
    """A bar for every stage, with speed and time left, on a terminal; None elsewhere.

    A stage that begins again (the next of several outputs) begins its bar again.
    """
    if not console.is_terminal:
        yield None
        return
    with _bars(console) as bars:
        yield _teller(bars)


def _teller(bars: Progress) -> Tell:
    known: dict[str, Task] = {}

    def tell(stage: str, done: int, total: int) -> None:
        if stage not in known:
            at = bars.add_task(stage, total=total)
            known[stage] = next(task for task in bars.tasks if task.id == at)
        elif done < known[stage].completed:
            bars.reset(known[stage].id, total=total)
        bars.update(known[stage].id, completed=done, total=total)

    return tell


def _bars(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        """What is done and how much there is, and the speed."""

        def render(self, task: Task) -> Text:
            return Text(amount(task.description, task.completed, task.total, task.finished_speed or task.speed))

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        Amount(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def amount(stage: str, done: float, total: float | None, speed: float | None) -> str:
    """`1.0 MiB of 2.0 MiB, 300.0 KiB/s`, or `12 of 986, 40/s`."""
    shown = size if stage in IN_BYTES else _count
    text = f"{shown(int(done))} of {shown(int(total or 0))}"
    return f"{text}, {shown(int(speed))}/s" if speed else text


def _count(number: int) -> str:
    return f"{number:,}"
