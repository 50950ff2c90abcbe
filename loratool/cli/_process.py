"""The process around the commands: its streams, and the signals that end it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

PATIENCE = 1.2
"""Seconds from a signal until the process ends without waiting for its threads any longer."""

_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")


class Stopped(BaseException):
    """A signal that ends the process. No Exception: nothing that deals with errors may deal with it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(app: Callable[[], Any]) -> NoReturn:
    """Runs the command line, and ends the process: 130, 143 or 129 with one line for SIGINT, SIGTERM or SIGHUP."""
    _complete_streams()
    try:
        with _ended_by_signals():
            app()
    except Stopped as stop:
        _tell(stop.number)
        _end(128 + stop.number)
    sys.exit(0)


def _complete_streams() -> None:
    """Opens what the caller closed on nothing. Else the first file opened would be stdout, and get what is printed."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raises Stopped in the main thread for a signal. What is ignored (nohup, background jobs) stays so.

    A thread looks on: where the main thread does not get to it, or its own threads do not end, the process ends
    anyway, its temporary files removed.
    """
    numbers = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    heard = {number for number, handler in before.items() if handler is not signal.SIG_IGN}
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        if not stopped:  # once: cleaning up must not be interrupted
            stopped = True
            raise Stopped(number)

    for number in heard:
        signal.signal(number, stop)
    watched = _watch(heard) if sys.platform != "win32" else None
    try:
        yield
    finally:
        if not stopped:
            for number in heard:
                signal.signal(number, before[number])
            if watched is not None:
                signal.set_wakeup_fd(-1)


def _watch(heard: set[int]) -> threading.Thread:
    """A thread that sees signals even while the main thread is inside a long call."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while True:
            number = os.read(reader, 1)
            if number and number[0] in heard:
                threading.Event().wait(PATIENCE)
                _tell(number[0])
                _end(128 + number[0])

    thread = threading.Thread(target=watch, name="loratool-signals", daemon=True)
    thread.start()
    return thread


_told = threading.Lock()


def _tell(number: int) -> None:
    """The one line; and the cursor, where a progress bar had hidden it."""
    if not _told.acquire(blocking=False):
        return
    shown = "\x1b[?25h" if sys.stderr.isatty() else ""
    line = f"{shown}stopped by {signal.Signals(number).name}: nothing unfinished was kept\n"
    with suppress(OSError):
        os.write(2, line.encode())


def _end(code: int) -> NoReturn:
    """Ends the process at once, without its unfinished outputs; threads that compute are not waited for."""
    atomic = sys.modules.get("loratool.files.atomic")
    if atomic is not None:
        atomic.remove_unfinished()
    os._exit(code)
