"""Devices: where tensors are computed."""

from __future__ import annotations

import re

import torch

from loratool.core.errors import UsageError


def device_named(text: str) -> str:
    """torch's name of a device that is there: auto (cuda if there is one, else cpu), cpu, cuda or cuda:N.

    Raises UsageError for other names, and for a GPU that is not there.
    """
    name = text.strip().lower()
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if there else "cpu"
    if name == "cpu":
        return name
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", name)
    if match is None:
        raise UsageError(f"no device is called {text!r}", hint="known: auto, cpu, cuda, cuda:N")
    if int(match[1] or 0) >= there:
        seen = f"torch sees {there} of them" if there else "torch sees no GPU"
        raise UsageError(f"there is no device {name}: {seen}", hint="use --device cpu")
    return name
