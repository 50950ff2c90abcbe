"""Devices: where tensors are computed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from loratool.core.errors import UsageError

_DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Where the driver of a GPU that torch could use shows on Linux: NVIDIA's, AMD's, Windows' below WSL."""


def device_named(text: str) -> str:
    """torch's name of a device that is there: auto (cuda if there is one, else cpu), cpu, cuda or cuda:N.

    Raises UsageError for other names, and for a GPU that is not there.
    """
    name = text.strip().lower()
    if name == "cpu" or (name == "auto" and not _may_have_gpu()):
        return "cpu"
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if there else "cpu"
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", name)
    if match is None:
        raise UsageError(f"no device is called {text!r}", hint="known: auto, cpu, cuda, cuda:N")
    if int(match[1] or 0) >= there:
        seen = f"torch sees {there} of them" if there else "torch sees no GPU"
        raise UsageError(f"there is no device {name}: {seen}", hint="use --device cpu")
    return name


def devices_named(text: str) -> list[str]:
    """torch's names of one or several devices, as in `cuda:0,cuda:1`; see `device_named`.

    Raises UsageError for one that is named twice, and for the CPU beside a GPU.
    """
    found = [device_named(part) for part in text.split(",")]
    numbered = ["cuda:0" if name == "cuda" else name for name in found]
    if len(set(numbered)) < len(numbered) or (len(found) > 1 and "cpu" in found):
        raise UsageError(f"--device {text}: expected different GPUs", hint="write cuda:0,cuda:1, or cpu alone")
    return found


def _may_have_gpu() -> bool:
    """Whether it is worth asking torch, whose import takes longer than most of what is computed here."""
    return not sys.platform.startswith("linux") or any(Path(place).exists() for place in _DRIVERS)
