"""What a GPU bakes is what the CPU bakes, to one unit in the last place; skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratool.ops.bake_file import bake_file
from loratool.ops.bake_task import Options
from loratool.ops.devices import devices_named
from loratool.ops.inputs import Asked
from tests.bakes import CONV, KEYS, TEXT, Q, kohya, load, noise, save

SHAPES = {Q: (320, 320), CONV: (320, 320, 3, 3), TEXT: (768, 768)}
GPUS = torch.cuda.device_count()
INTEGERS = {2: torch.int16, 4: torch.int32}


@pytest.mark.skipif(not GPUS, reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_and_cpu_agree(tmp_path: Path, dtype: torch.dtype) -> None:
    """Bit-equal but for sums in another order: a value in thousands may be one unit off (float32: some units)."""
    tensors = {KEYS[stem]: noise(*shape, seed=3, size=0.03).to(dtype) for stem, shape in SHAPES.items()}
    base = save(tmp_path / "base.safetensors", tensors)
    asked = [Asked(str(save(tmp_path / "lora.safetensors", kohya(SHAPES, size=0.05))), 0.8)]
    names = ["cpu", "cuda", *([",".join(f"cuda:{index}" for index in range(GPUS))] if GPUS > 1 else [])]
    found = []
    for number, name in enumerate(names):
        output = tmp_path / f"{number}.safetensors"
        bake_file(base, asked, output, Options(devices=tuple(devices_named(name))))
        found.append(load(output))
    for other in found[1:]:
        for key, cpu in found[0].items():
            off = (cpu.view(INTEGERS[cpu.element_size()]) - other[key].view(INTEGERS[cpu.element_size()])).abs()
            same = float((off == 0).float().mean())
            print(f"{dtype} {key}: {same:.5%} bit-equal, {int(off.max())} ulp at most")
            if dtype != torch.float32:
                assert int(off.max()) <= 1 and same > 0.99
            else:
                # Units of values next to zero are small: compared with the size of the weights instead.
                assert float((cpu - other[key]).abs().max()) <= 2e-7 * float(cpu.abs().max())


def test_one_gpu_is_dealt_everything_and_several_share_it() -> None:
    """Jobs go to the device that has least to do; without GPUs the dealing alone is looked at."""
    from types import SimpleNamespace

    from loratool.core.tensor import Held, LazyTensor
    from loratool.ops.bake_work import How
    from loratool.ops.baking import Bakery

    sizes = [40, 8, 8, 8, 8, 8, 16, 24]
    sites = [
        SimpleNamespace(
            tensor=LazyTensor((n, 1 << 10), "F32", Held(bytes(4 * n << 10))), scale=None, nbytes=4 * n << 10
        )
        for n in sizes
    ]
    bakery = Bakery({}, ("cuda:0", "cuda:1"), How(), lambda nbytes: None)
    loads = {"cuda:0": 0, "cuda:1": 0}
    dealt = bakery._dealt(sites)  # type: ignore[arg-type]
    assert [job.index for job in dealt] == list(range(len(sizes)))
    for job in dealt:
        loads[job.device] += sizes[job.index]
    assert loads == {"cuda:0": 64, "cuda:1": 56}
    alone = Bakery({}, ("cuda:1",), How(), lambda nbytes: None)
    assert {job.device for job in alone._dealt(sites)} == {"cuda:1"}  # type: ignore[arg-type]
