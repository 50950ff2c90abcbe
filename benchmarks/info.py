"""`loratool info FILE` against `python -c "import typer, rich.table"`, as processes: wall time and peak memory.

Files as sd-scripts writes them, warm in the page cache: SD 1.5, SDXL, Flux, and one of 2 GB.
"""

from __future__ import annotations

import argparse
import sys

from _measure import LORATOOL, MB, PYTHON, Budget, folder, in_turns, memory, ratio, verdict, write_lora

TIMES, MEMORY = 2.0, 80 * MB
FILES = (("sd15", 16), ("sdxl", 32), ("flux", 16), ("sdxl", 288))
"""(architecture, rank); the last one is the file of 2 GB."""


def main() -> int:
    """Measures, prints, and returns 1 if a budget is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=21, help="runs of each process (default: 21)")
    times = parser.parse_args().n
    commands = {"baseline": [PYTHON, "-c", "import typer, rich.table"]}
    with folder() as place:
        for architecture, rank in FILES:
            path = place / f"{architecture}_r{rank}.safetensors"
            modules = write_lora(path, architecture, rank)
            size = path.stat().st_size / MB
            name = f"{architecture} rank {rank} ({modules} modules, {size:,.0f} MB)"
            commands[name] = [LORATOOL, "info", str(path)]
        found = in_turns(commands, times)
    baseline = found.pop("baseline")
    budgets: list[Budget] = []
    for name, runs in found.items():
        budgets += [ratio(f"{name}: time", runs, baseline, TIMES), memory(f"{name}: memory", runs, MEMORY)]
    return verdict(f'loratool info over `python -c "import typer, rich.table"`, median of {times}', budgets)


if __name__ == "__main__":
    sys.exit(main())
