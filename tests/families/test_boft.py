"""BOFT: the family's contract, and its new weights against LyCORIS' and PEFT's own."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from peft.tuners.boft import layer as peft
from peft.tuners.boft.config import BOFTConfig

from loratool.core.family import Factors
from loratool.core.tensor import LazyTensor
from loratool.families.boft import FAMILY
from tests.contracts import assert_same, check_family
from tests.families.common import LAYERS, applied, constant, factors, module_of, shuffle, stored

NAMES = {"blocks": "oft_blocks", "constraint": "alpha", "rescale": "rescale"}
SAMPLES: dict[str, tuple[Factors, float | None]] = {
    "one stage": (factors(blocks=(1, 3, 4, 4)), None),
    "three stages": (factors(blocks=(3, 4, 6, 6)), None),
    "rescaled": (factors(blocks=(2, 4, 4, 4), rescale=(16, 1)), None),
    "constraint that holds": ({**factors(blocks=(2, 4, 4, 4)), "constraint": constant(0.01)}, None),
    "PEFT, one stage": (factors(R=(1, 3, 5, 5), s=(9, 1)), None),
    "PEFT, two stages": (factors(R=(2, 4, 4, 4), s=(9, 1)), None),
    "PEFT, of a convolution": (factors(R=(2, 4, 4, 4), s=(1, 9)), None),
}


def test_contract() -> None:
    check_family(FAMILY, SAMPLES, optional=("rescale", "constraint"))


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.5])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("constraint", [0, 1e-3])
@pytest.mark.parametrize("layer", ["wide linear", "conv 1x1", "conv 3x3", "conv 1d"])
def test_the_weight_equals_lycoris(layer: str, constraint: float, rescaled: bool, strength: float) -> None:
    base = LAYERS[layer]()
    trained = ButterflyOFTModule("x", base, lora_dim=6, constraint=constraint, rescaled=rescaled)
    shuffle(trained)
    roles = stored(trained, NAMES)
    assert len(roles["blocks"].shape) == 4 and roles["blocks"].shape[0] > 1
    module = module_of(FAMILY, roles, tuple(base.weight.shape))
    with torch.no_grad():
        expected = trained.get_merged_weight(multiplier=strength)[0]
        assert_same(applied(module, base.weight, strength), expected, layer, 1e-6)


@pytest.mark.parametrize("layer", ["linear", "wide linear", "conv 1x1", "conv 3x3"])
def test_the_weight_equals_peft(layer: str) -> None:
    base = LAYERS[layer]()
    weight = base.weight.detach().clone()
    kind = peft.Linear if "linear" in layer else peft.Conv2d
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, init_weights=False)
    trained = kind(base, "default", config=config)
    names = {"R": "boft_R.default", "s": "boft_s.default"}
    module = module_of(
        FAMILY,
        {role: LazyTensor.from_torch(one.load().clone()) for role, one in stored(trained, names).items()},
        tuple(weight.shape),
    )
    with torch.no_grad():
        trained.merge()
    assert_same(applied(module, weight, 1.0), base.weight.detach(), layer, 1e-6)


@pytest.mark.parametrize("stages", [2, 3])
def test_the_stages_equal_pefts_permutations(stages: int) -> None:
    """PEFT makes more than one stage on a GPU only; here its matrices, and its merge, are put together by hand."""
    count, size = 8, 4
    roles = factors(3, R=(stages, count, size, size), s=(5, 1))
    layer = peft.BOFTLayer.__new__(peft.Linear)
    raw = roles["R"].load()
    whole = torch.eye(count * size, dtype=torch.float64)
    for index in range(stages):
        order = layer.block_butterfly_perm(count * size, count // 2**index, size // 2, stages - 1)
        swap = layer.perm2mat(order).double()
        blocks = torch.block_diag(*layer.cayley_batch(raw[index].float()).double())
        whole = swap @ blocks @ swap.T @ whole
    weight = torch.randn(5, count * size, dtype=torch.float64)
    expected = (whole @ weight.T).T * roles["s"].load()
    loaded = {role: factor.load() for role, factor in roles.items()}
    assert_same(FAMILY.apply(loaded, 1.0, weight, 1.0), expected, "stages", 1e-6)


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({}, "no blocks"),
        ({"blocks": (1, 2, 3, 4)}, "square blocks"),
        ({"blocks": (3, 2, 4, 4)}, "3 stages cannot be made of 8 rows"),
        ({"R": (1, 2, 4, 4)}, "no s"),
        ({"blocks": (1, 2, 4, 4), "rescale": (9, 1)}, "rescale has shape"),
        ({"blocks": (1, 2, 4, 4), "R": (1, 2, 4, 4)}, "twice"),
    ],
)
def test_a_damaged_module_is_told_in_words(shapes: dict[str, tuple[int, ...]], found: str) -> None:
    assert found in (FAMILY.problem(shapes) or "")
