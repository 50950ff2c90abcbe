"""decompose: singular values and truncation against the dense SVD in float64, for every family, shape and condition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratool.core.errors import FormatError
from loratool.core.family import Family
from loratool.core.module import Module
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.families import lokr, lora
from loratool.ops import gpu
from loratool.ops.decompose import decompose
from loratool.ops.spectrum import Spectrum, by_grams, spectrum, truncated

F64 = torch.float64
TORCH = {"F64": F64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROUNDING = {"F64": 1e-13, "F32": 3e-7, "F16": 1e-3, "BF16": 8e-3}
"""Relative error of a product whose factors are rounded to a dtype; the unit roundoff of both, and some room."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def conditioned(rows: int, columns: int, condition: float, seed: int) -> Tensor:
    """A random matrix whose singular values fall from 1 to 1 / condition, evenly in their logarithm."""
    count = min(rows, columns)
    left, _ = torch.linalg.qr(noise(rows, count, seed=seed))
    right, _ = torch.linalg.qr(noise(columns, count, seed=seed + 1))
    return left * torch.logspace(0, -math.log10(condition), count, dtype=F64) @ right.T


def module(
    family: Family,
    factors: Mapping[str, Tensor],
    alpha: float | None = None,
    magnitude: Tensor | None = None,
    dtype: str = "F64",
) -> Module:
    stored = {role: LazyTensor.from_torch(factor.to(TORCH[dtype])) for role, factor in factors.items()}
    shape = family.shape({role: factor.shape for role, factor in stored.items()})
    held = None if magnitude is None else LazyTensor.from_torch(magnitude)
    return Module((Target("unet", "mid_block.attentions.0.proj_in", shape),), family, stored, alpha, held)


def pair(up: Tensor, down: Tensor, alpha: float | None = None, dtype: str = "F64") -> Module:
    return module(lora.FAMILY, {"up": up, "down": down}, alpha, dtype=dtype)


def dense(one: Module) -> Tensor:
    """The update as a matrix, float64."""
    loaded = {role: factor.load().double() for role, factor in one.factors.items()}
    return one.family.delta(loaded, one.scale).flatten(1)


def singular(matrix: Tensor) -> list[float]:
    values: list[float] = torch.linalg.svdvals(matrix).tolist()
    return values


