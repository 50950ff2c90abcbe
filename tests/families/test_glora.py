"""GLoRA: the family's contract, and its new weights against LyCORIS' own."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.glora import GLoRAModule

from loratool.core.family import Factors
from loratool.families.glora import FAMILY
from tests.contracts import assert_same, check_family
from tests.families.common import LAYERS, applied, factors, module_of, shuffle, stored

NAMES = {role: f"{role}.weight" for role in ("a1", "a2", "b1", "b2", "bm")}
SAMPLES: dict[str, tuple[Factors, float | None]] = {
    "linear": (factors(a1=(9, 2), a2=(2, 9), b1=(12, 2), b2=(2, 9)), 1.0),
    "conv 3x3": (factors(a1=(5, 2, 1, 1), a2=(2, 5, 1, 1), b1=(6, 2, 1, 1), b2=(2, 5, 3, 3)), None),
    "Tucker": (factors(a1=(5, 2, 1, 1), a2=(2, 5, 1, 1), b1=(6, 2, 1, 1), b2=(2, 5, 1, 1), bm=(2, 2, 3, 3)), 4.0),
    "of 2023": (factors(a1=(2, 9), a2=(9, 2), b1=(2, 9), b2=(12, 2)), 1.0),
}


def test_contract() -> None:
    check_family(FAMILY, SAMPLES, optional=("bm",))


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("options", [{}, {"use_scalar": True}], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_weight_equals_lycoris(layer: str, options: dict[str, bool], strength: float) -> None:
    base = LAYERS[layer]()
    trained = GLoRAModule("x", base, lora_dim=3, alpha=2.0, **options)
    shuffle(trained)
    state = trained.state_dict()
    module = module_of(FAMILY, stored(trained, NAMES), tuple(base.weight.shape), state["alpha"].item())
    assert module.shape == tuple(base.weight.shape) and module.rank == 3
    with torch.no_grad():
        expected = trained.get_merged_weight(multiplier=strength)[0]
        assert_same(applied(module, base.weight, strength), expected, layer, 1e-6)


def test_the_old_order_is_the_same_update_the_other_way_round() -> None:
    new = SAMPLES["linear"][0]
    old = {"a1": new["a2"], "a2": new["a1"], "b1": new["b2"], "b2": new["b1"]}
    weight = torch.randn(12, 9)
    assert torch.equal(
        applied(module_of(FAMILY, new, (12, 9)), weight, 1.0), applied(module_of(FAMILY, old, (12, 9)), weight, 1.0)
    )


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({"a1": (9, 2), "a2": (2, 9), "b1": (12, 2)}, "no b2"),
        ({"a1": (9, 2), "a2": (2, 9), "b1": (12, 2), "b2": (3, 9)}, "do not fit"),
        ({"a1": (9, 2), "a2": (2, 9), "b1": (12, 2), "b2": (2, 8)}, "do not fit"),
        ({"a1": (9,), "a2": (2, 9), "b1": (12, 2), "b2": (2, 8)}, "expected a matrix"),
    ],
)
def test_a_damaged_module_is_told_in_words(shapes: dict[str, tuple[int, ...]], found: str) -> None:
    assert found in (FAMILY.problem(shapes) or "")
