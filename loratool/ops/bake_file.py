"""bake: adapters added to a checkpoint, from files to files, with the report as data."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from loratool.core.architecture import Architecture
from loratool.core.errors import UsageError
from loratool.files.atomic import atomic_folder, atomic_write, check_room
from loratool.files.bundle import check_output
from loratool.files.checkpoint import WeightFile
from loratool.files.stream import Output
from loratool.ops import recipe
from loratool.ops.bake_copy import Copier
from loratool.ops.bake_folder import Others, bring_others, restate
from loratool.ops.bake_report import BakeReport, bake_report
from loratool.ops.bake_task import FileTask, Options, Task, prepared, record, with_record
from loratool.ops.inputs import Asked

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total): bytes while writing and verifying, tensors otherwise."""


def bake_file(
    base: str | os.PathLike[str],
    asked: Sequence[Asked],
    output: str | os.PathLike[str] | None,
    options: Options | None = None,
    *,
    undo: str | os.PathLike[str] | None = None,
    architecture: Architecture | str | None = None,
    progress: Progress | None = None,
) -> BakeReport:
    """Adds adapters to the checkpoint at `base` (a file or folder) and writes the result; `output` None only plans it.

    Every weight becomes round(W + sum of strength * delta), computed in float32 and rounded once. Everything else
    keeps its bytes. `undo` names a file to write that gives the base back bit for bit. Raises LoratoolError before
    anything is read for an output that cannot be written, and for modules without a weight (unless allowed).
    """
    started = time.perf_counter()
    options = options or Options()
    paths = [os.fspath(base), *(one.path for one in asked)]
    if not asked and options.dtype is None:
        raise UsageError("nothing to bake", hint="name at least one LoRA file")
    if output is not None:
        check_output(output, paths, os.path.isdir(base), options.overwrite)
    if undo is not None:
        if options.dtype is not None:
            raise UsageError("--undo cannot undo --dtype: a cast loses bits", hint="keep the base")
        check_output(undo, [*paths, *([os.fspath(output)] if output is not None else [])], False, options.overwrite)
    hashes = recipe.hashing([one.path for one in asked])
    task = prepared(base, asked, options, architecture)
    size = sum(file.header.size_bytes for one in task.checkpoint.sets for file in one.files)
    if output is None:
        return bake_report(task, asked, hashes(), options, None, size, started)
    check_room(Path(output).parent, sum(file.plan.nbytes for file in task.files))
    return _Bake(task, asked, options, Path(output), undo, hashes, progress, started).run()


class _Bake:
    """One bake that is under way."""

    def __init__(
        self,
        task: Task,
        asked: Sequence[Asked],
        options: Options,
        output: Path,
        undo: str | os.PathLike[str] | None,
        hashes: Callable[[], list[str]],
        progress: Progress | None,
        started: float,
    ) -> None:
        self._task, self._asked, self._options = task, asked, options
        self._output, self._undo, self._hashes, self._started = output, undo, hashes, started
        self._told = progress
        self._others = Others(0, 0)

    def run(self) -> BakeReport:
        """Writes everything, checks it, and gives it its name."""
        with ExitStack() as stack:
            if self._task.checkpoint.folder:
                folder = stack.enter_context(atomic_folder(self._output, self._options.overwrite))
                self._others = bring_others(
                    Path(self._task.checkpoint.path), folder, {one.file.name for one in self._task.files}
                )
                if self._options.dtype is not None:
                    restate(folder, self._task, self._options.dtype)
                places = {one.file: folder / one.file.name for one in self._task.files}
                for place in places.values():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.touch()
            else:
                file = stack.enter_context(atomic_write(self._output, self._options.overwrite))
                places = {one.file: file for one in self._task.files}
            report = self._filled(places)
        size = _size_of(self._output)
        return replace(report, size=size, seconds=time.perf_counter() - self._started)

    def _filled(self, places: Mapping[WeightFile, Path]) -> BakeReport:
        """Fills the files under their temporary names."""
        digests = ["0" * 64] * len(self._asked)  # as long as the true ones, which are known when the data are written
        with ExitStack() as stack:
            outputs: dict[WeightFile, Output] = {}
            for one in self._task.files:
                head = len(one.plan.header(self._header(one, digests)))
                outputs[one.file] = stack.enter_context(Output(places[one.file], head, one.plan))
            total = sum(one.plan.nbytes for one in self._task.files)
            tick = _Ticker(self._told, "writing", total)
            untouched = sum(what.nbytes for one in self._task.files for what in one.copies)
            compared = _Ticker(self._told, "comparing", untouched)
            with Copier(self._task.files, outputs, self._options.verify, tick, compared) as copier:
                # Imported while bytes are copied: torch takes a second or two to begin.
                from loratool.ops import bake_check, baking

                destinations = {one.file: baking.Destination(outputs[one.file], one.plan) for one in self._task.files}
                how = baking.How(self._options.rounding, self._options.seed, self._options.dora_norm)
                sites = self._task.found.sites
                bakery = baking.Bakery(destinations, self._options.devices, how, tick)
                checked = None
                with bake_check.RowCheck(destinations, how, _Ticker(self._told, "verifying", len(sites))) as check:
                    if self._options.verify:
                        bakery.done = check.written
                    survivals = bakery.run(sites)
                    copier.wait()
                    if self._options.verify:
                        checked = check.result(copier.compared)
            digests = self._hashes()
            for one in self._task.files:
                outputs[one.file].finish(one.plan.header(self._header(one, digests)))
        report = bake_report(self._task, self._asked, digests, self._options, survivals, 0, self._started)
        return replace(
            report, output=str(self._output), checked=checked, linked=self._others.linked, copied=self._others.copied
        )

    def _header(self, one: FileTask, digests: Sequence[str]) -> dict[str, str]:
        told = record(self._asked, digests, self._task.checkpoint.path, self._options)
        return with_record(one.metadata, told)


class _Ticker:
    """Adds up what threads have done, and tells it."""

    def __init__(self, progress: Progress | None, stage: str, total: int) -> None:
        self._progress, self._stage, self._total = progress, stage, total
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, amount: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += amount
                self._progress(self._stage, self._done, self._total)


def _size_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
