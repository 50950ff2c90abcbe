"""Baking: adds updates to the tensors of a checkpoint, block by block, on the CPU's cores or on GPUs.

On the CPU every core has jobs of its own. A GPU is fed by one thread (`bake_gpu`): several would wait for one another,
as each of the small steps of a block holds Python's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from loratool.core.tensor import DTYPES, LazyTensor, torch_dtype
from loratool.files.checkpoint import WeightFile
from loratool.files.stream import Output, Plan
from loratool.ops.bake_work import Desk, How, Survival, Work, survivals
from loratool.ops.pool import each, threads
from loratool.ops.sites import Site
from loratool.ops.stored import row_blocks, size_of

CPU_BLOCK, GPU_BLOCK = 512 << 10, 8 << 20
"""Stored bytes that are computed at once: what fits the processor's cache; what keeps a GPU busy."""

JOB = 64 << 20
"""Stored bytes that one thread takes at once."""

GPU_THREADS = 8
"""Threads for each GPU where what is done with a block takes the CPU longer than the GPU."""


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
class Job:
    """Blocks of one tensor, ranges of rows, that are computed on one device; `index` is the site's."""

    site: Site
    index: int
    ranges: tuple[tuple[int, int], ...]
    device: str


@dataclass(eq=False)
class Bakery:
    """Bakes sites into their files. From several threads, `tick` is called with the bytes that were written, and
    `finished` with each site of which all is written."""

    destinations: Mapping[WeightFile, Destination]
    devices: Sequence[str]
    how: How
    tick: Callable[[int], None]
    recorder: Recorder | None = None
    finished: Callable[[Site], None] = lambda site: None
    _local: threading.local = field(default_factory=threading.local)
    _missing: list[int] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, sites: Sequence[Site]) -> list[Survival]:
        """Bakes all sites, and says how much of each update survived."""
        jobs = self._dealt(sites)
        self._missing = [0] * len(sites)
        for job in jobs:
            self._missing[job.index] += len(job.ranges)
        for site, blocks in zip(sites, self._missing, strict=True):
            if not blocks:
                self.finished(site)
        found = [Survival() for _ in sites]
        for job, survival in zip(jobs, self._baked(jobs), strict=True):
            found[job.index].add(survival)
        return found

    def _baked(self, jobs: Sequence[Job]) -> list[Survival]:
        if self.devices[0] == "cpu":
            return each(self._bake, jobs, workers=threads())
        if self.recorder is not None:
            return each(self._bake, jobs, workers=GPU_THREADS * len(self.devices))
        from loratool.ops.bake_gpu import Line

        lines = [Line(device, self) for device in self.devices]
        mine = [[job for job in jobs if job.device == device] for device in self.devices]
        made = each(lambda at: lines[at].run(mine[at]), range(len(lines)), workers=len(lines))
        by_job = {
            id(job): one for some, found in zip(mine, made, strict=True) for job, one in zip(some, found, strict=True)
        }
        return [by_job[id(job)] for job in jobs]

    def _dealt(self, sites: Sequence[Site]) -> list[Job]:
        """Jobs in the order of the files, each for the device that has least to do so far, the largest dealt first."""
        jobs: list[Job] = []
        for index, site in enumerate(sites):
            ranges = row_blocks(site.tensor, GPU_BLOCK if self.devices[0] != "cpu" else CPU_BLOCK)
            whole = site.scale is not None or site.tensor.nbytes <= JOB
            size = max(1, len(ranges) if whole else JOB * len(ranges) // site.tensor.nbytes)
            for at in range(0, len(ranges), size):
                jobs.append(Job(site, index, tuple(ranges[at : at + size]), self.devices[0]))
        if len(self.devices) == 1:
            return jobs
        loads = dict.fromkeys(self.devices, 0)
        dealt = list(jobs)
        for at in sorted(range(len(jobs)), key=lambda at: -jobs[at].site.nbytes):
            device = min(loads, key=lambda name: loads[name])
            loads[device] += _bytes_in(jobs[at])
            dealt[at] = Job(jobs[at].site, jobs[at].index, jobs[at].ranges, device)
        return dealt

    def _bake(self, job: Job) -> Survival:
        desk = self._desk(job.device)
        with desk.context():
            work = Work(job.site, job.ranges, desk, self.how)
            self.begin(job, work)
            for start, stop in job.ranges:
                stored = desk.read(job.site.tensor, start, stop)
                written = work.block(stored, start)
                if self.recorder is not None:
                    self.recorder.block(job.site, start, stored, written, work.scale)
                work.survey(written)
                self.write(job, start, desk.flat(written))
            return survivals([work.sums])[0]

    def begin(self, job: Job, work: Work) -> None:
        """Writes the new scale of a scaled fp8 tensor."""
        site, to = job.site, self.destinations[job.site.file]
        if work.scale is not None and site.scale is not None and site.scale_key is not None:
            made = LazyTensor.from_torch(work.scale.to(torch_dtype(site.scale.dtype)).cpu())
            to.output.write(made.read(), to.plan.start(site.scale_key))
            self.tick(made.nbytes)

    def write(self, job: Job, start: int, data: memoryview) -> None:
        """Writes what rows from `start` on became."""
        to, site = self.destinations[job.site.file], job.site
        _, columns = size_of(site.tensor)
        to.output.write(data, to.plan.start(site.key) + start * columns * DTYPES[site.dtype] // 8)
        self.tick(data.nbytes)
        with self._lock:
            self._missing[job.index] -= 1
            last = not self._missing[job.index]
        if last:
            self.finished(site)

    def _desk(self, device: str) -> Desk:
        desks: dict[str, Desk] = self._local.__dict__.setdefault("desks", {})
        if device not in desks:
            desks[device] = Desk(device, 0 if device == "cpu" else 2 * GPU_BLOCK)
        return desks[device]


def _bytes_in(job: Job) -> int:
    rows, _ = size_of(job.site.tensor)
    return sum(stop - start for start, stop in job.ranges) * job.site.nbytes // max(rows, 1)
