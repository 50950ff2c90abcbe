"""What the benchmarks share: LoRA files of real names and sizes, processes measured in turns, a table of budgets.

This imports neither torch nor numpy, and keeps its own memory small: Linux counts the memory that a parent had when it
started a process to the peak of that process.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loratool.core.registry import architectures
from loratool.core.tensor import encoded

MB = 1_000_000
PYTHON = sys.executable
LORATOOL = str(Path(sysconfig.get_path("scripts")) / "loratool")

_POOL = 4 << 20
_NOISE = random.Random(0)

Shape = tuple[int, ...]


# ---------------------------------------------------------------- inputs


def kohya_modules(architecture: str) -> dict[str, Shape]:
    """stem -> shape of the weight, for every module that sd-scripts trains by default.

    UNet: the linears and 1x1 convolutions of its transformers. Flux: all linears of its blocks. Text encoders:
    q, k, v, out, fc1, fc2.
    """
    model = architectures()[architecture]
    found: dict[str, Shape] = {}
    for component, voice in model.writes["kohya"].items():
        if architecture == "flux" and component != "transformer":
            continue  # sd-scripts trains the transformer alone
        for name, targets in model.naming(component, voice.naming).items():
            shape = (sum(target.rows for target in targets), *targets[0].shape[1:])
            if _is_trained(component, name, shape):
                found[voice.prefix + name.replace(".", "_")] = shape
    return found


def _is_trained(component: str, name: str, shape: Shape) -> bool:
    if len(shape) < 2:
        return False
    if component.startswith("text_encoder"):
        return ".self_attn." in name or ".mlp." in name
    if component == "transformer":
        return name.startswith(("double_blocks.", "single_blocks."))
    return "transformer_blocks" in name or name.endswith((".proj_in", ".proj_out"))


def write_lora(path: Path, architecture: str, rank: int, metadata: Mapping[str, str] | None = None) -> int:
    """Writes the LoRA that sd-scripts writes for a model, in fp16 with noise for values; returns its modules."""
    modules = kohya_modules(architecture)
    tensors: dict[str, Shape] = {}
    for stem, (out, size, *kernel) in modules.items():
        tensors[f"{stem}.alpha"] = ()
        tensors[f"{stem}.lora_down.weight"] = (rank, size, *kernel)
        tensors[f"{stem}.lora_up.weight"] = (out, rank, *(1 for _ in kernel))
    header: dict[str, object] = {"__metadata__": {**_METADATA[architecture], **(metadata or {})}}
    position = 0
    ordered = sorted(tensors)
    for key in ordered:
        stop = position + 2 * _numel(tensors[key])
        header[key] = {"dtype": "F16", "shape": tensors[key], "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pool, alpha = _noise(), encoded(rank / 2, "F16")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in ordered:
            for piece in (alpha,) if key.endswith(".alpha") else _pieces(pool, 2 * _numel(tensors[key])):
                file.write(piece)
    return len(modules)


def header_of(architecture: str) -> dict[str, str]:
    """The header entries of a file for this model."""
    return dict(_METADATA[architecture])


def write_trained(path: Path, architecture: str, rank: int, seed: int = 0) -> int:
    """Writes a LoRA with the spectrum of a trained one (see `_trained.py`); returns the size of the file."""
    run([PYTHON, str(Path(__file__).with_name("_trained.py")), architecture, str(rank), str(seed), str(path)])
    return path.stat().st_size


def fresh(output: Path, memory: int = 0) -> Callable[[], None]:
    """Removes the last output and lets the disk finish: nobody pays for what another process wrote.

    On Linux `memory` bytes are used and freed again by a process, as far as half of the free memory goes: a virtual
    machine's host takes back what is free, and whoever needs it next waits (`cp` took 1.2 and 3.5 s in turns).
    """

    def prepare() -> None:
        if output.is_dir():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)
        os.sync()
        if memory and sys.platform == "linux":
            run([PYTHON, "-S", "-c", _TOUCH, str(min(memory, _free() // 2))])

    return prepare


_TOUCH = """
import mmap, sys
size, step = int(sys.argv[1]), 1 << 22
room, zeros = mmap.mmap(-1, size), bytes(step)
for at in range(0, size - step, step):
    room[at : at + step] = zeros
