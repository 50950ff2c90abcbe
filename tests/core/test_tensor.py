"""LazyTensor against torch: bytes, numbers, rows, and nothing read too early."""

from __future__ import annotations

import gc
import itertools
import math
import struct
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from loratool.core.errors import FormatError, LoratoolError, NotRepresentable, UsageError
from loratool.core.tensor import (
    DTYPES,
    SERIAL_ORDER,
    Computed,
    Held,
    LazyTensor,
    code_of,
    concatenated,
    encoded,
    same_bytes,
    torch_dtype,
)

WITHOUT_TORCH = {"F4", "F6_E2M3", "F6_E3M2"}
TORCH_CODES = sorted(set(DTYPES) - WITHOUT_TORCH)
SMALL_FLOATS = ["F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"]
WRITABLE = [code for code in SMALL_FLOATS if code != "F8_E8M0"]


def held(data: bytes, shape: tuple[int, ...], dtype: str) -> LazyTensor:
    return LazyTensor(shape, dtype, Held(data))


def all_patterns(code: str) -> list[bytes]:
    size = DTYPES[code] // 8
    return [pattern.to_bytes(size, "little") for pattern in range(1 << DTYPES[code])]


def reference(patterns: list[bytes], code: str) -> list[float]:
    values = torch.frombuffer(bytearray(b"".join(patterns)), dtype=torch_dtype(code))
    return list(values.to(torch.float64).tolist())


def same_number(ours: float, theirs: float) -> bool:
    if math.isnan(theirs):
        return math.isnan(ours)
    return ours == theirs and math.copysign(1, ours) == math.copysign(1, theirs)


