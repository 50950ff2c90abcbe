"""Full differences and replaced weights: the families' contracts, and LyCORIS' own new weights."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.norms import NormModule
from torch import nn

from loratool.core.family import Factors, Part
from loratool.core.tensor import LazyTensor
from loratool.families import diff
from loratool.families import set as replaced
from tests.contracts import assert_same, check_family, dense
from tests.families.common import LAYERS, applied, factors, module_of, shuffle, stored

SAMPLES: dict[str, tuple[Factors, float | None]] = {
    "linear": (factors(diff=(12, 9)), None),
    "with a bias": (factors(diff=(12, 9), bias=(12,)), None),
    "conv 3x3": (factors(diff=(6, 5, 3, 3)), None),
    "norm": (factors(w_norm=(12,), bias=(12,)), None),
    "diff of a norm": (factors(diff=(12,)), None),
}


def test_contract() -> None:
    # Without its weight a module is one of a bias alone, which is whole; without anything else it is not.
    check_family(diff.FAMILY, SAMPLES, optional=("bias", "diff", "w_norm"))
    check_family(
        replaced.FAMILY, {"linear": (factors(weight=(12, 9)), None), "conv": (factors(weight=(6, 5, 3, 3)), None)}
    )


def test_a_bias_alone_changes_no_weight() -> None:
    alone = factors(bias=(7,))
    assert diff.FAMILY.problem({"bias": (7,)}) is None and diff.FAMILY.product(alone) is None
    assert not dense(diff.FAMILY, alone).any()
    assert torch.equal(diff.FAMILY.scaled(alone, 2.0)["bias"].load(), alone["bias"].load() * 2)
    stacked = diff.FAMILY.stacked([Part(7, alone), Part(7, alone)])
    assert stacked["bias"].shape == (14,)


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_weight_and_the_bias_equal_lycoris(layer: str, strength: float) -> None:
    base = LAYERS[layer]()
    trained = FullModule("x", base)
    shuffle(trained)
    roles = {"diff": trained.weight.detach(), "bias": trained.bias.detach()}
    module = module_of(
        diff.FAMILY, {role: LazyTensor.from_torch(one) for role, one in roles.items()}, tuple(base.weight.shape)
    )
    with torch.no_grad():
        weight, bias = trained.get_merged_weight(multiplier=strength)
        assert_same(applied(module, base.weight, strength), weight, layer, 1e-6)
        assert_same(base.bias + strength * module.factors["bias"].load() * module.scale, bias, "bias", 1e-6)


@pytest.mark.parametrize("norm", [nn.LayerNorm(12), nn.GroupNorm(3, 12)], ids=str)
def test_the_norm_equals_lycoris(norm: nn.Module) -> None:
    trained = NormModule("x", norm)
    shuffle(trained)
    roles = stored(trained, {"w_norm": "w_norm", "bias": "b_norm"})
    module = module_of(diff.FAMILY, roles, (12,))
    with torch.no_grad():
        weight, bias = trained.get_merged_weight(multiplier=0.6)
        assert_same(applied(module, norm.weight, 0.6), weight, "weight", 1e-6)
        assert_same(norm.bias + 0.6 * roles["bias"].load(), bias, "bias", 1e-6)


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({}, "no diff"),
        ({"diff": (4, 2), "w_norm": (4,)}, "a diff and a w_norm"),
        ({"diff": (4, 2), "bias": (3,)}, "bias has shape"),
        ({"diff": ()}, "expected that of a weight"),
    ],
)
def test_a_damaged_module_is_told_in_words(shapes: dict[str, tuple[int, ...]], found: str) -> None:
    assert found in (diff.FAMILY.problem(shapes) or "")
