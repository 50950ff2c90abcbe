"""Stored: the rows of a checkpoint's tensor, block by block, as numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loratool.core.tensor import LazyTensor, torch_dtype
from loratool.files.stream import stretch

BLOCK = 4 << 20
"""Stored bytes that are looked at at once where nothing else is said."""


def size_of(tensor: LazyTensor) -> tuple[int, int]:
    """Rows and columns of a stored tensor, everything behind the first dimension flattened."""
    rows = tensor.shape[0] if tensor.shape else 1
    return rows, tensor.numel // max(rows, 1)


def row_blocks(tensor: LazyTensor, nbytes: int, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
    """Ranges of rows of about so many stored bytes. None has a single row if it can be helped: products of a vector
    and a matrix are computed in another order, with other roundings. No ranges of a tensor without values."""
    if not tensor.numel:
        return []
    rows, _ = size_of(tensor)
    stop = rows if stop is None else stop
    step = max(2, nbytes * rows // max(tensor.nbytes, 1))
    cuts = list(range(start, stop, step))
    if len(cuts) > 1 and stop - cuts[-1] == 1:
        cuts.pop()
    return list(zip(cuts, [*cuts[1:], stop], strict=True))


def blocks_of(
    tensor: LazyTensor, scale: LazyTensor | None, device: str, work: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """The rows of a stored weight in blocks: first row, and values in `work`, `(rows, columns)`."""
    for start, stop in row_blocks(tensor, BLOCK):
        yield start, weight_rows(tensor, scale, start, stop, device, work)


def weight_rows(
    tensor: LazyTensor, scale: LazyTensor | None, start: int, stop: int, device: str, work: torch.dtype
) -> Tensor:
    """Rows of a stored weight, `(stop - start, columns)` in `work`, times their scale."""
    first, last = byte_range(tensor, start, stop)
    stored = torch.frombuffer(stretch(tensor).slice(first, last).read(), dtype=torch_dtype(tensor.dtype))
    rows = stored.reshape(stop - start, -1).to(device)
    return dequantised(rows, None if scale is None else scale_column(scale, device), start, work)


def byte_range(tensor: LazyTensor, start: int, stop: int) -> tuple[int, int]:
    """Where rows `start:stop` begin and end in the bytes of a tensor."""
    rows, _ = size_of(tensor)
    height = tensor.nbytes // max(rows, 1)
    return start * height, stop * height


def scale_column(scale: LazyTensor, device: str) -> Tensor:
    """The scale of a scaled fp8 tensor as a column, float32: one number, or one per row."""
    return scale.load(device).float().reshape(-1, 1)


def dequantised(stored: Tensor, scale: Tensor | None, row: int, work: torch.dtype = torch.float32) -> Tensor:
    """Stored rows `row:` in `work`, times their scale (see `scale_column`) if they have one; may be `stored` itself."""
    values = stored.to(work)
    return values if scale is None else values * part_of(scale, row, len(stored)).to(work)


def part_of(scale: Tensor, row: int, height: int) -> Tensor:
    """What of a scale's column belongs to rows `row:row + height`."""
    return scale if len(scale) == 1 else scale[row : row + height]
