"""updates: what is added block by block is the dense update, cut wherever; DoRA is its formula, written plainly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratool.core.errors import FormatError
from loratool.core.module import Module
from loratool.core.registry import families
from loratool.core.target import Target
from loratool.core.tensor import LazyTensor
from loratool.files.safetensors import read_header
from loratool.ops.sites import Fixed, Part
from loratool.ops.updates import adder, check_parts, update_of
from loratool.ops.weights import Span
from tests.bakes import noise, save

F64 = torch.float64
CUTS = pytest.mark.parametrize("cuts", [(), (1,), (5, 6, 7), (13, 26), tuple(range(1, 30))], ids=str)


def wide(*shape: int, seed: int = 0) -> Tensor:
    return noise(*shape, seed=seed, dtype=F64)


def module(family: str, alpha: float | None = None, magnitude: Tensor | None = None, **factors: Tensor) -> Module:
    lazy = {role: LazyTensor.from_torch(factor.contiguous()) for role, factor in factors.items()}
    shape = families()[family].shape({role: factor.shape for role, factor in lazy.items()})
    stored = None if magnitude is None else LazyTensor.from_torch(magnitude.contiguous())
    return Module((Target("unet", "layer", shape),), families()[family], lazy, alpha, stored)


def whole(of: Module, strength: float = 1.0, transposed: bool = False, first: int = 0) -> Part:
    """All rows of a module, from row (column) `first` of the tensor "w" on; the base's tensors are not needed."""
    return Part(of, strength, Span("w", first, 0, of.shape[0], transposed, 0), ())


def added(part: Part | Fixed, base: Tensor, cuts: Sequence[int] = (), norm: str = "paper") -> Tensor:
    """What is added to a stored tensor in blocks that end at `cuts`, float64, in its shape."""
    rows = base.to(F64).reshape(len(base), -1)
    total = rows.clone()
    one = adder(part, "cpu", norm, F64)
    edges = [0, *(cut for cut in cuts if cut < len(rows)), len(rows)]
    for start, stop in pairwise(edges):
        one.add(total[start:stop], rows[start:stop], start)
    return (total - rows).reshape(base.shape)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == expected.shape
    error = float((found.double() - expected.double()).norm())
    assert error <= tolerance * float(expected.double().norm()) and float(expected.norm()) > 0, error


# -- sums -------------------------------------------------------------------------------------------------------------

UP, DOWN = wide(30, 4), wide(4, 12, seed=1)
W1, W2 = wide(5, 3), wide(6, 4, seed=1)


@CUTS
def test_a_linear_pair(cuts: tuple[int, ...]) -> None:
    found = added(whole(module("lora", 2.0, up=UP, down=DOWN), 0.7), torch.zeros(30, 12), cuts)
    assert_close(found, 0.7 * 2 / 4 * UP @ DOWN)


@CUTS
def test_a_convolution(cuts: tuple[int, ...]) -> None:
    up, down = wide(30, 4, 1, 1), wide(4, 5, 3, 3, seed=1)
    found = added(whole(module("lora", 8.0, up=up, down=down), -1.0), torch.zeros(30, 5, 3, 3), cuts)
    assert_close(found, -2 * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down))