def check(one: Module, ranks: Sequence[int] | None = None, found: Spectrum | None = None, floor: float = 1e-9) -> None:
    """Singular values and the truncation error at some ranks equal those of the dense SVD (Eckart-Young)."""
    found = found or spectrum(one)
    whole = dense(one)
    expected = singular(whole)
    peak = expected[0]
    assert list(found.values) == sorted(found.values, reverse=True)
    assert all(math.isfinite(value) and value >= 0 for value in found.values)
    for at in range(max(len(expected), len(found.values))):
        want = expected[at] if at < len(expected) else 0.0
        got = found.values[at] if at < len(found.values) else 0.0
        if want > floor * peak:
            assert got == pytest.approx(want, rel=1e-6), at
        else:
            assert got <= 2 * floor * peak, at
    assert found.norm == pytest.approx(float(whole.norm()), rel=1e-9)
    full = one.product.rank
    rounding = ROUNDING[one.dtype]
    for rank in ranks or sorted({1, 2, full // 2, full - 1} - {0}):
        if rank >= full:
            continue
        made = truncated(one, found, rank)
        assert made.family.problem(made.shapes) is None
        assert made.family.product(made.factors).rank <= rank
        bound = math.sqrt(math.fsum(value * value for value in expected[rank:]))
        error = float((dense(made) - whole).norm())
        assert error == pytest.approx(bound, rel=1e-5, abs=max(rounding, 1e-12) * float(whole.norm())), rank
        if peak:
            assert found.error(rank) == pytest.approx(bound / float(whole.norm()), rel=1e-5, abs=1e-9), rank
        check_kept(one, made)


def check_kept(one: Module, made: Module) -> None:
    """Targets, shape, scale, dtypes, magnitude and every tensor that is not in the product."""
    assert made.targets == one.targets
    assert made.shape == one.shape
    assert (made.alpha is None) == (one.alpha is None)
    assert made.scale == pytest.approx(one.scale, rel=1e-12)
    assert made.magnitude is one.magnitude
    assert {tensor.dtype for tensor in made.factors.values()} == {tensor.dtype for tensor in one.factors.values()}
    for role in ("bias", "w1", "w1_a", "w1_b"):
        assert made.factors.get(role) is one.factors.get(role)
    assert all(bool(torch.isfinite(tensor.load()).all()) for tensor in made.factors.values())


# -- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 32, 128, 256])
@pytest.mark.parametrize(("rows", "columns"), [(320, 320), (320, 768), (1280, 320), (40, 300), (300, 40)])
def test_random_pairs_of_every_rank(rank: int, rows: int, columns: int) -> None:
    check(pair(noise(rows, rank), noise(rank, columns, seed=1), 2.0))


CONDITIONS = [1.0, 1e2, 1e4, 1e5, 1e6, 1e8]


@pytest.mark.parametrize("up", CONDITIONS)
@pytest.mark.parametrize("down", CONDITIONS)
def test_badly_conditioned_pairs(up: float, down: float) -> None:
    check(pair(conditioned(96, 16, up, 0), conditioned(16, 128, down, 2), 4.0), range(1, 16))


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e8])
@pytest.mark.parametrize("both", [False, True], ids=["one scaled", "both scaled"])
def test_scaled_columns(condition: float, both: bool) -> None:
    """Columns of up grow while the rows of down shrink: harmless for the product, deadly for a norm-wise bound."""
    scale = torch.logspace(0, math.log10(condition), 12, dtype=F64)
    up, down = noise(80, 12) * scale, noise(12, 90, seed=1)
    if both:
        down = down / scale[:, None]
    check(pair(up, down), range(1, 12))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e8])
def test_inversely_scaled_columns_in_short_dtypes(dtype: str, condition: float) -> None:
    if dtype == "F16" and condition > 1e4:
        condition = 3e4  # of what the dtype can hold
    scale = torch.logspace(0, math.log10(condition), 12, dtype=F64) / math.sqrt(condition)
    one = pair(noise(80, 12) * scale, noise(12, 90, seed=1) / scale[:, None], dtype=dtype)
    check(one, range(1, 12))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_duplicated_columns(dtype: str) -> None:
    up, down = noise(64, 4), noise(8, 48, seed=1)
    one = pair(torch.cat([up, up], dim=1), down, 8.0, dtype)
    found = spectrum(one)
    assert found.rank == 4
    check(one, range(1, 8), found)


def test_columns_that_cancel_leave_the_rest() -> None:
    """[a, a, c] @ [b, -b, d]: what is left is c @ d, a hundredth of what cancels."""
    a, b, c, d = noise(64, 4), noise(4, 48, seed=1), noise(64, 4, seed=2) / 10, noise(4, 48, seed=3) / 10
    check(pair(torch.cat([a, a, c], 1), torch.cat([b, -b, d])), range(1, 12))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_columns_that_cancel_almost_wholly_keep_their_precision(dtype: str) -> None:
    """The same, in 16 bits, with four powers of ten between: as the difference of two adapters has it."""
    a, b, c, d = noise(64, 4), noise(4, 48, seed=1), noise(64, 4, seed=2) / 100, noise(4, 48, seed=3) / 100
    one = pair(torch.cat([a, a, c], 1), torch.cat([b, -b, d]), dtype=dtype)
    made = truncated(one, spectrum(one), 4)
    error = float((dense(made) - dense(one)).norm())
    assert error <= ROUNDING[dtype] * float(dense(one).norm())


