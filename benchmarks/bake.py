"""loratool bake: the time of `cp`, a fifth of loading everything, adding and saving, and little memory.

    python benchmarks/bake.py [-n RUNS] [--models sd15,sdxl]
    python benchmarks/bake.py --device cuda [-n RUNS] [--models sd15,sdxl]

A checkpoint of real names at full size (SD 1.5 2.1 GB, SDXL 6.9 GB, fp16) and a LoRA of rank 32 for all attention and
feed-forward modules. The peers are `cp`; what popular scripts do (`_popular.py`: make the models, load, add, save;
needs the `test` extra); and the least that any script could do: load the file, cast, add every update, cast back, save.
All run in turns, the page cache warm, the last output removed; ours is flushed to the disk and
verified, theirs are not, so `cp` is also timed with a `sync`. On the CPU all are processes. On a GPU ours and the
script run in one process that has imported torch and started the GPU, and both as processes, as a user runs them. On
the CPU the scripts' turns come behind those of `cp` and ours: where a virtual machine gives free memory back to its
host, the 7 GB that one of them leaves keep a processor busy during what comes next.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from _measure import LORATOOL, MB, PYTHON, Budget, folder, fresh, in_turns, ratio, run, verdict, write_trained

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


def on_cpu(models: list[str], times: int) -> int:
    """Everything as processes."""
    budgets: list[Budget] = []
    with folder() as place:
        for model in models:
            base, lora, size = inputs(place, model)
            output = place / "output.safetensors"
            script = [PYTHON, "-c", LOAD_ADD_SAVE, str(base), str(lora), str(output), "cpu"]
            here = str(Path(__file__).parent)
            bake = [LORATOOL, "bake", "--base", str(base), f"{lora}:0.8", "-o", str(output), "--device", "cpu"]
            copies = {
                "cp": ["cp", str(base), str(output)],
                "flushed": ["sh", "-c", f"cp '{base}' '{output}' && sync '{output}'"],
                "ours": bake,
            }
            scripts = {"script": [*script, "same", here], "wide": [*script, "wide", here]}
            if model == "sd15":
                popular = Path(__file__).with_name("_popular.py")
                scripts["popular"] = [PYTHON, str(popular), str(base), str(lora), str(output)]
            found = in_turns(copies, times, fresh(output)) | in_turns(scripts, times, fresh(output))
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
    """Ours and the script in this process, `cp` and the whole command as processes; each model in one of its own."""
    import torch

    if len(models) > 1:  # the peak of this process would be that of the next model's command
        words = [PYTHON, __file__, "--device", device, "-n", str(times), "--models"]
        return max(subprocess.run([*words, model]).returncode for model in models)
    with folder() as place:
        budgets = one_on_gpu(place, models[0], device, times)
    return verdict(f"loratool bake on {torch.cuda.get_device_name()}, torch imported, median of {times}", budgets)


def one_on_gpu(place: Path, model: str, device: str, times: int) -> list[Budget]:
    """The budgets of one model."""
    import torch

    from loratool.ops.bake_file import bake_file
    from loratool.ops.bake_task import Options
    from loratool.ops.inputs import Asked

    devices = tuple(device.split(","))
    base, lora, size = inputs(place, model)
    output = place / "output.safetensors"

    def ours(verify: bool = True) -> None:
        options = Options(devices=devices, overwrite=True, verify=verify)
        bake_file(base, [Asked(str(lora), 0.8)], output, options)

    def scripted(where: str, width: str) -> list[str]:
        return [str(base), str(lora), str(output), where, width, str(Path(__file__).parent)]

    def script(where: str, width: str = "same") -> None:
        sys.argv[1:] = scripted(where, width)
        exec(LOAD_ADD_SAVE, {"__name__": "script"})
        torch.cuda.synchronize()

    code = "import sys; sys.argv[0] = 'loratool'; from loratool.cli.main import app; app()"
    words = ["bake", "--base", str(base), f"{lora}:0.8", "-o", str(output), "--device", device]
    jobs: dict[str, Callable[[], object]] = {
        "cp": lambda: subprocess.run(["cp", str(base), str(output)], check=True),
        "flushed": lambda: subprocess.run(["sh", "-c", f"cp '{base}' '{output}' && sync '{output}'"], check=True),
        "ours": ours,
        "unverified": lambda: ours(False),
        "script gpu": lambda: script(devices[0], "wide"),
        "script cpu": lambda: script("cpu"),
        "command": lambda: run([PYTHON, "-c", code, *words]),
        "script command": lambda: run([PYTHON, "-c", LOAD_ADD_SAVE, *scripted(devices[0], "wide")]),
    }
    alone = run([PYTHON, "-c", code, *words])  # before this process grows: a child begins with its parent's peak
    took: dict[str, list[float]] = {job: [] for job in jobs}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for turn in range(times + 1):
        for job, do in jobs.items():
            if job == "script gpu" and turn == 0:
                peak = torch.cuda.max_memory_reserved()
            output.unlink(missing_ok=True)
            os.sync()
            started = time.perf_counter()
            do()
            took[job].append(time.perf_counter() - started)
            print(f"{model} {job}: {took[job][-1]:.2f} s", flush=True)
    for job, seconds in took.items():
        print(f"{model} {job}: first {seconds[0]:.2f} s, then {', '.join(f'{s:.2f}' for s in seconds[1:])}")
    medians = {job: statistics.median(seconds[1:]) for job, seconds in took.items()}
    title = f"{model} ({size / MB:,.0f} MB)"

    def against(what: str, other: str, allowed: float, one: str = "ours") -> Budget:
        mine = medians[one]
        detail = f"{mine:.2f} s / {medians[other]:.2f} s"
        return Budget(f"{title}: {what}", mine / medians[other], allowed, "x", detail)

    return [
        against("time of cp", "cp", COPIES["cuda"]),
        against("of cp and sync", "flushed", COPIES["cuda"]),
        against("a 5th of load, float32, add, save", "script gpu", 1 / FASTER),
        against("the command: a 5th of the script's", "script command", 1 / FASTER, "command"),
        against("of load, add, save on the CPU", "script cpu", 1.0),
        Budget(f"{title}: GPU memory", peak / MB, GPU / MB, "MB"),
        Budget(f"{title}: host memory of the command", alone.peak / MB, HOST / MB, "MB"),
    ]


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
