"""bake: adapters added to a checkpoint, from files to files, with the report as data."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool import __version__
from loratool.core.adapter import Adapter
from loratool.core.architecture import Architecture
from loratool.core.errors import FormatError, LoratoolError, UsageError, few
from loratool.core.identify import checkpoint_of
from loratool.files.atomic import atomic_folder, atomic_write, check_room
from loratool.files.bundle import PICKLES, check_output
from loratool.files.checkpoint import CheckpointFiles, WeightFile, read_checkpoint, read_index
from loratool.files.stream import Copy, Output, Plan, copies, plan_like, stretch
from loratool.ops import recipe
from loratool.ops.base import model_of
from loratool.ops.headers import STALE
from loratool.ops.inputs import Asked, Input, weighed
from loratool.ops.open import open_adapter
from loratool.ops.sites import Site, Sites, Unmatched, find_sites
from loratool.ops.weights import check_model

if TYPE_CHECKING:
    from loratool.ops.bake_check import Checked
    from loratool.ops.baking import Destination, How, Survival

ENTRY = "loratool.baked"
"""The header entry that says what was baked into a checkpoint: a JSON list, one object for every bake."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total): bytes while writing and verifying, tensors otherwise."""

LOW = 0.9
"""A share of an update below which its loss to rounding is worth a warning."""

_COPIERS = 2
_LINKED = 1 << 20
"""Files of a folder from this size on are linked where that is possible; smaller ones, which people edit, are copied."""


@dataclass(frozen=True)
class Baked:
    """One adapter that was baked: where it is from, its strength, and how many of its modules found their weights."""

    path: str
    sha256: str
    strength: float
    blocks: str | None
    layout: str
    modules: int
    matched: int
    dora: int


@dataclass(frozen=True)
class Component:
    """What became of one component: tensors changed, their bytes, and the share of the update that survived rounding
    (None where nothing was computed)."""

    component: str
    tensors: int
    bytes: int
    survived: float | None


@dataclass(frozen=True)
class Changed:
    """One tensor that was changed; `survived` as for components."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    survived: float | None


@dataclass(frozen=True)
class BakeReport:
    """What `loratool bake` did, or would do (`output` None). Sizes in bytes, `seconds` of wall time.

    `memory` is an estimate of what is used at once, on the host and on each GPU. `linked` and `copied` count the other
    files of a folder.
    """

    base: str
    output: str | None
    architecture: str
    architecture_title: str
    adapters: tuple[Baked, ...]
    components: tuple[Component, ...]
    tensors: tuple[Changed, ...]
    unmatched: tuple[Unmatched, ...]
    files: tuple[str, ...]
    linked: int
    copied: int
    size: int
    untouched: int
    dtype: str | None
    rounding: str
    seed: int
    dora_norm: str
    devices: tuple[str, ...]
    memory: Mapping[str, int]
    undo: str | None
    undo_size: int | None
    checked: Checked | None
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Options:
    """How to bake; see `bake_file`."""

    dtype: str | None = None
    rounding: str = "nearest"
    seed: int = 0
    dora_norm: str = "paper"
    devices: Sequence[str] = ("cpu",)
    verify: bool = True
    allow_unmatched: bool = False
    overwrite: bool = False


@dataclass(frozen=True, eq=False)
class _File:
    """One file that is rewritten."""

    file: WeightFile
    plan: Plan
    copies: list[Copy]
    metadata: dict[str, str]


@dataclass(frozen=True, eq=False)
class _Task:
    """Everything that is known before anything is written."""

    checkpoint: CheckpointFiles
    model: Architecture
    inputs: tuple[Input, ...]
    found: Sites
    files: tuple[_File, ...]
    notes: tuple[str, ...]


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
    task = _prepared(base, asked, options, architecture)
    size = sum(file.header.size_bytes for one in task.checkpoint.sets for file in one.files)
    if output is None:
        return _report(task, asked, hashes(), options, None, size, started)
    check_room(Path(output).parent, sum(file.plan.nbytes for file in task.files))
    return _Bake(task, asked, options, Path(output), undo, hashes, progress, started).run()


# -- before anything is written -----------------------------------------------------------------------------------------


def _prepared(
    base: str | os.PathLike[str], asked: Sequence[Asked], options: Options, architecture: Architecture | str | None
) -> _Task:
    checkpoint = read_checkpoint(base)
    known = checkpoint_of(checkpoint.keys)
    inputs = tuple(weighed(one, _opened(one.path, known, checkpoint, architecture)) for one in asked)
    found = find_sites(checkpoint, inputs, options.dtype)
    if found.unmatched and not options.allow_unmatched:
        raise _unmatched(found.unmatched, checkpoint.path)
    if not found.sites:
        raise FormatError(
            "nothing of the adapters has a place in it",
            file=checkpoint.path,
            hint="name a checkpoint of the adapter's model" if not found.silent else "every strength is 0",
        )
    files = tuple(_files(checkpoint, found.sites))
    return _Task(
        checkpoint, known or model_of(checkpoint), inputs, found, files, tuple(_notes(checkpoint, found.sites))
    )


def _opened(
    path: str, known: Architecture | None, checkpoint: CheckpointFiles, architecture: Architecture | str | None
) -> Adapter:
    """The adapter, with the checkpoint's names for its targets where nothing else tells its model."""
    try:
        adapter = open_adapter(path, architecture=architecture)
    except LoratoolError:
        if known is None or architecture is not None:
            raise
        return open_adapter(path, architecture=known)
    check_model(checkpoint.path, known, adapter.architecture)
    if adapter.architecture.open and known is not None:
        return open_adapter(path, architecture=known)
    if adapter.architecture.id == "unknown":
        return open_adapter(path, architecture=model_of(checkpoint))
    return adapter


