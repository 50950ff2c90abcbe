"""truncate: the best approximation there is, on the spectra that low-rank methods fail on."""

from __future__ import annotations

import pytest
import torch

from loratool.ops import truncate
from loratool.ops.truncate import leading, norm_of, singular_values, take_away

SPECTRA = {
    "noise": None,
    "slow": lambda i: i**-0.3,
    "fast": lambda i: i**-1.0,
    "rank 8": lambda i: (i <= 8).float() * 10 ** (-i / 8),
    "rank 60": lambda i: (i <= 60).float(),
    "constant": lambda i: (i <= 1).float(),
}


def noise_free(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """0.01 everywhere, as the difference of two float32 weights."""
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    return (weight + 0.01) - weight


def matrix(rows: int, columns: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if kind == "noise":
        return torch.randn(rows, columns, generator=generator)
    if kind == "constant":  # all rounding goes the same way, too
        return noise_free(rows, columns, generator)
    least = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, least, generator=generator)).Q for n in (rows, columns))
    spectrum = SPECTRA[kind]
    assert spectrum is not None
    return (left * spectrum(torch.arange(1, least + 1).float())) @ right.T


@pytest.mark.parametrize("shape", [(560, 560), (560, 1300), (1300, 560)])
@pytest.mark.parametrize("kind", SPECTRA)
def test_randomised_is_as_good_as_exact(kind: str, shape: tuple[int, int]) -> None:
    """Within 3e-4 of the smallest error possible, or within float32's rounding of nothing."""
    given = matrix(*shape, kind)
    total = norm_of(given)
    best = torch.linalg.svdvals(given.double())
    for count in (4, 24):
        found = leading(given, count)
        assert not found.exact
        assert found.left.shape == (shape[0], len(found.values)) and found.right.shape == (len(found.values), shape[1])
        error = take_away(given.clone(), found.left, found.right) / total
        optimum = float(best[count:].norm()) / total
        assert error <= optimum * (1 + 3e-4) + 2e-6, (kind, count)
        assert torch.allclose(found.values, best[: len(found.values)], rtol=2e-2, atol=1e-5 * float(best[0]))
    assert len(leading(given, 24).values) == {"rank 8": 8, "constant": 1}.get(kind, 24)


@pytest.mark.parametrize("kind", SPECTRA)
def test_exact_is_the_truncated_svd(kind: str) -> None:
    given = matrix(90, 140, kind)
    x, values, y = torch.linalg.svd(given.double(), full_matrices=False)
    for count in (1, 8, 90):
        found = leading(given, count)
        assert found.exact
        meant = (x[:, :count] * values[:count]) @ y[:count]
        made = found.left.double() @ found.right.double()
        assert float((made - meant).norm()) <= 1e-5 * float(meant.norm())
    assert singular_values(given) == pytest.approx(values.tolist(), rel=1e-6, abs=2e-6 * float(values[0]))
    assert singular_values(given.T) == pytest.approx(singular_values(given), rel=1e-9, abs=1e-9)


def test_factors_are_balanced() -> None:
    found = leading(matrix(560, 700, "fast"), 16)
    for side in (found.left.norm(dim=0), found.right.norm(dim=1)):
        assert torch.allclose(side.double() ** 2, found.values, rtol=1e-3)


def test_what_does_not_settle_is_found_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncate, "SETTLED", -1.0)
    monkeypatch.setattr(truncate, "NOISE", -1.0)
    assert leading(matrix(560, 560, "noise"), 8).exact


def test_it_is_the_same_every_time() -> None:
    given = matrix(560, 700, "noise")
    assert torch.equal(leading(given, 8).left, leading(given, 8).left)
