"""Baking: adds updates to the tensors of a checkpoint, block by block, on the CPU's cores or on GPUs."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from loratool.core.errors import LoratoolError
from loratool.core.tensor import DTYPES, LazyTensor, torch_dtype
from loratool.files.checkpoint import WeightFile
from loratool.files.stream import Output, Plan, stretch
from loratool.ops.pool import each, threads
from loratool.ops.rounding import FP8, WIDE, fresh_scale, rounded, uniform
from loratool.ops.sites import Site
from loratool.ops.stored import byte_range, part_of, row_blocks, scale_column, size_of
from loratool.ops.updates import Adder, adder, check_parts

CPU_BLOCK, GPU_BLOCK = 512 << 10, 4 << 20
"""Stored bytes that are computed at once: what fits the processor's cache; what keeps a GPU busy."""

JOB = 64 << 20
"""Stored bytes that one thread takes at once."""

GPU_THREADS = 8
"""Threads for each GPU, each with a stream of its own: while one computes, others read and write."""


@dataclass(frozen=True)
class How:
    """How to bake: `rounding` is nearest or stochastic (with `seed`), `norm` what DoRA divides by (see `updates`)."""

    rounding: str = "nearest"
    seed: int = 0
    norm: str = "paper"


@dataclass
class Survival:
    """How much of an update survived rounding: the sums of (written - base) * update and of update^2, in float64."""

    along: float = 0.0
    square: float = 0.0

    @property
    def share(self) -> float:
        """1 if all of it did; also where there was no update."""
        return self.along / self.square if self.square else 1.0

    def add(self, other: Survival) -> None:
        """Adds another one to this."""
        self.along += other.along
        self.square += other.square


class Recorder(Protocol):
    """Sees what becomes of every block, on the device where it was computed."""

    def block(self, site: Site, row: int, stored: Tensor, written: Tensor, scale: Tensor | None) -> None:
        """Rows `row:` of a tensor before and after, `(rows, columns)` in their dtypes, and the new fp8 scale."""


@dataclass(frozen=True)
class Destination:
    """Where the tensors of one file go."""

    output: Output
    plan: Plan


@dataclass(frozen=True, eq=False)
class _Job:
    site: Site
    index: int
    ranges: tuple[tuple[int, int], ...]
    device: str