def test_columns_that_cancel_wholly_are_zero() -> None:
    a, b = noise(64, 4), noise(4, 48, seed=1)
    one = pair(torch.cat([a, a], 1), torch.cat([b, -b]))
    made = truncated(one, spectrum(one), 5)
    assert float(dense(made).norm()) <= 1e-12 * float(a.norm() * b.norm())


@pytest.mark.parametrize(("rows", "columns", "rank"), [(6, 10, 32), (10, 6, 32), (7, 7, 8), (1, 5, 3), (5, 1, 3)])
@pytest.mark.parametrize("dtype", ["F64", "F16"])
def test_a_rank_above_both_sizes(rows: int, columns: int, rank: int, dtype: str) -> None:
    one = pair(noise(rows, rank), noise(rank, columns, seed=1), 4.0, dtype)
    check(one, range(1, rank))


ZEROS = {
    "zero up": (0.0, 1.0),
    "zero down": (1.0, 0.0),
    "both zero": (0.0, 0.0),
}


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("factors", ZEROS.values(), ids=ZEROS.keys())
def test_a_zero_module_stays_zero(factors: tuple[float, float], size: float, dtype: str) -> None:
    up, down = factors
    one = pair(noise(24, 8) * up * size, noise(8, 30, seed=1) * down * size, 4.0, dtype)
    found = spectrum(one)
    assert found.rank == 0 and found.norm == 0.0 and found.error(1) == 0.0
    for rank in range(1, 8):
        made = truncated(one, found, rank)
        assert made.rank == rank
        assert not dense(made).any()
        check_kept(one, made)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("side", ["up", "down", "both, others"])
def test_some_zero_columns(side: str, dtype: str) -> None:
    up, down = noise(40, 8), noise(8, 50, seed=1)
    if side != "down":
        up[:, 1::3] = 0
    if side != "up":
        down[::3] = 0
    check(pair(up, down, 8.0, dtype), range(1, 8))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_every_dtype_is_kept(dtype: str, rank: int) -> None:
    check(pair(noise(96, rank) * 0.05, noise(rank, 128, seed=1) * 0.1, rank / 2, dtype))


ALPHAS = [None, 0.0, -3.0, 1.0, 16.0, 1e-30, 1e30, 1e-7]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_scale_is_kept_and_in_the_values(alpha: float | None) -> None:
    one = pair(noise(30, 6), noise(6, 20, seed=1), alpha)
    found = spectrum(one)
    base = spectrum(replace(one, alpha=None))
    assert found.values == pytest.approx([value * abs(one.scale) for value in base.values], rel=1e-12)
    check(one, range(1, 6), found)


def test_an_alpha_that_is_no_number_is_an_error() -> None:
    for alpha in (math.nan, math.inf):
        with pytest.raises(FormatError, match=r"mid_block\.attentions\.0\.proj_in"):
            spectrum(pair(noise(8, 3), noise(3, 8, seed=1), alpha))


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_tiny_and_huge_factors(size: float) -> None:
    for up, down in ((size, 1.0), (1.0, size), (size, 1 / size), (math.sqrt(size), math.sqrt(size))):
        check(pair(noise(30, 6) * up, noise(6, 20, seed=1) * down, 6.0), range(1, 6))


def test_fp16_subnormals() -> None:
    """A module whose up is at the bottom of fp16, as after a few steps of training: balanced factors are better."""
    one = pair(noise(40, 8) * 1e-6, noise(8, 50, seed=1), 8.0, "F16")
    check(one, range(1, 8))


def test_factors_are_balanced() -> None:
    one = pair(conditioned(60, 12, 1e3, 0) * 1e4, conditioned(12, 70, 1e2, 2) * 1e-3, 3.0)
    found = spectrum(one)
    for rank in (1, 5, 11):
        made = truncated(one, found, rank)
        up, down = made.factors["up"].load(), made.factors["down"].load()
        assert up.norm(dim=0).tolist() == pytest.approx(down.norm(dim=1).tolist(), rel=1e-9)
        roots = [math.sqrt(value / abs(one.scale)) for value in found.values[:rank]]
        assert up.norm(dim=0).tolist() == pytest.approx(roots, rel=1e-6)
        for gram in (up.T @ up, down @ down.T):
            off = gram - gram.diagonal().diag()
            assert float(off.abs().max()) <= 1e-9 * float(gram.abs().max())


