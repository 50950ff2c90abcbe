"""loratool bake: the time of `cp`, a fifth of loading everything, adding and saving, and little memory.

    python benchmarks/bake.py [-n RUNS] [--models sd15,sdxl]
    python benchmarks/bake.py --device cuda [-n RUNS] [--models sd15,sdxl]

A checkpoint of real names at full size (SD 1.5 2.1 GB, SDXL 6.9 GB, fp16) and a LoRA of rank 32 for all attention and
feed-forward modules. The peers are `cp`; on a GPU what diffusers' documentation says (`_diffusers.py`: load the
pipeline, fuse, save); what popular scripts do (`_popular.py`: make the models, load, add, save; on the CPU even where
there is a GPU); and the least that any script could do, without making models: load the file, cast, add every update,
cast back, save. The first two scripts need the `test` extra. All run in turns as processes, the page cache warm, the
last output removed. On a GPU ours and the bare script also run within one process that has imported torch and started
the GPU.

Ours is flushed to the disk and verified, theirs are not, so `cp` is also timed with a `sync`. The scripts' turns come
behind those of `cp` and ours: where a virtual machine gives free memory back to its host, the many GB that one of them
leaves keep processors busy during what comes next. On the CPU, hence, memory is used and freed before each.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from _measure import MB, PYTHON, Budget, folder, fresh, in_turns, ratio, run, verdict, write_trained

COPIES = {"cpu": 3.0, "cuda": 1.0}
"""Of the time of `cp`, at most."""

FASTER = 5.0
HOST, GPU = 3 << 29, 2 << 30
"""Bytes of host and of GPU memory, at most."""

LOAD_ADD_SAVE = """
import sys, torch
from safetensors.torch import load_file, save_file
base, lora, output, device, wide = sys.argv[1:6]
sys.path.insert(0, sys.argv[6])
from bake import keys_of
weights = load_file(base, device=device)
if wide == "wide":
    weights = {key: tensor.float() for key, tensor in weights.items()}
factors = load_file(lora, device=device)
for stem, (key, turned) in keys_of(lora).items():
    up, down = factors[stem + ".lora_up.weight"].float(), factors[stem + ".lora_down.weight"].float()
    scale = 0.8 * factors[stem + ".alpha"].item() / down.shape[0]
    delta = (up.flatten(1) @ down.flatten(1)) * scale
    weight = weights[key]
    weights[key] = (weight.float() + delta.reshape(weight.shape)).to(weight.dtype)
save_file({key: tensor.half().contiguous() for key, tensor in weights.items()}, output)
"""


def keys_of(lora: str) -> dict[str, tuple[str, bool]]:
    """stem -> key of the weight in the checkpoint, for what has a tensor of its own there."""
    from loratool.ops.open import open_adapter

    adapter = open_adapter(lora)
    checkpoint = adapter.architecture.checkpoints[0]
    found = {}
    for module in adapter.modules:
        voice = checkpoint.voices[module.component]
        naming = adapter.architecture.naming(module.component, voice.naming)
        home = naming.home(module.targets[0])
        if naming[home.name] == module.targets:
            stem = module.keys["up"].removesuffix(".lora_up.weight")
            found[stem] = (voice.prefix + home.tensor_key, home.transposed)
    return found


def inputs(place: Path, model: str) -> tuple[Path, Path, int]:
    """The checkpoint, the LoRA, and the size of the checkpoint."""
    base, lora = place / f"{model}.safetensors", place / f"{model}-lora.safetensors"
    run([PYTHON, str(Path(__file__).with_name("_checkpoint.py")), model, str(base)])
    write_trained(lora, model, 32)
    return base, lora, base.stat().st_size


def commands(model: str, base: Path, lora: Path, output: Path, device: str) -> dict[str, list[str]]:
    """Ours and its peers as processes. diffusers' way makes a folder of `output`, all others a file."""
    files, here = [str(base), str(lora), str(output)], Path(__file__).parent
    first = device.split(",")[0]
    script = [PYTHON, "-c", LOAD_ADD_SAVE, *files, first]
    ours = [PYTHON, "-m", "loratool", "bake", "--base", str(base), f"{lora}:0.8", "-o", str(output), "--device", device]
    return {
        "cp": ["cp", str(base), str(output)],
        "flushed": ["sh", "-c", f"cp '{base}' '{output}' && sync '{output}'"],
        "ours": ours,
        "script": [*script, "same", str(here)],
        "wide": [*script, "wide", str(here)],
        "popular": [PYTHON, str(here / "_popular.py"), model, *files],
        "diffusers": [PYTHON, str(here / "_diffusers.py"), model, *files, first],
    }


