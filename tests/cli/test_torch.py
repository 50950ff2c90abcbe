"""torch in the command's process: less of it is imported, and it computes the same."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

from loratool.cli import _torch
from tests.bakes import KEYS, Q, kohya, noise, save

_RUN = """
import gc, sys
{first}
from loratool.ops.bake_file import bake_file
from loratool.ops.inputs import Asked
bake_file(sys.argv[1], [Asked(sys.argv[2], 0.8)], sys.argv[3])
print("torch._decomp" in sys.modules, gc.isenabled())
{then}
"""

_SPARE = "from loratool.cli._torch import spare; spare()"


def _bake(first: str, base: Path, lora: Path, out: Path, then: str = "") -> str:
    words = [sys.executable, "-c", _RUN.format(first=first, then=then), str(base), str(lora), str(out)]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=300).stdout


def test_the_command_imports_less_of_torch_and_bakes_the_same(tmp_path: Path) -> None:
    base = save(tmp_path / "base.safetensors", {KEYS[Q]: noise(320, 320).half()})
    lora = save(tmp_path / "lora.safetensors", kohya({Q: (320, 320)}))
    assert _bake(_SPARE, base, lora, tmp_path / "less.safetensors") == "False True\n"
    assert _bake("", base, lora, tmp_path / "all.safetensors") == "True True\n"
    assert (tmp_path / "less.safetensors").read_bytes() == (tmp_path / "all.safetensors").read_bytes()


def test_nothing_else_is_left_out(tmp_path: Path) -> None:
    """What is left out is one module of torch that is there, and no other."""
    words = f"{_SPARE}; import torch, torch._meta_registrations as one; print(one.__spec__.origin, len(dir(one)) < 12)"
    found = subprocess.run([sys.executable, "-c", words], check=True, capture_output=True, text=True, timeout=300)
    assert found.stdout == "None True\n"
    import torch._meta_registrations as real

    assert real.__name__ == _torch._UNNEEDED and len(dir(real)) > 100
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
