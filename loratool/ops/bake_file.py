"""bake: adapters added to a checkpoint, from files to files, with the report as data."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.core.architecture import Architecture
from loratool.core.errors import UsageError
from loratool.files.atomic import check_room
from loratool.files.bundle import check_output
from loratool.files.checkpoint import WeightFile
from loratool.files.stream import Output
from loratool.ops import recipe
from loratool.ops.bake_copy import Copier
from loratool.ops.bake_folder import restate
from loratool.ops.bake_format import write_respelled
from loratool.ops.bake_report import BakeReport, bake_report
from loratool.ops.bake_task import FileTask, Options, Task, planned_size, prepared, record, with_record
from loratool.ops.bake_write import Progress, Ticker, check_places, scratch_places, size_of, temporary_places
from loratool.ops.devices import devices_named, wake
from loratool.ops.inputs import Asked

if TYPE_CHECKING:
    from loratool.ops.bake_check import Checked
    from loratool.ops.bake_work import How, Survival
    from loratool.ops.baking import Recorder


def bake_file(
    base: str | os.PathLike[str],
    asked: Sequence[Asked],
    output: str | os.PathLike[str] | None,
    options: Options | None = None,
    *,
    undo: str | os.PathLike[str] | None = None,
    architecture: Architecture | str | None = None,
    recorder: Recorder | None = None,
    check: Callable[[Task], None] | None = None,
    progress: Progress | None = None,
) -> BakeReport:
    """Adds adapters to the checkpoint at `base` (a file or folder) and writes the result; `output` None only plans it.

    Every weight becomes round(W + sum of strength * delta), computed in float32 and rounded once. Everything else
    keeps its bytes; with `options.format` all get other names, in one file. `undo` names a file to write that gives the
    base back bit for bit; without one, `recorder` may look on. `check` may refuse what is planned. Raises LoratoolError
    before anything is read for an output that cannot be written, and for modules without a weight (unless allowed).
    """
    started = time.perf_counter()
    options = options or Options()
    paths = [os.fspath(base), *(one.path for one in asked)]
    if not asked and options.dtype is None:
        raise UsageError("nothing to bake", hint="name at least one LoRA file")
    for one in asked:
        if not math.isfinite(one.weight):
            raise UsageError(f"its strength is {one.weight}, expected a finite number", file=one.path)
    if output is not None and options.format is None:
        check_output(output, paths, os.path.isdir(base), options.overwrite)
    if undo is not None:
        if options.dtype is not None:
            raise UsageError("--undo cannot undo --dtype: a cast loses bits", hint="keep the base")
        if options.format is not None:
            raise UsageError("--undo cannot undo --format: other names are not taken back", hint="keep the base")
        if output is not None and os.path.realpath(undo) == os.path.realpath(output):
            raise UsageError("--undo and -o name the same file", file=os.fspath(undo), hint="name two files")
        check_output(undo, [*paths, *([os.fspath(output)] if output is not None else [])], False, options.overwrite)
    hashes = recipe.hashing([one.path for one in asked])
    task = prepared(base, asked, options, architecture)
    if check is not None:
        check(task)
    if output is not None and options.format is not None:  # only now is known whether it is a folder
        check_output(output, paths, os.path.isdir(base) and task.target is None, options.overwrite)
    if output is None:
        options = replace(options, devices=devices_named(",".join(options.devices)))
        report = bake_report(task, asked, hashes(), options, None)
        return replace(report, size=planned_size(task), seconds=time.perf_counter() - started)
    baked = sum(file.plan.nbytes for file in task.files)
    if task.planned is None:
        check_places(Path(output), task.checkpoint, [one.file for one in task.files], baked)
    else:  # what is baked waits in a file of its own
        check_room(Path(output).absolute().parent, planned_size(task) + baked)
    report = _Bake(task, asked, options, Path(output), undo, recorder, hashes, progress).run()
    return replace(report, size=size_of(Path(output)), seconds=time.perf_counter() - started)


@dataclass(frozen=True, eq=False)
class _Bake:
    """One bake that is under way."""

    task: Task
    asked: Sequence[Asked]
    options: Options
    output: Path
    undo: str | os.PathLike[str] | None
    recorder: Recorder | None
    hashes: Callable[[], list[str]]
    progress: Progress | None

    def run(self) -> BakeReport:
        """Writes everything, checks it, and gives it its name."""
        checkpoint, options = self.task.checkpoint, self.options
        rewritten = [one.file for one in self.task.files]
        if self.task.target is not None:
            with scratch_places(self.output, rewritten, options.overwrite) as (file, files):
                report, told = self._baked(files)
                compared = write_respelled(self.task, files, file, told, options.verify, self.progress)
            checked = None if report.checked is None else replace(report.checked, bytes=compared)
            return replace(report, checked=checked)
        with temporary_places(self.output, checkpoint, rewritten, options.overwrite) as places:
            if places.folder is not None and options.dtype is not None:
                restate(places.folder, self.task, options.dtype)
            report, _ = self._baked(places.files)
        return replace(report, linked=places.others.linked, copied=places.others.copied)

    def _baked(self, places: Mapping[WeightFile, Path]) -> tuple[BakeReport, Mapping[str, Any]]:
        """Fills the files at these places, and checks them; also the record of what was baked."""
        # As long as the true one, which is known when the data are written.
        told = self._record(["0" * 64] * len(self.asked))
        with ExitStack() as stack:
            outputs = {
                one.file: stack.enter_context(Output(places[one.file], len(_header(one, told)), one.plan))
                for one in self.task.files
            }
            devices, survivals, checked, undone = self._filled(outputs)
            digests = self.hashes()
            known = replace(self, options=replace(self.options, devices=devices))
            told = known._record(digests)
            for one in self.task.files:
                outputs[one.file].finish(_header(one, told, outputs[one.file].head))
            undo_size = undone(told)
        report = bake_report(self.task, self.asked, digests, known.options, survivals)
        report = replace(
            report,
            output=str(self.output),
            checked=checked,
            undo=None if self.undo is None else str(self.undo),
            undo_size=undo_size,
        )
        return report, told

    def _record(self, digests: Sequence[str]) -> dict[str, Any]:
        return record(self.asked, digests, self.task.checkpoint.path, self.options)

    def _filled(
        self, outputs: Mapping[WeightFile, Output]
    ) -> tuple[Sequence[str], list[Survival], Checked | None, Callable[[Mapping[str, Any]], int | None]]:
        """Fills the files; also the devices, what was found, and the function that writes the undo file."""
        files, verify = self.task.files, self.options.verify
        written = Ticker(self.progress, "writing", sum(one.plan.nbytes for one in files))
        with Copier(files, outputs, verify, written) as copier, self._hashing() as bases:
            # Asked and imported while bytes are copied: torch takes a second or two to begin.
            wake(self.options.devices)
            devices = devices_named(",".join(self.options.devices))
            from loratool.ops import bake_check, bake_work, baking

            copier.hurry()
            sites = self.task.found.sites
            destinations = {one.file: baking.Destination(outputs[one.file], one.plan) for one in files}
            how = bake_work.How(self.options.rounding, self.options.seed, self.options.dora_norm)
            recorder, undone = self._recording(how, bases)
            bakery = baking.Bakery(destinations, devices, how, written, recorder=recorder)
            checked = None
            if verify:
                with bake_check.RowCheck(destinations, how) as rows:
                    bakery.finished = rows.add
                    survivals = bakery.run(sites)
                    found = rows.result(Ticker(self.progress, "verifying", len(sites)))
                checked = replace(found, bytes=copier.compared)
            else:
                survivals = bakery.run(sites)
            copier.wait()
        return devices, survivals, checked, undone

    @contextmanager
    def _hashing(self) -> Iterator[Mapping[WeightFile, Future[str]]]:
        """Hashes the base's files in the background, if there is an undo file to write them to."""
        with ThreadPoolExecutor(2, "loratool-sha256") as pool:
            files = [one.file for one in self.task.files] if self.undo is not None else []
            yield {file: pool.submit(recipe.file_sha256, file.path) for file in files}

    def _recording(
        self, how: How, bases: Mapping[WeightFile, Future[str]]
    ) -> tuple[Recorder | None, Callable[[Mapping[str, Any]], int | None]]:
        """What looks on while blocks are computed, and the function that then writes the undo file."""
        if self.undo is None:
            return self.recorder, lambda told: None
        from loratool.ops.undo import Recording, write_undo

        sites, undo = self.task.found.sites, self.undo
        recording = Recording(sites, how.norm)

        def write(told: Mapping[str, Any]) -> int:
            hashed = {file: future.result() for file, future in bases.items()}
            return write_undo(undo, sites, recording, told, hashed, self.options.overwrite)

        return recording, write


def _header(one: FileTask, told: Mapping[str, Any], least: int = 0) -> bytes:
    """The header of a file with the record of the bake; see `header_bytes`."""
    return one.plan.header(with_record(one.metadata, told), one.file.header.header_bytes, least)