def on_cpu(models: list[str], times: int) -> int:
    """Everything as processes."""
    budgets: list[Budget] = []
    with folder() as place:
        for model in models:
            base, lora, size = inputs(place, model)
            output = place / "output.safetensors"
            peers = commands(model, base, lora, output, "cpu")
            scripts = ["script", "wide", *(["popular"] if model == "sd15" else [])]  # SDXL's takes 23 GB of memory
            prepare = fresh(output, 3 * size)
            found = in_turns({name: peers[name] for name in ("cp", "flushed", "ours")}, times, prepare)
            found |= in_turns({name: peers[name] for name in scripts}, times, prepare)
            name = f"{model} ({size / MB:,.0f} MB)"
            ours = found["ours"]
            budgets += [
                ratio(f"{name}: time of cp", ours, found["cp"], COPIES["cpu"]),
                ratio(f"{name}: of cp and sync", ours, found["flushed"], COPIES["cpu"]),
                ratio(f"{name}: a 5th of load, float32, add, save", ours, found["wide"], 1 / FASTER),
                ratio(f"{name}: of load, add, save in fp16", ours, found["script"], 1.0),
                Budget(f"{name}: memory", ours.peak / MB, HOST / MB, "MB", f"theirs {found['wide'].peak / MB:,.0f} MB"),
            ]
            if "popular" in found:
                budgets.append(ratio(f"{name}: a 5th of popular scripts", ours, found["popular"], 1 / FASTER))
            base.unlink()
    return verdict(f"loratool bake on the CPU, median of {times}", budgets)


def on_gpu(device: str, models: list[str], times: int) -> int:
    """Each model in a process of its own: the peak of this one would be that of the next model's command."""
    import torch

    if len(models) > 1:
        words = [PYTHON, __file__, "--device", device, "-n", str(times), "--models"]
        return max(subprocess.run([*words, model]).returncode for model in models)
    with folder() as place:
        budgets = one_on_gpu(place, models[0], device, times)
    return verdict(f"loratool bake on {torch.cuda.get_device_name()}, median of {times}", budgets)


def one_on_gpu(place: Path, model: str, device: str, times: int) -> list[Budget]:
    """The budgets of one model: everything as processes, ours and the bare script also within this one."""
    import torch

    base, lora, size = inputs(place, model)
    output = place / "output.safetensors"
    peers = commands(model, base, lora, output, device)
    alone = run(peers["ours"])  # before this process grows: a child begins with its parent's peak
    within = _within(base, lora, output, device)
    jobs: dict[str, Callable[[], object]] = {job: partial(run, words) for job, words in peers.items()} | within
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats()
    found = _timed(jobs, ("cp", "flushed", "ours", "ours, warm", "ours, warm, unverified"), output, times)
    peak = torch.cuda.max_memory_reserved()
    found |= _timed(jobs, ("wide", "wide, warm", "popular", "diffusers"), output, times)
    name = f"{model} ({size / MB:,.0f} MB)"

    def against(what: str, one: str, other: str, allowed: float) -> Budget:
        detail = f"{found[one]:.2f} s / {found[other]:.2f} s"
        return Budget(f"{name}: {what}", found[one] / found[other], allowed, "x", detail)

    return [
        against("torch imported: time of cp", "ours, warm", "cp", COPIES["cuda"]),
        against("torch imported: of cp and sync", "ours, warm", "flushed", COPIES["cuda"]),
        against("a 5th of diffusers on the GPU", "ours", "diffusers", 1 / FASTER),
        against("a 5th of popular scripts", "ours", "popular", 1 / FASTER),
        against("a 5th of load, float32, add, save", "ours", "wide", 1 / FASTER),
        against("torch imported: a 5th of the same", "ours, warm", "wide, warm", 1 / FASTER),
        Budget(f"{name}: GPU memory", peak / MB, GPU / MB, "MB"),
        Budget(f"{name}: host memory", alone.peak / MB, HOST / MB, "MB"),
    ]


def _within(base: Path, lora: Path, output: Path, device: str) -> dict[str, Callable[[], object]]:
    """What runs within this process, which has imported torch and started the GPU."""
    import torch

    from loratool.ops.bake_file import bake_file
    from loratool.ops.bake_task import Options
    from loratool.ops.inputs import Asked

    devices = tuple(device.split(","))

    def ours(verify: bool = True) -> None:
        bake_file(base, [Asked(str(lora), 0.8)], output, Options(devices=devices, overwrite=True, verify=verify))

    def script() -> None:
        sys.argv[1:] = [str(base), str(lora), str(output), devices[0], "wide", str(Path(__file__).parent)]
        exec(LOAD_ADD_SAVE, {"__name__": "script"})
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    return {"ours, warm": ours, "ours, warm, unverified": partial(ours, False), "wide, warm": script}


def _timed(
    jobs: Mapping[str, Callable[[], object]], names: Sequence[str], output: Path, times: int
) -> dict[str, float]:
    """The median seconds of some jobs, done in turns after one round that is not counted."""
    took: dict[str, list[float]] = {job: [] for job in names}
    prepare = fresh(output)
    for _ in range(times + 1):
        for job in names:
            prepare()
            started = time.perf_counter()
            jobs[job]()
            took[job].append(time.perf_counter() - started)
    for job, seconds in took.items():
        print(f"{job}: first {seconds[0]:.2f} s, then {', '.join(f'{s:.2f}' for s in seconds[1:])}", flush=True)
    return {job: statistics.median(seconds[1:]) for job, seconds in took.items()}


def main() -> int:
    """Measures, prints, and returns 1 if a budget is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, or several: cuda:0,cuda:1")
    parser.add_argument("--models", default="", help="sd15, sdxl, or both (default: sd15 on the CPU, else both)")
    options = parser.parse_args()
    if options.device == "cpu":
        return on_cpu((options.models or "sd15").split(","), options.n)
    return on_gpu(options.device, (options.models or "sd15,sdxl").split(","), options.n)


if __name__ == "__main__":
    sys.exit(main())