def _unmatched(found: Sequence[Unmatched], path: str) -> FormatError:
    names = [f"{one.title} {one.reason}" + (f", nearest: {one.nearest}" if one.nearest else "") for one in found]
    count = len(found)
    return FormatError(
        f"{count} part{'s' if count > 1 else ''} of {few(sorted({one.adapter for one in found}))} cannot be baked into it: "
        f"{'; '.join(names[:3])}{'; ...' if count > 3 else ''}",
        file=path,
        hint="--allow-unmatched leaves them out",
    )


def _files(checkpoint: CheckpointFiles, sites: Sequence[Site]) -> Iterator[_File]:
    changed: dict[WeightFile, dict[str, str]] = {}
    for site in sites:
        changed.setdefault(site.file, {})[site.key] = site.dtype
    for weights in checkpoint.sets:
        for file in weights.files:
            if file in changed:
                plan = plan_like(file.header, changed[file])
                scales = {site.scale_key for site in sites if site.file is file and site.scale_key}
                moved = frozenset({*changed[file], *scales})
                metadata = {key: value for key, value in file.header.metadata.items() if key not in STALE}
                yield _File(file, plan, copies(file.header, plan, moved), metadata)


def _notes(checkpoint: CheckpointFiles, sites: Sequence[Site]) -> Iterator[str]:
    """What a user should know about files that are not rewritten."""
    stale = {file for site in sites for file in site.file.header.metadata if file in STALE}
    if stale:
        yield f"left out of the header, as it would be false: {', '.join(sorted(stale))}"
    if not checkpoint.folder:
        return
    for folder in dict.fromkeys(site.file.name.rpartition("/")[0] for site in sites):
        pickles = [p.name for p in sorted(Path(checkpoint.path, folder).iterdir()) if p.suffix in PICKLES]
        if pickles:
            yield f"{folder or '.'}: {few(pickles)} still hold the old weights"


def record(asked: Sequence[Asked], digests: Sequence[str], base: str, options: Options) -> dict[str, Any]:
    """What the header says of a bake: files with their sha256, strengths, and how."""
    adapters = [
        {
            "name": one.name or recipe.file_name(one.path),
            "sha256": digest,
            "strength": one.weight,
            **({"blocks": one.blocks} if one.blocks is not None else {}),
        }
        for one, digest in zip(asked, digests, strict=True)
    ]
    told: dict[str, Any] = {"version": __version__, "base": recipe.file_name(base), "adapters": adapters}
    if options.rounding != "nearest":
        told |= {"rounding": options.rounding, "seed": options.seed}
    if options.dtype is not None:
        told["dtype"] = options.dtype
    if options.dora_norm != "paper":
        told["dora_norm"] = options.dora_norm
    kinds = {kind for device in options.devices if (kind := recipe.device_kind(device)) is not None}
    return told | ({"device": "/".join(sorted(kinds))} if kinds else {})


