"""Devices: names that are there, names that are asked for, and a GPU that is woken."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from loratool.core.errors import UsageError
from loratool.ops import devices
from loratool.ops.devices import device_named


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (device_named("auto"), device_named("CPU")) == ("cpu", "cpu")
    for name in ("cuda", "cuda:0", "gpu", "", "cuda:", "cuda:-1", "mps"):
        with pytest.raises(UsageError, match=r"no device|no GPU"):
            device_named(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "_may_have_gpu", lambda: False)
    assert device_named("auto") == "cpu"  # without asking torch
    monkeypatch.setattr(devices, "_may_have_gpu", lambda: True)
    assert [device_named(name) for name in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    with pytest.raises(UsageError, match="sees 2 of them; use --device cuda:0 or cuda:1 or cpu"):
        device_named("cuda:2")
    assert devices.devices_named("auto") == ["cuda"]
    assert devices.devices_named("cuda:1, CUDA:0") == ["cuda:1", "cuda:0"]


def test_devices_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names are looked at, and torch is not asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("torch was asked"))
    for there, auto in ((False, "cpu"), (True, "auto")):
        monkeypatch.setattr(devices, "_may_have_gpu", lambda there=there: there)
        assert devices.devices_asked("AUTO") == [auto]
        assert devices.devices_asked("cuda:7,cuda:0") == ["cuda:7", "cuda:0"]
        for name in ("gpu", "cuda:", "cuda,cuda:0", "cpu,cuda", "auto,cuda", ""):
            with pytest.raises(UsageError, match=r"no device is called|different GPUs"):
                devices.devices_asked(name)


@pytest.mark.parametrize("device", ["cpu", "cuda:3", "auto"])
def test_a_gpu_is_woken_before_torch_is_there(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The driver's context that torch uses, too; not for the CPU, nor where torch has been imported."""
    called: list[tuple[str, int]] = []

    class Driver:
        def cuInit(self, flags: int) -> int:
            called.append(("init", flags))
            return 0

        def cuDeviceGet(self, device: object, number: int) -> int:
            called.append(("device", number))
            return 0

        def cuDevicePrimaryCtxRetain(self, context: object, device: object) -> int:
            called.append(("context", 0))
            return 0

    monkeypatch.setattr(devices, "_may_have_gpu", lambda: True)
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(devices.ctypes, "byref", lambda value: value)
    devices.wake([device])
    assert not called  # torch is there
    monkeypatch.delitem(sys.modules, "torch")
    devices.wake([device])
    for thread in threading.enumerate():
        if thread.name == "loratool-gpu":
            thread.join()
    number = 3 if device == "cuda:3" else 0
    assert called == ([] if device == "cpu" else [("init", 0), ("device", number), ("context", 0)])

    def none(name: str) -> object:
        raise OSError("no such library")

    monkeypatch.setattr(devices.ctypes, "CDLL", none)
    devices._wake(0)
