"""What is seen in bytes is what torch sees in numbers."""

from __future__ import annotations

import math
import random

import pytest
import torch

from loratool.checks._values import FLOATS, largest, seen
from loratool.core.tensor import CHUNK, DTYPES, LazyTensor, torch_dtype

SCALES = (1e-40, 1e-3, 1.0, 50.0, 1e4, 1e5, 1e37)


def sample(dtype: str, rng: random.Random) -> torch.Tensor:
    """A few numbers of one magnitude, or any bits at all."""
    count, kind = rng.randrange(1, 300), torch_dtype(dtype)
    if dtype == "C64" or rng.random() < 0.5:
        return torch.frombuffer(bytearray(rng.randbytes(count * DTYPES[dtype] // 8)), dtype=kind)
    numbers = torch.tensor([rng.gauss(0, 1) * rng.choice(SCALES) for _ in range(count)], dtype=torch.float64)
    return (numbers if dtype == "F64" else numbers.float()).to(kind)


def real(values: torch.Tensor) -> torch.Tensor:
    if values.is_complex():
        return torch.view_as_real(values).flatten().double()
    return values.double() if values.dtype == torch.float64 else values.float().double()


@pytest.mark.parametrize("dtype", FLOATS)
def test_sees_what_torch_sees(dtype: str) -> None:
    rng = random.Random(dtype)
    for _ in range(60):
        values = sample(dtype, rng)
        tensor, numbers = LazyTensor.from_torch(values), real(values)
        found, odd = seen(tensor), ~numbers.isfinite()
        assert found.odd == int(odd.sum())
        assert found.first == (int(odd.nonzero()[0]) if odd.any() else -1)
        assert found.zero == bool((numbers == 0).all()) or (numbers.signbit() & (numbers == 0)).any()
        finite = numbers[~odd].abs()
        if len(finite):
            assert float(finite.max()) <= found.bound
            if dtype != "C64":
                assert largest(tensor)[0] == float(finite.max())


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_finds_one_number_behind_the_first_piece(dtype: str) -> None:
    count = CHUNK // (DTYPES[dtype] // 8) + 1000
    values = torch.zeros(count, dtype=torch_dtype(dtype))
    values[-3] = math.inf
    found = seen(LazyTensor.from_torch(values))
    assert (found.odd, found.first, found.zero) == (1, count - 3, False)


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL"])
def test_whole_numbers_are_never_odd(dtype: str) -> None:
    values = torch.ones(100, dtype=torch_dtype(dtype))
    assert seen(LazyTensor.from_torch(values)).odd == 0
    assert seen(LazyTensor.from_torch(values * 0)).zero