@pytest.mark.parametrize("rank", [8, 9, 10**6])
def test_a_rank_that_is_not_exceeded_leaves_the_very_object(rank: int) -> None:
    for one in FAMILIES.values():
        full = one.product.rank
        assert truncated(one, spectrum(one), max(rank, full)) is one


def test_another_dtype_makes_new_factors_even_at_the_full_rank() -> None:
    one = pair(noise(20, 4), noise(4, 30, seed=1), 2.0, "F32")
    made = truncated(one, spectrum(one), 4, "F16")
    assert {tensor.dtype for tensor in made.factors.values()} == {"F16"}
    assert float((dense(made) - dense(one)).norm()) <= 1e-3 * float(dense(one).norm())


@st.composite
def any_pair(draw: st.DrawFn) -> Module:
    rows, columns, rank = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(1, 28))
    seed = draw(st.integers(0, 10**6))
    up, down = noise(rows, rank, seed=seed), noise(rank, columns, seed=seed + 1)
    exponents = st.lists(st.integers(-4, 4), min_size=rank, max_size=rank)
    up = up * torch.tensor(draw(exponents), dtype=F64).mul(draw(st.sampled_from([0, 0.5, 1]))).exp()
    for column in draw(st.sets(st.integers(0, rank - 1), max_size=3)):
        up[:, column] = draw(st.sampled_from([0.0, 1.0])) * up[:, 0]
    alpha = draw(st.sampled_from([None, 0.0, -1.0, 1.0, 7.5]))
    return pair(up, down, alpha, draw(st.sampled_from(["F64", "F32", "F16", "BF16"])))


@given(any_pair())
@settings(max_examples=60, deadline=None)
def test_any_pair(one: Module) -> None:
    check(one, range(1, one.rank))


# -- families and shapes --------------------------------------------------------------------------------------------


def tucker(p: int, q: int, kernel: tuple[int, ...] = (3, 3), seed: int = 0, out: int = 20, width: int = 16) -> Module:
    ones = (1,) * len(kernel)
    return module(
        lora.FAMILY,
        {
            "up": noise(out, p, *ones, seed=seed),
            "down": noise(q, width, *ones, seed=seed + 1),
            "mid": noise(p, q, *kernel, seed=seed + 2),
        },
        3.0,
    )


