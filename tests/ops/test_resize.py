"""resize, in memory: what it decides from, what it keeps, and what it says about it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loratool.core.adapter import Adapter
from loratool.core.module import Module
from loratool.core.registry import architectures
from loratool.core.target import Target
from loratool.ops.decompose import decompose
from loratool.ops.ranks import Limits, parse_rule
from loratool.ops.resize import resize
from tests.ops.test_decompose import FAMILIES, PAIRS, TUCKERS, WHOLES, dense, noise, pair, spectrum


def adapter(*modules: Module) -> Adapter:
    named = [replace(one, targets=(Target("unet", f"b{n}", one.shape),)) for n, one in enumerate(modules)]
    return Adapter(tuple(named), architectures()["unknown"], "comfyui")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_said_is_what_was_done(name: str) -> None:
    before = adapter(FAMILIES[name])
    for rank in (1, 2, 3, 100):
        made = resize(before, parse_rule("rank", str(rank)))
        (one,), (cut,) = made.adapter.modules, made.cuts
        whole = dense(before.modules[0])
        error = float((dense(one).reshape(whole.shape) - whole).norm() / whole.norm())
        if name in TUCKERS:
            assert error <= cut.error + 1e-12
        else:
            assert error == pytest.approx(cut.error, rel=1e-5, abs=1e-12)
        assert cut.energy == pytest.approx(1 - cut.error**2, abs=1e-12)
        assert made.error == pytest.approx(cut.error, rel=1e-9, abs=1e-12)
        assert cut.bytes_after == sum(tensor.nbytes for tensor in one.tensors.values()) <= cut.bytes_before
        assert cut.rank_after == one.family.product(one.factors).rank <= max(rank, cut.rank_after)
        assert one.magnitude is before.modules[0].magnitude


def test_a_rank_that_is_not_exceeded_leaves_the_very_objects() -> None:
    before = adapter(*FAMILIES.values())
    made = resize(before, parse_rule("rank", "1000"))
    assert all(new is old for new, old in zip(made.adapter.modules, before.modules, strict=True))
    assert made.error == 0.0


@pytest.mark.parametrize("name", WHOLES)
def test_a_whole_matrix_never_grows(name: str) -> None:
    before = adapter(WHOLES[name])
    for rank in range(1, 10):
        (cut,) = resize(before, parse_rule("rank", str(rank))).cuts
        assert cut.bytes_after <= cut.bytes_before


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dtype_is_taken_by_every_tensor(name: str) -> None:
    before = adapter(FAMILIES[name])
    for rank in ("2", "1000"):
        (one,) = resize(before, parse_rule("rank", rank), dtype="F32").adapter.modules
        assert {tensor.dtype for tensor in one.tensors.values()} == {"F32"}
        (same,) = resize(before, parse_rule("rank", rank)).adapter.modules
        assert float((dense(one) - dense(same)).norm()) <= 1e-5 * float(dense(same).norm())


def test_the_update_does_not_care_for_magnitude_or_bias() -> None:
    plain, others = PAIRS["linear"], [PAIRS["DoRA per row"], PAIRS["DoRA per column"], PAIRS["bias"]]
    rule = parse_rule("energy", "0.8")
    ranks = [cut.rank_after for cut in resize(adapter(plain, *others), rule).cuts]
    assert len(set(ranks)) == 1


def test_base_norms_make_error_relative() -> None:
    """The same update on a weight a hundred times as large matters less: it is cut first, and further."""
    one = pair(noise(30, 8), noise(8, 20, seed=1), 8.0)
    before = adapter(one, one)
    norms = {before.modules[0].targets: (1.0, 1.0), before.modules[1].targets: (100.0, 100.0)}
    plain = resize(before, parse_rule("error", "0.4"))
    told = resize(before, parse_rule("error", "0.4"), norms=norms)
    assert abs(plain.cuts[0].rank_after - plain.cuts[1].rank_after) <= 1
    assert told.cuts[1].rank_after == 1 < told.cuts[0].rank_after
    assert [cut.importance for cut in told.cuts] == pytest.approx([told.cuts[0].norm, told.cuts[0].norm / 100])
    assert plain.cuts[0].importance is None


def test_ratio_is_against_the_base_where_it_is_known() -> None:
    one = pair(noise(30, 8), noise(8, 20, seed=1), 8.0)
    before, values = adapter(one), spectrum(one).values
    norms = {before.modules[0].targets: (1.0, values[0] * 10)}
    kept = resize(before, parse_rule("ratio", "20"), norms=norms).cuts[0].rank_after
    assert kept == max(sum(value >= values[0] / 2 for value in values), 1)


def test_conv_rank_is_for_kernels() -> None:
    before = adapter(PAIRS["linear"], PAIRS["conv 1x1"], PAIRS["conv 3x3"], PAIRS["conv 1x3"])
    cuts = resize(before, parse_rule("rank", "4"), limits=Limits(conv_rank=2)).cuts
    assert [cut.rank_after for cut in cuts] == [4, 4, 2, 2]


def test_spectra_are_used_and_not_made_again() -> None:
    before = adapter(*PAIRS.values())
    spectra = decompose(before.modules)
    one = resize(before, parse_rule("rank", "2"), spectra=spectra)
    two = resize(before, parse_rule("rank", "2"))
    assert one.cuts == two.cuts
    with pytest.raises(ValueError):
        resize(before, parse_rule("rank", "2"), spectra=spectra[:-1])
