"""rounding: to nearest it is torch's cast; stochastically it is one of the two neighbours, and right in the mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loratool.core.tensor import torch_dtype
from loratool.ops.rounding import FP8, fresh_scale, largest, rounded, uniform

SMALL = ("F16", "BF16", "F8_E4M3", "F8_E5M2")
each_dtype = pytest.mark.parametrize("dtype", SMALL)


def normal(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def noise_for(values: Tensor, seed: int = 0) -> Tensor:
    return torch.rand(values.shape, generator=torch.Generator().manual_seed(seed))


def grid(dtype: str) -> Tensor:
    """All finite numbers of a small dtype, ascending, each once (one zero); float64."""
    kind = torch_dtype(dtype)
    codes = torch.arange(2 ** (8 * kind.itemsize), dtype=torch.int32)
    whole = codes.to(torch.uint8 if kind.itemsize == 1 else torch.uint16).view(kind).double()
    found: Tensor = torch.unique(whole[whole.isfinite()])
    return found


def neighbours(values: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """The largest number of the dtype that is not above a value, and the smallest not below it; float64."""
    numbers = grid(dtype)
    exact = values.double().flatten()
    above = torch.searchsorted(numbers, exact).clamp(max=len(numbers) - 1)
    below = (torch.searchsorted(numbers, exact, right=True) - 1).clamp(min=0)
    return numbers[below].reshape(values.shape), numbers[above].reshape(values.shape)


# -- to nearest -------------------------------------------------------------------------------------------------------


def of_every_size() -> Tensor:
    """Values from far below the smallest float16 to near its largest, and the special ones."""
    sizes = torch.logspace(-12, 4, 64).repeat_interleave(64)
    special = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, 65504.0, -65504.0, 2.0**-24, 2.0**-25, 1 + 2.0**-11, 1 + 3 * 2.0**-11]
    )
    return torch.cat([normal(len(sizes)) * sizes, special])


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_to_nearest_is_torchs_cast(dtype: str) -> None:
    values = of_every_size()
    found = rounded(values, dtype)
    assert found.dtype == torch_dtype(dtype)
    assert torch.equal(found, values.to(torch_dtype(dtype)))
    assert torch.equal(found.signbit(), values.signbit())


@each_dtype
def test_to_nearest_is_nearest_and_ties_are_even(dtype: str) -> None:
    """Against the definition, not a cast."""
    values = of_every_size().clamp(-largest(dtype), largest(dtype))
    below, above = neighbours(values, dtype)
    found = rounded(values, dtype).double()
    off = (found - values.double()).abs()
    assert torch.equal(off, torch.minimum(values.double() - below, above - values.double()))
    numbers = grid(dtype)
    numbers = numbers[numbers >= 0]
    ties = ((numbers[:-1] + numbers[1:]) / 2).float()
    index = torch.searchsorted(numbers, rounded(ties, dtype).double())
    assert not bool((index % 2).any())  # an even code has an even place among the numbers from 0 on


@pytest.mark.parametrize("dtype", sorted(FP8))
@pytest.mark.parametrize("stochastic", [False, True])
def test_fp8_stays_within_its_range(dtype: str, stochastic: bool) -> None:
    top = largest(dtype)
    assert top == {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}[dtype]
    values = torch.tensor([top, top * 1.01, top * 2, 1e30, math.inf]).repeat(100)
    for sign in (1.0, -1.0):
        found = rounded(values * sign, dtype, noise_for(values) if stochastic else None)
        assert torch.equal(found.float(), torch.full_like(values, top * sign))


@pytest.mark.parametrize("dtype", SMALL)
def test_nan_stays_nan(dtype: str) -> None:
    values = torch.tensor([math.nan, 1.0])
    for noise in (None, torch.zeros(2)):
        assert rounded(values, dtype, noise).float().isnan().tolist() == [True, False]


def test_float16_too_large_becomes_infinite() -> None:
    """Not a wrong number: baking refuses infinity."""
    values = torch.tensor([65519.0, 65520.0, 1e6, -1e6])
    expected = [65504.0, math.inf, math.inf, -math.inf]
    assert rounded(values, "F16").tolist() == expected
    assert rounded(values, "F16", torch.zeros(4)).tolist()[1:] == expected[1:]


# -- stochastically ---------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-4, 1e-2, 1.0, 100.0])
def test_only_the_two_neighbours_occur(dtype: str, size: float) -> None:
    """Around zero, among subnormal numbers, of either sign."""
    values = normal(4096, size=size)
    below, above = neighbours(values, dtype)
    found = rounded(values, dtype, noise_for(values)).double()
    assert bool(((found == below) | (found == above)).all())
    if dtype != "BF16" and size == 1e-9:
        return  # so far below the smallest number that nothing is ever rounded away from zero
    assert bool((found == below).any()) and bool((found == above).any())


@each_dtype
@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2.0**-24])
def test_what_can_be_stored_stays(dtype: str, noise: float) -> None:
    """Every single number: zero, subnormal ones, powers of two, the largest, of either sign."""
    numbers = grid(dtype).float()
    assert numbers.double().equal(grid(dtype)) and len(numbers) > 200
    assert torch.equal(rounded(numbers, dtype, torch.full_like(numbers, noise)).float(), numbers)


@each_dtype
def test_the_largest_finite_never_becomes_infinite(dtype: str) -> None:
    """Nor what lies between it and where rounding to nearest would."""
    top = grid(dtype)[-1].float()
    values = torch.stack([top, top * (1 + 2.0**-13) if dtype == "F16" else top, -top]).repeat(1000)
    found = rounded(values, dtype, noise_for(values)).float()
    assert torch.equal(found, torch.stack([top, top, -top]).repeat(1000))


@each_dtype
@pytest.mark.parametrize(
    "place", [(0.0, 1e-1), (1.0, 0.3), (1.0, 0.5), (1.0, 0.9), (-1.0, 0.25), (-3.0, 0.75), (0.25, 0.01)], ids=str
)
def test_the_mean_is_exact(dtype: str, place: tuple[float, float]) -> None:
    """A value at a known share of the way from one number to the next: as often the upper one. z within 4.5."""
    start, share = place
    numbers = grid(dtype)
    at = int(torch.searchsorted(numbers, torch.tensor(start, dtype=torch.float64)))
    low, high = float(numbers[at]), float(numbers[at + 1])
    value = torch.tensor(low + share * (high - low), dtype=torch.float64).float()
    share = (float(value) - low) / (high - low)
    count = 200_000
    values = value.expand(count)
    found = rounded(values, dtype, uniform((1, count), 0, 12345, torch.device("cpu"))[0]).double()
    ups = int((found == high).sum())
    assert ups + int((found == low).sum()) == count
    assert abs(ups - count * share) < 4.5 * math.sqrt(count * share * (1 - share))


@each_dtype
def test_many_values_are_unbiased_together(dtype: str) -> None:
    """The sum of all errors, in units of what chance allows; rounding to nearest a constant fails this by far."""
    values = normal(200_000, seed=3, size=0.02)
    below, above = neighbours(values, dtype)
    share = torch.where(above > below, (values.double() - below) / (above - below).clamp(min=1e-300), 0.0)
    spread = float((share * (1 - share) * (above - below).square()).sum().sqrt())
    error = float((rounded(values, dtype, noise_for(values)).double() - values.double()).sum())
    assert abs(error) < 4.5 * spread


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_noise_does_not_touch_wide_dtypes(dtype: str) -> None:
    values = normal(1000)
    assert torch.equal(rounded(values, dtype, noise_for(values)), values.to(torch_dtype(dtype)))


# -- noise ------------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", [0, 7, 2**62 - 1])
def test_noise_is_the_same_in_pieces(seed: int) -> None:
    whole = uniform((60, 32), 0, seed, CPU)
    pieces = [uniform((stop - start, 32), start * 32, seed, CPU) for start, stop in ((0, 1), (1, 17), (17, 60))]
    assert torch.equal(torch.cat(pieces), whole)


def test_noise_lies_in_zero_to_one_and_is_even() -> None:
    found = uniform((1, 1 << 18), 0, 1, CPU).double()
    assert float(found.min()) >= 0 and float(found.max()) < 1
    assert float(found.mean()) == pytest.approx(0.5, abs=4.5 / math.sqrt(12 * found.numel()))
    counts = torch.histc(found, 64, 0, 1)
    expected = found.numel() / 64
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert chi < 63 + 4.5 * math.sqrt(2 * 63)


def test_neighbours_in_noise_have_nothing_to_do_with_each_other() -> None:
    found = uniform((1, 1 << 18), 0, 1, CPU)[0].double() - 0.5
    for lag in (1, 2, 320, 1280):
        correlation = float((found[lag:] * found[:-lag]).mean() * 12)
        assert abs(correlation) < 4.5 / math.sqrt(found.numel() - lag)


def test_noise_differs_by_seed() -> None:
    first, second = (uniform((1, 4096), 0, seed, CPU) for seed in (1, 2))
    assert float((first == second).double().mean()) < 0.01


def test_noise_is_splitmix64() -> None:
    """The mixing steps with Python's integers."""
    mask, seed, first = (1 << 64) - 1, 99, 5

    def mixed(x: int) -> float:
        x = (x + seed) * 0x9E3779B97F4A7C15 & mask
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return float(((x ^ (x >> 31)) >> 40) / 2**24)

    assert uniform((2, 3), first, seed, CPU).flatten().tolist() == [mixed(first + i) for i in range(6)]


# -- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(FP8))
def test_a_fresh_scale_puts_the_peak_on_the_largest_number(dtype: str) -> None:
    peak, old = torch.tensor([[3.0], [0.0], [1e-3]]), torch.tensor([[1.0], [0.5], [2.0]])
    new = fresh_scale(peak, old, dtype)
    assert float(new[0]) == pytest.approx(3.0 / largest(dtype), rel=1e-6)
    assert float(new[1]) == 0.5  # a row of zeros keeps its scale
    assert rounded(peak / new, dtype).float()[[0, 2]].tolist() == [[largest(dtype)]] * 2


def test_a_fresh_scale_has_the_dtype_of_the_old_one() -> None:
    found = fresh_scale(torch.tensor(1.0), torch.tensor(1.0, dtype=torch.bfloat16), "F8_E4M3")
    assert found.dtype == torch.bfloat16
    assert float(found) == pytest.approx(1 / 448, rel=2.0**-8)