PAIRS: dict[str, Module] = {
    "linear": pair(noise(20, 6), noise(6, 30, seed=1), 3.0),
    "conv 1x1": pair(noise(20, 6, 1, 1), noise(6, 30, 1, 1, seed=1), 3.0),
    "conv 3x3": pair(noise(20, 6, 1, 1), noise(6, 8, 3, 3, seed=1), 3.0),
    "conv 1x3": pair(noise(20, 6, 1, 1), noise(6, 8, 1, 3, seed=1), 3.0),
    "conv 3x1": pair(noise(20, 6, 1, 1), noise(6, 8, 3, 1, seed=1), 3.0),
    "conv 1d": pair(noise(20, 6, 1), noise(6, 8, 5, seed=1), 3.0),
    "conv flattened": pair(noise(20, 6), noise(6, 8 * 9, seed=1), 3.0),
    "embedding": module(lora.FAMILY, {"embedding_A": noise(6, 90), "embedding_B": noise(24, 6, seed=1)}, 3.0),
    "bias": module(lora.FAMILY, {"up": noise(20, 6), "down": noise(6, 30, seed=1), "bias": noise(20, seed=2)}, 3.0),
    "DoRA per row": module(lora.FAMILY, {"up": noise(20, 6), "down": noise(6, 30, seed=1)}, 3.0, noise(20, 1, seed=2)),
    "DoRA per column": module(
        lora.FAMILY, {"up": noise(20, 6), "down": noise(6, 30, seed=1)}, 3.0, noise(1, 30, seed=2)
    ),
    "LoKr, w2 a pair": module(lokr.FAMILY, {"w1": noise(3, 4), "w2_a": noise(9, 5), "w2_b": noise(5, 8, seed=1)}, 2.0),
    "LoKr, both pairs": module(
        lokr.FAMILY,
        {"w1_a": noise(3, 2), "w1_b": noise(2, 4), "w2_a": noise(9, 5), "w2_b": noise(5, 8, seed=1)},
        2.0,
    ),
    "LoKr, conv pair": module(
        lokr.FAMILY, {"w1": noise(3, 4), "w2_a": noise(9, 5), "w2_b": noise(5, 4 * 9, seed=1)}, 2.0
    ),
    "LoKr, conv pair with its kernel": module(
        lokr.FAMILY, {"w1": noise(3, 4), "w2_a": noise(9, 5), "w2_b": noise(5, 4, 3, 1, seed=1)}, 2.0
    ),
}
WHOLES: dict[str, Module] = {
    "LoKr, both whole": module(lokr.FAMILY, {"w1": noise(3, 4), "w2": noise(9, 8)}, 2.0),
    "LoKr, both whole, no alpha": module(lokr.FAMILY, {"w1": noise(3, 4), "w2": noise(9, 8)}),
    "LoKr, w2 whole": module(lokr.FAMILY, {"w1_a": noise(3, 2), "w1_b": noise(2, 4), "w2": noise(6, 8)}, 3.0),
    "LoKr, whole conv": module(lokr.FAMILY, {"w1": noise(3, 4), "w2": noise(6, 4, 3, 3)}, 2.0),
}
TUCKERS: dict[str, Module] = {
    "Tucker": tucker(6, 6),
    "Tucker, p < q": tucker(4, 6),
    "Tucker, p > q": tucker(7, 5),
    "Tucker, p above the output": tucker(12, 6, out=8),
    "Tucker 1x3": tucker(6, 6, (1, 3)),
    "LoKr, Tucker": module(
        lokr.FAMILY,
        {"w1": noise(2, 3), "w2_a": noise(5, 8), "w2_b": noise(5, 9, seed=1), "t2": noise(5, 5, 3, 3, seed=2)},
        2.0,
    ),
}
FAMILIES = PAIRS | WHOLES | TUCKERS


def unscaled(one: Module) -> Module:
    """A LoKr of which kron(w1, .) has been made harmless: its w2 alone, with the same scale and ||w1||."""
    w1 = one.factors["w1"].load() if "w1" in one.factors else one.factors["w1_a"].load() @ one.factors["w1_b"].load()
    lone = {role: factor for role, factor in one.factors.items() if not role.startswith("w1")}
    alone = {"w1": LazyTensor.from_torch(w1.norm().reshape(1, 1))}
    moved = replace(one, factors={**alone, **lone})
    if "w2" in lone and one.alpha is not None:
        return replace(moved, factors={"w1": LazyTensor.from_torch((w1.norm() * one.scale).reshape(1, 1)), **lone})
    return moved


