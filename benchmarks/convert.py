"""`loratool convert` against safetensors' own load_file + save_file of the same file, as processes: wall time, memory.

SDXL rank 128 and Flux rank 64 as sd-scripts writes them, fp16, every module that it trains, to diffusers: names only
for SDXL, with and without the header's hashes made true; rows cut for Flux. Ours is flushed to the disk before it
gets its name and read back and compared (the default); the baseline does neither.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from _measure import LORATOOL, MB, PYTHON, Budget, Runs, folder, fresh, in_turns, memory, ratio, verdict, write_lora

TIMES = 1.5
HASHES = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
FILES = (("sdxl", 128, {}), ("sdxl", 128, HASHES), ("flux", 64, {}))
"""(architecture, rank, more metadata)."""

BASELINE = """
import sys
from safetensors.torch import load_file, save_file
save_file(load_file(sys.argv[1]), sys.argv[2], metadata={"format": "pt"})
"""


def allowed_memory(size: int) -> float:
    """The larger of 300 MB and 1.2x the file, in bytes."""
    return max(300 * MB, 1.2 * size)


def measured(path: Path, output: Path, times: int) -> dict[str, Runs]:
    """The baseline, ours, and ours without its proof, in turns on one file."""
    ours = [LORATOOL, "convert", str(path), "--to", "diffusers", "-o", str(output)]
    commands = {
        "baseline": [PYTHON, "-c", BASELINE, str(path), str(output)],
        "ours": ours,
        "unverified": [*ours, "--no-verify"],
    }
    return in_turns(commands, times, fresh(output))


def main() -> int:
    """Measures, prints, and returns 1 if a budget is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=5, help="runs of each process (default: 5)")
    times = parser.parse_args().n
    budgets: list[Budget] = []
    stages: list[str] = []
    with folder() as place:
        for architecture, rank, metadata in FILES:
            path = place / "input.safetensors"
            modules = write_lora(path, architecture, rank, metadata)
            size = path.stat().st_size
            found = measured(path, place / "output.safetensors", times)
            name = (
                f"{architecture} rank {rank}{', hashed' if metadata else ''} ({modules} modules, {size / MB:,.0f} MB)"
            )
            budgets += [
                ratio(f"{name}: time", found["ours"], found["baseline"], TIMES),
                memory(f"{name}: memory", found["ours"], allowed_memory(size)),
            ]
            stages.append(_stages(name, found))
    code = verdict(f"loratool convert --to diffusers over load_file + save_file, median of {times}", budgets)
    print("\n".join(stages))
    return code


def _stages(name: str, found: dict[str, Runs]) -> str:
    """Where the time goes: the proof is what `--no-verify` saves."""
    written, whole = found["unverified"].seconds, found["ours"].seconds
    return f"{name}: read, regroup, write, flush {written:.2f} s; proof {whole - written:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
