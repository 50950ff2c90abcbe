"""OFT: the family's contract, and its new weights against LyCORIS' and PEFT's own."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.diag_oft import DiagOFTModule
from peft.tuners.oft import layer as peft
from peft.tuners.oft.config import OFTConfig

from loratool.core.family import Factors
from loratool.core.tensor import LazyTensor
from loratool.families.oft import FAMILY
from tests.contracts import assert_same, check_family
from tests.families.common import LAYERS, applied, constant, factors, module_of, shuffle, stored

NAMES = {"blocks": "oft_blocks", "constraint": "alpha", "rescale": "rescale"}
SAMPLES: dict[str, tuple[Factors, float | None]] = {
    "rows": (factors(blocks=(3, 4, 4)), None),
    "one block": (factors(blocks=(1, 5, 5)), None),
    "rescaled": (factors(blocks=(3, 4, 4), rescale=(12, 1)), None),
    "rescaled convolution": (factors(blocks=(3, 4, 4), rescale=(12, 1, 1, 1)), None),
    "constraint of 0": ({**factors(blocks=(3, 4, 4)), "constraint": constant(0.0)}, None),
    "constraint that holds": ({**factors(blocks=(3, 4, 4), rescale=(12, 1)), "constraint": constant(0.01)}, None),
    "constraint that does not": ({**factors(blocks=(3, 4, 4)), "constraint": constant(100.0)}, None),
    "R itself": (factors(diag=(3, 4, 4)), None),
    "PEFT": (factors(R=(3, 15)), None),
    "PEFT, shared": (factors(R=(1, 15)), None),
    "PEFT, series": ({**factors(R=(3, 15)), "terms": constant(5)}, None),
    "PEFT, constrained": ({**factors(R=(3, 15)), "terms": constant(5), "eps": constant(0.01)}, None),
}


def test_contract() -> None:
    check_family(FAMILY, SAMPLES, optional=("rescale", "constraint", "terms", "eps"))


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.5])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("constraint", [0, 1e-3, 10.0])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_weight_equals_lycoris(layer: str, constraint: float, rescaled: bool, strength: float) -> None:
    base = LAYERS[layer]()
    trained = DiagOFTModule("x", base, lora_dim=4, constraint=constraint, rescaled=rescaled)
    shuffle(trained)
    roles = stored(trained, NAMES)
    assert ("rescale" in roles) is rescaled
    module = module_of(FAMILY, roles, tuple(base.weight.shape))
    with torch.no_grad():
        expected = trained.get_merged_weight(multiplier=strength)[0]
        assert_same(applied(module, base.weight, strength), expected, layer, 1e-6)
    norm = float(roles["blocks"].load().norm())
    assert norm > 1e-3 * len(base.weight), "the constraint is at work"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("how", ["exact", "series 5", "series 3", "series 2", "series 8", "coft"])
@pytest.mark.parametrize("layer", ["linear", "wide linear", "conv 1x1", "conv 3x3"])
def test_the_weight_equals_peft(layer: str, how: str, shared: bool) -> None:
    base = LAYERS[layer]()
    weight = base.weight.detach().clone()
    terms = int(how.split()[1]) if how.startswith("series") else 5 if how == "coft" else 0
    config = OFTConfig(
        r=0,
        oft_block_size=6 if layer != "wide linear" else 8,
        coft=how == "coft",
        eps=0.02,
        block_share=shared,
        use_cayley_neumann=terms > 0,
        num_cayley_neumann_terms=terms or 5,
        init_weights=False,
    )
    kind = peft.Linear if "linear" in layer else peft.Conv2d
    trained = kind(base, "default", r=0, config=config)
    with torch.no_grad():
        trained.oft_R["default"].weight.normal_(std=0.1)
    roles = {"R": LazyTensor.from_torch(trained.oft_R["default"].weight.detach().clone())}
    if terms:
        roles["terms"] = LazyTensor.scalar(terms, "F32")
    if how == "coft":
        roles["eps"] = LazyTensor.scalar(0.02, "F32")
    assert (roles["R"].shape[0] == 1) is shared
    module = module_of(FAMILY, roles, tuple(weight.shape))
    with torch.no_grad():
        trained.merge()
    assert_same(applied(module, weight, 1.0), base.weight.detach(), how, 1e-6)
    assert not torch.equal(base.weight, weight)


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({}, "no blocks"),
        ({"rescale": (4, 1)}, "no blocks"),
        ({"blocks": (2, 3, 4)}, "square blocks"),
        ({"blocks": (2, 3, 3), "diag": (2, 3, 3)}, "twice"),
        ({"blocks": (2, 3, 3), "rescale": (5, 1)}, "rescale has shape"),
        ({"blocks": (2, 3, 3), "constraint": (2,)}, "constraint has shape"),
        ({"R": (2, 5)}, "upper triangles"),
    ],
)
def test_a_damaged_module_is_told_in_words(shapes: dict[str, tuple[int, ...]], found: str) -> None:
    assert found in (FAMILY.problem(shapes) or "")
