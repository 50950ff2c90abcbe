"""unbake: a base again from what was baked into it, bit for bit by its undo file, or nearly by subtracting."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from loratool.core.errors import FormatError, LoratoolError, UsageError, few
from loratool.files.bundle import check_output
from loratool.files.checkpoint import CheckpointFiles, WeightFile, read_checkpoint
from loratool.files.stream import Output, copies, plan_like
from loratool.ops import recipe
from loratool.ops.bake_copy import Copier
from loratool.ops.bake_file import bake_file
from loratool.ops.bake_report import BakeReport
from loratool.ops.bake_task import FileTask, Options, Task, bakes_in
from loratool.ops.bake_work import Desk
from loratool.ops.bake_write import Progress, Ticker, check_places, size_of, temporary_places
from loratool.ops.baking import GPU_THREADS, Destination
from loratool.ops.frames import Frame, corrected, frames_in
from loratool.ops.inputs import Asked
from loratool.ops.open import open_adapter
from loratool.ops.pool import each, threads
from loratool.ops.predict import Back
from loratool.ops.rounding import ulp
from loratool.ops.sites import Fixed, Site
from loratool.ops.stored import byte_range, part_of, scale_column
from loratool.ops.undo import Undo, UndoFile, UndoSite, read_undo, tensor_of


@dataclass(frozen=True)
class UnbakeReport:
    """What `loratool unbake` did. `exact`: every file has the sha256 of the base's, as the undo file tells it.

    Without an undo file, `doubtful` is the share of the changed values whose last bits the bake had rounded away, and
    `error` the relative error (Frobenius) that this leads to in the changed tensors: both estimated.
    """

    baked: str
    output: str
    undo: str | None
    adapters: tuple[str, ...]
    exact: bool
    tensors: int
    files: Mapping[str, str]
    doubtful: float | None
    error: float | None
    notes: tuple[str, ...]
    size: int
    seconds: float


# -- by an undo file --------------------------------------------------------------------------------------------------


def unbake_file(
    baked: str | os.PathLike[str],
    undo: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    devices: Sequence[str] = ("cpu",),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> UnbakeReport:
    """Writes the base that `baked` was made from, bit for bit, by the undo file that its bake wrote.

    The output's sha256 is compared with that of the base before it gets its name. Computed in float64. Raises
    FormatError for an undo file of another bake, and where the result is not the base.
    """
    started = time.perf_counter()
    check_output(output, [os.fspath(baked), os.fspath(undo)], os.path.isdir(baked), overwrite)
    opened = read_undo(undo)
    checkpoint = read_checkpoint(baked)
    tasks = [_task(checkpoint, opened, one) for one in opened.files]
    files = {told.name: file for told, file in zip(opened.files, (task.file for task in tasks), strict=True)}
    sites = [_site(checkpoint, files, one) for one in opened.sites]
    check_places(Path(output), checkpoint, list(files.values()), sum(task.plan.nbytes for task in tasks))
    with temporary_places(Path(output), checkpoint, list(files.values()), overwrite) as places:
        with ExitStack() as stack:
            outputs = {
                task.file: stack.enter_context(Output(places.files[task.file], len(told.header), task.plan))
                for task, told in zip(tasks, opened.files, strict=True)
            }
            try:
                _restore(tasks, outputs, list(zip(sites, opened.sites, strict=True)), devices, progress)
            except FormatError as error:
                raise error.with_file(undo) from error.__cause__
            for task, told in zip(tasks, opened.files, strict=True):
                outputs[task.file].finish(told.header)
        for told in opened.files:
            if recipe.file_sha256(places.files[files[told.name]]) != told.sha256:
                raise FormatError(
                    f"{told.name or 'the file'} would not be the base (another sha256)",
                    file=str(baked),
                    hint="it was changed after it was baked, or the undo file is of another bake",
                )
    return UnbakeReport(
        baked=str(baked),
        output=str(output),
        undo=str(undo),
        adapters=tuple(str(one.get("name")) for one in opened.baked.get("adapters", [])),
        exact=True,
        tensors=len(sites),
        files={told.name: told.sha256 for told in opened.files},
        doubtful=None,
        error=None,
        notes=(),
        size=size_of(Path(output)),
        seconds=time.perf_counter() - started,
    )


def _task(checkpoint: CheckpointFiles, undo: Undo, told: UndoFile) -> FileTask:
    """What is copied and what is computed of one file. Raises FormatError unless its last bake is the undo file's."""
    file = next((f for weights in checkpoint.sets for f in weights.files if f.name == told.name), None)
    if file is None:
        raise FormatError(f"holds no {told.name or 'such file'}", file=checkpoint.path, hint=_OTHER)
    if _last_bake(file) != undo.baked:
        raise FormatError("its last bake is not the one that the undo file is of", file=file.path, hint=_OTHER)
    plan = plan_like(file.header)
    mine = [one for one in undo.sites if one.file == told.name]
    moved = frozenset({one.key for one in mine} | {one.scale_key for one in mine if one.scale_key})
    lacking = sorted(moved - file.header.tensors.keys())
    if lacking or len(told.header) + plan.nbytes != told.size:
        raise FormatError(f"lacks {few(lacking)}" if lacking else "has another size", file=file.path, hint=_OTHER)
    return FileTask(file, plan, copies(file.header, plan, moved), {})


