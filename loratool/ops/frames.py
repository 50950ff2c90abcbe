"""Frames: the bits of a block of weights relative to predicted ones, packed. Exact whatever the prediction is."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loratool.core.errors import FormatError
from loratool.ops.rounding import other_int

_HEAD = struct.Struct("<QQBBI")
"""First row, rows, whether all values are stored (else those that differ), number of gains, bytes that follow."""

_DENSE = 4
"""All differences are stored where more than one in so many values differs."""

_LEVEL = 4
MOST = 1 << 30
"""Bytes that one frame may unpack to."""

Numbers = NDArray[np.integer]


@dataclass(frozen=True)
class Frame:
    """One block: rows `row:row + height`, the gains that its prediction needs, and the packed differences."""

    row: int
    height: int
    dense: bool
    gains: tuple[NDArray[np.float32], ...]
    packed: bytes


def packed(row: int, true: Tensor, predicted: Tensor, gains: Sequence[Tensor]) -> bytes:
    """A frame that turns `predicted` into `true`: both of one shape `(rows, columns)` and dtype."""
    kind = other_int(true)
    off = (true.contiguous().view(kind) - predicted.contiguous().view(kind)).view(
        -1
    )  # wraps around: exact for any bits
    places = off.nonzero().view(-1)
    dense = len(places) * _DENSE > len(off)
    parts: list[Numbers] = []
    if dense:
        parts = [_numpy(off)]
    elif len(places):
        steps = torch.diff(places, prepend=places.new_full((1,), -1))
        parts = [_numpy(steps).astype("<u4"), _numpy(off[places])]
    body = b"".join(_gain(gain) for gain in gains) + b"".join(_part(one) for one in parts)
    return _HEAD.pack(row, len(true), dense, len(gains), len(body)) + body


def frames_in(data: bytes) -> Iterator[Frame]:
    """The frames in a run of bytes. Raises FormatError for what is none."""
    at = 0
    try:
        while at < len(data):
            row, height, dense, count, nbytes = _HEAD.unpack_from(data, at)
            body = data[at + _HEAD.size : at + _HEAD.size + nbytes]
            if len(body) != nbytes:
                raise FormatError("ends inside a frame")
            gains = []
            for _ in range(count):
                gain, body = _next(body)
                gains.append(np.frombuffer(gain, "<f4"))
            yield Frame(row, height, bool(dense), tuple(gains), body)
            at += _HEAD.size + nbytes
    except (struct.error, zlib.error, ValueError) as error:
        raise FormatError(f"is damaged: {error}") from error


def corrected(frame: Frame, predicted: Tensor) -> Tensor:
    """The true values of a frame, from the predicted ones (`(height, columns)` on the CPU), which are overwritten.

    Raises FormatError for a frame that does not fit.
    """
    bits = predicted.view(other_int(predicted)).view(-1)
    try:
        if frame.dense:
            off, _ = _next(frame.packed)
            bits += _joined(off, bits)
        elif frame.packed:
            gaps, rest = _next(frame.packed)
            off, _ = _next(rest)
            steps = _unshuffled(gaps, 4).view("<u4").astype(np.int64)
            places = torch.from_numpy(np.cumsum(steps) - 1)
            if len(places) and int(places[-1]) >= len(bits):
                raise FormatError("has more values than the tensor")
            bits[places] += _joined(off, bits)
    except (zlib.error, ValueError, struct.error, RuntimeError, IndexError) as error:
        raise FormatError(f"is damaged: {error}") from error
    return predicted


def _numpy(values: Tensor) -> Numbers:
    found: Numbers = values.cpu().numpy()
    return found


def _gain(gain: Tensor) -> bytes:
    return _sized(zlib.compress(gain.float().cpu().contiguous().numpy().tobytes(), _LEVEL))


def _part(values: Numbers) -> bytes:
    """Numbers byte by byte: first all lowest bytes, last all highest ones, which are nearly all the same."""
    planes = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1).T
    return _sized(zlib.compress(planes.tobytes(), _LEVEL))


def _sized(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def _next(data: bytes) -> tuple[bytes, bytes]:
    """The next part, unpacked, and the rest."""
    (nbytes,) = struct.unpack_from("<I", data)
    machine = zlib.decompressobj()
    found = machine.decompress(data[4 : 4 + nbytes], MOST)
    if not machine.eof:
        raise FormatError("unpacks to too much")
    return found, data[4 + nbytes :]


def _joined(data: bytes, like: Tensor) -> Tensor:
    size = like.element_size()
    return torch.from_numpy(_unshuffled(data, size).view(f"<i{size}"))


def _unshuffled(data: bytes, size: int) -> NDArray[np.uint8]:
    planes = np.frombuffer(data, np.uint8).reshape(size, -1)
    found: NDArray[np.uint8] = planes.T.copy().reshape(-1)
    return found