@CUTS
def test_a_tucker_core(cuts: tuple[int, ...]) -> None:
    up, mid, down = wide(30, 4, 1, 1), wide(4, 4, 3, 3, seed=1), wide(4, 5, 1, 1, seed=2)
    found = added(whole(module("lora", up=up, mid=mid, down=down)), torch.zeros(30, 5, 3, 3), cuts)
    assert_close(found, torch.einsum("op,pqkl,qi->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0]))


@CUTS
def test_an_embedding(cuts: tuple[int, ...]) -> None:
    a, b = wide(4, 30), wide(12, 4, seed=1)
    found = added(whole(module("lora", 2.0, embedding_A=a, embedding_B=b), 3.0), torch.zeros(30, 12), cuts)
    assert_close(found, 1.5 * (b @ a).T)


@pytest.mark.parametrize("factored", ["neither", "w1", "w2", "both"])
@CUTS
def test_a_kronecker_product_cut_anywhere(cuts: tuple[int, ...], factored: str) -> None:
    """Blocks have 6 rows: most cuts are inside one."""
    a, b, c, d = wide(5, 2), wide(2, 3, seed=1), wide(6, 2, seed=2), wide(2, 4, seed=3)
    left = {"w1_a": a, "w1_b": b} if factored in ("w1", "both") else {"w1": a @ b}
    right = {"w2_a": c, "w2_b": d} if factored in ("w2", "both") else {"w2": c @ d}
    alpha = None if factored == "neither" else 3.0
    found = added(whole(module("lokr", alpha, **left, **right), 0.7), torch.zeros(30, 12), cuts)
    assert_close(found, 0.7 * torch.kron(a @ b, c @ d) * (1.0 if alpha is None else 3 / 2))


@CUTS
def test_a_kronecker_product_of_a_convolution(cuts: tuple[int, ...]) -> None:
    w2 = wide(6, 4, 3, 3, seed=1)
    found = added(whole(module("lokr", w1=W1, w2=w2)), torch.zeros(30, 12, 3, 3), cuts)
    assert_close(found, torch.einsum("ab,cdkl->acbdkl", W1, w2).reshape(30, 12, 3, 3))


@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize(("start", "stop", "first"), [(0, 30, 0), (0, 10, 7), (7, 20, 0), (11, 30, 26)])
@CUTS
def test_some_rows_of_an_update_on_some_rows_of_a_tensor(
    kind: str, start: int, stop: int, first: int, cuts: tuple[int, ...]
) -> None:
    """And no other row changes by a single bit."""
    of = module("lora", up=UP, down=DOWN) if kind == "lora" else module("lokr", w1=W1, w2=W2)
    update = UP @ DOWN if kind == "lora" else torch.kron(W1, W2)
    base = wide(50, 12, seed=7)
    found = added(Part(of, 0.7, Span("w", first, start, stop, False, 0), ()), base, cuts)
    last = first + stop - start
    assert_close(found[first:last], 0.7 * update[start:stop])
    assert not found[:first].any() and not found[last:].any()


@pytest.mark.parametrize("kind", ["lora", "lokr", "embedding"])
@pytest.mark.parametrize(("start", "stop", "first"), [(0, 30, 0), (0, 10, 7), (11, 30, 26)])
@CUTS
def test_a_tensor_that_is_stored_transposed(
    kind: str, start: int, stop: int, first: int, cuts: tuple[int, ...]
) -> None:
    of, update = {
        "lora": (module("lora", up=UP, down=DOWN), UP @ DOWN),
        "lokr": (module("lokr", w1=W1, w2=W2), torch.kron(W1, W2)),
        "embedding": (module("lora", embedding_A=UP.T, embedding_B=DOWN.T), UP @ DOWN),
    }[kind]
    found = added(Part(of, 0.7, Span("w", first, start, stop, True, 0), ()), wide(12, 50, seed=7), cuts)
    last = first + stop - start
    assert_close(found[:, first:last], 0.7 * update[start:stop].T)
    assert not found[:, :first].any() and not found[:, last:].any()


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_the_update_in_float32_is_the_familys_to_the_last_bit(alpha: float | None) -> None:
    of = module("lora", alpha, up=noise(30, 4), down=noise(4, 12, seed=1))
    made = update_of(of, "cpu")
    assert torch.equal(made.rows(0, 30), of.delta())
    assert torch.equal(made.columns(0, 12), of.delta())


LORA = {"up": UP, "down": DOWN, "magnitude": wide(30, 1).abs()}
LOKR = {"w1": W1, "w2": W2}
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


@pytest.mark.parametrize(
    ("family", "role"), [("lora", "up"), ("lora", "down"), ("lora", "magnitude"), ("lokr", "w1"), ("lokr", "w2")]
)
@BAD
def test_nan_and_infinity_reach_the_result_and_are_named(family: str, role: str, bad: float) -> None:
    """Factors are looked at only when a result is not finite, so one bad value must always spoil some of it."""
    tensors = {name: tensor.clone() for name, tensor in (LORA if family == "lora" else LOKR).items()}
    check_parts([whole(module(family, None, **tensors))])
    tensors[role].view(-1)[3] = bad
    part = replace(whole(module(family, None, **tensors)), adapter="lora.safetensors")
    assert not bool(added(part, wide(30, 12, seed=7), (13,)).isfinite().all())
    with pytest.raises(FormatError, match="NaN or infinite") as caught:
        check_parts([whole(module("lora", up=UP, down=DOWN)), part])
    assert (caught.value.file, caught.value.key) == ("lora.safetensors", "unet.layer")


@BAD
def test_a_bad_bias_is_named(bad: float) -> None:
    part = Fixed(LazyTensor.from_torch(torch.tensor([1.0, bad])), 0, 1.0, 0, 2, False, "the bias", "lora.safetensors")
    with pytest.raises(FormatError, match="NaN or infinite") as caught:
        check_parts([part])
    assert (caught.value.file, caught.value.key) == ("lora.safetensors", "the bias")


def test_large_but_finite_values_are_no_mistake_of_the_file() -> None:
    """In float32 their sum would be infinite."""
    check_parts([whole(module("lora", up=torch.full((30, 4), 3e38), down=torch.full((4, 12), 3e38)))])


# -- biases and whole tensors -----------------------------------------------------------------------------------------


@CUTS
def test_a_bias(cuts: tuple[int, ...]) -> None:
    values, base = wide(30), wide(50, seed=7)
    found = added(Fixed(LazyTensor.from_torch(values), 4, 0.7, 20, 40, False, "b"), base, cuts)
    assert_close(found[20:40], 0.7 * values[4:24])
    assert not found[:20].any() and not found[40:].any()


@pytest.mark.parametrize("strength", [1.0, 0.25, -1.0])
@pytest.mark.parametrize("shape", [(30,), (30, 4), (30, 4, 3, 3)], ids=str)
@CUTS
def test_a_tensor_that_replaces_the_base(strength: float, shape: tuple[int, ...], cuts: tuple[int, ...]) -> None:
    values, base = wide(*shape), wide(*shape, seed=7)
    found = added(Fixed(LazyTensor.from_torch(values), 0, strength, 0, 30, True, "w"), base, cuts)
    assert_close(base + found, base + strength * (values - base))


def test_a_replacement_is_exact() -> None:
    """Not base + (values - base), which rounds."""
    values, base = noise(30, 4), noise(30, 4, seed=7, size=1e4)
    total = base.clone()
    part = Fixed(LazyTensor.from_torch(values), 0, 1.0, 0, 30, True, "w")
    adder(part, "cpu", "paper").add(total, base, 0)
    assert torch.equal(total, values)


def test_a_scalar_is_replaced() -> None:
    part = Fixed(LazyTensor.from_torch(torch.tensor(3.0)), 0, 1.0, 0, 1, True, "scalar")
    total = torch.tensor([[1.0]])
    adder(part, "cpu", "paper").add(total, total.clone(), 0)
    assert total.tolist() == [[3.0]]


# -- DoRA -------------------------------------------------------------------------------------------------------------


def dora(weight: Tensor, update: Tensor, magnitude: Tensor, per_row: bool, norm: str) -> Tensor:
    """The new weight, (out, in) or (out, in, kh, kw): m (W + delta) / norm."""
    out, width = weight.shape[:2]
    changed = weight + update
    if per_row and norm == "comfyui":
        norms = weight.reshape(out, -1).norm(dim=1) + 2.0**-23
    elif per_row:
        norms = changed.reshape(out, -1).norm(dim=1)
    else:
        norms = changed.transpose(0, 1).reshape(width, -1).norm(dim=1)
    ones = (1,) * (weight.dim() - 2)
    shape = (out, 1, *ones) if per_row else (1, width, *ones)
    gain: Tensor = magnitude.reshape(shape) / norms.reshape(shape)
    return changed * gain


def stored(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    return read_header(save(folder / "base.safetensors", tensors)).tensors


def magnitude_for(weight: Tensor, per_row: bool) -> Tensor:
    """As trained: near the norms, of the canonical shape."""
    ones = (1,) * (weight.dim() - 2)
    count = weight.shape[0 if per_row else 1]
    return (wide(count, seed=5) * 0.3 + 3).abs().reshape((count, 1, *ones) if per_row else (1, count, *ones))


each_norm = pytest.mark.parametrize("norm", ["paper", "comfyui"])
each_axis = pytest.mark.parametrize("per_row", [True, False], ids=["rows", "columns"])


@each_norm
@each_axis
@pytest.mark.parametrize("strength", [1.0, 0.6, -1.0, 0.0])
@CUTS
def test_dora_on_a_linear(tmp_path: Path, norm: str, per_row: bool, strength: float, cuts: tuple[int, ...]) -> None:
    """At a strength in between, the weight is interpolated: W + s (W' - W)."""
    weight = wide(30, 12, seed=7)
    magnitude = magnitude_for(weight, per_row)
    of = module("lora", 2.0, magnitude, up=UP, down=DOWN)
    span = Span("w", 0, 0, 30, False, 0)
    part = Part(of, strength, span, ((span, stored(tmp_path, {"w": weight})["w"], None),))
    found = weight + added(part, weight, cuts, norm)
    changed = dora(weight, UP @ DOWN / 2, magnitude, per_row, norm)
    assert_close(found, weight + strength * (changed - weight))


@each_norm
@each_axis
@CUTS
def test_dora_on_a_convolution(tmp_path: Path, norm: str, per_row: bool, cuts: tuple[int, ...]) -> None:
    up, down, weight = wide(30, 4, 1, 1), wide(4, 5, 3, 3, seed=1), wide(30, 5, 3, 3, seed=7)
    magnitude = magnitude_for(weight, per_row)
    span = Span("w", 0, 0, 30, False, 0)
    places = ((span, stored(tmp_path, {"w": weight})["w"], None),)
    part = Part(module("lora", 4.0, magnitude, up=up, down=down), 0.6, span, places)
    update = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    changed = dora(weight, update, magnitude, per_row, norm)
    assert_close(weight + added(part, weight, cuts, norm), weight + 0.6 * (changed - weight))


@each_norm
@each_axis
@CUTS
def test_dora_on_a_kronecker_product(tmp_path: Path, norm: str, per_row: bool, cuts: tuple[int, ...]) -> None:
    weight = wide(30, 12, seed=7)
    magnitude = magnitude_for(weight, per_row)
    span = Span("w", 0, 0, 30, False, 0)
    places = ((span, stored(tmp_path, {"w": weight})["w"], None),)
    part = Part(module("lokr", None, magnitude, w1=W1, w2=W2), 1.0, span, places)
    found = weight + added(part, weight, cuts, norm)
    assert_close(found, dora(weight, torch.kron(W1, W2), magnitude, per_row, norm))


@each_norm
@each_axis
@pytest.mark.parametrize("first", [0, 9])
@CUTS
def test_dora_on_a_transposed_weight(
    tmp_path: Path, norm: str, per_row: bool, first: int, cuts: tuple[int, ...]
) -> None:
    """OpenCLIP's text_projection; also where the tensor holds other columns."""
    held = wide(12, 50, seed=7)
    weight = held[:, first : first + 30].T
    magnitude = magnitude_for(weight, per_row)
    span = Span("w", first, 0, 30, True, 0)
    places = ((span, stored(tmp_path, {"w": held})["w"], None),)
    part = Part(module("lora", 4.0, magnitude, up=UP, down=DOWN), 0.6, span, places)
    found = added(part, held, cuts, norm)
    changed = dora(weight, UP @ DOWN, magnitude, per_row, norm)
    assert_close(found[:, first : first + 30], 0.6 * (changed - weight).T)
    assert not found[:, :first].any() and not found[:, first + 30 :].any()


@each_norm
@each_axis
@CUTS
def test_dora_on_rows_of_a_fused_weight(tmp_path: Path, norm: str, per_row: bool, cuts: tuple[int, ...]) -> None:
    """Columns are measured over the module's rows alone."""
    held = wide(50, 12, seed=7)
    magnitude = magnitude_for(held[9:39], per_row)
    span = Span("w", 9, 0, 30, False, 0)
    places = ((span, stored(tmp_path, {"w": held})["w"], None),)
    part = Part(module("lora", 4.0, magnitude, up=UP, down=DOWN), 1.0, span, places)
    found = added(part, held, cuts, norm)
    assert_close(held[9:39] + found[9:39], dora(held[9:39], UP @ DOWN, magnitude, per_row, norm))
    assert not found[:9].any() and not found[39:].any()


@each_norm
@each_axis
@CUTS
def test_dora_across_split_weights(tmp_path: Path, norm: str, per_row: bool, cuts: tuple[int, ...]) -> None:
    """Columns are measured over all tensors of a fused module, also where one of them has another strength."""
    weight = wide(30, 12, seed=7)
    magnitude = magnitude_for(weight, per_row)
    of = module("lora", 4.0, magnitude, up=UP, down=DOWN)
    held = stored(tmp_path, {name: weight[at : at + 10] for name, at in (("q", 0), ("k", 10), ("v", 20))})
    spans = [Span(name, 0, at, at + 10, False, i) for i, (name, at) in enumerate((("q", 0), ("k", 10), ("v", 20)))]
    places = tuple((span, held[span.key], None) for span in spans)
    changed = dora(weight, UP @ DOWN, magnitude, per_row, norm)
    for span, strength in zip(spans, (1.0, 0.5, -1.0)):
        rows = weight[span.start : span.stop]
        found = added(Part(of, strength, span, places), rows, cuts, norm)
        assert_close(found, strength * (changed[span.start : span.stop] - rows))


@each_axis
@pytest.mark.parametrize("scales", [1, 30])
def test_dora_measures_what_a_scaled_weight_means(tmp_path: Path, per_row: bool, scales: int) -> None:
    codes = (wide(30, 12, seed=7) * 100).to(torch.float8_e4m3fn)
    scale = torch.linspace(0.01, 0.03, scales)
    weight = codes.double() * scale.double().reshape(-1, 1)
    held = stored(tmp_path, {"w": codes, "s": scale})
    magnitude = magnitude_for(weight, per_row)
    span = Span("w", 0, 0, 30, False, 0)
    part = Part(module("lora", 4.0, magnitude, up=UP, down=DOWN), 1.0, span, ((span, held["w"], held["s"]),))
    assert_close(weight + added(part, weight, (13,)), dora(weight, UP @ DOWN, magnitude, per_row, "paper"), 1e-7)


def test_norms_are_summed_over_all_blocks_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.ops.stored.BLOCK", 7 * 12 * 8)
    weight = wide(30, 12, seed=7)
    held = stored(tmp_path, {"w": weight})["w"]
    magnitude = magnitude_for(weight, False)
    span = Span("w", 0, 0, 30, False, 0)
    part = Part(module("lora", 4.0, magnitude, up=UP, down=DOWN), 1.0, span, ((span, held, None),))
    assert_close(weight + added(part, weight, (5,)), dora(weight, UP @ DOWN, magnitude, False, "paper"))


def test_comfyui_gives_rows_of_zeros_and_not_nan(tmp_path: Path) -> None:
    weight = wide(30, 12, seed=7)
    weight[3] = 0
    magnitude = magnitude_for(weight, True)
    part = whole(module("lora", 4.0, magnitude, up=UP, down=DOWN))
    found = weight + added(part, weight, (), "comfyui")
    assert_close(found, dora(weight, UP @ DOWN, magnitude, True, "comfyui"))
    assert bool(found.isfinite().all())
