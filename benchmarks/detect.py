"""Cold detection: which model and spelling a file of up to 2,000 keys is, over all tables, in a process that has built
none; CPU time, for every architecture in each of its sizes and in every layout that is written for it.

Each measurement is a process of its own, forked before any table is imported, that collects garbage as seldom as the
program does; of several the least counts, which nothing else on the machine held up. What is not measured: reading the
header.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _measure import Budget, folder, verdict

import loratool.cli  # noqa: F401  # as the program, which sets how often garbage is collected
from loratool.core import detect
from loratool.core.adapter import Bundle
from loratool.core.architecture import Architecture
from loratool.core.layout import Layout
from loratool.core.module import Module
from loratool.core.registry import architectures, families, layouts
from loratool.core.tensor import Held, LazyTensor

KEYS = 2000
DETECTION, IMPORT = 50.0, 25.0
"""Milliseconds of CPU time."""

Keys = dict[str, tuple[tuple[int, ...], str]]
"""key -> shape and dtype."""


def main() -> int:
    """Measures, prints a line for each model and layout and the worst; returns 1 if a budget is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=5, help="processes for each file (default: 5)")
    parser.add_argument("--only", default="", help="an architecture's id (default: all)")
    options = parser.parse_args()
    worst, most = "", 0.0
    with folder() as place:
        files = apart(lambda: _write_all(place, options.only))
        loaded = min(apart(_import) for _ in range(11))
        paths = [path for sizes in files.values() for _, path, _, _ in sizes]
        least: dict[Path, tuple[float, str]] = {}
        for _ in range(options.n):  # round after round: what holds up the machine for a second spoils one of them
            for path in paths:
                found = apart(lambda path=path: _detect(path))  # type: ignore[misc]
                least[path] = min(least.get(path, found), found)
        for (model, layout), sizes in files.items():
            slowest = 0.0
            for title, path, count, told in sizes:
                spent, taken_for = least[path]
                slowest = max(slowest, spent)
                if spent > most:
                    worst, most = f"{title}, {layout}, {count} keys", spent
                if taken_for != told:
                    print(f"  {title}, {layout}: taken for {taken_for}")
            largest = max(count for _, _, count, _ in sizes)
            print(f"{model:20} {layout:12} {slowest:6.1f} ms  ({len(sizes)} sizes, up to {largest} keys)", flush=True)
    budgets = [
        Budget("import of all tables, layouts and families", loaded, IMPORT, "ms"),
        Budget("cold detection, the slowest file", most, DETECTION, "ms", worst),
    ]
    return verdict(f"CPU time, the least of {options.n} processes for each file", budgets)


def apart(work: Callable[[], Any]) -> Any:
    """What `work` returns in a child process of this one."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(work(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    if os.waitpid(child, 0)[1]:
        sys.exit("a measurement failed")
    return pickle.loads(text)


def _import() -> float:
    started = time.process_time()
    architectures(), layouts(), families()
    return 1000 * (time.process_time() - started)


def _detect(path: Path) -> tuple[float, str]:
    """CPU milliseconds, and what the file was taken for."""
    keys: Keys = pickle.loads(path.read_bytes())
    bundle = Bundle({key: LazyTensor(shape, dtype, Held(b"")) for key, (shape, dtype) in keys.items()})
    architectures(), layouts(), families()
    started = time.process_time()
    found = detect.detect(bundle)
    spent = 1000 * (time.process_time() - started)
    return spent, "nothing" if found is None else found.best.architecture.title


def _write_all(place: Path, only: str) -> dict[tuple[str, str], list[tuple[str, Path, int, str]]]:
    """(model, layout) -> title, file, count of keys and expected title of each size."""
    found: dict[tuple[str, str], list[tuple[str, Path, int, str]]] = {}
    for model in architectures().values():
        if model.open or (only and model.id != only):
            continue
        for index, size in enumerate(model.sizes):
            for layout in layouts().values():
                keys = dict(_keys(size, layout)) if layout.writable else {}
                if keys:
                    path = place / f"{model.id}-{index}-{layout.id}"
                    path.write_bytes(pickle.dumps(keys))
                    found.setdefault((model.id, layout.id), []).append((size.title, path, len(keys), size.title))
    return found


def _keys(model: Architecture, layout: Layout) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    """Keys of a LoRA for as many of a model's linears and convolutions as make 2,000, evenly spread."""
    voices = layout.written(model)
    pair = families()["lora"]
    modules: list[Module] = []
    for component, voice in voices.items():
        for targets in model.naming(component, voice.naming).values():
            if len(targets[0].shape) > 1:
                out, (columns, *kernel) = sum(target.rows for target in targets), targets[0].shape[1:]
                factors = {"up": _empty(out, 4, *(1 for _ in kernel)), "down": _empty(4, columns, *kernel)}
                modules.append(Module(targets, pair, factors, 4.0))
    modules = [module for module in modules if layout.obstacle(module) is None]
    each = len(layout.spell(modules[0], model, voices)) if modules else 1
    step = max(1.0, len(modules) * each / KEYS)
    for index in range(int(len(modules) / step)):
        for key, tensor in layout.spell(modules[int(index * step)], model, voices).values():
            yield key, (tensor.shape, tensor.dtype)


def _empty(*shape: int) -> LazyTensor:
    return LazyTensor(shape, "F16", Held(b""))


if __name__ == "__main__":
    sys.exit(main())