@pytest.mark.parametrize("name", [*PAIRS, *WHOLES])
def test_every_family_and_shape(name: str) -> None:
    one = FAMILIES[name]
    full = one.product.rank
    if one.family is not lokr.FAMILY:
        check(one, range(1, full))
        return
    found, alone = spectrum(one), unscaled(one)
    whole = dense(one)
    assert found.norm == pytest.approx(float(whole.norm()), rel=1e-9)
    matrix = _w2(alone) * float(alone.factors["w1"].load()) * abs(alone.scale)
    assert found.values == pytest.approx(singular(matrix)[: len(found.values)], rel=1e-6)
    for rank in range(1, full):
        made = truncated(one, found, rank)
        assert made.family.product(made.factors).rank == rank
        error = float((dense(made).reshape(whole.shape) - whole).norm())
        assert error == pytest.approx(found.error(rank) * float(whole.norm()), rel=1e-5)
        assert dense(made).numel() == whole.numel()
        assert made.scale == pytest.approx(one.scale, rel=1e-12)
        for role in ("w1", "w1_a", "w1_b"):
            assert made.factors.get(role) is one.factors.get(role)


def _w2(one: Module) -> Tensor:
    factors = {role: factor.load() for role, factor in one.factors.items()}
    return factors["w2"].flatten(1) if "w2" in factors else factors["w2_a"] @ factors["w2_b"].flatten(1)


@pytest.mark.parametrize("name", TUCKERS)
def test_the_error_of_a_tucker_module_is_bounded_and_at_the_full_rank_exact(name: str) -> None:
    one = TUCKERS[name]
    found, whole = spectrum(one), dense(one)
    norm = float(whole.norm())
    assert found.norm == pytest.approx(norm, rel=1e-9)
    full = one.product.rank
    last = 1.0
    for rank in range(1, full):
        made = truncated(one, found, rank)
        assert made.family.problem(made.shapes) is None
        assert made.family.product(made.factors).rank <= rank
        error = float((dense(made) - whole).norm()) / norm
        assert error <= found.error(rank) + 1e-12
        assert error <= last + 1e-12  # nested bases: never worse with more
        last = error
        check_kept(one, made)
    assert found.error(full) == 0.0


def test_a_tucker_module_of_low_multilinear_rank_is_cut_exactly() -> None:
    small = tucker(3, 3)
    grow = noise(7, 3, seed=9)
    factors = {role: factor.load() for role, factor in small.factors.items()}
    mid = torch.einsum("ap,pqxy,bq->abxy", grow, factors["mid"], grow)
    pinv = torch.linalg.pinv(grow)
    big = module(
        lora.FAMILY,
        {
            "up": torch.einsum("opxy,pa->oaxy", factors["up"], pinv),
            "down": torch.einsum("qb,qixy->bixy", pinv, factors["down"]),
            "mid": mid,
        },
        7.0,
    )
    found = spectrum(big)
    assert found.rank == 3
    made = truncated(big, found, 3)
    assert float((dense(made) - dense(big)).norm()) <= 1e-12 * found.norm


@pytest.mark.parametrize("zeroed", ["up", "down", "mid"])
def test_a_zero_tucker_module_stays_zero(zeroed: str) -> None:
    one = tucker(4, 4)
    held = LazyTensor.from_torch(torch.zeros_like(one.factors[zeroed].load()))
    one = replace(one, factors={**one.factors, zeroed: held})
    found = spectrum(one)
    assert found.norm == 0.0 and found.rank == 0
    assert not dense(truncated(one, found, 2)).any()


def test_a_zero_lokr_stays_zero() -> None:
    for name in ("LoKr, w2 a pair", "LoKr, both whole"):
        for role in ("w1", "w2", "w2_a"):
            one = FAMILIES[name]
            if role in one.factors:
                held = LazyTensor.from_torch(torch.zeros_like(one.factors[role].load()))
                one = replace(one, factors={**one.factors, role: held})
                found = spectrum(one)
                assert found.norm == 0.0
                assert not dense(truncated(one, found, 2)).any()


def test_scales_of_dora_are_kept_bit_for_bit() -> None:
    for name in ("DoRA per row", "DoRA per column"):
        one = PAIRS[name]
        assert truncated(one, spectrum(one), 2).magnitude is one.magnitude


