"""Views with gaps, turned or spread: gathered as numpy gathers them, whatever fits into a block."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from loratool.core.tensor import Held
from loratool.files import strided
from loratool.files.strided import Strided, Swapped

WIDTHS = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}


class Counted(Held):
    """A storage that tells how many bytes were read of it, and the most at once."""

    __slots__ = ("of", "reads")

    def slice(self, start: int, stop: int) -> Any:
        self.reads.append(stop - start)
        return super().slice(start, stop)


def counted(data: bytes) -> Counted:
    made = Counted(data)
    made.reads = []
    return made


@st.composite
def views(draw: st.DrawFn) -> tuple[int, int, list[int], list[int]]:
    """Width, offset, shape and strides of a view whose elements do not overlap, in any order of dimensions."""
    sizes = draw(st.lists(st.integers(1, 6), max_size=4))
    spread = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    strides, reach = [], 1
    for size, one in zip(sizes, spread):
        stride = 0 if one else reach + draw(st.integers(0, 9))
        strides.append(stride)
        reach += (size - 1) * stride
    order = draw(st.permutations(range(len(sizes))))
    width = draw(st.sampled_from(list(WIDTHS)))
    return width, draw(st.integers(0, 5)), [sizes[i] for i in order], [strides[i] for i in order]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(views(), st.sampled_from([1, 8, 40, 1 << 20]))
def test_gathers_as_numpy_does(
    monkeypatch: pytest.MonkeyPatch, view: tuple[int, int, list[int], list[int]], block: int
) -> None:
    width, offset, shape, strides = view
    monkeypatch.setattr(strided, "BLOCK", block)
    reach = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    numbers = numpy.random.default_rng(0).integers(0, 256, reach * width, "u1")
    base = numbers.view(WIDTHS[width])[offset:]
    expected = as_strided(base, shape, [stride * width for stride in strides]).tobytes()
    storage = counted(numbers.tobytes())
    source = Strided(storage, width, offset, shape, strides)
    assert bytes(source.read()) == expected
    assert b"".join(source.chunks(7)) == expected
    assert bytes(source.slice(3, len(expected)).read()) == expected[3:]
    assert source.nbytes == len(expected)
    assert max(storage.reads) <= max(block, width)
    assert sum(storage.reads) <= 2 * 3 * numbers.nbytes + len(expected) * 3


def test_nothing() -> None:
    assert bytes(Strided(Held(b""), 4, 0, (0, 3), (9, 9)).read()) == b""


def test_a_wide_matrix_is_turned_block_by_block() -> None:
    """48 MiB, three blocks of 16: what is held at once stays below, and every byte is read once."""
    matrix = numpy.arange(3 * 4 << 20, dtype="<u4").reshape(2048, -1)
    storage = counted(matrix.tobytes())
    source = Strided(storage, 4, 0, matrix.T.shape, (1, matrix.shape[1]))
    assert bytes(source.read()) == matrix.T.tobytes()
    assert max(storage.reads) <= strided.BLOCK
    assert sum(storage.reads) <= matrix.nbytes


def test_columns_of_a_wide_matrix_read_little_more_than_it() -> None:
    matrix = numpy.arange(3 * 4 << 20, dtype="<u4").reshape(2048, -1)
    storage = counted(matrix.tobytes())
    part = matrix[:, 100:164]
    assert bytes(Strided(storage, 4, 100, part.shape, (matrix.shape[1], 1)).read()) == part.tobytes()
    assert sum(storage.reads) <= matrix.nbytes


@pytest.mark.parametrize("width", WIDTHS)
def test_the_other_byte_order(width: int) -> None:
    numbers = numpy.arange(24, dtype="u1").tobytes()
    turned = numpy.frombuffer(numbers, WIDTHS[width]).byteswap().tobytes()
    source = Swapped(Held(numbers), width)
    assert bytes(source.read()) == turned
    assert b"".join(source.chunks(5)) == turned
    part = source.slice(4, 20)
    assert (bytes(part.read()), part.nbytes) == (turned[4:20], 16)
    assert bytes(part.slice(2, 5).read()) == turned[6:9]
    assert b"".join(part.chunks(3)) == turned[4:20]