_OTHER = "name the undo file that was written with this checkpoint"


def _last_bake(file: WeightFile) -> object:
    found = bakes_in(file.header.metadata)
    return found[-1] if found else None


def _site(checkpoint: CheckpointFiles, files: Mapping[str, WeightFile], told: UndoSite) -> Site:
    file = files.get(told.file)
    if file is None or told.key not in file.header.tensors:
        raise FormatError(f"has no tensor {told.key}", file=checkpoint.path, hint=_OTHER)
    tensor = file.header.tensors[told.key]
    scale = file.header.tensors.get(told.scale_key) if told.scale_key else None
    return Site("", file, told.key, tensor, tensor.dtype, told.parts, told.scale_key, scale)


def _restore(
    tasks: Sequence[FileTask],
    outputs: Mapping[WeightFile, Output],
    sites: Sequence[tuple[Site, UndoSite]],
    devices: Sequence[str],
    progress: Progress | None,
) -> None:
    tick = Ticker(progress, "writing", sum(task.plan.nbytes for task in tasks))
    with Copier(tasks, outputs, True, tick) as copier:
        destinations = {task.file: Destination(outputs[task.file], task.plan) for task in tasks}
        jobs = [(site, told, devices[at % len(devices)]) for at, (site, told) in enumerate(sites)]
        workers = GPU_THREADS * len(devices) if devices[0] != "cpu" else threads()

        def work(job: tuple[Site, UndoSite, str]) -> None:
            _undone(*job, destinations[job[0].file], tick)

        each(work, jobs, workers=workers)
        copier.wait()


def _undone(site: Site, told: UndoSite, device: str, to: Destination, tick: Ticker) -> None:
    """Computes one tensor of the base."""
    desk = Desk(device)
    with desk.context():
        back = Back(told.parts, site.dtype, device)
        new = None if site.scale is None else scale_column(site.scale, device)
        old = None if told.scale is None else scale_column(told.scale, device)
        try:
            for frame in frames_in(bytes(told.frames.read())):
                values = _rows(desk, site, frame, back, old, new)
                first, _ = byte_range(site.tensor, frame.row, frame.row + frame.height)
                data = values.contiguous().view(-1).view(torch.uint8).numpy().data
                to.output.write(data, to.plan.start(site.key) + first)
                tick(data.nbytes)
        except FormatError as error:
            error.key = error.key or site.key
            raise
        if told.scale is not None and told.scale_key is not None:
            to.output.write(told.scale.read(), to.plan.start(told.scale_key))
            tick(told.scale.nbytes)


def _rows(desk: Desk, site: Site, frame: Frame, back: Back, old: Tensor | None, new: Tensor | None) -> Tensor:
    rows = site.tensor.shape[0] if site.tensor.shape else 1
    if frame.row + frame.height > rows:
        raise FormatError("has more rows than the tensor", key=site.key)
    written = desk.read(site.tensor, frame.row, frame.row + frame.height)
    gains = [tensor_of(gain) for gain in frame.gains]
    here = [None if scale is None else part_of(scale, frame.row, frame.height) for scale in (old, new)]
    predicted = back.rows(written, frame.row, gains, here[0], here[1])
    return corrected(frame, predicted.cpu().contiguous())


# -- by subtracting ---------------------------------------------------------------------------------------------------


class Doubt:
    """Counts values whose last bits a bake had rounded away: those that were stored with larger steps than they have
    now, and where it rounded at random (`stochastic`) a quarter of all. A `baking.Recorder`."""

    def __init__(self, stochastic: bool = False) -> None:
        self._lock = Lock()
        self._stochastic = stochastic
        self.values, self.doubtful = 0, 0.0
        self.square = self.norm = 0.0

    def block(self, site: Site, row: int, stored: Tensor, written: Tensor, scale: Tensor | None) -> None:
        """Looks at rows before (`stored`: as they were baked) and after."""
        old = 1.0 if site.scale is None else part_of(scale_column(site.scale, str(stored.device)), row, len(stored))
        new = 1.0 if scale is None else part_of(scale, row, len(written))
        before, after = ulp(stored.float(), site.tensor.dtype) * old, ulp(written.float(), site.dtype) * new
        # A rounding error is spread evenly over a step; one to a random side over two of them, less at their ends, so
        # that rounding it again to steps of the same size moves a quarter of the values by one.
        variance, same = (1 / 6, 1 / 4) if self._stochastic else (1 / 12, 0.0)
        if site.scale is None:
            larger, equal = before > after, before == after
            share = larger + same * equal
            off = before.double().square() * (variance * larger + same * equal)
        else:  # the scale was a fresh one, and is again: the numbers are rounded twice
            share = torch.ones_like(before)
            off = variance * before.double().square() + after.double().square() / 12
        counted, square = float(share.sum()), float(off.sum())
        norm = float((written.double() * new).square().sum())
        with self._lock:
            self.values += stored.numel()
            self.doubtful += counted
            self.square += square
            self.norm += norm

    @property
    def share(self) -> float:
        """The share of doubtful values."""
        return self.doubtful / self.values if self.values else 0.0

    @property
    def error(self) -> float:
        """The relative error that they lead to."""
        return math.sqrt(self.square / self.norm) if self.norm else 0.0