# -- what is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_not_finite_is_an_error_that_names_the_module(name: str) -> None:
    one = FAMILIES[name]
    for role, tensor in one.tensors.items():
        for value in (math.nan, math.inf, -math.inf):
            spoiled = tensor.load().clone()
            spoiled.view(-1)[-1] = value
            held = LazyTensor.from_torch(spoiled)
            broken = replace(one, factors={**one.factors, role: held})
            if role == "magnitude":
                broken = replace(one, magnitude=held)
            for work in (decompose, lambda modules: gpu.decompose_on("cpu", modules)):
                with pytest.raises(FormatError, match=r"unet\.mid_block\.attentions\.0\.proj_in.*NaN or infinite"):
                    work([one, broken])


# -- many modules ---------------------------------------------------------------------------------------------------


def test_order_and_ticks() -> None:
    modules = [pair(noise(10 + n, 3, seed=n), noise(3, 12, seed=n + 50), 1.0) for n in range(7)]
    ticks: list[tuple[int, int]] = []
    found = decompose(modules, tick=lambda done, total: ticks.append((done, total)))
    assert [one.values for one in found] == [spectrum(module).values for module in modules]
    assert ticks == [(n, 7) for n in range(1, 8)]
    assert decompose([]) == []


def test_batches_equal_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, run on the CPU: equal shapes together, bad conditions apart, other families alone."""
    monkeypatch.setattr(gpu, "BATCH_BYTES", 40_000)
    modules = [pair(noise(40, 6, seed=n), noise(6, 30, seed=n + 50), 2.0) for n in range(5)]
    modules += [pair(noise(40, 6, seed=n), noise(6, 30, seed=n + 50), -1.0, "F16") for n in range(5, 8)]
    modules += [pair(noise(40, 6, seed=n), noise(6, 30, seed=n + 50), -1.0, "BF16") for n in range(8, 10)]
    modules += [pair(conditioned(40, 6, 1e7, 3), conditioned(6, 30, 1e7, 5), 2.0)]
    modules += [pair(noise(40, 6) * 0, noise(6, 30), 2.0), pair(noise(4, 6), noise(6, 5))]
    modules += FAMILIES.values()
    ticks: list[tuple[int, int]] = []
    found = gpu.decompose_on("cpu", modules, lambda done, total: ticks.append((done, total)))
    for one, spread in zip(modules, found, strict=True):
        alone = spectrum(one)
        live = [value for value in alone.values if value > 1e-9 * max(alone.values[0], 1e-300)]
        assert spread.values[: len(live)] == pytest.approx(live, rel=1e-6)
        assert spread.norm == pytest.approx(alone.norm, rel=1e-9)
        full = one.product.rank
        if full > 1:
            half = full // 2
            ours, theirs = dense(truncated(one, spread, half)), dense(truncated(one, alone, half))
            assert float((ours - theirs).norm()) <= 2 * ROUNDING[one.dtype] * alone.norm
    assert ticks[-1] == (len(modules), len(modules))


def test_made_factors_are_lazy_and_equal_each_time() -> None:
    one = pair(noise(40, 6), noise(6, 30, seed=1), 2.0, "F16")
    made = truncated(one, spectrum(one), 3)
    assert bytes(made.factors["up"].read()) == bytes(made.factors["up"].read())


@pytest.mark.parametrize("rank", [4, 64, 192])
def test_gram_matrices_are_trusted_only_where_they_are_good_enough(rank: int) -> None:
    """Conditions around the border between the fast way and the accurate one: both sides keep the promise."""
    trusted = []
    left, _ = torch.linalg.qr(noise(256, rank, seed=rank))
    for condition in torch.logspace(1, 5, 13).tolist():
        one = pair(left, conditioned(rank, 300, condition, rank + 1))
        expected = singular(dense(one))
        found = spectrum(one)
        up, down = (one.factors[role].array() for role in ("up", "down"))
        trusted.append(by_grams(up.T @ up, down @ down.T) is not None)
        assert found.values == pytest.approx(expected[:rank], rel=1e-6)
    assert trusted[0] and not trusted[-1]