@dataclass(eq=False)
class Bakery:
    """Bakes sites into their files. `tick` is called with the bytes that were written, `done` with every finished site.

    Both are called from several threads.
    """

    destinations: Mapping[WeightFile, Destination]
    devices: Sequence[str]
    how: How
    tick: Callable[[int], None]
    done: Callable[[Site], None] | None = None
    recorder: Recorder | None = None
    _left: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _local: threading.local = field(default_factory=threading.local)

    def run(self, sites: Sequence[Site]) -> list[Survival]:
        """Bakes all sites, and says how much of each update survived."""
        found = [Survival() for _ in sites]
        gpus = [device for device in self.devices if device != "cpu"]
        workers = GPU_THREADS * len(gpus) if gpus else threads()
        jobs = self._dealt(sites)
        self._left = dict(Counter(job.index for job in jobs))
        for job, survival in zip(jobs, each(self._bake, jobs, workers=workers), strict=True):
            found[job.index].add(survival)
        return found

    def _dealt(self, sites: Sequence[Site]) -> list[_Job]:
        """Jobs in the order of the files, each for the device that has least to do so far, the largest dealt first."""
        jobs: list[_Job] = []
        for index, site in enumerate(sites):
            ranges = row_blocks(site.tensor, GPU_BLOCK if self.devices[0] != "cpu" else CPU_BLOCK)
            whole = site.scale is not None or site.tensor.nbytes <= JOB
            size = max(1, len(ranges) if whole else JOB * len(ranges) // site.tensor.nbytes)
            for at in range(0, len(ranges), size):
                jobs.append(_Job(site, index, tuple(ranges[at : at + size]), self.devices[0]))
        if len(self.devices) == 1:
            return jobs
        loads = dict.fromkeys(self.devices, 0)
        dealt = list(jobs)
        for at in sorted(range(len(jobs)), key=lambda at: -jobs[at].site.nbytes):
            device = min(loads, key=lambda name: loads[name])
            loads[device] += _bytes_in(jobs[at])
            dealt[at] = _Job(jobs[at].site, jobs[at].index, jobs[at].ranges, device)
        return dealt

    def _bake(self, job: _Job) -> Survival:
        desk = self._desk(job.device)
        with desk.context():
            site, to = job.site, self.destinations[job.site.file]
            desk.work = torch.float64 if site.tensor.dtype == "F64" else torch.float32
            adders = [adder(part, job.device, self.how.norm, desk.work, desk.matrix) for part in site.parts]
            old = None if site.scale is None else scale_column(site.scale, job.device)
            scale = self._scale(job, desk, adders, old)
            survival = _Sums(job.device)
            for start, stop in job.ranges:
                here = None if scale is None else part_of(scale, start, stop - start)
                stored = desk.read(site.tensor, start, stop)
                base, total = self._added(desk, stored, old, adders, start)
                written = self._rounded(job, desk, total, here, start)
                if self.recorder is not None:
                    self.recorder.block(site, start, stored, written, scale)
                if site.parts:
                    after = desk.room("after", total.shape).copy_(written)
                    survival.add(total.sub_(base), (after if here is None else after.mul_(here)).sub_(base))
                else:
                    survival.cast(base, written)
                desk.write(written, to, site.key, start)
                self.tick(written.numel() * written.element_size())
            self._write_scale(site, to, scale, job.device)
            self._finished(job)
            return survival.result(site)

    def _finished(self, job: _Job) -> None:
        with self._lock:
            self._left[job.index] -= 1
            last = not self._left[job.index]
        if last and self.done is not None:
            self.done(job.site)

    def _scale(self, job: _Job, desk: Desk, adders: Sequence[Adder], old: Tensor | None) -> Tensor | None:
        """The scale of the output: that at which its largest value is the largest fp8 number; 1 where it is no fp8."""
        site = job.site
        if old is None or site.scale is None:
            return None
        if site.dtype not in FP8:
            return torch.ones_like(old)
        peaks = torch.zeros_like(old)
        for start, stop in job.ranges:
            _, total = self._added(desk, desk.read(site.tensor, start, stop), old, adders, start)
            if len(old) == 1:
                peaks = torch.maximum(peaks, total.abs().max())
            else:
                peaks[start:stop] = total.abs().amax(1, keepdim=True)
        stored = site.scale.load(job.device).reshape(-1, 1)
        return fresh_scale(peaks, stored, site.dtype).float()

    def _write_scale(self, site: Site, to: Destination, scale: Tensor | None, device: str) -> None:
        if scale is None or site.scale is None or site.scale_key is None:
            return
        made = LazyTensor.from_torch(scale.to(torch_dtype(site.scale.dtype)).cpu())
        to.output.write(made.read(), to.plan.start(site.scale_key))
        self.tick(made.nbytes)

    def _added(
        self, desk: Desk, stored: Tensor, scale: Tensor | None, adders: Sequence[Adder], row: int
    ) -> tuple[Tensor, Tensor]:
        """The base and base + everything that is added, float32, in the order of the adapters."""
        base = desk.room("base", stored.shape).copy_(stored)
        if scale is not None:
            base.mul_(part_of(scale, row, len(stored)))
        total = desk.room("total", stored.shape).copy_(base)
        for one in adders:
            one.add(total, base, row)
        return base, total

    def _rounded(self, job: _Job, desk: Desk, total: Tensor, scale: Tensor | None, row: int) -> Tensor:
        site = job.site
        by_chance = self.how.rounding == "stochastic" and bool(site.parts) and site.dtype not in WIDE
        if not by_chance and site.dtype not in FP8:
            return desk.room("written", total.shape, torch_dtype(site.dtype)).copy_(total)
        noise = None
        if by_chance:
            columns = total.shape[1]
            seed = hash_of(f"{self.how.seed} {site.file.name} {site.key}")
            noise = uniform((len(total), columns), row * columns, seed, total.device)
        return rounded(total if scale is None else total / scale, site.dtype, noise)

    def _desk(self, device: str) -> Desk:
        desks: dict[str, Desk] = self._local.__dict__.setdefault("desks", {})
        if device not in desks:
            desks[device] = Desk(device)
        return desks[device]


def hash_of(text: str) -> int:
    """A number of 62 bits that stands for a text, the same on every machine."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "little") >> 2


def _bytes_in(job: _Job) -> int:
    rows, _ = size_of(job.site.tensor)
    return sum(stop - start for start, stop in job.ranges) * job.site.nbytes // max(rows, 1)


class _Sums:
    """The sums of a `Survival`, added up on the device."""

    def __init__(self, device: str) -> None:
        self._along = torch.zeros((), dtype=torch.float64, device=device)
        self._square = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, update: Tensor, change: Tensor) -> None:
        flat = update.reshape(-1)
        self._along += torch.dot(change.reshape(-1), flat)
        self._square += torch.dot(flat, flat)

    def cast(self, before: Tensor, after: Tensor) -> None:
        """Where nothing is added: infinite only where a number became infinite."""
        if after.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):  # which end at their largest number
            self._square += torch.where((after.isinf() & before.isfinite()).any(), math.inf, 0.0)

    def result(self, site: Site) -> Survival:
        found = Survival(float(self._along), float(self._square))
        if not (math.isfinite(found.along) and math.isfinite(found.square)):
            check_parts(site.parts)
            raise LoratoolError(
                f"would hold values that are NaN, infinite or too large for {site.dtype}",
                file=site.file.path,
                key=site.key,
                hint="lower the strength, or store a wider dtype with --dtype",
            )
        return found


class Desk:
    """What one thread reads into and writes from, for one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._rooms: dict[str, Tensor] = {}
        self.work = torch.float32
        self._usual = 0 if device == "cpu" else 2 * GPU_BLOCK
        self._stream: Any = None if device == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def context(self) -> AbstractContextManager[object]:
        """The thread's stream on a GPU; nothing on the CPU."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def read(self, tensor: LazyTensor, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of a stored tensor, `(rows, columns)`, on the device: valid until the next call."""
        first, last = byte_range(tensor, start, stop)
        if self._stream is not None:
            self._stream.synchronize()  # what was read before may still be on its way to the GPU
        room = self._room(last - first)
        source = stretch(tensor)
        source.file.readinto(room.numpy().data, source.start + first)
        stored = room.view(torch_dtype(tensor.dtype)).reshape(stop - start, -1)
        return stored if self._stream is None else self._moved(stored)

    def _moved(self, stored: Tensor) -> Tensor:
        return self.room("stored", stored.shape, stored.dtype).copy_(stored, non_blocking=True)

    def write(self, rows: Tensor, to: Destination, key: str, start: int) -> None:
        """Writes rows from `start` on of the tensor `key`."""
        flat = rows.contiguous().view(-1).view(torch.uint8)
        if self._stream is not None:
            room = self._room(flat.numel())  # free: the stream keeps its order
            room.copy_(flat, non_blocking=True)
            self._stream.synchronize()
            flat = room
        columns = rows.numel() // max(len(rows), 1)
        at = start * columns * DTYPES[to.plan.entries[key][0]] // 8
        to.output.write(flat.numpy().data, to.plan.start(key) + at)

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Memory on the device, the same for a name each time: new memory would cost more than computing in it.

        In the dtype of the computation, if none is given.
        """
        dtype = dtype or self.work
        nbytes = math.prod(shape) * dtype.itemsize
        if name not in self._rooms or self._rooms[name].numel() < nbytes:
            # At once what most blocks need: memory that is given back is not given to other threads.
            self._rooms[name] = torch.empty(max(nbytes, self._usual), dtype=torch.uint8, device=self.device)
        return self._rooms[name][:nbytes].view(dtype).view(*shape)

    def matrix(self, shape: tuple[int, int]) -> Tensor:
        """Room for an update."""
        return self.room("update", shape)

    def _room(self, nbytes: int) -> Tensor:
        if self._buffer.numel() < nbytes:
            if self._stream is not None:
                self._stream.synchronize()  # the old buffer may still be in use
            self._buffer = torch.empty(max(nbytes, self._usual), dtype=torch.uint8, pin_memory=self._stream is not None)
        return self._buffer[:nbytes]