def test_core_modules_do_not_import_torch_or_numpy() -> None:
    code = (
        "import sys, loratool.core.tensor as t, loratool.files.safetensors, loratool.files.atomic;"
        "t.LazyTensor.scalar(2.5, 'BF16').item();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'safetensors')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("code", TORCH_CODES)
def test_torch_roundtrip_keeps_every_bit(code: str) -> None:
    data = bytes(range(48)) if code != "BOOL" else bytes([0, 1] * 24)
    lazy = held(data, (2, 24 * 8 // DTYPES[code]), code)
    loaded = lazy.load()
    assert (tuple(loaded.shape), code_of(loaded.dtype)) == (lazy.shape, code)
    again = LazyTensor.from_torch(loaded)
    assert bytes(again.read()) == data
    assert same_bytes(lazy, again)


@pytest.mark.parametrize("code", TORCH_CODES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_scalars_and_empty_tensors(code: str, shape: tuple[int, ...]) -> None:
    lazy = held(bytes(math.prod(shape) * DTYPES[code] // 8), shape, code)
    assert tuple(lazy.load().shape) == shape
    assert same_bytes(LazyTensor.from_torch(lazy.load()), lazy)


@pytest.mark.parametrize("code", sorted(WITHOUT_TORCH))
def test_dtype_unknown_to_torch_is_named(code: str) -> None:
    with pytest.raises(FormatError, match=code):
        held(bytes(3), (8 * 3 // DTYPES[code],), code).load()


def test_dtype_unknown_to_safetensors_is_named() -> None:
    with pytest.raises(FormatError, match="complex128"):
        LazyTensor.from_torch(torch.zeros(1, dtype=torch.complex128))


@pytest.mark.parametrize("code", SMALL_FLOATS)
def test_item_of_every_pattern_equals_torch(code: str) -> None:
    patterns = all_patterns(code)
    expected = reference(patterns, code)
    ours = [held(pattern, (), code).item() for pattern in patterns]
    assert all(map(same_number, ours, expected))


@pytest.mark.parametrize("code", WRITABLE)
def test_scalar_of_every_value_gives_its_pattern_back(code: str) -> None:
    for pattern, value in zip(all_patterns(code), reference(all_patterns(code), code)):
        written = bytes(LazyTensor.scalar(value, code).read())
        assert written == pattern or math.isnan(value)
        assert same_number(held(written, (), code).item(), value)


@pytest.mark.parametrize("code", WRITABLE)
def test_scalar_rounds_as_torch_does(code: str) -> None:
    # Values between neighbours: ties, their float32 neighbours, and beyond the smallest and the largest.
    step = 1 if DTYPES[code] == 8 else 5
    finite = sorted({v for v in reference(all_patterns(code), code) if math.isfinite(v)})[::step]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(finite)]
    beyond = [] if code == "F8_E4M3" else [finite[-1] * 1.5, finite[0] * 4, 3e38]
    values = torch.tensor([*middles, *(m * 1.0000002 for m in middles), *beyond, 1e-30, -1e-30], dtype=torch.float32)
    expected = values.to(torch_dtype(code)).to(torch.float64).tolist()
    ours = [LazyTensor.scalar(value, code).item() for value in values.tolist()]
    assert all(map(same_number, ours, expected))


def test_too_large_for_e4m3_is_not_a_number() -> None:
    # torch differs by version: NaN, or the largest number. A wrong number would pass unnoticed.
    assert LazyTensor.scalar(464.0, "F8_E4M3").item() == 448
    assert math.isnan(LazyTensor.scalar(464.1, "F8_E4M3").item())
    assert math.isnan(LazyTensor.scalar(math.inf, "F8_E4M3").item())


@pytest.mark.parametrize("code", ["F32", "F64"])
@pytest.mark.parametrize("value", [0.1, -0.0, 1e300, -1e300, math.inf, math.nan, 5e-324, 1.5])
def test_wide_scalars_equal_torch(code: str, value: float) -> None:
    expected = torch.tensor(value, dtype=torch_dtype(code)).to(torch.float64).item()
    assert same_number(LazyTensor.scalar(value, code).item(), expected)


@pytest.mark.parametrize("code", ["BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"])
def test_integers(code: str) -> None:
    assert LazyTensor.scalar(1, code).item() == 1
    assert same_bytes(LazyTensor.scalar(1, code), LazyTensor.from_torch(torch.tensor(1, dtype=torch_dtype(code))))
    for value in (0.5, 1e30, math.nan, math.inf):
        with pytest.raises(LoratoolError, match="does not fit"):
            LazyTensor.scalar(value, code)


def test_item_wants_one_real_number() -> None:
    with pytest.raises(FormatError, match="one number"):
        held(bytes(8), (2,), "F32").item()
    with pytest.raises(FormatError, match="C64"):
        held(bytes(8), (), "C64").item()
    with pytest.raises(FormatError, match="F4"):
        LazyTensor.scalar(1.0, "F4")
    assert held(struct.pack("<f", 2.5), (1, 1), "F32").item() == 2.5


def test_rows_equal_torch_slices_and_nest() -> None:
    tensor = torch.arange(60, dtype=torch.int16).reshape(5, 4, 3)
    for lazy in (LazyTensor.from_torch(tensor), LazyTensor.computed((5, 4, 3), "I16", lambda: tensor)):
        for start in range(6):
            for stop in range(start, 6):
                assert torch.equal(lazy.rows(start, stop).load(), tensor[start:stop])
        assert torch.equal(lazy.rows(1, 4).rows(1, 3).load(), tensor[2:4])
        for bad in ((-1, 2), (2, 1), (0, 6)):
            with pytest.raises(IndexError):
                lazy.rows(*bad)
    with pytest.raises(IndexError):
        LazyTensor.scalar(1.0, "F32").rows(0, 1)


def test_rows_below_a_byte() -> None:
    lazy = held(bytes(range(6)), (4, 3), "F4")
    assert bytes(lazy.rows(2, 4).read()) == bytes([3, 4, 5])
    with pytest.raises(FormatError, match="inside a byte"):
        lazy.rows(1, 4)


def test_reshape() -> None:
    lazy = held(bytes(range(12)), (3, 4), "U8")
    assert lazy.reshape((2, 6)).load().tolist()[1][0] == 6
    with pytest.raises(ValueError, match="reshape"):
        lazy.reshape((5,))


def test_computed_is_made_when_asked_and_never_kept() -> None:
    calls: list[int] = []

    def make() -> torch.Tensor:
        calls.append(1)
        return torch.ones(2, 3)

    lazy = LazyTensor.computed((2, 3), "F32", make)
    assert (lazy.shape, lazy.nbytes, calls) == ((2, 3), 24, [])
    assert torch.equal(lazy.load(), torch.ones(2, 3))
    lazy.rows(0, 1).load()
    assert len(calls) == 2


@pytest.mark.parametrize("make", [lambda: torch.ones(3, 2), lambda: torch.ones(2, 3).half()])
def test_computed_must_keep_its_promise(make: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="announced"):
        LazyTensor.computed((2, 3), "F32", make).read()
    with pytest.raises(ValueError, match="announced"):
        Computed(3, lambda: b"12").read()


def test_from_torch_of_odd_tensors() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    for tensor in (base.T, base[:, ::2], base[1:], base.expand(2, 3, 4), torch.nn.Parameter(base)):
        assert torch.equal(LazyTensor.from_torch(tensor).load(), tensor)
    numbers = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    assert torch.equal(LazyTensor.from_torch(numbers.conj()).load(), numbers.conj())


def test_from_torch_keeps_the_memory_alive() -> None:
    lazy = LazyTensor.from_torch(torch.full((1000, 1000), 7.0))
    gc.collect()
    junk = [torch.zeros(1000, 1000) for _ in range(3)]
    assert bool((lazy.rows(10, 20).load() == 7).all())
    del junk


def test_from_torch_and_back_does_not_copy() -> None:
    tensor = torch.ones(8)
    assert LazyTensor.from_torch(tensor).load().data_ptr() == tensor.data_ptr()
    read_only = held(b"\0" * 4, (1,), "F32")
    read_only.load().fill_(1)  # a copy: bytes are never written to
    assert bytes(read_only.read()) == b"\0" * 4


def test_same_bytes() -> None:
    ours = held(bytes(range(10)), (10,), "U8")
    assert same_bytes(ours, held(bytes(range(10)), (10,), "U8"))
    assert not same_bytes(ours, held(bytes(range(10)), (10,), "I8"))
    assert not same_bytes(ours, held(bytes(range(10)), (2, 5), "U8"))
    assert not same_bytes(ours, held(bytes(10), (10,), "U8"))
    nan = held(struct.pack("<f", math.nan), (1,), "F32")
    assert same_bytes(nan, held(struct.pack("<f", math.nan), (1,), "F32"))


@pytest.mark.parametrize("size", [1, 3, 4, 7, 100])
def test_concatenated_equals_torch(size: int) -> None:
    parts = [torch.arange(rows * 3, dtype=torch.uint8).reshape(rows, 3) for rows in (2, 0, 1, 4)]
    whole = torch.cat(parts)
    lazy = concatenated([LazyTensor.from_torch(part) for part in parts])
    assert torch.equal(lazy.load(), whole)
    assert same_bytes(lazy, LazyTensor.from_torch(whole))
    for start in range(8):
        for stop in range(start, 8):
            assert torch.equal(lazy.rows(start, stop).load(), whole[start:stop])
    pieces = list(lazy.source.chunks(size))
    assert b"".join(pieces) == bytes(whole.flatten().tolist())
    assert all(piece.nbytes == size for piece in pieces[:-1])


def test_concatenated_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="concatenate"):
        concatenated([held(bytes(4), (2, 2), "U8"), held(bytes(3), (1, 3), "U8")])
    with pytest.raises(ValueError, match="concatenate"):
        concatenated([held(bytes(4), (2, 2), "U8"), held(bytes(4), (2, 2), "I8")])
    with pytest.raises(ValueError, match="concatenate"):
        concatenated([held(bytes(1), (), "U8"), held(bytes(1), (), "U8")])


def test_every_dtype_has_a_rank() -> None:
    assert set(SERIAL_ORDER) == set(DTYPES)
    assert SERIAL_ORDER["U64"] == 0
    assert SERIAL_ORDER["BOOL"] == len(DTYPES) - 1


def test_errors_are_one_line() -> None:
    error = FormatError("has 3, expected 4", key="a\nb\x1b[31m", hint="try again")
    assert error.with_file("x.safetensors") is error
    assert error.with_file("y.safetensors").file == "x.safetensors"
    assert str(error) == "x.safetensors: a\\nb\\x1b[31m: has 3, expected 4; try again"
    assert str(LoratoolError("only this")) == "only this"
    assert len(str(LoratoolError("no", key="k" * 10_000))) < 300
    assert (LoratoolError("m").exit_code, UsageError("m").exit_code) == (1, 2)
    assert NotRepresentable("m", modules=("a", "b")).modules == ("a", "b")


FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def every_kind_of_number(dtype: torch.dtype) -> torch.Tensor:
    """All bit patterns of a small dtype, else numbers of every size: subnormal, huge, ties between neighbours."""
    if dtype.itemsize <= 2:
        bits = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32)
        return bits.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-44, 38, 4096, dtype=torch.float64)
    return (torch.randn(4096, generator=generator, dtype=torch.float64) * sizes).to(dtype)


@pytest.mark.parametrize("code", FLOATS)
def test_array_reads_what_load_does(code: str) -> None:
    stored = every_kind_of_number(torch_dtype(code))
    for work in ("float64", "float32"):
        found = torch.from_numpy(LazyTensor.from_torch(stored).array(work))
        assert torch.equal(found.nan_to_num(7.0), stored.to(getattr(torch, work)).nan_to_num(7.0))
    assert LazyTensor.from_torch(stored.reshape(2, -1)).array().shape == (2, len(stored) // 2)


@pytest.mark.parametrize("code", FLOATS)
@pytest.mark.parametrize("work", [torch.float32, torch.float64])
def test_rounded_rounds_once_to_nearest_even(code: str, work: torch.dtype) -> None:
    """Against `encoded`, which rounds number by number with exact arithmetic."""
    dtype = torch_dtype(code)
    near = every_kind_of_number(dtype).to(torch.float64)
    near = near[torch.isfinite(near)].unique()
    between = (near[1:] + near[:-1]) / 2
    nudged = torch.cat([between, between * (1 + 2.0**-40), between * (1 - 2.0**-40), near])
    picked = nudged[torch.randperm(len(nudged), generator=torch.Generator().manual_seed(1))[:3000]].to(work)
    picked = picked[picked.abs() <= near.abs().max()]
    made = LazyTensor.rounded(tuple(picked.shape), code, lambda: picked.numpy())
    if code.startswith("F8") and work == torch.float64:
        picked = picked.float()  # torch rounds these, by way of float32
    assert bytes(made.read()) == b"".join(encoded(value, code) for value in picked.tolist())


def test_rounded_keeps_nan_and_makes_too_large_infinite() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 1e39, -1e39])
    for code in ("F32", "F16", "BF16"):
        found = LazyTensor.rounded((5,), code, lambda: values).load().double()
        assert found.isnan().tolist() == [True, False, False, False, False]
        assert found[1:].tolist() == [math.inf, -math.inf, math.inf, -math.inf]
    with pytest.raises(ValueError, match=r"computed \[5\], announced \[4\]"):
        LazyTensor.rounded((4,), "F32", lambda: values).read()
