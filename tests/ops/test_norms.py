"""norms: of base weights, against torch.linalg, and their cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratool.ops import norms
from loratool.ops.norms import base_norms, spectral_norm
from tests.ops.test_weights import QKV, SD15, adapter, noise, save


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_norms_equal_torchs(tmp_path: Path) -> None:
    weight = noise(320, 320)
    one = adapter("sd15", "kohya", SD15[0])
    found = base_norms(save(tmp_path / "m.safetensors", {QKV: weight}), one)
    whole, peak = found[one.modules[0].targets]
    assert whole == pytest.approx(float(weight.double().norm()), rel=1e-6)
    assert peak == pytest.approx(float(torch.linalg.matrix_norm(weight.double(), 2)), rel=1e-3)


@pytest.mark.parametrize("shape", [(64, 64), (300, 40), (40, 300), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_spectral_norm(shape: tuple[int, int], size: float) -> None:
    for seed in range(3):
        matrix = noise(*shape, seed=seed, dtype=torch.float32) * size
        expected = float(torch.linalg.matrix_norm(matrix.double(), 2))
        assert spectral_norm(matrix) == pytest.approx(expected, rel=1e-3)
        assert spectral_norm(matrix) <= expected * (1 + 1e-5)


def test_spectral_norm_of_zero() -> None:
    assert spectral_norm(torch.zeros(4, 3)) == 0.0


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    real = norms._norms
    monkeypatch.setattr(norms, "_norms", lambda weights, module: (seen.append(module.title), real(weights, module))[1])
    return seen


def test_the_cache_spares_reading_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "m.safetensors", {QKV: noise(320, 320)})
    one = adapter("sd15", "kohya", SD15[0])
    seen = reads(monkeypatch)
    first = base_norms(path, one)
    assert len(seen) == 1
    assert base_norms(path, one) == first
    assert len(seen) == 1
    save(path, {QKV: noise(320, 320, seed=5) * 2})
    assert base_norms(path, one) != first
    assert len(seen) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"a": 1}', '{"unet.x": ["a", 1]}', "\x00", '{"KEY": ["nan", 1]}', '{"KEY": [-1, 1]}', "null"],
)
def test_a_corrupt_cache_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = save(tmp_path / "m.safetensors", {QKV: noise(320, 320)})
    one = adapter("sd15", "kohya", SD15[0])
    first = base_norms(path, one)
    (file,) = (tmp_path / "cache" / "loratool" / "norms").iterdir()
    file.write_text(text.replace("KEY", norms._key(one.modules[0])))
    assert base_norms(path, one) == first


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = save(tmp_path / "m.safetensors", {QKV: noise(320, 320)})
    assert base_norms(path, adapter("sd15", "kohya", SD15[0]))
