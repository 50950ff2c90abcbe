"""The process around the commands: its streams, and the signals that end it."""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from loratool.cli._torch import own_process

PATIENCE = 1.2
"""Seconds from a signal until the process ends without waiting for its threads any longer."""

_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")


class Stopped(BaseException):
    """A signal that ends the process. No Exception: nothing that deals with errors may deal with it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def hear() -> None:
    """From now on a signal ends the process at once, with its line; `run` does it with more care."""
    for number in _numbers():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop_at_once)


def run(app: Callable[[], Any]) -> NoReturn:
    """Runs the command line, and ends the process: 130, 143 or 129 with one line for SIGINT, SIGTERM or SIGHUP.

    An error of a stream is one line, too. A reader that went away (`| head`) is no error: the work goes on, and what
    it would print goes nowhere.
    """
    _complete_streams()
    own_process()
    code: Any = 0
    try:
        with _ended_by_signals():
            try:
                app()
            except SystemExit as end:
                code = end.code
            sys.stdout.flush()
    except Stopped as stop:
        _tell(stop.number)
        _end(128 + stop.number)
    except OSError as error:
        from loratool.report.inert import inert

        where = inert(f"{error.filename}: ") if error.filename else ""
        _write(f"error: {where}{error.strerror or error}\n")
        code = 1
    _leave(code)


def _leave(code: Any) -> NoReturn:
    """Ends the process without taking it apart object by object, which takes 15 ms, and torch a third of a second."""
    if code is not None and not isinstance(code, int):
        _write(f"{code}\n")
        code = 1
    atexit._run_exitfuncs()
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code or 0)


def _complete_streams() -> None:
    """Opens what the caller closed on nothing. Else the first file opened would be stdout, and get what is printed."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not stream.isatty():
            setattr(sys, name, _patient(stream, name))


class _Patient(io.FileIO):
    """stdout or stderr, whose errors name it. Where nobody reads any more, what is written goes nowhere."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd, "w", closefd=False)
        self._stream = name

    def write(self, data: Any, /) -> int:
        """As many bytes as were written."""
        try:
            return super().write(data)
        except OSError as error:
            _to_nowhere(self.fileno())  # told once: what is in the buffers must not fail again
            if self._stream == "stdout" and not isinstance(error, BrokenPipeError):
                raise OSError(error.errno, error.strerror, self._stream) from error
            return memoryview(data).nbytes


def _patient(stream: Any, name: str) -> io.TextIOWrapper:
    """The same stream, patient."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Patient(stream.fileno(), name)),
        encoding=stream.encoding,
        errors="backslashreplace",  # a name that the encoding lacks is no reason to end
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _to_nowhere(fd: int) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, fd)
    os.close(nothing)


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raises Stopped in the main thread for a signal. What is ignored (nohup, background jobs) stays so.

    A thread looks on: where the main thread does not get to it, or its own threads do not end, the process ends
    anyway, its temporary files removed.
    """
    before = {number: signal.getsignal(number) for number in _numbers()}
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
    _write(f"{shown}stopped by {signal.Signals(number).name}: nothing unfinished was kept\n")


def _write(line: str) -> None:
    """A line on stderr, whatever the state of its buffers."""
    with suppress(OSError):
        os.write(2, line.encode("utf-8", "backslashreplace"))


def _stop_at_once(number: int, frame: object) -> None:
    _tell(number)
    _end(128 + number)


def _end(code: int) -> NoReturn:
    """Ends the process at once, without its unfinished outputs; threads that compute are not waited for."""
    atomic = sys.modules.get("loratool.files.atomic")
    if atomic is not None:
        atomic.remove_unfinished()
    os._exit(code)
