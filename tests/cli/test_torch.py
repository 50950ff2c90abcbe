"""torch in the process of a command: bake imports less of it, and writes the same bytes, whatever it bakes."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from loratool.cli import _torch
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.inputs import Asked
from tests.bakes import CONV, KEYS, K, Q, kohya, noise, save

SHAPES = {Q: (320, 320), K: (320, 320), CONV: (320, 320, 3, 3)}
LINEAR = {Q: (320, 320), K: (320, 320)}

Made = Mapping[str, torch.Tensor]

ADAPTERS: Mapping[str, Callable[[], Made]] = {
    "lora": lambda: kohya(SHAPES),
    "dora": lambda: kohya(LINEAR) | {f"{stem}.dora_scale": noise(320, 1).abs() for stem in LINEAR},
    "loha": lambda: {
        f"{stem}.{role}": noise(*((320, 4) if role.endswith("a") else (4, 320)), seed=at, size=0.1)
        for stem in LINEAR
        for at, role in enumerate(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
    },
    "lokr": lambda: {
        f"{stem}.{role}": noise(*shape, size=0.1)
        for stem in LINEAR
        for role, shape in (("lokr_w1", (8, 8)), ("lokr_w2", (40, 40)))
    },
    "oft": lambda: (
        {f"{stem}.oft_blocks": noise(8, 40, 40, size=0.01) for stem in LINEAR}
        | {f"{stem}.alpha": torch.tensor(1e-3) for stem in LINEAR}
    ),
    "full": lambda: {f"{stem}.diff": noise(320, 320, size=0.01) for stem in LINEAR},
}

_RUN = """
import atexit, gc, sys
atexit.register(lambda: print("torch" in sys.modules, "torch._decomp" in sys.modules, gc.isenabled(), file=sys.stderr))
sys.argv[0] = "loratool"
from loratool.__main__ import main
main()
"""


def command(*words: object) -> str:
    """What a command's process says of its modules at its end: torch, the decompositions, and whether it collects."""
    run = [sys.executable, "-c", _RUN, *map(str, words)]
    found = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stderr.splitlines()[-1]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base.safetensors", {KEYS[stem]: noise(*shape).half() for stem, shape in SHAPES.items()})


@pytest.mark.parametrize(
    ("kind", "words", "options"),
    [
        *((kind, [], Options()) for kind in ADAPTERS),
        ("lora", ["--rounding", "stochastic", "--seed", "3"], Options(rounding="stochastic", seed=3)),
        ("lora", ["--dtype", "F8_E4M3"], Options(dtype="F8_E4M3")),
        ("lora", ["--dtype", "BF16", "--no-verify"], Options(dtype="BF16", verify=False)),
        ("dora", ["--dora-norm", "comfyui"], Options(dora_norm="comfyui")),
    ],
)
def test_bake_writes_the_same_without(
    tmp_path: Path, base: Path, kind: str, words: list[str], options: Options
) -> None:
    """As this process does with all of torch."""
    path = save(tmp_path / "adapter.safetensors", ADAPTERS[kind]())
    less, whole = tmp_path / "less.safetensors", tmp_path / "whole.safetensors"
    found = command("bake", "--base", base, f"{path}:0.8", "-o", less, "--device", "cpu", *words)
    assert found == "True False True"
    bake_file(base, [Asked(str(path), 0.8)], whole, options)
    assert "torch._decomp" in sys.modules
    assert less.read_bytes() == whole.read_bytes()


def test_bake_undoes_the_same_without(tmp_path: Path, base: Path) -> None:
    path = save(tmp_path / "adapter.safetensors", ADAPTERS["lora"]())
    out, undo, back = (tmp_path / f"{name}.safetensors" for name in ("out", "undo", "back"))
    assert command("bake", "--base", base, path, "-o", out, "--undo", undo) == "True False True"
    assert command("unbake", out, "--undo", undo, "-o", back) == "True True True"
    assert back.read_bytes() == base.read_bytes()


def test_other_commands_have_all_of_torch(tmp_path: Path) -> None:
    """Where they need torch at all: its `Generator` needs the module that bake does without."""
    path = save(tmp_path / "adapter.safetensors", kohya({Q: (320, 320)}))
    found = command("resize", path, "--rank", "2", "-o", tmp_path / "out.safetensors")
    assert found in ("True True True", "False False True")


def test_nothing_is_left_out_of_a_process_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = list(sys.meta_path)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(_torch, "_ours", False)
    _torch.spare()
    assert sys.meta_path == before
    _torch.own_process()
    _torch.spare()
    assert sys.meta_path[1:] == before
    assert _torch._Spare().find_spec("torch.nn") is None


def test_collecting_goes_on_whatever_torch_imports() -> None:
    """With a torch that does not import that module, it does with the next module of our own."""
    try:
        for name in (_torch._UNNEEDED, "loratool.anything"):
            assert _torch._Spare().find_spec("torch") is None
            assert not gc.isenabled()
            assert _torch._Spare().find_spec("numpy") is None
            assert not gc.isenabled()
            assert (_torch._Spare().find_spec(name) is None) == (name != _torch._UNNEEDED)
            assert gc.isenabled()
    finally:
        gc.unfreeze()
        gc.enable()
