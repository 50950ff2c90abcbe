"""Devices: where tensors are computed."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from loratool.core.errors import UsageError

_DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Where the driver of a GPU that torch could use shows on Linux: NVIDIA's, AMD's, Windows' below WSL."""


def device_named(text: str) -> str:
    """torch's name of a device that is there: auto (cuda if there is one, else cpu), cpu, cuda or cuda:N.

    Raises UsageError for other names, and for a GPU that is not there.
    """
    name, number = _asked(text)
    if name == "cpu":
        return name
    there = 0
    if _may_have_gpu():
        import torch

        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if there else "cpu"
    if number >= there:
        seen = f"torch sees {there} of them" if there else "torch sees no GPU"
        known = "".join(f"cuda:{index} or " for index in range(there))
        raise UsageError(f"there is no device {name}: {seen}", hint=f"use --device {known}cpu")
    return name


def devices_named(text: str) -> list[str]:
    """torch's names of one or several devices, as in `cuda:0,cuda:1`; see `device_named`.

    Raises UsageError for one that is named twice, and for the CPU beside a GPU.
    """
    return _different([device_named(part) for part in text.split(",")], text)


def devices_asked(text: str) -> list[str]:
    """The names in `cuda:0,cuda:1`, without asking torch whether they are there: `devices_named` is for that.

    auto stays what it is where there may be a GPU. Raises UsageError as `devices_named` does.
    """
    return _different([_asked(part)[0] for part in text.split(",")], text)


def wake(devices: Sequence[str]) -> None:
    """Has NVIDIA's driver make itself ready for a device in the background: it takes the time of a third of torch's
    import, and torch would wait for it. What goes wrong is left to torch."""
    number = _asked(devices[0])[1]
    if devices[0] != "cpu" and "torch" not in sys.modules and _may_have_gpu():
        threading.Thread(target=_wake, args=(number,), name="loratool-gpu", daemon=True).start()


def _wake(number: int) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), number) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)  # the one that torch uses, too


def _asked(text: str) -> tuple[str, int]:
    """A device's name as it is asked for, and the number of a GPU."""
    name = text.strip().lower()
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,4}))?", name)
    if match is None:
        raise UsageError(f"no device is called {text!r}", hint="known: auto, cpu, cuda, cuda:N")
    return ("cpu" if name == "auto" and not _may_have_gpu() else name), int(match[1] or 0)


def _different(names: list[str], text: str) -> list[str]:
    numbered = ["cuda:0" if name == "cuda" else name for name in names]
    if len(set(numbered)) < len(numbered) or (len(names) > 1 and not {"auto", "cpu"}.isdisjoint(names)):
        raise UsageError(f"--device {text}: expected different GPUs", hint="write cuda:0,cuda:1, or cpu alone")
    return names


def _may_have_gpu() -> bool:
    """Whether it is worth asking torch, whose import takes longer than most of what is computed here."""
    return not sys.platform.startswith("linux") or any(Path(place).exists() for place in _DRIVERS)
