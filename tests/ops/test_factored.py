"""The update of a module as two matrices, or as one, is that of its family, and DoRA's is the formula."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loratool.core.errors import FormatError
from loratool.core.module import Module
from loratool.core.registry import architectures, families
from loratool.core.tensor import LazyTensor
from loratool.ops.factored import dense_update, pair_update
from loratool.ops.weights import BaseWeights
from tests.builders import Weight, weight
from tests.contracts import assert_same

NAME = "down_blocks.0.resnets.0.conv1"
LINEAR = weight("sd15", "kohya", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
CONV = weight("sd15", "kohya", NAME)
WORK = torch.float64
NOISE = torch.Generator().manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=NOISE, dtype=WORK) * 0.1


def module(one: Weight, factors: Mapping[str, Tensor], alpha: float | None, family: str = "lora") -> Module:
    return Module(
        one.targets, families()[family], {role: LazyTensor.from_torch(f) for role, f in factors.items()}, alpha
    )


SAMPLES: Mapping[str, tuple[Weight, Mapping[str, Tensor]]] = {
    "linear": (LINEAR, {"up": noise(320, 4), "down": noise(4, 320)}),
    "convolution": (CONV, {"up": noise(320, 4, 1, 1), "down": noise(4, 320, 3, 3)}),
    "Tucker": (CONV, {"up": noise(320, 4, 1, 1), "down": noise(4, 320, 1, 1), "mid": noise(4, 4, 3, 3)}),
    "embedding": (LINEAR, {"embedding_A": noise(4, 500), "embedding_B": noise(320, 4)}),
}
ALPHAS = (None, 4.0, 1.0, 0.0, -3.0, 1e-30, 1e20)
each_sample = pytest.mark.parametrize("name", SAMPLES)
each_alpha = pytest.mark.parametrize("alpha", ALPHAS)


@each_sample
@each_alpha
@pytest.mark.parametrize("unit", [1.0, 0.3, -2.0])
def test_a_pair_is_the_update(name: str, alpha: float | None, unit: float) -> None:
    one = module(*SAMPLES[name], alpha)
    meant = one.family.delta({role: f.load() for role, f in one.factors.items()}, one.scale).flatten(1)
    pair = pair_update(one, WORK, unit=unit)
    assert pair is not None
    left, right = pair
    assert left.shape == (one.shape[0], 4) and right.shape == (4, one.delta_width)
    assert left.dtype == right.dtype == WORK
    assert_same(left @ right * unit, meant, name)
    assert_same(dense_update(one, WORK), meant, name)


def test_factors_of_scale_1_are_as_they_are_stored() -> None:
    one = module(*SAMPLES["linear"], 4.0)
    pair = pair_update(one, WORK)
    assert pair is not None
    assert torch.equal(pair[0], one.factors["up"].load()) and torch.equal(pair[1], one.factors["down"].load())


def test_scales_are_shared_by_both_factors() -> None:
    plain, scaled = (pair_update(module(*SAMPLES["linear"], alpha), WORK) for alpha in (4.0, -16.0))
    assert plain is not None and scaled is not None
    assert_same(scaled[0], -2 * plain[0], "left")
    assert_same(scaled[1], 2 * plain[1], "right")


def test_what_is_no_pair() -> None:
    kron = module(LINEAR, {"w1": noise(4, 8), "w2_a": noise(80, 3), "w2_b": noise(3, 40)}, 6.0, "lokr")
    assert pair_update(kron, WORK) is None
    w1, w2 = kron.factors["w1"].load(), kron.factors["w2_a"].load() @ kron.factors["w2_b"].load()
    assert_same(dense_update(kron, WORK), torch.kron(w1, w2) * 2, "kron")
    dora = replace(module(*SAMPLES["linear"], 4.0), magnitude=LazyTensor.from_torch(torch.ones(320, 1)))
    assert pair_update(dora, WORK) is None
    with pytest.raises(ValueError, match="base"):
        dense_update(dora, WORK)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["up", "down", "mid"])
def test_values_that_are_no_numbers(value: float, role: str) -> None:
    place, factors = SAMPLES["Tucker"]
    bad = {name: factor.clone() for name, factor in factors.items()}
    bad[role].view(-1)[5] = value
    for update in (pair_update, dense_update):
        with pytest.raises(FormatError, match="NaN or infinite") as caught:
            update(module(place, bad, 1.0), torch.float32)
        assert caught.value.key == f"unet.{NAME}"


def test_large_finite_values_are_no_error() -> None:
    """Their sum is infinite in float32; they are not."""
    factors = {"up": torch.full((320, 4), 3e38, dtype=torch.float32), "down": torch.zeros(4, 320)}
    assert pair_update(module(LINEAR, factors, 4.0), torch.float32) is not None


def base(values: Tensor, one: Weight, path: str) -> BaseWeights:
    model = architectures()["sd15"]
    voice = next(c for c in model.checkpoints if c.id == "diffusers").voices["unet"]
    tensors = {f"{voice.prefix}{path}.weight": LazyTensor.from_torch(values)}
    return BaseWeights("base.safetensors", model, {"unet": tensors}, {"unet": voice})


@pytest.mark.parametrize("kind", ["LoRA", "LoKr", "convolution"])
@pytest.mark.parametrize("per_row", [True, False])
def test_dora(kind: str, per_row: bool) -> None:
    """m (W + delta) / ||W + delta|| - W, one norm per output row, or per input column (over rows and kernel)."""
    if kind == "LoKr":
        one = module(LINEAR, {"w1": noise(4, 8), "w2": noise(80, 40)}, None, "lokr")
    else:
        one = module(*SAMPLES["linear" if kind == "LoRA" else "convolution"], -3.0)
    kernel = one.shape[2:]
    weight = noise(*one.shape).float()
    ones = (1,) * len(kernel)
    magnitude = torch.rand((320, 1, *ones) if per_row else (1, 320, *ones), generator=NOISE, dtype=WORK) + 0.5
    one = replace(one, magnitude=LazyTensor.from_torch(magnitude))
    path = one.targets[0].path
    found = dense_update(one, WORK, base=base(weight, LINEAR, path))
    delta = one.family.delta({role: f.load() for role, f in one.factors.items()}, one.scale)
    whole = weight.double() + delta
    dims = [1, 2, 3][: len(whole.shape) - 1] if per_row else [0, *range(2, len(whole.shape))]
    meant = magnitude * whole / whole.square().sum(dims, keepdim=True).sqrt() - weight
    assert_same(found, meant.flatten(1), kind, 1e-6)
    norms = (weight + found.reshape(whole.shape)).square().sum(dims).sqrt()
    assert_same(norms.flatten(), magnitude.flatten(), "the norms are the magnitudes", 1e-6)