def subtract_file(
    baked: str | os.PathLike[str],
    asked: Sequence[Asked],
    output: str | os.PathLike[str],
    options: Options,
    *,
    progress: Progress | None = None,
) -> UnbakeReport:
    """Subtracts adapters from a checkpoint: nearly the base, as what rounding took when they were baked is lost.

    Raises LoratoolError for modules whose update depends on the base, as that of DoRA and OFT does.
    """
    if not asked:
        raise UsageError(
            "nothing says what to take out", hint="name --undo FILE, or the LoRA files with their strengths"
        )
    for one in asked:
        adapter = open_adapter(one.path)
        based = [module for module in adapter.modules if module.needs_base]
        if based:
            kinds = sorted({"DoRA" if module.magnitude is not None else module.family.title for module in based})
            raise LoratoolError(
                f"{len(based)} of its modules are {' and '.join(kinds)}: what they change depends on the base and "
                "cannot be subtracted",
                file=one.path,
                hint="use the undo file that `bake --undo` writes",
            )
    record = _Record(baked)
    whole = record.completed(asked)
    doubt = Doubt(record.stochastic)
    told = [replace(one, weight=-one.weight) for one in whole]
    done = bake_file(baked, told, output, options, recorder=doubt, check=_check_sums, progress=progress)
    return UnbakeReport(
        baked=str(baked),
        output=str(output),
        undo=None,
        adapters=tuple(one.path for one in done.adapters),
        exact=False,
        tensors=len(done.tensors),
        files={},
        doubtful=doubt.share,
        error=doubt.error,
        notes=(*record.notes(asked, whole, done), *done.notes),
        size=done.size,
        seconds=done.seconds,
    )


def _check_sums(task: Task) -> None:
    """Raises LoratoolError for tensors that the adapters replace: what was there before is not known any more."""
    for site in task.found.sites:
        for part in site.parts:
            if isinstance(part, Fixed) and part.replaces:
                raise LoratoolError(
                    "takes the place of the base's tensor, which cannot be subtracted",
                    file=part.adapter,
                    key=part.title,
                    hint="use the undo file that `bake --undo` writes",
                )


class _Record:
    """What the header of a checkpoint says of all its bakes."""

    def __init__(self, baked: str | os.PathLike[str]) -> None:
        files = [file for weights in read_checkpoint(baked).sets for file in weights.files]
        self._bakes = [bake for file in files for bake in bakes_in(file.header.metadata) if isinstance(bake, dict)]
        self._known: dict[tuple[object, object], Any] = {}
        for bake in self._bakes:
            adapters = bake.get("adapters")
            for one in adapters if isinstance(adapters, list) else ():
                if isinstance(one, dict) and isinstance(one.get("strength"), (int, float)):
                    self._known[str(one.get("sha256")), one["strength"]] = one.get("blocks")

    @property
    def stochastic(self) -> bool:
        """Whether something was rounded at random."""
        return any(bake.get("rounding") == "stochastic" for bake in self._bakes)

    def completed(self, asked: Sequence[Asked]) -> list[Asked]:
        """Each with the block weights at which it was baked. Hashes them only if there were any."""
        if not any(isinstance(blocks, (str, dict)) for blocks in self._known.values()):
            return list(asked)
        digests = recipe.hashing([one.path for one in asked])()
        return [self._completed(one, digest) for one, digest in zip(asked, digests, strict=True)]

    def _completed(self, asked: Asked, digest: str) -> Asked:
        blocks = self._known.get((digest, asked.weight))
        usable = asked.blocks is None and isinstance(blocks, (str, dict))
        return replace(asked, blocks=blocks) if usable else asked

    def notes(self, asked: Sequence[Asked], whole: Sequence[Asked], done: BakeReport) -> Iterator[str]:
        """What a user should know of what was taken out: as it was asked for, and as it was completed."""
        for one, completed, found in zip(asked, whole, done.adapters, strict=True):
            name = recipe.file_name(one.path)
            if (found.sha256, one.weight) not in self._known:
                yield f"the header does not say that {name} was baked into it at this strength"
            elif completed is not one:
                yield f"{name} was baked with block weights, and is subtracted with them"
        casts = {str(bake["dtype"]) for bake in self._bakes if "dtype" in bake}
        if casts:
            yield f"it was cast to {few(sorted(casts))} when it was baked: what that rounded away is not counted"
