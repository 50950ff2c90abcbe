"""`loratool resize` against a full dense SVD per module: wall time, memory, accuracy.

The SDXL LoRA that sd-scripts trains (986 modules, rank 128, fp16) to rank 32, and SD 1.5 ones (264 modules) of rank 32
and 128, from the start of the process to the file flushed, read back and measured. The baseline is what the popular
script does, in a few lines: multiply the factors, take torch's full SVD in float32; timed on one module of every shape
with as many threads, and counted as often as the shape occurs. With `--device cuda` the resizing alone is timed, in
process: without reading and writing.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from _measure import (
    LORATOOL,
    MB,
    PYTHON,
    Budget,
    folder,
    fresh,
    in_turns,
    kohya_modules,
    memory,
    run,
    seconds,
    verdict,
    write_trained,
)

TIMES_FASTER = 50
CASES = (("sdxl", 128, 32, 15.0), ("sd15", 32, 16, 2.0), ("sd15", 128, 32, 3.0))
"""(architecture, rank before, after, seconds allowed)."""

DENSE = """
import sys, time, torch
rank = int(sys.argv[1])
for shape in sys.argv[2:]:
    out, size = map(int, shape.split("x"))
    up, down = torch.randn(out, rank), torch.randn(rank, size)
    started = time.perf_counter()
    torch.linalg.svd(up @ down, full_matrices=False)
    print(shape, time.perf_counter() - started)
"""


def dense_seconds(architecture: str, rank: int, place: Path) -> float:
    """What a full dense SVD of every module would take: one module per shape, times how many there are."""
    shapes = Counter(f"{out}x{size}" for out, size, *_ in kohya_modules(architecture).values())
    log = place / "dense.txt"
    script = f"import sys\nsys.stdout = open({str(log)!r}, 'w')\n{DENSE}"
    run([PYTHON, "-c", script, str(rank), *shapes])
    took = dict(line.split() for line in log.read_text().splitlines())
    return sum(float(took[shape]) * count for shape, count in shapes.items())


def on_cpu(times: int) -> int:
    """The command, against the dense way."""
    budgets: list[Budget] = []
    with folder() as place:
        for architecture, before, after, allowed in CASES:
            path, output = place / "input.safetensors", place / "output.safetensors"
            size = write_trained(path, architecture, before)
            command = [LORATOOL, "resize", str(path), "--rank", str(after), "-o", str(output), "--device", "cpu"]
            ours = in_turns({"ours": command}, times, fresh(output))["ours"]
            name = (
                f"{architecture} {before} -> {after} ({len(kohya_modules(architecture))} modules, {size / MB:,.0f} MB)"
            )
            budgets.append(seconds(f"{name}: time", ours, allowed))
            if architecture == "sdxl":
                dense = dense_seconds(architecture, before, place)
                what = f"{name}: a {TIMES_FASTER}th of dense SVDs"
                faster = Budget(what, ours.seconds, dense / TIMES_FASTER, "s", f"{dense / ours.seconds:.0f} times")
                budgets.append(faster)
            budgets.append(memory(f"{name}: memory", ours, 2 * size + 500 * MB))
    return verdict(f"loratool resize, median of {times}", budgets)


def on_gpu(device: str) -> int:
    """Decomposition and new factors in process, inputs in memory; and how far the values are from the CPU's."""
    import time
    from dataclasses import replace

    import torch

    from loratool.core.module import Module
    from loratool.core.tensor import LazyTensor
    from loratool.ops.decompose import decompose
    from loratool.ops.open import open_adapter
    from loratool.ops.spectrum import truncated

    def held(module: Module) -> Module:
        return replace(module, factors={role: LazyTensor.from_torch(f.load()) for role, f in module.factors.items()})

    with folder() as place:
        path = place / "input.safetensors"
        write_trained(path, "sdxl", 128)
        modules = [held(module) for module in open_adapter(path).modules]
    took: dict[str, float] = {}
    values = {}
    for turn, where in enumerate((device, device, device, "cpu")):
        started = time.perf_counter()
        spectra = decompose(modules, where)
        middle = time.perf_counter()
        for module, found in zip(modules, spectra, strict=True):
            for factor in truncated(module, found, 32).factors.values():
                factor.read()
        torch.cuda.synchronize()
        ended = time.perf_counter()
        values[where] = [value for found in spectra for value in found.values]
        took[where] = min(took.get(where, 1e9), ended - started)
        print(f"{turn} {where}: decompose {middle - started:.2f} s, factors {ended - middle:.2f} s")
    off = max(abs(a - b) / b for a, b in zip(values[device], values["cpu"], strict=True))
    budgets = [
        Budget(f"sdxl 128 -> 32 on {torch.cuda.get_device_name()}", took[device], 1.5, "s", f"cpu {took['cpu']:.2f} s"),
        Budget("largest relative difference of a singular value", off * 1e6, 1.0, "ppm"),
    ]
    return verdict("loratool resize on a GPU, without reading and writing, best of 3", budgets)


def main() -> int:
    """Measures, prints, and returns 1 if a budget is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=3, help="runs of each process (default: 3)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options = parser.parse_args()
    return on_cpu(options.n) if options.device == "cpu" else on_gpu(options.device)


if __name__ == "__main__":
    sys.exit(main())