"""


def _free() -> int:
    """Bytes of memory that are free."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


_METADATA = {
    "sd15": {"ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1"},
    "sdxl": {"ss_network_module": "networks.lora", "ss_base_model_version": "sdxl_base_v1-0"},
    "flux": {"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1"},
}


def _numel(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _noise() -> memoryview:
    """Random halves between -2 and 2: no infinity, no NaN."""
    pool = bytearray(_NOISE.randbytes(_POOL))
    pool[1::2] = pool[1::2].translate(bytes(byte & 0xBF for byte in range(256)))
    return memoryview(pool)


def _pieces(pool: memoryview, size: int) -> Iterator[memoryview]:
    while size:
        start = 2 * _NOISE.randrange(_POOL // 4)
        piece = pool[start : start + size]
        yield piece
        size -= piece.nbytes


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Run:
    """One process: wall time in seconds, peak resident memory in bytes."""

    seconds: float
    peak: int


@dataclass(frozen=True)
class Runs:
    """All runs of one process."""

    runs: tuple[Run, ...]

    @property
    def seconds(self) -> float:
        """Median wall time."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def peak(self) -> int:
        """The highest peak of all runs."""
        return max(run.peak for run in self.runs)


def run(command: Sequence[str]) -> Run:
    """Runs a process to its end. Exits with its output when it fails."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=_environment()
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)}\nexit {process.returncode}\n{output.read().decode(errors='replace')}")
    return Run(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def _environment() -> dict[str, str]:
    """Ours, but with bytecode kept, as an installed program has it: the uncounted first round writes it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def in_turns(
    commands: Mapping[str, Sequence[str]], times: int, between: Callable[[], None] = lambda: None
) -> dict[str, Runs]:
    """Runs the commands in turns, `times` each, after one round that is not counted: what else the machine does hits
    all of them alike. Every other round goes backwards, so that none always comes behind the same one. `between` runs
    before each process, unmeasured."""
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(times + 1):
        for name, command in list(commands.items())[:: -1 if turn % 2 else 1]:
            between()
            one = run(command)
            if turn:
                found[name].append(one)
    return {name: Runs(tuple(runs)) for name, runs in found.items()}


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder (under TMPDIR), gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="loratool-bench-") as name:
        yield Path(name)


# ---------------------------------------------------------------- telling


@dataclass(frozen=True)
class Budget:
    """One claim: what was measured and the most that is allowed, both as numbers of `unit`."""

    what: str
    measured: float
    allowed: float
    unit: str
    detail: str = ""

    @property
    def kept(self) -> bool:
        """Whether the claim is true."""
        return self.measured <= self.allowed


def ratio(what: str, ours: Runs, baseline: Runs, allowed: float) -> Budget:
    """Median wall time over the baseline's, in the same run."""
    detail = f"{ours.seconds:.3f} s / {baseline.seconds:.3f} s"
    return Budget(what, ours.seconds / baseline.seconds, allowed, "x", detail)


def seconds(what: str, ours: Runs, allowed: float) -> Budget:
    """Median wall time against `allowed` seconds."""
    return Budget(what, ours.seconds, allowed, "s")


def memory(what: str, ours: Runs, allowed: float) -> Budget:
    """Peak resident memory against `allowed` bytes."""
    return Budget(what, ours.peak / MB, allowed / MB, "MB")


def verdict(title: str, budgets: Sequence[Budget]) -> int:
    """Prints the table; the exit code: 0 if all budgets are kept."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, right in (("what", False), ("required", True), ("measured", True), ("", False), ("pass", False)):
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for budget in budgets:
        table.add_row(
            budget.what,
            f"<= {_number(budget.allowed)} {budget.unit}",
            f"{_number(budget.measured)} {budget.unit}",
            budget.detail,
            "yes" if budget.kept else "NO",
        )
    Console(width=120, highlight=False).print(table)
    return 0 if all(budget.kept for budget in budgets) else 1


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.2f}"
