"""`loratool merge` by concat against reading the inputs and writing such a file with safetensors: wall time, memory.

Two SDXL LoRAs as sd-scripts trains them (986 modules, rank 128, fp16). The baseline loads both, puts equal factors side
by side and saves: no alphas, no ranks looked at, no proof, not flushed. Ours adds the strengths, looks for ranks that
carry nothing, compares the two inputs, hashes them for the recipe, flushes, reads back and measures.
"""

from __future__ import annotations

import argparse
import sys

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
    ratio,
    verdict,
    write_trained,
)

TIMES = 2.0

BASELINE = """
import sys, torch
from safetensors.torch import load_file, save_file
first, second = load_file(sys.argv[1]), load_file(sys.argv[2])
merged = {}
for key, one in first.items():
    side = 0 if "lora_down" in key else 1
    merged[key] = torch.cat([one, second[key]], side) if one.dim() else one + second[key]
save_file(merged, sys.argv[3])
"""


def main() -> int:
    """Measures, prints, and returns 1 if a budget is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=3, help="runs of each process (default: 3)")
    times = parser.parse_args().n
    with folder() as place:
        one, other, output = (place / f"{name}.safetensors" for name in ("one", "other", "output"))
        size = write_trained(one, "sdxl", 128, 1) + write_trained(other, "sdxl", 128, 2)
        merge = [LORATOOL, "merge", f"{one}:0.7", f"{other}:0.3", "-o", str(output), "--device", "cpu"]
        commands = {
            "baseline": [PYTHON, "-c", BASELINE, str(one), str(other), str(output)],
            "ours": merge,
            "unverified": [*merge, "--no-verify"],
        }
        found = in_turns(commands, times, fresh(output))
        name = f"sdxl 128 + 128 ({len(kohya_modules('sdxl'))} modules, {size / MB:,.0f} MB)"
        budgets: list[Budget] = [
            ratio(f"{name}: time", found["ours"], found["baseline"], TIMES),
            ratio(f"{name}: time, --no-verify", found["unverified"], found["baseline"], TIMES),
            memory(f"{name}: memory", found["ours"], 2 * size + 500 * MB),
        ]
    return verdict(f"loratool merge over load_file, cat, save_file, median of {times}", budgets)


if __name__ == "__main__":
    sys.exit(main())
