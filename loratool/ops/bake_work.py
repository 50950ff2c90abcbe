"""What is computed of one tensor while it is baked: base + updates, rounded, and how much of them survived."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from loratool.core.errors import LoratoolError
from loratool.core.tensor import LazyTensor, torch_dtype
from loratool.files.stream import stretch
from loratool.ops.finite import STORED, not_finite
from loratool.ops.rounding import FP8, WIDE, beyond, fresh_scale, largest, rounded, uniform
from loratool.ops.sites import Site
from loratool.ops.stored import byte_range, part_of, scale_column
from loratool.ops.updates import Adder, adder, alone, check_parts


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


class Work:
    """A part of a site on its way: `block` makes what its rows become, `survey` notes what survived of the update.

    `sums` tell how much did. `scale` is the new one of a scaled fp8 tensor, None of any other. Making this reads the
    factors, unless there are `adders` already, and all rows where a fresh scale is needed.
    """

    def __init__(
        self,
        site: Site,
        ranges: Sequence[tuple[int, int]],
        desk: Desk,
        how: How,
        adders: Sequence[Adder] | None = None,
    ) -> None:
        self._site, self._desk, self._how = site, desk, how
        desk.work = work_of(site)
        self._adders = adders_of(site, desk, how) if adders is None else adders
        self._old = None if site.scale is None else scale_column(site.scale, desk.device)
        self._by_chance = how.rounding == "stochastic" and bool(site.parts) and site.dtype not in WIDE
        self.sums = Sums(site)
        self._row = 0
        self._update: Tensor | None = None
        self.scale = self._fresh_scale(ranges)

    def block(self, stored: Tensor, row: int) -> Tensor:
        """What the stored rows `row:` become, `(rows, columns)` in the dtype of the output: valid until the next."""
        self._row = row
        self._base, self._total = self._added(stored, row)
        return self._rounded(self._total, row)

    def survey(self, written: Tensor) -> None:
        """Notes how much of the update is in the last block. `written` is what `block` gave."""
        base, total = self._base, self._total
        self.sums.burst(self._burst(base, total, written))
        if not self._site.parts:
            return
        after = self._desk.room("after", total.shape).copy_(written)
        if self.scale is not None:
            after.mul_(part_of(self.scale, self._row, len(after)))
        self.sums.add(total.sub_(base) if self._update is None else self._update, after.sub_(base))

    def _burst(self, base: Tensor, total: Tensor, written: Tensor) -> Tensor | None:
        """Whether a number became infinite, or, in fp8, its largest from beyond that; None where the sums tell it."""
        dtype = self._site.dtype
        if dtype in FP8:
            # With a fresh scale all fits, unless there is no such scale.
            return (total.abs() > (beyond(dtype) if self.scale is None else largest("F32"))).any()
        return None if self._site.parts else (written.isinf() & base.isfinite()).any()

    def _fresh_scale(self, ranges: Sequence[tuple[int, int]]) -> Tensor | None:
        """The scale of the output: that at which its largest value is the largest fp8 number; 1 where it is no fp8."""
        site = self._site
        if self._old is None or site.scale is None:
            return None
        if site.dtype not in FP8:
            return torch.ones_like(self._old)
        peaks = torch.zeros_like(self._old)
        for start, stop in ranges:
            _, total = self._added(self._desk.read(site.tensor, start, stop), start)
            if len(peaks) == 1:
                peaks = torch.maximum(peaks, total.abs().max())
            else:
                peaks[start:stop] = total.abs().amax(1, keepdim=True)
        stored = site.scale.load(self._desk.device).reshape(-1, 1)
        return fresh_scale(peaks, stored, site.dtype).float()

    def _added(self, stored: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """The base and base + everything that is added, in the order of the adapters."""
        base = self._desk.room("base", stored.shape).copy_(stored)
        if self._old is not None:
            base.mul_(part_of(self._old, row, len(stored)))
        total = self._desk.room("total", stored.shape)
        self._update = alone(self._adders, row, len(stored))
        if self._update is not None:  # the same bits, and two steps less
            torch.add(base, self._update, out=total)
            return base, total
        total.copy_(base)
        for one in self._adders:
            one.add(total, base, row)
        return base, total

    def _rounded(self, total: Tensor, row: int) -> Tensor:
        site = self._site
        if not self._by_chance and site.dtype not in FP8:
            return self._desk.room("written", total.shape, torch_dtype(site.dtype)).copy_(total)
        noise = None
        if self._by_chance:
            columns = total.shape[1]
            seed = _hash_of(f"{self._how.seed} {site.file.name} {site.key}")
            noise = uniform((len(total), columns), row * columns, seed, total.device)
        scale = None if self.scale is None else part_of(self.scale, row, len(total))
        return rounded(total if scale is None else total / scale, site.dtype, noise)


def work_of(site: Site) -> torch.dtype:
    """The dtype that a site is computed in."""
    return torch.float64 if site.tensor.dtype == "F64" else torch.float32


def adders_of(site: Site, desk: Desk, how: How) -> list[Adder]:
    """What is added to a site, with the factors on the desk's device."""
    return [adder(part, desk.device, how.norm, work_of(site), desk.matrix) for part in site.parts]