def with_record(metadata: Mapping[str, str], told: Mapping[str, Any]) -> dict[str, str]:
    """The header with one more bake in its list."""
    try:
        before = json.loads(metadata.get(ENTRY, "[]"))
    except (ValueError, RecursionError):
        before = []
    return {**metadata, ENTRY: json.dumps([*(before if isinstance(before, list) else []), told])}


# -- writing --------------------------------------------------------------------------------------------------------------


class _Bake:
    """One bake that is under way."""

    def __init__(
        self,
        task: _Task,
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
        self._copied = self._linked = 0

    def run(self) -> BakeReport:
        """Writes everything, checks it, and gives it its name."""
        with ExitStack() as stack:
            if self._task.checkpoint.folder:
                folder = stack.enter_context(atomic_folder(self._output, self._options.overwrite))
                self._others(folder)
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
            with self._copying(outputs) as copied:
                # Imported while bytes are copied: torch takes a second or two to begin.
                from loratool.ops import baking

                destinations = {one.file: baking.Destination(outputs[one.file], one.plan) for one in self._task.files}
                how = baking.How(self._options.rounding, self._options.seed, self._options.dora_norm)
                survivals = self._baked(destinations, how)
                copied()
            digests = self._hashes()
            for one in self._task.files:
                outputs[one.file].finish(one.plan.header(self._header(one, digests)))
            checked = self._checked(destinations, how) if self._options.verify else None
        report = _report(self._task, self._asked, digests, self._options, survivals, 0, self._started)
        return replace(report, output=str(self._output), checked=checked, linked=self._linked, copied=self._copied)

    def _header(self, one: _File, digests: Sequence[str]) -> dict[str, str]:
        told = record(self._asked, digests, self._task.checkpoint.path, self._options)
        return with_record(one.metadata, told)

    @contextmanager
    def _copying(self, outputs: Mapping[WeightFile, Output]) -> Iterator[Callable[[], None]]:
        """Copies untouched bytes in the background; the function that is given waits for them."""
        total = sum(one.plan.nbytes for one in self._task.files)
        self._tick = _Ticker(self._told, "writing", total)
        buffers = threading.local()

        def copy(one: _File, what: Copy) -> None:
            if not hasattr(buffers, "one"):
                buffers.one = bytearray(1 << 20)
            source = stretch(next(iter(one.file.header.tensors.values())))
            outputs[one.file].copy(source, what, buffers.one)
            self._tick(what.nbytes)

        with ThreadPoolExecutor(_COPIERS, "loratool-copy") as pool:
            futures: list[Future[None]] = [
                pool.submit(copy, one, part)
                for one in self._task.files
                for what in one.copies
                for part in what.parts(32 << 20)
            ]
            try:
                yield lambda: _wait(futures)
            finally:
                pool.shutdown(cancel_futures=True)

    def _baked(self, destinations: Mapping[WeightFile, Destination], how: How) -> list[Survival]:
        from loratool.ops import baking

        bakery = baking.Bakery(destinations, self._options.devices, how, self._tick)
        return bakery.run(self._task.found.sites)

    def _checked(self, destinations: Mapping[WeightFile, Destination], how: How) -> Checked:
        from loratool.ops import bake_check

        untouched = {one.file: one.copies for one in self._task.files}
        total = sum(what.nbytes for found in untouched.values() for what in found)
        nbytes = bake_check.check_copies(untouched, destinations, _Ticker(self._told, "comparing", total))
        sites = self._task.found.sites
        tick = _Ticker(self._told, "verifying", len(sites))
        rows, worst = bake_check.check_rows(sites, destinations, how, tick)
        return bake_check.Checked(nbytes, len(sites), rows, worst)

    def _others(self, folder: Path) -> None:
        """Links or copies what is not rewritten; `dtype` and sizes in configs and indices are made true."""
        base = Path(self._task.checkpoint.path)
        rewritten = {one.file.name for one in self._task.files}
        for place, folders, names in os.walk(base, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            at = Path(place).relative_to(base)
            (folder / at).mkdir(exist_ok=True)
            for name in sorted(names):
                relative = (at / name).as_posix()
                if relative not in rewritten:
                    self._other(base / at / name, folder / at / name)
        if self._options.dtype is not None:
            self._restate(folder)

    def _other(self, source: Path, target: Path) -> None:
        real = Path(os.path.realpath(source))
        if not real.is_file():
            raise LoratoolError("is not a regular file", file=str(source), hint="remove it from the folder")
        if real.stat().st_size >= _LINKED:
            try:
                os.link(real, target)
                self._linked += 1
                return
            except OSError:
                pass  # another file system, or one without links
        shutil.copyfile(real, target)
        self._copied += 1

    def _restate(self, folder: Path) -> None:
        """Configs say the dtype, indices the size of all tensors."""
        sizes: Counter[str] = Counter()
        for one in self._task.files:
            sizes[one.file.name.rpartition("/")[0]] += one.plan.nbytes
        for weights in self._task.checkpoint.sets:
            if weights.index is not None:
                index = folder / weights.index
                data = read_index(index)
                data["metadata"] = {**(data.get("metadata") or {}), "total_size": sizes[weights.folder]}
                index.write_text(json.dumps(data, indent=2), encoding="utf-8")
            config = folder / weights.folder / "config.json"
            if config.is_file():
                data = json.loads(config.read_text(encoding="utf-8"))
                for key in {"dtype", "torch_dtype"} & data.keys():
                    data[key] = _TORCH_NAMES.get(self._options.dtype or "", data[key])
                config.write_text(json.dumps(data, indent=2), encoding="utf-8")


_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def _wait(futures: Sequence[Future[None]]) -> None:
    for future in futures:
        future.result()


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


# -- the report -------------------------------------------------------------------------------------------------------------


def _report(
    task: _Task,
    asked: Sequence[Asked],
    digests: Sequence[str],
    options: Options,
    survivals: Sequence[Survival] | None,
    size: int,
    started: float,
) -> BakeReport:
    sites = task.found.sites
    missing = Counter(one.adapter for one in task.found.unmatched)
    return BakeReport(
        base=task.checkpoint.path,
        output=None,
        architecture=task.model.id,
        architecture_title=task.model.title,
        adapters=tuple(
            Baked(
                path=one.path,
                sha256=digest,
                strength=one.weight,
                blocks=one.blocks if isinstance(one.blocks, str) else None,
                layout=opened.adapter.layout,
                modules=len(opened.adapter.modules),
                matched=len(opened.adapter.modules) - missing[opened.adapter.path],
                dora=sum(module.magnitude is not None for module in opened.adapter.modules),
            )
            for one, opened, digest in zip(asked, task.inputs, digests, strict=True)
        ),
        components=tuple(_components(sites, survivals)),
        tensors=tuple(
            Changed(
                site.file.name,
                site.key,
                site.dtype,
                site.tensor.shape,
                None if survivals is None or not site.parts else survivals[index].share,
            )
            for index, site in enumerate(sites)
        ),
        unmatched=task.found.unmatched,
        files=tuple(one.file.name for one in task.files),
        linked=0,
        copied=0,
        size=size,
        untouched=sum(what.nbytes for one in task.files for what in one.copies),
        dtype=options.dtype,
        rounding=options.rounding,
        seed=options.seed,
        dora_norm=options.dora_norm,
        devices=tuple(options.devices),
        memory=_memory(sites, options),
        undo=None,
        undo_size=None,
        checked=None,
        notes=(*(note for one in task.inputs for note in one.adapter.notes), *task.notes),
        seconds=time.perf_counter() - started,
    )


def _components(sites: Sequence[Site], survivals: Sequence[Survival] | None) -> Iterator[Component]:
    for name in dict.fromkeys(site.component for site in sites if site.parts):
        mine = [index for index, site in enumerate(sites) if site.component == name and site.parts]
        share = None
        if survivals is not None:
            square = sum(survivals[index].square for index in mine)
            share = sum(survivals[index].along for index in mine) / square if square else 1.0
        yield Component(name, len(mine), sum(sites[index].nbytes for index in mine), share)


def _memory(sites: Sequence[Site], options: Options) -> dict[str, int]:
    """What is needed at once, in bytes: an estimate from the sizes of blocks and the largest factors."""
    from loratool.ops.pool import threads

    factors = max(
        (
            sum(
                4 * tensor.numel
                for part in site.parts
                if hasattr(part, "module")
                for tensor in part.module.tensors.values()
            )
            for site in sites
        ),
        default=0,
    )
    gpus = sum(device != "cpu" for device in options.devices)
    if gpus:
        return {"host": (600 << 20) + gpus * 8 * (16 << 20), "device": (600 << 20) + 8 * (12 * (8 << 20) + factors)}
    return {"host": (300 << 20) + threads() * (12 * (1 << 20) + factors), "device": 0}


def _size_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
