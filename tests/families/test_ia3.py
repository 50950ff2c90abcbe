"""(IA)^3: the family's contract, and its new weights against LyCORIS' and PEFT's own."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.ia3 import IA3Module
from peft.tuners.ia3 import layer as peft
from peft.tuners.ia3.config import IA3Config

from loratool.core.family import Factors
from loratool.core.tensor import LazyTensor
from loratool.families.ia3 import FAMILY
from tests.contracts import assert_same, check_family
from tests.families.common import LAYERS, applied, factors, module_of, shuffle

SAMPLES: dict[str, tuple[Factors, float | None]] = {
    "rows": (factors(output=(12,)), None),
    "rows of a convolution": (factors(output=(1, 12, 1, 1)), None),
    "columns": (factors(input=(9,)), None),
    "columns of a convolution": (factors(input=(1, 9, 1, 1)), None),
    "PEFT, rows": (factors(output_l=(12, 1)), None),
    "PEFT, columns": (factors(input_l=(1, 9)), None),
}


def test_contract() -> None:
    check_family(FAMILY, SAMPLES)


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.5])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_weight_equals_lycoris(layer: str, on_input: bool, strength: float) -> None:
    base = LAYERS[layer]()
    trained = IA3Module("x", base, train_on_input=on_input)
    shuffle(trained)
    state = trained.state_dict()
    assert bool(state["on_input"].item()) is on_input
    role = "input" if on_input else "output"
    module = module_of(FAMILY, {role: LazyTensor.from_torch(state["weight"])}, tuple(base.weight.shape))
    with torch.no_grad():
        expected = trained.get_merged_weight(multiplier=strength)[0]
        assert_same(applied(module, base.weight, strength), expected, layer, 1e-6)


@pytest.mark.parametrize("feed_forward", [False, True])
@pytest.mark.parametrize("layer", ["linear", "conv 1x1", "conv 3x3"])
def test_the_weight_and_the_bias_equal_peft(layer: str, feed_forward: bool) -> None:
    base = LAYERS[layer]()
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    kind = peft.Linear if layer == "linear" else peft.Conv2d
    trained = kind(base, "default", config=IA3Config(init_ia3_weights=False), is_feedforward=feed_forward)
    vector = trained.ia3_l["default"].detach()
    role = "input_l" if feed_forward else "output_l"
    module = module_of(FAMILY, {role: LazyTensor.from_torch(vector.clone())}, tuple(weight.shape))
    with torch.no_grad():
        trained.merge()
    assert_same(applied(module, weight, 1.0), base.weight.detach(), layer, 1e-6)
    of_bias = FAMILY.on_bias(module.factors)
    assert (of_bias is None) is feed_forward
    if of_bias is None:
        assert torch.equal(base.bias, bias)
    else:
        on_bias = applied(module_of(FAMILY, of_bias, (len(bias), 1)), bias.reshape(-1, 1), 1.0)
        assert_same(on_bias.flatten(), base.bias.detach(), "bias", 1e-6)


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({}, "no vector"),
        ({"on_input": ()}, "no vector"),
        ({"output": (4,), "input": (4,)}, "two vectors"),
        ({"output": (4, 2)}, "expected a vector"),
        ({"output": (0,)}, "expected a vector"),
    ],
)
def test_a_damaged_module_is_told_in_words(shapes: dict[str, tuple[int, ...]], found: str) -> None:
    assert found in (FAMILY.problem(shapes) or "")