class Sums:
    """What a `Survival` is made of, one number for each block, left where it was computed until all are there."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.along: list[Tensor] = []
        self.square: list[Tensor] = []

    def add(self, update: Tensor, change: Tensor) -> None:
        """Adds a block: what was to be added, and what was."""
        flat = update.reshape(-1)
        self.along.append(torch.dot(change.view(-1), flat))
        self.square.append(torch.dot(flat, flat))

    def burst(self, found: Tensor | None) -> None:
        """Makes the sums infinite where numbers were found that the dtype cannot hold."""
        if found is not None:
            self.square.append(torch.where(found, math.inf, 0.0))


def survivals(sums: Sequence[Sums]) -> list[Survival]:
    """What survived of each, added up in float64. Raises LoratoolError where a number became NaN or infinite."""
    found = []
    along = _numbers([number for one in sums for number in one.along])
    square = _numbers([number for one in sums for number in one.square])
    for one in sums:
        survival = Survival(sum(islice(along, len(one.along))), sum(islice(square, len(one.square))))
        if not (math.isfinite(survival.along) and math.isfinite(survival.square)):
            check_parts(one.site.parts)
            if one.site.parts:
                _check_base(one.site)
            raise LoratoolError(
                f"would hold values that are NaN, infinite or too large for {one.site.dtype}",
                file=one.site.file.path,
                key=one.site.key,
                hint=f"{'lower the strength, or ' if one.site.parts else ''}store a wider dtype with --dtype",
            )
        found.append(survival)
    return found


def _check_base(site: Site) -> None:
    """Raises FormatError for a weight of the base, or its scale, that holds NaN or infinite values. As `check_parts`,
    it is asked when a result is not finite."""
    for key, tensor in ((site.key, site.tensor), (site.scale_key, site.scale)):
        if tensor is not None and not bool(tensor.load().double().isfinite().all()):
            raise not_finite(key or "", STORED).with_file(site.file.path)


def _numbers(tensors: Sequence[Tensor]) -> Iterator[float]:
    """The values of scalars, fetched at once."""
    return iter(torch.stack(list(tensors)).tolist() if tensors else [])


def _hash_of(text: str) -> int:
    """A number of 62 bits that stands for a text, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "little") >> 2


class Desk:
    """What one thread reads into and computes in, on one device; `usual` bytes are what most blocks need there.

    On a GPU with a stream of its own, unless `shared`.
    """

    def __init__(self, device: str, usual: int = 0, shared: bool = False) -> None:
        self.device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._rooms: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}
        self.work = torch.float32
        self._usual = usual
        self._stream: Any = None
        if device != "cpu":
            self._stream = torch.cuda.current_stream(device) if shared else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

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
        return stored if self._stream is None else self.moved(stored)

    def moved(self, stored: Tensor) -> Tensor:
        """Rows on the device; they may still be on their way when this returns."""
        return self.room("stored", stored.shape, stored.dtype).copy_(stored, non_blocking=True)

    def flat(self, rows: Tensor) -> memoryview:
        """The bytes of rows, in the host's memory: valid until the next call or `read`."""
        flat = rows.contiguous().view(-1).view(torch.uint8)
        if self._stream is not None:
            room = self._room(flat.numel())  # free: the stream keeps its order
            room.copy_(flat, non_blocking=True)
            self._stream.synchronize()
            flat = room
        view: memoryview = flat.numpy().data
        return view

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Memory on the device, the same for a name each time: new memory would cost more than computing in it.

        In the dtype of the computation, if none is given.
        """
        dtype = dtype or self.work
        asked = name, tuple(shape), dtype
        view = self._views.get(asked)  # most blocks have the shape of some before
        if view is None:
            nbytes = math.prod(shape) * dtype.itemsize
            if name not in self._rooms or self._rooms[name].numel() < nbytes:
                # At once what most blocks need: memory that is given back is not given to other threads.
                self._rooms[name] = torch.empty(max(nbytes, self._usual), dtype=torch.uint8, device=self.device)
                self._views = {key: old for key, old in self._views.items() if key[0] != name}
            view = self._views[asked] = self._rooms[name][:nbytes].view(dtype).view(*shape)
        return view

    def matrix(self, shape: tuple[int, int]) -> Tensor:
        """Room for an update."""
        return self.room("update", shape)

    def _room(self, nbytes: int) -> Tensor:
        if self._buffer.numel() < nbytes:
            if self._stream is not None:
                self._stream.synchronize()  # the old buffer may still be in use
            self._buffer = torch.empty(max(nbytes, self._usual), dtype=torch.uint8, pin_memory=self._stream is not None)
        return self._buffer[:nbytes]
